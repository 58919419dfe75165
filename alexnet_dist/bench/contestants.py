"""Contestants: what is timed, each in a process of its own, with the memory and threads that it
would have alone. What one of them sets (an allocator, say) does not affect the others.

They start, and compile what they are made of, all at the same time; then each works only when it is
its turn.
"""

import contextlib
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

# One piece of work, such as a training step; its result is kept beside its seconds. A result on a
# GPU may still be being computed.
Work = Callable[[], float | Tensor]


class Contestant:
    """A pass that runs some work in another process, and returns the seconds of one piece of it.

    Args:
        module: module of alexnet_dist.bench whose `contestant(name, config)` makes the work.
        pieces: pieces of work in a pass.
        plain: whether to run in the environment of a user of plain PyTorch.
    """

    def __init__(
        self, module: str, name: str, config: Config, pieces: int = 2, plain: bool = False
    ) -> None:
        self.name, self.pieces = name, pieces
        self.results: list[float] = []  # of each pass, that of its first piece
        self.peak = 0  # bytes of GPU memory allocated at the peak
        self._is_ready = False
        code = (
            "from alexnet_dist.bench.contestants import serve; "
            f"serve({module!r}, {name!r}, {flat(config)!r})"
        )
        # Several compile at the same time, by default with a process for each core.
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4"} | os.environ
        if plain:
            environment.pop("GOMP_SPINCOUNT", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, process_group=0,  # so that Ctrl-C reaches this process alone
        )  # fmt: skip

    def wait(self) -> None:
        """Wait until the work is made, or has failed to be, which the first pass reports."""
        assert self._process.stdout is not None
        if not self._is_ready:
            self._process.stdout.readline()
            self._is_ready = True

    def __call__(self) -> float:
        """Run a pass, and return the seconds of a piece of work."""
        self.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            print(self.pieces, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise ConfigError(f"bench: {self.name!r} failed, and has reported why")
        seconds, result, self.peak = json.loads(answer)
        self.results.append(result)
        return float(seconds)

    def memory(self) -> int:
        """Return the process's resident memory in bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        """End the process; more than once is no error."""
        self._process.kill()
        self._process.communicate()


def serve(module: str, name: str, config: dict[str, Any]) -> None:
    """Run in a contestant's process: make the work, and say so; then, for each line with a number
    of pieces, do it, and answer with its seconds, the first piece's result, and the peak of GPU
    memory."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that libraries do not print answers
    make = importlib.import_module(f"alexnet_dist.bench.{module}").contestant
    work: Work = make(name, load_config([config]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        pieces = int(line)
        begin = time.perf_counter()
        results, peak = [work() for _ in range(pieces)], 0
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        took = time.perf_counter() - begin
        print(json.dumps([took / pieces, float(results[0]), peak]), file=answers, flush=True)
