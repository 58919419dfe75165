"""Choose and make the pipeline of a run, and make the batches that it trains on."""

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Literal

from alexnet_dist.config.from_data import AUTO, NO_SPLIT
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Decoded, Pipeline
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.pipelines.dali_pipeline import DaliPipeline, check_dali, gpu_decoders
from alexnet_dist.data.pipelines.resident import FreeMemory, ResidentPipeline, decoded_bytes, gb
from alexnet_dist.data.pipelines.torch_pipeline import TorchPipeline
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.data.sampler import TrainSampler
from alexnet_dist.errors import in_words, one_line
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE

_SHARE = 0.5  # of the memory left free by the network, which decoded images may take
Kind = Literal["resident", "dali", "torch"]


def splits_of(config: Config) -> list[str]:
    """Return the splits that a run reads."""
    seen = config.data.train_split, config.data.eval_split
    return [name for name in dict.fromkeys(seen) if name != NO_SPLIT]


def choose_pipeline(config: Config, topology: Topology, dataset: Dataset) -> tuple[Config, str]:
    """Return the config with data.pipeline=auto replaced by what suits this machine and data set,
    alike on every rank, and the reason. Collective."""
    if config.data.pipeline != AUTO:
        return config, "set"
    kind: Kind = "torch"
    if topology.device.type == "cpu":  # there decoding is 1 % of a step: docs/log.md
        why = "auto: on a CPU"
    else:
        size = decoded_bytes(config, dataset, splits_of(config))
        free = FreeMemory.of(config, topology).device
        kind, why = choose_on_gpu(size, free, lambda: _dali_fails(topology))
    return replace(config, data=replace(config.data, pipeline=kind)), why


def choose_on_gpu(size: float, free: float, dali_fails: Callable[[], str]) -> tuple[Kind, str]:
    """Return what data.pipeline=auto chooses on a GPU, and the reason.

    Args:
        size: bytes of all decoded images on a rank.
        free: bytes of its GPU's memory that the network leaves free.
        dali_fails: returns why DALI cannot decode there; empty if it can.
    """
    why = f"auto: decoded images would take {gb(size)} per rank, of {gb(free)} free"
    if size <= _SHARE * free:
        return "resident", why
    if wrong := dali_fails():
        return "torch", f"{why}, and DALI cannot decode there: {wrong}"
    return "dali", why


def decoder_in_words(config: Config, topology: Topology) -> str:
    """Return what decodes images for a GPU, for the log; empty where there is nothing to say."""
    if config.data.pipeline == "dali" and topology.device.type == "cuda" and topology.is_rank_0:
        return f", {gpu_decoders(topology.device.index or 0)}"
    return ""


def _dali_fails(topology: Topology) -> str:
    """Return why DALI cannot decode on a rank's GPU; empty if it can on all ranks. Collective."""
    wrong = ""
    try:
        check_dali(topology.device.index)
    except Exception as error:  # of any of its libraries
        wrong = f"{in_words(error) or one_line(error)}"
    return topology.first_message(wrong)


def make_pipeline(config: Config, topology: Topology, dataset: Dataset, split: str) -> Pipeline:
    """Return this rank's pipeline over one split, of the kind the config names. Collective."""
    config, _ = choose_pipeline(config, topology, dataset)
    device = topology.device
    preprocess = Preprocess(config, dataset.statistics, device, DTYPES[config.train.precision])
    threads = config.data.workers or topology.cores
    if config.data.pipeline == "resident":
        return ResidentPipeline(config, topology, dataset, split, preprocess, threads)
    own = replace(dataset.splits[split])  # a copy, with files of its own to close
    if config.data.pipeline == "dali":
        return DaliPipeline(config, own, device, preprocess, threads)
    return TorchPipeline(config, own, device, preprocess, threads)


def train_batches(
    config: Config, topology: Topology, dataset: Dataset, first_step: int, last_step: int
) -> Generator[Decoded]:
    """Yield the samples of steps first_step … last_step − 1, decoded ahead. Collective.

    The seed alone decides which samples are in a step's batch. This rank decodes a share of its
    replica's samples and receives the rest from the replica's other column rank. The caller must
    close the generator.
    """
    split = config.data.train_split
    shares = topology.shares(range(config.train.batch))
    counts = [len(slots) for slots in shares]
    sampler = TrainSampler(config, len(dataset.splits[split]), dataset.statistics)
    plan = sampler.plan(first_step, last_step, shares[topology.column])
    pipeline = make_pipeline(config, topology, dataset, split)
    try:
        decoded = pipeline.batches(plan)
        while True:
            with TIMELINE.span("data"):
                part = next(decoded, None)
            if part is None:
                return
            yield part.joined(counts, topology.column_group)
    finally:
        pipeline.close()


def for_one_pass(config: Config) -> Config:
    """Return the config with a pipeline for one pass over a split: torch in place of resident,
    since keeping decoded images in memory only pays where they are used again."""
    if config.data.pipeline not in ("resident", AUTO):
        return config
    return replace(config, data=replace(config.data, pipeline="torch"))
