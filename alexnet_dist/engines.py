"""Which engine computes which layout."""

from alexnet_dist.config import Config
from alexnet_dist.engine import Engine, TorchEngine
from alexnet_dist.layouts import ZERO_STAGES
from alexnet_dist.topology import Topology


def make_engine(config: Config, topology: Topology) -> Engine:
    if config.layout.kind in ZERO_STAGES:
        from alexnet_dist.zero import ZeroEngine  # imports DeepSpeed, for seconds

        return ZeroEngine(config, topology)
    return TorchEngine(config, topology)
