"""Pictures of runs after the paper's figures: Fig. 1 (curves), Fig. 3 (kernels), Fig. 4
(predictions and nearest neighbours), and bars for ablations."""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import IN_ONE_PROCESS, overridden
from alexnet_dist.data.dataset import evaluation_split
from alexnet_dist.data.pipelines.make import for_one_pass
from alexnet_dist.data.split import Split
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.errors import CheckpointError, looked_in
from alexnet_dist.evaluation.features import features_and_logits
from alexnet_dist.files import written_aside
from alexnet_dist.parallel.topology import connect
from alexnet_dist.plotting import Picture, as_label, chroma, figure, kernel_picture
from alexnet_dist.training.metrics_file import accuracies, read_metrics
from alexnet_dist.training.tensorboard import ANSWERED, draw_answers, evenly, image_of

Curve = Sequence[tuple[float, float]]  # epochs, and errors as shares
_QUERIES, _NEIGHBOURS = 5, 6  # rows and neighbours of Fig. 4, right
_CHUNK = 4096  # training images whose features are computed, and compared, at a time


def draw(folder: Path, out: Path | None = None) -> tuple[list[Path], list[float]]:
    """Draw curves and the newest kernels of a run; return the files' paths, and the chroma of each
    column's conv1 kernels: Fig. 3 in numbers.

    Args:
        out: folder to draw into; the run's `figures/` by default.
    """
    newest, _ = checkpoints.newest_good(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{folder} has no checkpoint to draw{looked_in(folder)}")
    model, out = newest.config.model, out or _folder(folder)
    conv1 = newest.parameters().rows("conv1.weight", slice(None))
    _write(kernel_picture(conv1, model.columns), out / "kernels.png")
    drawn = [out / "kernels.png"]
    if (folder / "metrics.jsonl").is_file():  # an imported run has no metrics
        _curves(folder, model.classes, out / "curves.png")
        drawn.append(out / "curves.png")
    return drawn, chroma(conv1, model.columns)


def draw_fig4(folder: Path, overrides: Sequence[str]) -> list[Path]:
    """Draw Fig. 4: the five likeliest classes of eight evaluation images, and, for five of them,
    the six training images whose features before the last layer (fc7) are nearest."""
    checkpoint = checkpoints.at(folder)
    config = overridden(for_one_pass(checkpoint.config), *IN_ONE_PROCESS, *overrides)
    dataset, out = checkpoint.open_data(config), _folder(folder)
    engine = TorchEngine(config, connect(config))
    engine.load(checkpoint.parameters(), None)

    def see(split: str, samples: range) -> tuple[Tensor, Tensor]:
        """Return features and logits of some samples of a split."""
        return features_and_logits(engine, config, dataset, split, samples)

    shown = evaluation_split(config, dataset)
    samples = evenly(len(shown), ANSWERED)
    features, logits = see(config.data.eval_split, samples)
    _write(draw_answers(shown, samples, dataset.classes, logits, config), out / "fig4-left.png")

    known = dataset.splits[config.data.train_split]
    every = range(len(known))
    parts = (every[first : first + _CHUNK] for first in every[::_CHUNK])
    rows = (see(config.data.train_split, part)[0] for part in parts)
    places, _ = nearest(features[:_QUERIES], rows, _NEIGHBOURS)
    _neighbours(shown, samples, known, places, config.data.canvas, out / "fig4-right.png")
    for split in (shown, known):
        split.close()
    return [out / "fig4-left.png", out / "fig4-right.png"]


def nearest(queries: Tensor, rows: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the rows nearest to each query by Euclidean distance, the nearest first.

    Args:
        queries: (q, d) float32.
        rows: (n, d) in parts of any length, which are looked at one after another.

    Returns:
        (q, count) int64 row numbers, ties to the lower one, and (q, count) distances.
    """
    best = torch.empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64)
    first = 0
    for part in rows:
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(queries, part, compute_mode=exact)
        own = torch.arange(first, first + len(part)).expand(len(queries), -1)
        first += len(part)
        best, places = torch.cat([best, distances], 1), torch.cat([places, own], 1)
        order = best.argsort(dim=1, stable=True)[:, :count]
        best, places = best.gather(1, order), places.gather(1, order)
    return places, best


def draw_fig1(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draw Fig. 1: training error by epoch, for runs grouped by name."""
    with _axes(path, (6, 4)) as axes:
        for place, (name, of_runs) in enumerate(curves.items()):
            for number, curve in enumerate(of_runs):
                errors = [100 * error for _, error in curve]
                label = as_label(name) if number == 0 else None
                axes.plot([epoch for epoch, _ in curve], errors, f"C{place}", label=label)
        axes.axhline(25, color="0.6", linestyle=":")
        axes.set(xlabel="epoch", ylabel="training error, %", ylim=(0, None))
        axes.legend()


def training_curve(run: Path) -> Curve:
    """Return the training errors that a run logged, each of the steps since the one before."""
    points = [point for point in read_metrics(run) if point["kind"] == "train"]
    return [(p["epoch"], 1 - p["top1"]) for p in points if math.isfinite(p["epoch"])]


def by_epoch(curve: Curve) -> Curve:
    """Return each epoch's mean of a run's training errors, at the middle of the epoch."""
    epochs = itertools.groupby(curve, lambda point: math.ceil(point[0]))
    return [(n - 0.5, statistics.fmean(error for _, error in points)) for n, points in epochs]


def epochs_to(error: float, curves: Sequence[Curve]) -> float:
    """Return the median over runs of the epoch at which the training error (a share) fell to
    `error`; infinity if at least half of the runs never reached it.

    It counts where a line through the epochs' means crosses `error`, since single points of a flat
    curve reach it early by chance; only if the first epoch's mean is as low, the first such point.
    """

    def reached(curve: Curve) -> float:
        means = by_epoch(curve)
        if means and means[0][1] <= error:
            return next(epoch for epoch, found in curve if found <= error)
        for (before, high), (after, low) in itertools.pairwise(means):
            if low <= error:
                return before + (high - error) / (high - low) * (after - before)
        return math.inf

    return statistics.median(map(reached, curves))


def draw_ablations(errors: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw bars of mean top-1 errors (shares) by name, with standard deviation and single runs."""
    with _axes(path, (7, 0.5 * len(errors) + 1.2)) as axes:
        for place, values in enumerate(errors.values()):
            percent = [100 * value for value in values]
            spread = statistics.stdev(percent) if len(percent) > 1 else 0.0
            axes.barh(place, statistics.fmean(percent), xerr=spread, color="C0", alpha=0.6)
            axes.plot(percent, [place] * len(percent), "k.")
        axes.set_yticks(range(len(errors)), map(as_label, errors))
        axes.invert_yaxis()
        axes.set(xlabel="top-1 error, %")


def _write(picture: Picture, path: Path) -> None:
    with written_aside(path) as aside:
        Image.fromarray(picture).save(aside)


def _folder(run: Path) -> Path:
    """Return the run's `figures/`, created if need be."""
    out = run / "figures"
    out.mkdir(exist_ok=True)
    return out


@contextmanager
def _axes(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a single pair of axes, which is written to `path` at the end."""
    with figure(path, 1, 1, size) as axes:
        axes[0, 0].grid(alpha=0.3)
        yield axes[0, 0]


def _neighbours(
    shown: Split, samples: range, known: Split, places: Tensor, canvas: int, path: Path
) -> None:
    """Draw Fig. 4, right: evaluation images in the first column, their neighbours to the right."""
    with figure(path, len(places), 1 + places.shape[1], (10, 1.6 * len(places))) as axes:
        for row, (sample, near) in enumerate(zip(samples, places.tolist(), strict=False)):
            _show(axes[row, 0], shown, sample, canvas)
            for column, place in enumerate(near, start=1):
                _show(axes[row, column], known, place, canvas)
        axes[0, 0].set_title("test", fontsize=9)
        axes[0, 1].set_title("nearest in training", fontsize=9)


def _show(axes: Any, split: Split, sample: int, canvas: int) -> None:
    axes.imshow(image_of(split, sample, canvas))
    axes.axis("off")


def _curves(folder: Path, classes: int, path: Path) -> None:
    """Draw loss, errors, and the colour in conv1's kernels of each column, by epoch."""
    points = read_metrics(folder)
    with figure(path, 1, 3, (15, 4)) as axes:
        left, right, colours = axes[0]
        for kind, line in (("train", "-"), ("eval", "o-")):
            chosen = [point for point in points if point["kind"] == kind]
            if not chosen:
                continue
            style = line if len(chosen) > 1 else "o"
            epochs = [point["epoch"] for point in chosen]
            left.plot(epochs, [point["loss"] for point in chosen], style, label=kind)
            for top, name in accuracies(classes).items():
                errors = [100 * (1 - point[top]) for point in chosen]
                right.plot(epochs, errors, style, label=f"{kind}, {name}")
        for column in (1, 2):
            chosen = [point for point in points if f"chroma_{column}" in point]
            values = [point[f"chroma_{column}"] for point in chosen]
            if values:
                epochs = [point["epoch"] for point in chosen]
                colours.plot(epochs, values, "o-", label=f"column {column}")
        if not colours.lines:  # it is measured at evaluations, and there was none
            colours.set_visible(False)
        left.set(xlabel="epoch", ylabel="loss, nats", title=as_label(folder.name))
        right.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
        colours.set(xlabel="epoch", ylabel="colour in conv1's kernels", ylim=(0, 1))
        for panel in (left, right, colours):
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend()
