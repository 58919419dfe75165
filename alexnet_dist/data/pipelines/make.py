"""Which pipeline decodes which config's samples."""

import dataclasses

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Pipeline
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.pipelines.auto import settled
from alexnet_dist.data.pipelines.resident import ResidentPipeline
from alexnet_dist.data.pipelines.torch_pipeline import TorchPipeline
from alexnet_dist.data.preprocess import Finish
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.topology import Topology


def make_pipeline(config: Config, topology: Topology, dataset: Dataset, split: str) -> Pipeline:
    """The pipeline a config names, over one split, for this rank. Collective."""
    config, _ = settled(config, topology, dataset)
    device = topology.device
    finish = Finish(config, dataset.statistics, device, DTYPES[config.train.precision])
    threads = config.data.workers or topology.cores
    if config.data.pipeline == "resident":
        return ResidentPipeline(config, topology, dataset, split, finish, threads)
    own = dataclasses.replace(dataset.splits[split])  # with files of its own, to close
    if config.data.pipeline == "dali":
        from alexnet_dist.data.pipelines.dali_pipeline import DaliPipeline

        return DaliPipeline(config, own, device, finish, threads)
    return TorchPipeline(config, own, device, finish, threads)


def once(config: Config) -> Config:
    """The config of a run for looking at a split once, or at some of it: images that are kept in
    memory pay where they come again."""
    if config.data.pipeline == "dali":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, pipeline="torch"))
