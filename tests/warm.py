"""What the server of forks.py imports before it forks: the package and its dependencies, and what
tests share."""

import importlib

import cycles
import numba

for name in (
    "alexnet_dist.cli.main",  # before torch: it says how long OpenMP's threads spin
    "alexnet_dist.training.loop",
    "alexnet_dist.reporting.figures",
    "alexnet_dist.parallel.spawn",
    "matplotlib.backends.backend_agg",
    "torch._dynamo",  # what some layouts import on their way to the first step
    "torch.fx.experimental.symbolic_shapes",
    "conftest",
):
    importlib.import_module(name)
importlib.import_module("alexnet_dist.data.pipelines.torch_pipeline")._compiled()
numba.njit(lambda: 0)()  # makes its compiler ready, and starts no thread
cycles.look()  # in each fork
