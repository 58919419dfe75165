"""Evaluation: every sample counted exactly once, one window or ten, one network or several."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alexnet_dist import checkpoint as checkpoints
from alexnet_dist.checkpoint import Checkpoint
from alexnet_dist.config import Config, flat
from alexnet_dist.config_layers import load_config
from alexnet_dist.data.dataset import Dataset, open_for
from alexnet_dist.data.pipeline import Pipeline
from alexnet_dist.data.sampler import evaluation_plan
from alexnet_dist.data.torch_pipeline import TorchPipeline
from alexnet_dist.engine import DTYPES, Engine, label_ranks
from alexnet_dist.engines import make_engine
from alexnet_dist.errors import CheckpointError, ConfigError
from alexnet_dist.preemption import StopSignals
from alexnet_dist.topology import Topology, connect


@dataclass(frozen=True)
class Score:
    """Exact counts over a split, and the mean loss (nats) of the averaged softmax outputs."""

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

    def tags(self) -> dict[str, float]:
        """For metrics: the counts, and the shares."""
        return {**vars(self), "top1": self.top1, "top5": self.top5}


def make_pipeline(config: Config, topology: Topology, dataset: Dataset, split: str) -> Pipeline:
    """The pipeline a config names, over one split, for this rank."""
    match config.data.pipeline:
        case "torch":
            threads = config.data.workers or torch.get_num_threads()
            return TorchPipeline(
                config,
                dataclasses.replace(dataset.splits[split], _files={}),  # its own, to close
                dataset.statistics,
                topology.device,
                DTYPES[config.train.precision],
                threads,
            )


def evaluate(
    engine: Engine,
    config: Config,
    topology: Topology,
    dataset: Dataset,
    signals: StopSignals | None = None,
) -> Score | None:
    """Score one network on the evaluation split, by this run's own ranks. Collective.

    Returns:
        The score, alike on every rank; None where a signal stopped it.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for probabilities, labels in _probabilities(engine, config, topology, dataset):
        totals += _counted(probabilities, labels)
        if signals is not None and signals.poll(topology):
            return None
    if topology.column != 0:  # a replica's columns hold the same probabilities
        totals.zero_()
    loss, correct1, correct5 = topology.sum(totals).tolist()
    samples = len(dataset.splits[config.data.eval_split])
    return Score(samples, int(correct1), int(correct5), loss / samples)


def evaluate_checkpoints(
    paths: Sequence[Path], overrides: Sequence[str] = ()
) -> tuple[Score, list[Checkpoint]]:
    """Score checkpoints, or the average of their softmax outputs (paper §6), in this process.

    Args:
        paths: run folders (their best checkpoint) or checkpoints.
        overrides: `key=value` over the first one's config.
    """
    found = [_checkpoint_at(path) for path in paths]
    alone = ("layout.kind=one", "layout.ranks=0")
    configs = [load_config([c.manifest["config"], *alone, *overrides]) for c in found]
    config, topology = configs[0], connect(configs[0])
    dataset = open_for(config)
    for checkpoint, other in zip(found, configs, strict=True):
        for key in ("model.classes", "data.path", "data.eval_split", "evaluate.views"):
            here, there = flat(other)[key], flat(config)[key]
            if here != there:
                raise ConfigError(
                    f"{checkpoint.path}: {key}={here!r}, and {there!r} in {found[0].path}: to "
                    f"average them give {key}=VALUE, if that fits both"
                )
    average: list[Tensor] = []
    for checkpoint, own in zip(found, configs, strict=True):
        engine = make_engine(own, topology)
        engine.load(checkpoint.parameters(), None)
        outputs = _probabilities(engine, own, topology, dataset)
        parts = torch.cat([probabilities.cpu() for probabilities, _ in outputs]) / len(found)
        average = [average[0] + parts] if average else [parts]
    split = dataset.splits[config.data.eval_split]
    labels = torch.from_numpy(split.labels(torch.arange(len(split)).numpy()))
    loss, correct1, correct5 = _counted(average[0], labels).tolist()
    return Score(len(split), int(correct1), int(correct5), loss / len(split)), found


def _probabilities(
    engine: Engine, config: Config, topology: Topology, dataset: Dataset
) -> Iterator[tuple[Tensor, Tensor]]:
    """Softmax outputs averaged over views (n, classes) and labels (n,), batch by batch.

    Every rank goes through as many batches, of any size, even none.
    """
    total, size = len(dataset.splits[config.data.eval_split]), config.evaluate.batch
    wholes = [range(start, min(start + size, total)) for start in range(0, total, size)]
    shares = [topology.shares(whole) for whole in wholes]
    mine = [parts[topology.column] for parts in shares]
    counts = [[len(part) for part in parts] for parts in shares]
    pipeline = make_pipeline(config, topology, dataset, config.data.eval_split)
    try:
        batches = pipeline.batches(evaluation_plan(config, mine))
        for part, sizes in zip(batches, counts, strict=True):
            views = config.evaluate.views
            batch = part.joined(sizes, topology.column_group, views)
            outputs = engine.predict(batch.windows).softmax(1).unflatten(0, (-1, views))
            yield outputs.mean(1), batch.labels
    finally:
        pipeline.close()


def _counted(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(3,) float64 on the CPU: summed loss, labels ranked first, and among the first five."""
    own = probabilities.double().gather(1, labels[:, None])
    rank = label_ranks(probabilities, labels)
    loss = -own.clamp_min(torch.finfo(torch.float64).tiny).log().sum()
    return torch.stack([loss, (rank < 1).sum().double(), (rank < 5).sum().double()]).cpu()


def _checkpoint_at(path: Path) -> Checkpoint:
    if (path / "checkpoints").is_dir():
        return checkpoints.best(path / "checkpoints")
    if (path / "manifest.json").is_file():
        return checkpoints.verify(path)
    raise CheckpointError(
        f"{path} is neither a run folder nor a checkpoint: name runs/NAME or "
        "runs/NAME/checkpoints/step-…"
    )
