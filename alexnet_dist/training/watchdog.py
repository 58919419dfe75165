"""A watchdog: ends a run that no longer progresses, and says which rank holds it up, and where.

A thread of each rank watches how often the training loop polls for signals. If the loop stands
still for most of `layout.timeout_s`, the rank tells the others, through the store that connected
them, how many rounds it has made and where it is; the ranks that made the fewest, or do not answer,
hold up the rest. The process group's own timeout would only say that some rank waited.

Time in which this process was stopped (SIGSTOP, Ctrl-Z, a job that Slurm suspends) does not count:
the thread adds up the time that it itself ran, and the process groups' timeouts, which use the
wall clock, are extended.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numba import types
from torch._C._distributed_c10d import HashStore

from alexnet_dist.network.kernels.numba_loops import compiled
from alexnet_dist.parallel.stop_signals import StopSignals
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.training.run_folder import RunFolder

log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parent.parent
_usleep: Any = types.ExternalFunction("usleep", types.intc(types.uint32))
_abort: Any = types.ExternalFunction("abort", types.void())


class Watchdog:
    """Watches this process's main thread from construction until `close`.

    Args:
        signals: counts the rounds of the training loop, each of which polls them.
    """

    def __init__(self, topology: Topology, signals: StopSignals, folder: RunFolder) -> None:
        self._topology, self._signals, self._folder = topology, signals, folder
        # The rest of the time is for the diagnosis, before collectives time out.
        self._limit_s = 0.8 * folder.config.layout.timeout_s
        self._closed = threading.Event()
        self._store = topology.store or HashStore()  # of this process alone
        self._post("who", {"host": socket.gethostname(), "pid": os.getpid()})
        topology.disable_timeouts()
        self._pause_s = min(0.9, self._limit_s / 20)
        # [heartbeats of the watchdog's thread, 1 once the watchdog is closed]; the guard reads it.
        self._beats = np.zeros(2, np.int64)
        self._prints = not faulthandler.is_enabled()
        if self._prints:
            faulthandler.enable(2)  # sys.stderr of a notebook has no file descriptor
        last = self._beats, int(2 * self._limit_s / self._pause_s), int(1e6 * self._pause_s)
        for name, target, arguments in (
            ("watchdog", self._watch, ()),
            ("guard", compiled(_abort_unless_beating, nogil=True), last),
        ):
            threading.Thread(target=target, args=arguments, name=name, daemon=True).start()

    def close(self) -> None:
        """Stop both threads."""
        self._closed.set()
        self._beats[1] = 1
        if self._prints:
            faulthandler.disable()

    def _watch(self) -> None:
        """Beat until closed; end the process once the loop has stood still for the limit."""
        seen, still_s, last_look = self._signals.polls, 0.0, time.monotonic()
        while not self._closed.wait(self._pause_s):
            self._beats[0] += 1
            now, before, last_look = self._signals.polls, last_look, time.monotonic()
            # A longer gap than that means that this process itself was stopped.
            still_s += min(last_look - before, 2 * self._pause_s)
            if now != seen:
                seen, still_s = now, 0.0
            elif still_s > self._limit_s:
                with contextlib.suppress(dist.DistError, RuntimeError):  # the store may be gone
                    self._end(seen)
                os._exit(1)

    def _end(self, rounds: int) -> None:
        """Find the rank that holds up the run. The first stuck rank logs it, for all."""
        self._post("stuck", {"rounds": rounds, **_where()})
        time.sleep(self._limit_s / 20 + 0.5)  # until the other stuck ranks have reported
        ranks = range(self._topology.world_size)
        stuck = {rank: message for rank in ranks if (message := self._read("stuck", rank))}
        who = {rank: self._read("who", rank) or {} for rank in ranks}
        silent = [rank for rank in ranks if rank not in stuck]
        if self._topology.global_rank == min(stuck):
            verdict = _verdict(stuck, silent, who, self._limit_s)
            log.error(verdict)
            if self._topology.is_rank_0:
                self._folder.report("failed", exit=1, reason=verdict.partition("\n")[0])
            self._post("said", {})
        else:
            deadline = time.monotonic() + 5
            while not self._read("said", min(stuck)) and time.monotonic() < deadline:
                time.sleep(0.05)
        for rank in silent:
            if who[rank].get("host") == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(who[rank]["pid"], signal.SIGKILL)  # it would not react to SIGTERM

    def _post(self, what: str, content: dict[str, Any]) -> None:
        """Leave a message for the other ranks, which read it by `_read`."""
        self._store.set(f"{what}/{self._topology.global_rank}", json.dumps(content))

    def _read(self, what: str, rank: int) -> dict[str, Any] | None:
        """Return the message that a rank has left under this key; None if it has left none."""
        key = f"{what}/{rank}"
        return dict(json.loads(self._store.get(key))) if self._store.check([key]) else None


def _abort_unless_beating(beats: Any, most: int, pause_us: int) -> None:
    """Abort the process after `most` pauses without a beat of the watchdog's thread.

    This guards against something that holds Python's lock, so that the watchdog cannot run either.
    Compiled by Numba, it runs without the lock; at SIGABRT faulthandler prints every thread's stack
    without it too.
    """
    still, seen = 0, beats[0]
    while beats[1] == 0 and still < most:
        _usleep(pause_us)
        now = beats[0]
        still = still + 1 if now == seen else 0
        seen = now
    if beats[1] == 0:
        _abort()


def _verdict(
    stuck: dict[int, dict[str, Any]], silent: list[int], who: dict[int, dict[str, Any]],
    limit_s: float,
) -> str:  # fmt: skip
    """Return a report: its first line says who holds up the run, the others hold stacks."""
    order = {rank: (message["rounds"], message["waits"]) for rank, message in stuck.items()}
    behind = [rank for rank, place in order.items() if place == min(order.values())]
    at_fault = silent or (behind if len(behind) < len(stuck) else [])
    names = [f"{r} (process {who[r].get('pid')} on {who[r].get('host')})" for r in
             at_fault or stuck]  # fmt: skip
    if silent:
        what = f"no step for {limit_s:g} s: rank {', '.join(names)} does not answer"
    elif at_fault:
        what = f"no step for {limit_s:g} s: the others wait for rank {', '.join(names)}"
    else:
        what = f"no step for {limit_s:g} s on any rank: {', '.join(names)}"
    lines = [f"{what}; the run ends (layout.timeout_s), start it again to resume"]
    lines += [f"rank {rank}: {_from_outside(who[rank])}" for rank in silent]
    lines += [f"rank {rank} is in\n{message['stack']}" for rank, message in sorted(stuck.items())]
    return "\n".join(lines)


def _where() -> dict[str, Any]:
    """Return where this process's main thread is ("stack": its innermost frames and those of this
    package), and whether it waits for other ranks there ("waits"; a backward pass may)."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    lines = traceback.extract_stack(frame)
    ours = [line for line in lines[:-3] if Path(line.filename).is_relative_to(_PACKAGE)]
    waits = any(
        "torch/distributed" in line.filename
        or line.name == "_engine_run_backward"
        or re.search(r"\.(wait|synchronize|cpu|item)\(\)", line.line or "")  # waits for a GPU
        for line in lines
    )
    return {"stack": "".join(traceback.format_list([*ours, *lines[-3:]])), "waits": waits}


def _from_outside(process: dict[str, Any]) -> str:
    """Return the stack of another process of this host, by py-spy if that is installed."""
    beside = Path(sys.executable).with_name("py-spy")
    spy = str(beside) if beside.exists() else shutil.which("py-spy")
    if process.get("host") != socket.gethostname():
        return f"on another host: look there with py-spy dump --pid {process.get('pid')}"
    if spy is None:
        return "install py-spy to see where it is"
    command = [spy, "dump", "--nonblocking", "--pid", str(process["pid"])]
    try:
        dump = subprocess.run(command, check=False, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return "py-spy could not read its stack either"
    return dump.stdout or dump.stderr
