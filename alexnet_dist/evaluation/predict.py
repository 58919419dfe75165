"""Image files as a trained network sees them, and what it predicts for one.

Files are read as `prepare` reads them and cut as evaluation cuts them, so that the prediction for a
file of a data set is that for its packed sample.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import started_ahead
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.missing import IMAGE_SUFFIXES
from alexnet_dist.data.prepare.convert import ConvertOptions, RefusedImage, convert, options_of
from alexnet_dist.data.preprocess import Preprocess, on_canvas, rgb_last
from alexnet_dist.data.sampler import views
from alexnet_dist.errors import DatasetError, cannot_be_read, filled_by, one_line
from alexnet_dist.files import MOST_ENCODED, read_bytes
from alexnet_dist.network.precision import parameter_dtype
from alexnet_dist.parallel.workers import worker_pool

WORTH_A_PROCESS = 500  # images per process that are worth starting it for
_AHEAD = 16  # images read ahead by each process
Canvas = npt.NDArray[np.uint8]  # (side, side, 3)


@dataclass(frozen=True)
class Prediction:
    """A network's prediction for an image file.

    Attributes:
        classes: class names.
        probabilities: (classes,), softmax outputs averaged over views (paper §4.1), on the CPU;
            None where the image was refused.
        refused: why the file could not be read; empty if it was.
    """

    path: Path
    classes: tuple[str, ...]
    probabilities: Tensor | None
    refused: str = ""

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the names and probabilities of the `count` most probable classes, the most
        probable first; an empty list where the image was refused."""
        if self.probabilities is None:
            return []
        best = self.probabilities.sort(descending=True, stable=True)
        shares, places = best.values[:count].tolist(), best.indices[:count].tolist()
        return [(self.classes[place], share) for place, share in zip(places, shares, strict=True)]


def windows_of(config: Config, preprocess: Preprocess, canvases: Tensor) -> Tensor:
    """Return the test windows of canvases (n, side, side, 3): (n · views, 3, crop, crop)."""
    corners, flips = (torch.from_numpy(part).to(canvases.device) for part in views(config))
    n, v, side = len(canvases), len(flips), config.model.crop
    if v == 1:  # as in a pipeline, the patch is then the window alone
        top, left = corners[0].tolist()
        canvases = canvases[:, top : top + side, left : left + side].contiguous()
    unlit = torch.zeros(n, 3, device=canvases.device)
    return preprocess(canvases, corners.expand(n, v, 2).contiguous(), flips.repeat(n, 1), unlit)


def canvas_of(path: Path, options: ConvertOptions, side: int) -> Canvas:
    """Read an image file, as `prepare` reads it, onto a canvas; raise RefusedImage."""
    try:
        if not path.is_file():
            why = "a folder, device or pipe" if path.exists() else "there is no such file"
            raise RefusedImage(why)
        content = read_bytes(path, MOST_ENCODED)
    except OSError as error:
        raise RefusedImage(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RefusedImage(f"{error}") from error
    with filled_by(str(path)):
        image = on_canvas(convert(content, *options).image, side)
    canvas: Canvas = rgb_last(image).contiguous().numpy()
    return canvas


def images_in(names: Sequence[Path]) -> tuple[list[Path], int]:
    """Return the files that are named, and below folders all files that end as images do; and how
    many other files, or links to folders, these hold. Hidden ones are left out of both.

    Raises DatasetError where a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DatasetError(cannot_be_read(Path(error.filename), error)) from error

    found: list[Path] = []
    others = 0
    for name in names:
        if not os.path.isdir(name):  # is_dir() raises for some names
            found.append(name)
            continue
        for root, folders, files in os.walk(name, onerror=fail):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            shown = sorted(file for file in files if not file.startswith("."))
            images = [file for file in shown if file.lower().endswith(IMAGE_SUFFIXES)]
            found += [Path(root, file) for file in images]
            linked = sum(os.path.islink(os.path.join(root, folder)) for folder in folders)
            others += len(shown) - len(images) + linked
    return found, others


def batches_of(
    config: Config, dataset: Dataset, device: torch.device, paths: Sequence[Path], workers: int
) -> Iterator[tuple[list[tuple[Path, str]], Tensor]]:
    """Read image files, as the images of a data set were read, `evaluate.batch` at a time.

    Args:
        workers: number of processes that read; with more than one, the main program must be
            importable (`__main__`).

    Yields:
        The path of each file, with the reason why it was refused, or an empty string; and the
        windows of those that were not refused.
    """
    dtype = parameter_dtype(config.train.precision)
    preprocess = Preprocess(config, dataset.statistics, device, dtype)
    side, size = config.data.canvas, config.evaluate.batch
    read = _read(paths, options_of(dataset), side, workers)
    for first in range(0, len(paths), size):
        part, canvases = [], [np.empty((0, side, side, 3), np.uint8)]
        for path in paths[first : first + size]:
            canvas = next(read)
            part.append((path, canvas if isinstance(canvas, str) else ""))
            if not isinstance(canvas, str):
                canvases.append(canvas[None])
        whole = torch.from_numpy(np.concatenate(canvases)).to(device)
        yield part, windows_of(config, preprocess, whole)


def _read(
    paths: Sequence[Path], options: ConvertOptions, side: int, workers: int
) -> Iterator[Canvas | str]:
    """Yield the canvas of each file, or why it was refused; read by so many processes."""
    workers = min(workers, len(paths) // WORTH_A_PROCESS)
    if workers <= 1:
        yield from (_canvas_or_why(path, options, side) for path in paths)
        return
    with worker_pool(workers, "reads images", "name fewer images at a time") as pool:
        for future in started_ahead(
            paths, lambda path: pool.submit(_canvas_or_why, path, options, side), workers * _AHEAD
        ):
            yield future.result()


def _canvas_or_why(path: Path, options: ConvertOptions, side: int) -> Canvas | str:
    try:
        return canvas_of(path, options, side)
    except RefusedImage as error:
        return one_line(error)
