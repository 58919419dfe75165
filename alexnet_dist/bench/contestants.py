"""Contestants: each lives in a process of its own, with the memory and threads it would have by
itself, and works when it is its turn; so what one sets (an allocator, say) is not another's.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import ConfigError

# A training step, say; what it gives is kept beside its seconds, and may be under way on a GPU.
Work = Callable[[], float | Tensor]


class Contestant:
    """A pass of a benchmark: seconds of one piece of work.

    Args:
        module: of alexnet_dist.bench; its `contestant(name, config)` makes the Work.
        pieces: of work in a pass.
        plain: with the environment that a user of plain PyTorch has.
    """

    def __init__(
        self, module: str, name: str, config: Config, pieces: int = 2, plain: bool = False
    ) -> None:
        self.name, self.pieces, self.given = name, pieces, list[float]()
        self.peak = 0  # bytes of a GPU's memory
        code = (
            f"from alexnet_dist.bench import contestants as c; c.serve{module, name, flat(config)}"
        )
        environment = dict(os.environ)
        if plain:
            environment.pop("GOMP_SPINCOUNT", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def __call__(self) -> float:
        """Seconds a piece of work."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(self.pieces, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise ConfigError(f"bench: {self.name!r} failed; it has said why")
        seconds, given, self.peak = json.loads(answer)
        self.given.append(given)
        return float(seconds)

    def memory(self) -> int:
        """Bytes resident now."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve(module: str, name: str, config: dict[str, Any]) -> None:
    """A contestant's process: a line in, so much work, its seconds and what the first gave out."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    make = importlib.import_module(f"alexnet_dist.bench.{module}").contestant
    work: Work = make(name, load_config([config]))
    for line in sys.stdin:
        pieces = int(line)
        begin = time.perf_counter()
        given, peak = [work() for _ in range(pieces)], 0
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        took = time.perf_counter() - begin
        print(json.dumps([took / pieces, float(given[0]), peak]), file=answers, flush=True)
