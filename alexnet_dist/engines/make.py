"""The choice of the engine for a layout."""

from alexnet_dist.config.schema import Config
from alexnet_dist.engines.base import Engine
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.sharded_fc import ShardedFcEngine
from alexnet_dist.parallel.layouts import ZERO_STAGES
from alexnet_dist.parallel.topology import Topology


def make_engine(config: Config, topology: Topology) -> Engine:
    """Make this rank's engine, with initial weights. Collective."""
    if config.layout.kind in ZERO_STAGES:
        from alexnet_dist.engines.zero import ZeroEngine  # imports DeepSpeed, which takes seconds

        return ZeroEngine(config, topology)
    if config.layout.kind == "sharded_fc":
        return ShardedFcEngine(config, topology)
    return TorchEngine(config, topology)
