"""Verify a packed data set, every hash, record and image of it, and summarise what is in it."""

import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from alexnet_dist.data.batch import started_ahead
from alexnet_dist.data.codecs import decode_image
from alexnet_dist.data.dataset import Dataset, open_dataset, verify_shards
from alexnet_dist.data.preprocess import on_canvas, rgb_last
from alexnet_dist.data.split import Split, doubtful
from alexnet_dist.errors import DatasetError, MachineError, filled_by
from alexnet_dist.files import written_aside
from alexnet_dist.parallel.device import cores
from alexnet_dist.parallel.topology import Topology

_AHEAD = 1000  # samples that threads are given at a time: a million would take gigabytes
QUICK = 100  # samples decoded of a split in a quick look
_SHOWN_CLASSES, _SHOWN_SAMPLES, _SHOWN_SIDE, _NAME_WIDTH = 20, 10, 96, 220


def inspect(folder: Path, sheet: Path | None) -> dict[str, Any]:
    """Read and decode everything in a packed data set; return a summary of it.

    Args:
        sheet: PNG in which to draw samples of the first classes, of the split train if there is
            one; None for a quick look, which hashes no shard, decodes some samples of each split,
            and draws nothing.

    Raises DatasetError for the first error found.
    """
    dataset = open_dataset(folder)
    if not dataset.splits:
        raise DatasetError(f"{folder / 'dataset.json'}: has no splits: prepare the data set again")
    if sheet is not None:
        verify_shards(dataset, Topology(cores=cores()))
    found: dict[str, Any] = {
        "folder": str(folder),
        "source": dataset.source["kind"],
        "classes": len(dataset.classes),
    }
    for name, split in dataset.splits.items():
        step = 1 if sheet else max(1, len(split) // QUICK)
        with contextlib.closing(split):
            found[name] = _verified(split, dataset, range(0, len(split), step))
    if "train" in dataset.splits:
        indexes = {name: split.index for name, split in dataset.splits.items()}
        if doubts := "; ".join(doubtful(indexes)):
            found["doubtful"] = doubts
    statistics = dataset.statistics
    found["mean RGB"] = statistics.mean_rgb.round(2).tolist()
    found["√λ of the covariance"] = np.sqrt(statistics.eigenvalues).round(2).tolist()
    found["its vectors"] = statistics.eigenvectors.round(3).tolist()
    if sheet is None:
        return found
    shown = dataset.splits.get("train") or next(iter(dataset.splits.values()))
    with contextlib.closing(shown):
        _contact_sheet(dataset, shown, sheet)
    return found | {"contact sheet": str(sheet)}


def _verified(split: Split, dataset: Dataset, samples: range) -> dict[str, Any]:
    """Decode these samples of a split; return counts of all; raise DatasetError."""

    def check(sample: int) -> None:
        image = _decoded(split, sample)
        size = split.index[["height", "width"]][sample].item()
        if image.shape[1:] != size or image.shape[0] not in (1, 3):
            raise DatasetError(
                f"split {split.name!r}: sample {sample} is {tuple(image.shape)}, but the index "
                f"says {size}: prepare the data set again"
            )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for checked in started_ahead(samples, lambda sample: pool.submit(check, sample), _AHEAD):
            checked.result()
    per_class = np.bincount(split.index["label"], minlength=len(dataset.classes))
    sizes = Counter(split.index[["height", "width"]].tolist())
    return {
        "samples": len(split),
        "shards": len(split.shards),
        "bytes": int(split.index["size"].sum()),
        "sizes": ", ".join(f"{h} × {w} ({n})" for (h, w), n in sizes.most_common(3)),
        "per class": f"{per_class.min()} to {per_class.max()}",
        "decoded": "all" if len(samples) == len(split) else f"{len(samples)}, evenly spread",
    }


def _decoded(split: Split, sample: int) -> Tensor:
    """Decode a sample: (1 or 3, h, w) uint8; raise DatasetError, or MachineError where memory is
    full."""
    which = f"split {split.name!r}: sample {sample}"
    try:
        with filled_by(which):
            return decode_image(torch.frombuffer(split.read(sample), dtype=torch.uint8))
    except MachineError:
        raise
    except RuntimeError as error:
        raise DatasetError(
            f"{which} cannot be decoded ({error}): prepare the data set again"
        ) from error


def _contact_sheet(dataset: Dataset, split: Split, path: Path) -> None:
    """Draw a split's first samples of the first classes, one row per class; raise DatasetError."""
    names = dataset.classes[:_SHOWN_CLASSES]
    size = (_NAME_WIDTH + _SHOWN_SAMPLES * _SHOWN_SIDE, len(names) * _SHOWN_SIDE)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((6, (row + 0.45) * _SHOWN_SIDE), name[:34].encode("ascii", "replace").decode(),
                  fill="black")  # fmt: skip
        shown = np.flatnonzero(split.index["label"] == row)[:_SHOWN_SAMPLES].tolist()
        for column, sample in enumerate(shown):
            image = rgb_last(on_canvas(_decoded(split, sample), _SHOWN_SIDE))
            tile = Image.fromarray(image.contiguous().numpy())
            sheet.paste(tile, (_NAME_WIDTH + column * _SHOWN_SIDE, row * _SHOWN_SIDE))
    try:
        with written_aside(path) as aside:
            sheet.save(aside)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be written: {error}; name another file by --sheet"
        ) from error
