"""What a run draws in TensorBoard besides numbers. docs/tensorboard.md is a tour of it."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.codecs import RGB, decode_image
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.preprocess import on_canvas
from alexnet_dist.data.split import Split
from alexnet_dist.engines.base import Engine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.evaluation.features import features_and_logits
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.plotting import (
    Picture,
    answer_picture,
    confusion_picture,
    distinct,
    drawable,
    kernel_picture,
)
from alexnet_dist.timing import SPANS
from alexnet_dist.training.metrics_file import accuracies
from alexnet_dist.training.tolerance import WarnOnce

ANSWERED = 8  # evaluation images whose predictions are drawn
_VALUES = 65_536  # values of a tensor, evenly spaced, that go into a histogram
# Keys by which HPARAMS compares runs: TensorBoard shows the first five in alphabetical order.
_HPARAMS = (
    "layout.kind", "model.dropout", "optimizer.kind", "schedule.rate", "seed", "train.batch",
    "train.epochs",
)  # fmt: skip
_HPARAM_METRICS = ("eval/top1", "eval/top5", "eval/loss", "train/loss", "speed/images_per_s")
_FIRST_TAGS = {"loss": "Loss/{}", "top1": "Error/{}_top1", "top5": "Error/{}_top5"}


class Board:
    """TensorBoard's event file in a run folder. Only rank 0 writes; collective methods are called
    by all ranks.

    Args:
        step: step at which the run continues; later points of an earlier attempt are purged.
    """

    def __init__(
        self, config: Config, schedule: Schedule, topology: Topology, dataset: Dataset, step: int
    ) -> None:
        self._config, self._topology = config, topology
        own = config.data.eval_split  # without one, the training split, of which nothing is shown
        self._dataset = dataset
        self._split = dataset.splits.get(own, dataset.splits[config.data.train_split])
        self._names = split_names(config)
        self._classes = [drawable(name) for name in dataset.classes]
        self._guard = WarnOnce("TensorBoard")
        self._writer: SummaryWriter | None = None
        self._descriptor: int | None = None  # of the folder
        if topology.is_rank_0 and "tensorboard" in config.log.to:
            with self._guard:
                # Opened by file descriptor: the writer opens its file by name at every flush, and
                # the folder may have been moved.
                self._descriptor = os.open(config.folder, os.O_PATH)
                place = f"/proc/self/fd/{self._descriptor}"
                self._writer = SummaryWriter(place, purge_step=step + 1)
            self.draw(lambda to: _begin(to, config, schedule, step))

    def draw(self, draw: Callable[[SummaryWriter], None]) -> None:
        """Call `draw` with the writer, on rank 0. After a full disk TensorBoard's writer fails at
        every call; the first failure is logged."""
        if self._writer is not None:
            with self._guard:
                draw(self._writer)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by tag; losses and errors also under the tags that TensorBoard shows
        first."""

        def draw(to: SummaryWriter) -> None:
            for tag, value in values.items():
                kind, _, name = tag.partition("/")
                to.add_scalar(tag, value, step)
                if kind in self._names and name in _FIRST_TAGS:
                    first = value if name == "loss" else 1 - value
                    to.add_scalar(_FIRST_TAGS[name].format(self._names[kind]), first, step)

        self.draw(draw)

    def histograms(self, engine: Engine, step: int) -> None:
        """Write histograms of every parameter and its gradient, merged from all ranks, and each
        gradient's norm. Collective."""
        for name, _ in engine.model.named_parameters():
            whole = engine.parameter(name), engine.gradient(name)
            self.draw(partial(_histograms, name=name, whole=whole, step=step))

    def evaluation(
        self, engine: Engine, step: int, kernels: Tensor | None, confusion: Tensor | None
    ) -> dict[str, Picture]:
        """Draw conv1's kernels, the predictions for a few evaluation images, and the confusion
        matrix; return the pictures by tag, on rank 0. Collective."""
        config, logits = self._config, torch.empty(0)
        samples = evenly(len(self._split), ANSWERED)
        pictures: dict[str, Picture] = {}
        if config.log.pictures:
            _, logits = self._features_and_logits(engine, samples)
        if not self._topology.is_rank_0:
            return pictures
        with self._guard:
            if kernels is not None:
                pictures["kernels/conv1"] = kernel_picture(kernels, config.model.columns)
            name = self._names["eval"]
            if config.log.pictures:
                answers = draw_answers(self._split, samples, self._classes, logits, config)
                pictures[f"answers/{name}"] = answers
            if confusion is not None:
                pictures[f"confusion/{name}"] = confusion_picture(confusion, self._classes)

        def draw(to: SummaryWriter) -> None:
            for tag, picture in pictures.items():
                to.add_image(tag, picture, step, dataformats="HWC")

        self.draw(draw)
        return pictures

    def embedding(self, engine: Engine, step: int) -> None:
        """Write the features of evaluation images before the last layer (fc7's) for the projector.
        Collective."""
        name = f"seen_by_{engine.model.layers()[-1].name}"
        wanted = self._config.log.embedding if "tensorboard" in self._config.log.to else 0
        if samples := evenly(len(self._split), wanted):
            features, _ = self._features_and_logits(engine, samples)
            self.draw(lambda to: self._embed(to, name, features, samples, step))

    def close(self, finished: bool) -> None:
        """Close the file; a run that has finished is marked so for the comparison of runs."""
        if finished:
            self.draw(lambda to: to._get_file_writer().add_summary(_hparams(self._config)[2]))
        self.draw(lambda to: to.close())
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._split.close()

    def _features_and_logits(self, engine: Engine, samples: range) -> tuple[Tensor, Tensor]:
        """Return features and logits of some evaluation samples. Collective."""
        split = self._config.data.eval_split
        return features_and_logits(engine, self._config, self._dataset, split, samples)

    def _embed(
        self, to: SummaryWriter, name: str, features: Tensor, samples: range, step: int
    ) -> None:
        """Write features, labels and thumbnails for the projector."""
        shutil.rmtree(self._config.folder / f"{step:05d}" / name, ignore_errors=True)
        labels = [self._classes[y] for y in self._split.labels(np.array(samples))]
        images = torch.cat([self._thumbnail(sample) for sample in samples])
        to.add_embedding(features, labels, images, step, name)

    def _thumbnail(self, sample: int) -> Tensor:
        """Return a sample as a thumbnail, (1, 3, 32, 32) float in [0, 1]."""
        image = image_of(self._split, sample, self._config.data.canvas)
        whole = torch.from_numpy(image).movedim(-1, 0)[None] / 255
        return interpolate(whole, (32, 32), mode="bilinear", antialias=True)


def split_names(config: Config) -> dict[str, str]:
    """Return the name that curves of "train" and "eval" points carry: their split."""
    own = config.data.eval_split
    return {"train": "train", "eval": "eval" if own == "train" else own}


def evenly(size: int, count: int) -> range:
    """Return at most `count` sample numbers, evenly spaced over a split of `size` samples."""
    return range(0, size, max(1, size // count))[:count] if count else range(0)


def draw_answers(
    split: Split, samples: range, classes: Sequence[str], logits: Tensor, config: Config
) -> Picture:
    """Draw samples of a split with the five likeliest classes of each (Fig. 4, left)."""
    classes = distinct(classes)
    top = logits.softmax(1).topk(min(5, len(classes)))
    likeliest = [
        [(classes[place], value) for place, value in zip(places, values, strict=True)]
        for places, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    labels = [classes[label] for label in split.labels(np.array(samples))]
    images = [image_of(split, sample, config.data.canvas) for sample in samples]
    return answer_picture(images, labels, likeliest)


def image_of(split: Split, sample: int, canvas: int) -> Picture:
    """Return a sample as (canvas, canvas, 3) uint8; a damaged one as the sample that stands in."""
    _, (encoded,) = split.read_batch(np.array([sample]))
    image = decode_image(torch.from_numpy(encoded), RGB)
    picture: Picture = on_canvas(image, canvas).movedim(0, -1).numpy()
    return picture


def _begin(to: SummaryWriter, config: Config, schedule: Schedule, step: int) -> None:
    """Write what is known before the first step: the config, the schedule, groups of curves."""
    for summary in _hparams(config)[:2]:
        to._get_file_writer().add_summary(summary)
    times = ["Multiline", [f"time/{name}" for name in SPANS]]
    rates = ["Multiline", ["train/rate", "schedule/rate"]]
    curves = {
        title: [
            "Multiline",
            [_FIRST_TAGS[key].format(name) for name in split_names(config).values()],
        ]
        for title, key in (("loss", "loss"), ("top-1 error", "top1"), ("top-5 error", "top5"))
        if key != "top5" or _tells_top5(config)
    }
    more = {"where the time goes": times, "rate, as planned": rates}
    to.add_custom_scalars({"run": curves | more})
    if step == 0:
        text = yaml.safe_dump(dataclasses.asdict(config), default_flow_style=None, sort_keys=False)
        to.add_text("config", "    " + text.replace("\n", "\n    "))
    if config.schedule.kind != "plateau":  # whose rate depends on evaluations to come
        left = schedule.last_step - step
        for at in sorted({step + left * place // 200 for place in range(1, 201)} - {step}):
            to.add_scalar("schedule/rate", schedule.rate(at - 1), at)


def _hparams(config: Config) -> tuple[Any, Any, Any]:
    """Return the three summaries of TensorBoard's HPARAMS tab: keys and metrics to compare runs by,
    this run's values, and that it ended."""
    values = flat(config)
    own = {k: v if type(v) in (int, float) else str(v) for k, v in values.items() if k in _HPARAMS}
    metrics = [tag for tag in _HPARAM_METRICS if tag != "eval/top5" or _tells_top5(config)]
    parts: tuple[Any, Any, Any] = hparams(own, dict.fromkeys(metrics, 0))
    return parts


def _tells_top5(config: Config) -> bool:
    return "top5" in accuracies(config.model.classes)


def _histograms(
    to: SummaryWriter, name: str, whole: tuple[Tensor | None, Tensor | None], step: int
) -> None:
    """Write a parameter's histogram, and its gradient's norm and histogram."""
    weights, gradient = whole
    if weights is not None:
        to.add_histogram(f"weights/{name}", _thinned(weights), step)
    if gradient is not None:
        to.add_scalar(f"gradient_norm/{name}", gradient.norm().item(), step)
        if gradient.isfinite().all():
            to.add_histogram(f"gradients/{name}", _thinned(gradient), step)


def _thinned(values: Tensor) -> Tensor:
    """Return at most about 2 × _VALUES values of a tensor, evenly spaced."""
    flat_values = values.flatten()
    return flat_values[:: max(1, len(flat_values) // _VALUES)]
