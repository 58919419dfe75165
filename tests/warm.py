"""What the server of forks.py imports before it forks: the package and its dependencies."""

import fcntl
import importlib
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher

for name in (
    "alexnet_dist.cli.main",  # before torch: it says how long OpenMP's threads spin
    "alexnet_dist.training.loop",
    "alexnet_dist.reporting.figures",
    "alexnet_dist.parallel.spawn",
    "matplotlib.backends.backend_agg",
    "torch._dynamo",  # what some layouts import on their way to the first step
    "torch.fx.experimental.symbolic_shapes",
    "forks",
):
    importlib.import_module(name)
importlib.import_module("alexnet_dist.data.pipelines.torch_pipeline")._compiled()
numba.njit(lambda: 0)()  # makes its compiler ready, and starts no thread

_compile, _held = Dispatcher.compile, list[Any]()


def _one_at_a_time(loop: Any, signature: Any) -> Any:
    """Compile a loop, or load what another process compiled meanwhile: ranks come to it together,
    and it takes seconds."""
    with global_compiler_lock, open(loop.py_func.__code__.co_filename) as source:
        if not _held:  # else it is called by a loop that is being compiled
            fcntl.flock(source, fcntl.LOCK_EX)
        _held.append(loop)
        try:
            return _compile(loop, signature)
        finally:
            _held.pop()


Dispatcher.compile = _one_at_a_time
