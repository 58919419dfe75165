"""Make the pipeline that a config names, and the batches of a training run."""

import dataclasses
from collections.abc import Generator

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch, Pipeline
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.pipelines.auto import choose_pipeline
from alexnet_dist.data.pipelines.resident import ResidentPipeline
from alexnet_dist.data.pipelines.torch_pipeline import TorchPipeline
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.data.sampler import TrainSampler
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE


def make_pipeline(config: Config, topology: Topology, dataset: Dataset, split: str) -> Pipeline:
    """Return this rank's pipeline over one split, of the kind the config names. Collective."""
    config, _ = choose_pipeline(config, topology, dataset)
    device = topology.device
    preprocess = Preprocess(config, dataset.statistics, device, DTYPES[config.train.precision])
    threads = config.data.workers or topology.cores
    if config.data.pipeline == "resident":
        return ResidentPipeline(config, topology, dataset, split, preprocess, threads)
    own = dataclasses.replace(dataset.splits[split])  # a copy, with files of its own to close
    if config.data.pipeline == "dali":
        from alexnet_dist.data.pipelines.dali_pipeline import DaliPipeline

        return DaliPipeline(config, own, device, preprocess, threads)
    return TorchPipeline(config, own, device, preprocess, threads)


def train_batches(
    config: Config, topology: Topology, dataset: Dataset, first_step: int, last_step: int
) -> Generator[Batch]:
    """Yield the batches of steps first_step … last_step − 1, prepared ahead. Collective.

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
    """Return the config with a pipeline for one pass over a split: keeping decoded images in memory
    only pays where they are used again."""
    if config.data.pipeline == "dali":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, pipeline="torch"))
