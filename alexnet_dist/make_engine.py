"""Which engine computes which layout."""

from alexnet_dist.config import Config
from alexnet_dist.engine import Engine
from alexnet_dist.layouts import ZERO_STAGES
from alexnet_dist.topology import Topology
from alexnet_dist.torch_engine import TorchEngine


def make_engine(config: Config, topology: Topology) -> Engine:
    """The engine of this rank, its weights drawn. Collective."""
    if config.layout.kind in ZERO_STAGES:
        from alexnet_dist.zero import ZeroEngine  # imports DeepSpeed, for seconds

        return ZeroEngine(config, topology)
    return TorchEngine(config, topology)
