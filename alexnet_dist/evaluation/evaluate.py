"""Evaluate one network or several: every sample counted exactly once, by one window or ten."""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.config.from_data import HELD_OUT
from alexnet_dist.config.load import IN_ONE_PROCESS, overridden
from alexnet_dist.config.schema import Config, fingerprint, flat
from alexnet_dist.data.batch import Decoded, started_ahead, to_host
from alexnet_dist.data.dataset import Dataset, check_damaged, evaluation_split
from alexnet_dist.data.pipelines.make import for_one_pass, make_pipeline
from alexnet_dist.data.sampler import evaluation_plan
from alexnet_dist.engines.base import Engine, label_ranks
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError, MachineError, NotFinite, counted
from alexnet_dist.evaluation.load import Trained, load_checkpoint
from alexnet_dist.evaluation.results import Conditions, Evaluation, Score, add_confusion
from alexnet_dist.network.precision import allow_tf32, parameter_dtype
from alexnet_dist.parallel.device import free_host_memory
from alexnet_dist.parallel.replicas import summed
from alexnet_dist.parallel.stop_signals import StopSignals
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.progress import progress_bar

log = logging.getLogger(__name__)


def evaluate(
    network: Trained | Path | str, data: Path | str | None = None, views: Literal[1, 10] = 10
) -> Score:
    """Score a network, in this process, on the evaluation split of its data set or of another.

    Args:
        network: what `load_checkpoint` returned, with its model's present weights; or a run folder
            or checkpoint.
        data: a packed data set of the same classes, whose own mean is subtracted unless
            data.mean_from names another; by default the one the config names.
        views: windows per image: the centre window, or the paper's ten.

    Raises CheckpointError, DatasetError or ConfigError, naming what does not fit.
    """
    trained = network if isinstance(network, Trained) else load_checkpoint(network)
    changes = {"evaluate.views": views} | ({} if data is None else {"data.path": str(data)})
    config = overridden(for_one_pass(trained.config), changes)
    engine = TorchEngine(config, connect(config), init_weights=False)
    engine.model.load_state_dict(trained.model.state_dict())
    engine.optimizer.narrow_all()  # the copies that a GPU computes with
    dataset = trained.checkpoint.open_data(config)
    score = evaluate_engine(engine, config, dataset)
    assert score is not None  # without signals, nothing stops it
    return _finite(score, trained.checkpoint.path)


def evaluate_engine(
    engine: Engine, config: Config, dataset: Dataset, signals: StopSignals | None = None,
    confusion: Tensor | None = None,
) -> Score | None:  # fmt: skip
    """Score one network on the evaluation split, with the ranks of this run. Collective.

    Args:
        signals: polled after each batch; a stop signal ends the evaluation.
        confusion: (classes, classes) int64 zeros on the CPU; the confusion matrix is added to it.

    Returns:
        The score, the same on every rank; None where a signal ended the evaluation.
    """
    topology = engine.topology
    sums = torch.zeros(4, dtype=torch.float64)  # as `_batch_sums` returns
    for probabilities, labels in _probabilities(engine, config, dataset):
        sums += _batch_sums(probabilities, labels)
        if confusion is not None:
            add_confusion(confusion, probabilities, labels)
        if signals is not None and signals.poll(topology):
            return None
    # A replica's column ranks hold the same probabilities: only the first column's count.
    for counts in [sums] if confusion is None else [sums, confusion]:
        summed(counts if topology.column == 0 else counts.zero_(), topology.control)
    return _score(sums, config, dataset)


def evaluate_checkpoints(
    paths: Sequence[Path], overrides: Sequence[str] = (), *, keep: bool = True
) -> Evaluation:
    """Score a checkpoint of any layout, or the average of several's softmax outputs (paper §6).

    Args:
        paths: checkpoints, or run folders, whose best checkpoint is taken.
        overrides: `key=value` settings laid over the checkpoints' configs.
        keep: whether one network's probabilities are kept in memory and returned, as those of
            several always are.

    Raises CheckpointError, DatasetError, ConfigError where they cannot be averaged, or MachineError
    where the probabilities to keep do not fit in memory.
    """
    found = [checkpoints.at(path) for path in paths]
    configs = [overridden(for_one_pass(c.config), *IN_ONE_PROCESS, *overrides) for c in found]
    config, topology = configs[0], connect(configs[0])
    dataset = found[0].open_data(config)
    _check_alike(found, configs, dataset)
    # One network after another; the last one completes the averages, which are scored batch by
    # batch.
    kept = _memory_for_all(configs, dataset) if keep or len(found) > 1 else None
    sums = torch.zeros(4, dtype=torch.float64)  # as `_batch_sums` returns
    confusion = torch.zeros(len(dataset.classes), len(dataset.classes), dtype=torch.int64)
    for checkpoint, own in zip(found, configs, strict=True):
        end = 0
        for outputs, truth in _predicted(checkpoint, own, topology, dataset):
            part = outputs / len(found)
            if kept is not None:
                begin, end = end, end + len(part)
                part = kept[0][begin:end].add_(part)
                kept[1][begin:end] = truth
            if checkpoint is found[-1]:
                sums += _batch_sums(part, truth)
                add_confusion(confusion, part, truth)
    score = _finite(_score(sums, config, dataset), *paths)
    average, labels = kept or (None, None)
    how = _conditions(found[0], config, dataset)
    return Evaluation(score, tuple(found), dataset.classes, confusion, average, labels, how)


def _predicted(
    checkpoint: Checkpoint, config: Config, topology: Topology, dataset: Dataset
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `_probabilities` does, of a checkpoint's network, with a progress bar; what begins
    is logged where there is no terminal."""
    allow_tf32(config.train.precision)
    engine = make_engine(config, topology)
    engine.load(checkpoint.parameters(), None)
    total = len(evaluation_split(config, dataset))
    if not sys.stderr.isatty():
        views = counted(config.evaluate.views, "view")
        log.info(f"{checkpoint.path}: evaluating {counted(total, 'image')}, {views} each")
    with progress_bar("evaluating", total=total, unit=" images", leave=False, delay=2) as bar:
        for outputs, labels in _probabilities(engine, config, dataset):
            yield outputs, labels
            bar.update(len(labels))


def _check_alike(found: Sequence[Checkpoint], configs: Sequence[Config], dataset: Dataset) -> None:
    """Raise ConfigError where networks cannot be averaged, or are to be scored on images that one
    of them was trained on.

    Args:
        configs: of the networks, as they are evaluated.
        dataset: the data set that they are scored on.
    """
    config = configs[0]
    alike = ["model.classes", "data.path", "data.eval_split", "evaluate.views"]
    if config.data.eval_split == HELD_OUT:  # else a network may have been trained on some of it
        alike += ["data.hold_out", "data.train_split"]
    for checkpoint, other in zip(found, configs, strict=True):
        for key in alike:
            here, there = flat(other)[key], flat(config)[key]
            if here != there:
                model = key.startswith("model.")
                remedy = "it must be the same" if model else f"set {key}=VALUE, if it suits both"
                raise ConfigError(
                    f"{checkpoint.path}: {key}={here!r}, but {there!r} in {found[0].path}: to "
                    f"average them {remedy}"
                )
        checkpoint.check_classes(dataset)
        most = checkpoint.config.data.hold_out
        same = checkpoint.manifest["dataset"] == dataset.digest
        if same and other.data.eval_split == HELD_OUT and other.data.hold_out > most:
            less = f"data.hold_out={most:g} or less, or " if most else ""
            raise ConfigError(
                f"data.hold_out={other.data.hold_out:g}: {checkpoint.path} was trained on some of "
                f"these images, since it held out {most:g}: set {less}another data.eval_split="
            )


def _memory_for_all(configs: Sequence[Config], dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return zeros for the probabilities of all samples, and for their labels; raise MachineError
    where they would not fit in memory."""
    samples, classes = len(evaluation_split(configs[0], dataset)), len(dataset.classes)
    dtypes = [parameter_dtype(config.train.precision) for config in configs]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    needed, free = samples * classes * dtype.itemsize, free_host_memory()
    if needed > free:
        what, remedy = (
            ("the average of networks", "evaluate them one by one")
            if len(configs) > 1
            else ("keeping predictions", "do without them (--predictions, keep=)")
        )
        raise MachineError(
            f"{what} takes {samples} x {classes} probabilities, {needed / 1e9:.1f} GB of memory, "
            f"of which {free / 1e9:.1f} GB are free: {remedy}, or evaluate fewer images "
            "(data.eval_split)"
        )
    return torch.zeros(samples, classes, dtype=dtype), torch.zeros(samples, dtype=torch.int64)


def _conditions(checkpoint: Checkpoint, config: Config, dataset: Dataset) -> Conditions:
    """Return the conditions under which the first network is scored."""
    changed = _changed(checkpoint.config, config)
    if checkpoint.manifest["dataset"] not in ("imported", dataset.digest):
        changed["data.path"] = config.data.path
    return Conditions(
        split=config.data.eval_split,
        views=config.evaluate.views,
        data=str(dataset.folder),
        data_sha256=dataset.digest,
        changed=changed,
    )


def _changed(trained: Config, config: Config) -> dict[str, Any]:
    """Return the keys that define a run and differ from those it was trained with, less those that
    `Conditions` holds itself."""
    before, now = fingerprint(trained), fingerprint(config)
    separate = ("data.eval_split", "evaluate.views")
    return {key: now[key] for key in now if now[key] != before.get(key) and key not in separate}


def _finite(score: Score, *networks: Path) -> Score:
    """Return a score; raise NotFinite where its loss, and so a network's output, is not finite."""
    if not math.isfinite(score.loss):
        raise NotFinite(
            f"{' + '.join(map(str, networks))}: the network's outputs are not finite (loss "
            f"{score.loss}), so it cannot be scored: evaluate an earlier checkpoint, or look at "
            "the data and its mean"
        )
    return score


def _probabilities(
    engine: Engine, config: Config, dataset: Dataset
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield softmax outputs averaged over views (n, classes) and labels (n,), batch by batch, on
    the CPU. The device computes the next batch meanwhile.

    The label of a damaged sample is −1. Every rank yields the same number of batches, of any size,
    even zero.
    """
    topology, size = engine.topology, config.evaluate.batch
    every = range(len(evaluation_split(config, dataset)))
    shares = [topology.shares(every[at : at + size]) for at in range(0, len(every), size)]
    mine = [parts[topology.column] for parts in shares]
    counts = [[len(part) for part in parts] for parts in shares]
    pipeline = make_pipeline(config, topology, dataset, config.data.eval_split)

    def launched(entry: tuple[Decoded, list[int]]) -> tuple[Callable[[], Tensor], ...]:
        part, sizes = entry
        batch = part.joined(sizes, topology.column_group).batch()
        outputs = engine.predict(batch.windows).softmax(1)
        labels = batch.labels.masked_fill(batch.damaged, -1)
        mean = outputs.unflatten(0, (-1, config.evaluate.views)).mean(1)
        return to_host(mean), to_host(labels)

    try:
        batches = pipeline.batches(evaluation_plan(config, mine))
        entries = zip(batches, counts, strict=True)
        for probabilities, labels in started_ahead(entries, launched, 1):
            yield probabilities(), labels()
    finally:
        pipeline.close()


def _batch_sums(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return sums over a batch, (4,) float64: samples, ranked first, among the first five, loss.

    Args:
        labels: (n,); samples with a negative label are left out.
    """
    sound, labels = labels >= 0, labels.clamp_min(0)
    own = probabilities.double().gather(1, labels[:, None])[:, 0]
    rank = label_ranks(probabilities, labels)
    loss = -own.clamp_min(torch.finfo(torch.float64).tiny).log()
    values = sound, (rank < 1) & sound, (rank < 5) & sound, loss * sound
    return torch.stack([value.double().sum() for value in values])


def _score(sums: Tensor, config: Config, dataset: Dataset) -> Score:
    """Return the score of `_batch_sums` over the split; raise DatasetError where too much is
    damaged."""
    samples, correct1, correct5, loss = sums.tolist()
    split = evaluation_split(config, dataset)
    check_damaged(config, split, len(split) - int(samples))
    return Score(int(samples), int(correct1), int(correct5), loss / samples)
