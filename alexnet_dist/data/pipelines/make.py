"""Which pipeline decodes which config's samples."""

import dataclasses

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Pipeline
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.pipelines.torch_pipeline import TorchPipeline
from alexnet_dist.data.preprocess import Finish
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.topology import Topology


def make_pipeline(config: Config, topology: Topology, dataset: Dataset, split: str) -> Pipeline:
    """The pipeline a config names, over one split, for this rank."""
    device = topology.device
    finish = Finish(config, dataset.statistics, device, DTYPES[config.train.precision])
    own = dataclasses.replace(dataset.splits[split], _files={})  # its own files, to close
    threads = config.data.workers or topology.cores
    match config.data.pipeline:
        case "torch":
            return TorchPipeline(config, own, device, finish, threads)
        case "dali":
            from alexnet_dist.data.pipelines.dali_pipeline import DaliPipeline

            return DaliPipeline(config, own, device, finish, threads)
