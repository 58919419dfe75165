"""Evaluation: every sample counted exactly once, one window or ten, one network or several."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.config.load import ALONE, load_config
from alexnet_dist.config.schema import Config, fingerprint, flat
from alexnet_dist.data.dataset import Dataset, check_damaged, evaluation_split, open_for
from alexnet_dist.data.pipelines.make import make_pipeline, once
from alexnet_dist.data.sampler import evaluation_plan
from alexnet_dist.engines.base import Engine, label_ranks
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError, NotFinite
from alexnet_dist.evaluation.load import Trained, load_checkpoint
from alexnet_dist.files import written_aside
from alexnet_dist.network.model import side_by_side
from alexnet_dist.network.precision import allow_tf32
from alexnet_dist.parallel.stop_signals import StopSignals
from alexnet_dist.parallel.topology import Topology, connect


@dataclass(frozen=True)
class Score:
    """Exact counts over a split, and the mean loss (nats) of the averaged softmax outputs.

    Damaged samples are not among `samples`, and never counted.
    """

    samples: int
    correct1: int
    correct5: int
    loss: float

    @property
    def top1(self) -> float:
        return self.correct1 / self.samples

    @property
    def top5(self) -> float:
        return self.correct5 / self.samples

    @property
    def top1_interval(self) -> tuple[float, float]:
        """Bounds of a 95 % bootstrap interval of top1."""
        return self.interval(self.correct1)

    @property
    def top5_interval(self) -> tuple[float, float]:
        """Bounds of a 95 % bootstrap interval of top5."""
        return self.interval(self.correct5)

    def interval(self, correct: int) -> tuple[float, float]:
        """The middle 95 % of the share of right answers over bootstrap resamples of the samples.

        Drawing samples with replacement, each right or not, is drawing a binomial. The same
        numbers give the same interval.
        """
        generator = np.random.Generator(np.random.Philox(key=[self.samples, correct]))
        drawn = generator.binomial(self.samples, correct / self.samples, 10_000) / self.samples
        low, high = np.percentile(drawn, [2.5, 97.5])
        return float(low), float(high)

    def tags(self) -> dict[str, float]:
        """For metrics: the counts, and the shares."""
        return {**vars(self), "top1": self.top1, "top5": self.top5}


@dataclass(frozen=True)
class Evaluation:
    """What one network or the average of several says of every sample of a split.

    Attributes:
        checkpoints: of the networks.
        classes: their names.
        probabilities: (n, classes) float32 or wider, softmax outputs averaged over views and
            networks, in the split's order; n counts damaged samples too.
        labels: (n,) int64; −1 where the sample is damaged.
        how: what else the score depends on: split, views, data set, keys that were changed.
    """

    score: Score
    checkpoints: tuple[Checkpoint, ...]
    classes: tuple[str, ...]
    probabilities: Tensor
    labels: Tensor
    how: Mapping[str, Any] = field(default_factory=dict)

    def confusion(self) -> Tensor:
        """(classes, classes) int64: samples of the row's class that were taken for the column's."""
        size = len(self.classes)
        counts = torch.zeros(size, size, dtype=torch.int64)
        _confuse(counts, self.probabilities, self.labels)
        return counts

    def report(self) -> dict[str, Any]:
        """For programs: counts, 95 % intervals, each class's error, and the commonest mistakes."""
        score, confusion = self.score, self.confusion()
        wrong = confusion - confusion.diag().diag()
        worst = wrong.flatten().topk(min(10, wrong.numel()))
        pairs = [divmod(place, len(self.classes)) for place in worst.indices.tolist()]
        return {
            **score.tags(),
            "top1_interval": score.top1_interval,
            "top5_interval": score.top5_interval,
            "of": [str(checkpoint.path) for checkpoint in self.checkpoints],
            **self.how,
            "classes": [
                {"name": name, "samples": int(row.sum()), "right": int(row[place])}
                for place, (name, row) in enumerate(zip(self.classes, confusion, strict=True))
            ],
            "mistakes": [
                {"of": self.classes[a], "taken_for": self.classes[b], "samples": count}
                for (a, b), count in zip(pairs, worst.values.tolist(), strict=True)
                if count
            ],
        }

    def write(self, path: Path) -> None:
        """Every prediction, as .npz: probabilities, labels, predicted, confusion, classes."""
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez(
                file,
                probabilities=self.probabilities.numpy(),
                labels=self.labels.numpy(),
                predicted=self.probabilities.argmax(1).numpy(),
                confusion=self.confusion().numpy(),
                classes=np.array(self.classes, dtype=np.str_),
            )


def evaluate(
    network: Trained | Path | str, data: Path | str | None = None, views: Literal[1, 10] = 10
) -> Score:
    """Score a network, in this process, on the evaluation split of its data set or of another.

    Args:
        network: what `load_checkpoint` gave, its model as it now is; a run folder or a checkpoint.
        data: a packed data set with as many classes; where the config says, if left out.
        views: windows an image: the centre's, or the paper's ten.

    Raises CheckpointError, DatasetError or ConfigError, each naming what does not fit.
    """
    trained = network if isinstance(network, Trained) else load_checkpoint(network)
    changes = {"evaluate.views": views} | ({} if data is None else {"data.path": str(data)})
    config = load_config([flat(once(trained.config)) | changes])
    topology = connect(config)
    engine = TorchEngine(config, topology, drawn=False)
    engine.model.load_state_dict(trained.model.state_dict())
    dataset = open_for(config, trained.checkpoint.path)
    score = evaluate_engine(engine, config, topology, dataset)
    assert score is not None  # no signals are listened to
    return _finite(score, trained.checkpoint.path)


def evaluate_engine(
    engine: Engine,
    config: Config,
    topology: Topology,
    dataset: Dataset,
    signals: StopSignals | None = None,
    confusion: Tensor | None = None,
) -> Score | None:
    """Score one network on the evaluation split, by this run's own ranks. Collective.

    Args:
        confusion: (classes, classes) int64 zeros on the CPU, made what `Evaluation.confusion` is.

    Returns:
        The score, alike on every rank; None where a signal stopped it.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    for probabilities, labels in _probabilities(engine, config, topology, dataset):
        totals += _counted(probabilities, labels)
        if confusion is not None:
            _confuse(confusion, probabilities.cpu(), labels.cpu())
        if signals is not None and signals.poll(topology):
            return None
    counted = [totals] if confusion is None else [totals, confusion]
    for counts in counted:  # a replica's columns hold the same probabilities
        topology.sum(counts if topology.column == 0 else counts.zero_())
    return _score(totals, config, dataset)


def seen(
    engine: Engine, config: Config, topology: Topology, dataset: Dataset, split: str,
    samples: range,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a network's last layer sees of samples (fc7), and what it says. Collective: each rank
    decodes all of them.

    Returns:
        (n, units) float32, of the units that the last layer sees on this rank, and (n, classes)
        logits, on the CPU.
    """
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, views=1))
    features: list[Tensor] = []
    *_, last = engine.model.layers()
    products = last.products

    def noted(seen: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        features.append(side_by_side(seen))
        return products(seen, weight, bias)

    last.products = noted  # type: ignore[method-assign]
    pipeline = make_pipeline(config, topology, dataset, split)
    size = config.evaluate.batch
    parts = [samples[first : first + size] for first in range(0, len(samples), size)]
    try:
        logits = [
            engine.predict(decoded.joined([len(decoded.metadata)], None).windows)
            for decoded in pipeline.batches(evaluation_plan(config, parts))
        ]
    finally:
        del last.products
        pipeline.close()
    own = [part[: len(said)] for part, said in zip(features, logits, strict=True)]
    return torch.cat(own).float().cpu(), torch.cat(logits).cpu()


def evaluate_checkpoints(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Evaluation:
    """Score checkpoints of any layouts, or the average of their softmax outputs (paper §6).

    Args:
        paths: run folders (their best checkpoint) or checkpoints.
        overrides: `key=value` over their configs.

    Raises CheckpointError, DatasetError, or ConfigError where they cannot be averaged.
    """
    found = [checkpoints.at(path) for path in paths]
    configs = [load_config([flat(once(c.config)), *ALONE, *overrides]) for c in found]
    config, topology = configs[0], connect(configs[0])
    dataset = open_for(config, found[0].path)
    for checkpoint, other in zip(found, configs, strict=True):
        for key in ("model.classes", "data.path", "data.eval_split", "evaluate.views"):
            here, there = flat(other)[key], flat(config)[key]
            if here != there:
                model = key.startswith("model.")
                remedy = "it must be the same" if model else f"give {key}=VALUE, if that fits both"
                raise ConfigError(
                    f"{checkpoint.path}: {key}={here!r}, and {there!r} in {found[0].path}: to "
                    f"average them {remedy}"
                )
    average, labels = torch.zeros(()), torch.zeros(())
    for checkpoint, own in zip(found, configs, strict=True):
        allow_tf32(own.train.precision)
        engine = make_engine(own, topology)
        engine.load(checkpoint.parameters(), None)
        outputs = list(_probabilities(engine, own, topology, dataset))
        average = average + torch.cat([part.cpu() for part, _ in outputs]) / len(found)
        labels = torch.cat([part.cpu() for _, part in outputs])
    score = _finite(_score(_counted(average, labels), config, dataset), *paths)
    how = {
        "split": config.data.eval_split,
        "views": config.evaluate.views,
        "data": str(dataset.folder),
        "data_sha256": dataset.digest,
        "changed": _changed(found[0].config, config),
    }
    return Evaluation(score, tuple(found), dataset.classes, average, labels, how)


def _changed(trained: Config, config: Config) -> dict[str, Any]:
    """Keys that define a run, beside those that `how` has, and are not as it was trained."""
    before, now = fingerprint(trained), fingerprint(config)
    told = ("data.eval_split", "evaluate.views")
    return {key: now[key] for key in now if now[key] != before[key] and key not in told}


def _finite(score: Score, *networks: Path) -> Score:
    """Raises NotFinite where a network's outputs, and so the loss, are not finite."""
    if not math.isfinite(score.loss):
        raise NotFinite(
            f"{' + '.join(map(str, networks))}: outputs that are not finite (a loss of "
            f"{score.loss}): nothing can be said of it. Evaluate an earlier checkpoint, or look at "
            "the data and its mean"
        )
    return score


def _probabilities(
    engine: Engine, config: Config, topology: Topology, dataset: Dataset
) -> Iterator[tuple[Tensor, Tensor]]:
    """Softmax outputs averaged over views (n, classes) and labels (n,), batch by batch.

    The label of a damaged sample is −1. Every rank goes through as many batches, of any size, even
    none.
    """
    total, size = len(evaluation_split(config, dataset)), config.evaluate.batch
    wholes = [range(start, min(start + size, total)) for start in range(0, total, size)]
    shares = [topology.shares(whole) for whole in wholes]
    mine = [parts[topology.column] for parts in shares]
    counts = [[len(part) for part in parts] for parts in shares]
    pipeline = make_pipeline(config, topology, dataset, config.data.eval_split)
    try:
        batches = pipeline.batches(evaluation_plan(config, mine))
        for part, sizes in zip(batches, counts, strict=True):
            batch = part.joined(sizes, topology.column_group)
            outputs = engine.predict(batch.windows).softmax(1)
            labels = batch.labels.masked_fill(batch.damaged, -1)
            yield outputs.unflatten(0, (-1, config.evaluate.views)).mean(1), labels
    finally:
        pipeline.close()


def _confuse(counts: Tensor, probabilities: Tensor, labels: Tensor) -> None:
    """Add to (classes, classes) int64 counts samples of the row's class taken for the column's;
    those of a negative label are left out."""
    sound = labels >= 0
    labels, taken = labels[sound], probabilities[sound].argmax(1)
    counts.index_put_((labels, taken), torch.ones_like(labels), accumulate=True)


def _counted(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(4,) float64 on the CPU: samples, summed loss, labels ranked first, among the first five.

    Samples of a negative label are left out.
    """
    counts, labels = labels >= 0, labels.clamp_min(0)
    own = probabilities.double().gather(1, labels[:, None])[:, 0]
    rank = label_ranks(probabilities, labels)
    loss = -own.clamp_min(torch.finfo(torch.float64).tiny).log()
    sums = [counts, loss * counts, (rank < 1) & counts, (rank < 5) & counts]
    return torch.stack([value.double().sum() for value in sums]).cpu()


def _score(totals: Tensor, config: Config, dataset: Dataset) -> Score:
    """The score of `_counted` over the split; raises DatasetError where too much is damaged."""
    samples, loss, correct1, correct5 = totals.tolist()
    split = evaluation_split(config, dataset)
    check_damaged(config, split, len(split) - int(samples))
    return Score(int(samples), int(correct1), int(correct5), loss / samples)
