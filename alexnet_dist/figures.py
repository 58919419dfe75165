"""Pictures of runs, after the paper's: Fig. 1 (curves), Fig. 3 (kernels), Fig. 4 (answers and
neighbours), and bars for ablations."""

import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, write_png

from alexnet_dist import checkpoint as checkpoints
from alexnet_dist.checkpoint import Checkpoint
from alexnet_dist.config_layers import load_config
from alexnet_dist.data.dataset import Dataset, open_for
from alexnet_dist.data.sampler import evaluation_plan
from alexnet_dist.data.windows import on_canvas
from alexnet_dist.engine import TorchEngine
from alexnet_dist.errors import CheckpointError
from alexnet_dist.evaluate import make_pipeline
from alexnet_dist.telemetry import chroma, kernel_picture, read_metrics
from alexnet_dist.topology import connect

_ANSWERED, _QUERIES, _NEIGHBOURS = 8, 5, 6  # of Fig. 4
_CHUNK = 4096  # rows of the memory map compared at a time


def draw(folder: Path) -> list[Path]:
    """Draw kernels and curves of a run folder into its `figures/`; their paths."""
    newest, _ = checkpoints.newest_good(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint yet, so nothing to draw")
    out = _folder(folder)
    conv1 = newest.parameters().rows("conv1.weight", slice(None))
    picture = torch.from_numpy(kernel_picture(conv1, newest.config.model.columns))
    write_png(picture.movedim(-1, 0).contiguous(), str(out / "kernels.png"))
    drawn = [out / "kernels.png"]
    if (folder / "metrics.jsonl").is_file():  # an imported run has none
        _curves(folder, out / "curves.png")
        drawn.append(out / "curves.png")
    return drawn


def colour(folder: Path) -> list[float]:
    """Fig. 3 in numbers: the chroma of each column's kernels in a run's newest checkpoint."""
    newest, _ = checkpoints.newest_good(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint yet")
    conv1 = newest.parameters().rows("conv1.weight", slice(None))
    return chroma(conv1, newest.config.model.columns)


def draw_answers(folder: Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Fig. 4: the five likeliest labels of eight test images, and the six training images nearest
    to five test images by the distance of what the last layer sees (fc7).

    Those features of the training split lie in `figures/features.npy` as long as they are compared.
    """
    found = checkpoints.at(folder)
    alone = ["layout.kind=one", "layout.ranks=0", "evaluate.views=1", *overrides]
    config = load_config([found.manifest["config"], *alone])
    dataset, out = open_for(config), _folder(folder)
    shown = replace(dataset.splits[config.data.eval_split], _files={})
    ids = np.linspace(0, len(shown) - 1, _ANSWERED).astype(np.int64)
    network = _Network(found, config, dataset)
    features, logits = network.of(config.data.eval_split, ids)
    _answers(dataset, ids, shown, logits.softmax(1), config.data.canvas, out / "fig4-left.png")

    known, path = replace(dataset.splits[config.data.train_split], _files={}), out / "features.npy"
    kept = np.lib.format.open_memmap(path, "w+", np.float32, (len(known), features.shape[1]))
    try:
        for first in range(0, len(known), config.evaluate.batch):
            part = np.arange(first, min(first + config.evaluate.batch, len(known)))
            kept[part[0] : part[-1] + 1] = network.of(config.data.train_split, part)[0].numpy()
        places, _ = nearest(features[:_QUERIES], kept, _NEIGHBOURS)
    finally:
        path.unlink()
    _neighbours(shown, ids[:_QUERIES], known, places, config.data.canvas, out / "fig4-right.png")
    for split in (shown, known):
        split.close()
    return [out / "fig4-left.png", out / "fig4-right.png"]


def nearest(queries: Tensor, rows: npt.NDArray[np.float32], count: int) -> tuple[Tensor, Tensor]:
    """The rows nearest to each query by Euclidean distance, the nearest first.

    Args:
        queries: (q, d).
        rows: (n, d), a memory map of any length: a chunk of it is read at a time.

    Returns:
        (q, count) int64 places, ties to the lower, and (q, count) distances.
    """
    best = torch.empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(rows), _CHUNK):
        part = torch.from_numpy(np.array(rows[first : first + _CHUNK]))
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(queries, part, compute_mode=exact)
        own = torch.arange(first, first + len(part)).expand(len(queries), -1)
        best, places = torch.cat([best, distances], 1), torch.cat([places, own], 1)
        order = best.argsort(dim=1, stable=True)[:, :count]
        best, places = best.gather(1, order), places.gather(1, order)
    return places, best


class _Network:
    """A checkpoint's network on one device, and what its last layer sees of samples."""

    def __init__(self, found: Checkpoint, config: Any, dataset: Dataset) -> None:
        self.config, self.dataset, self.topology = config, dataset, connect(config)
        self.engine = TorchEngine(config, self.topology)
        self.engine.load(found.parameters(), None)
        self.seen: list[Tensor] = []
        last = self.engine.model.layers()[-1]
        last.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))

    def of(self, split: str, ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(n, units) float32 what the last layer sees, and (n, classes) logits."""
        pipeline = make_pipeline(self.config, self.topology, self.dataset, split)
        try:
            one = [range(int(i), int(i) + 1) for i in ids]
            whole = [range(int(ids[0]), int(ids[-1]) + 1)]
            plan = evaluation_plan(self.config, whole if len(whole[0]) == len(ids) else one)
            logits = [
                self.engine.predict(decoded.joined([len(decoded.facts)], None).windows)
                for decoded in pipeline.batches(plan)
            ]
        finally:
            pipeline.close()
        features, self.seen = torch.cat(self.seen).float().cpu(), []
        return features, torch.cat(logits).float().cpu()


def draw_fig1(runs: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Fig. 1: training error by epoch of runs by name."""
    with _axes(path, (6, 4)) as axes:
        for place, (name, folders) in enumerate(runs.items()):
            for number, run in enumerate(folders):
                points = [p for p in read_metrics(run) if p["kind"] == "train"]
                errors = [100 * (1 - p["top1"]) for p in points]
                label = name if number == 0 else None
                axes.plot([p["epoch"] for p in points], errors, f"C{place}", label=label)
        axes.axhline(25, color="0.6", linestyle=":")
        axes.set(xlabel="epoch", ylabel="training error, %", ylim=(0, None))
        axes.legend()


def epochs_to(error: float, folders: Sequence[Path]) -> float:
    """The median of the epochs at which runs' training errors (shares) were first as low; infinite
    where half of them never were."""

    def first(run: Path) -> float:
        points = [p for p in read_metrics(run) if p["kind"] == "train"]
        return next((float(p["epoch"]) for p in points if 1 - p["top1"] <= error), math.inf)

    return statistics.median(map(first, folders))


def draw_ablations(errors: Mapping[str, Sequence[float]], path: Path) -> None:
    """Bars of mean top-1 errors (shares) of runs by name, with the deviation and each run."""
    with _axes(path, (7, 0.5 * len(errors) + 1.2)) as axes:
        for place, values in enumerate(errors.values()):
            percent = [100 * value for value in values]
            spread = statistics.stdev(percent) if len(percent) > 1 else 0.0
            axes.barh(place, statistics.fmean(percent), xerr=spread, color="C0", alpha=0.6)
            axes.plot(percent, [place] * len(percent), "k.")
        axes.set_yticks(range(len(errors)), errors)
        axes.invert_yaxis()
        axes.set(xlabel="top-1 error, %")


def _folder(run: Path) -> Path:
    out = (run if (run / "checkpoints").is_dir() else run.parent.parent) / "figures"
    out.mkdir(exist_ok=True)
    return out


@contextmanager
def _axes(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on; written to the path in the end."""
    with figure(path, 1, 1, size) as axes:
        axes[0, 0].grid(alpha=0.3)
        yield axes[0, 0]


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """(rows, columns) axes; written to the path in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _answers(
    dataset: Dataset, ids: npt.NDArray[np.int64], split: Any, probabilities: Tensor, canvas: int,
    path: Path,
) -> None:  # fmt: skip
    """Fig. 4, left: an image above, its label, and bars of the five likeliest; red: right."""
    top = probabilities.topk(min(5, probabilities.shape[1]))
    with figure(path, 4, _ANSWERED // 2, (12, 10)) as axes:
        for place, (sample, label) in enumerate(zip(ids, split.labels(ids), strict=True)):
            row, column = divmod(place, _ANSWERED // 2)
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            _show(above, split, int(sample), canvas)
            above.set_title(_short(dataset.classes[label]), fontsize=9)
            values, classes = top.values[place].tolist(), top.indices[place].tolist()
            colours = ["C3" if c == label else "C0" for c in classes]
            below.barh(range(len(classes)), values, color=colours, alpha=0.6)
            below.set_yticks(range(len(classes)), [_short(dataset.classes[c]) for c in classes])
            below.tick_params(labelsize=8)
            below.invert_yaxis()
            below.set_xlim(0, 1)


def _neighbours(
    shown: Any, ids: npt.NDArray[np.int64], known: Any, places: Tensor, canvas: int, path: Path
) -> None:
    """Fig. 4, right: a test image in the first column, then its training neighbours."""
    with figure(path, len(ids), 1 + places.shape[1], (10, 1.6 * len(ids))) as axes:
        for row, (sample, near) in enumerate(zip(ids, places.tolist(), strict=True)):
            _show(axes[row, 0], shown, int(sample), canvas)
            for column, place in enumerate(near, start=1):
                _show(axes[row, column], known, place, canvas)
        axes[0, 0].set_title("test", fontsize=9)
        axes[0, 1].set_title("nearest in training", fontsize=9)


def _show(axes: Any, split: Any, sample: int, canvas: int) -> None:
    _, encoded = split.read_whole(sample)
    image = decode_image(torch.frombuffer(encoded, dtype=torch.uint8), ImageReadMode.RGB)
    axes.imshow(on_canvas(image, canvas).movedim(0, -1).numpy())
    axes.axis("off")


def _short(name: str) -> str:
    return name.split(",")[0][:24]


def _curves(folder: Path, path: Path) -> None:
    points = read_metrics(folder)
    with figure(path, 1, 3, (15, 4)) as axes:
        left, right, colours = axes[0]
        for kind, style in (("train", "-"), ("eval", "o-")):
            chosen = [point for point in points if point["kind"] == kind]
            epochs = [point["epoch"] for point in chosen]
            left.plot(epochs, [point["loss"] for point in chosen], style, label=kind)
            for name in ("top1", "top5"):
                errors = [100 * (1 - point[name]) for point in chosen]
                right.plot(epochs, errors, style, label=f"{kind}, {name.replace('top', 'top-')}")
        for column in (1, 2):
            chosen = [point for point in points if f"chroma_{column}" in point]
            values = [point[f"chroma_{column}"] for point in chosen]
            if values:
                epochs = [point["epoch"] for point in chosen]
                colours.plot(epochs, values, "o-", label=f"column {column}")
        left.set(xlabel="epoch", ylabel="loss, nats", title=folder.name)
        right.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
        colours.set(xlabel="epoch", ylabel="colour in conv1's kernels", ylim=(0, 1))
        for panel in (left, right, colours):
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend()
