"""A watchdog: ends a run that no longer moves, and says which rank holds it up, and where.

A thread of every rank looks whether its loop still goes round. When it has not for most of
`layout.timeout_s`, the rank tells the others how often it went round and where it is, by the store
that joined them; those that stopped first, or say nothing, hold up the rest. The process group's
own timeout would only say that somebody waited.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alexnet_dist.parallel.topology import Topology

log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parent.parent


class Watchdog:
    """Watches this process's main thread, from now until `close`.

    Args:
        rounds: how often the loop went round.
        limit_s: the longest a round may take.
        report: told why the run ends, before it does; by rank 0 alone.
    """

    def __init__(
        self, topology: Topology, rounds: Callable[[], int], limit_s: float,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._topology, self._rounds, self._report = topology, rounds, report
        self._limit_s = 0.8 * limit_s  # the rest is for finding out, before collectives time out
        self._closed = threading.Event()
        self._store = topology.store
        self._tell("who", {"host": socket.gethostname(), "pid": os.getpid()})
        self._arm()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, since = self._rounds(), time.monotonic()
        while not self._closed.wait(min(1.0, self._limit_s / 20)):
            if (now := self._rounds()) != seen:
                seen, since = now, time.monotonic()
                self._arm()
            elif time.monotonic() - since > self._limit_s:
                with contextlib.suppress(dist.DistError, RuntimeError):  # the store is gone too
                    self._end(seen)
                os._exit(1)

    def _arm(self) -> None:
        """Should this thread not run either, because something holds Python's lock: end anyway."""
        standard_error = 2  # what stands for it in a notebook has no file
        faulthandler.dump_traceback_later(2 * self._limit_s, exit=True, file=standard_error)

    def _end(self, rounds: int) -> None:
        """Find out who holds up the run, and say so; once, by the first rank that can."""
        self._tell("stuck", {"rounds": rounds, **_place()})
        time.sleep(self._limit_s / 20 + 0.5)  # until the others have told
        ranks = range(self._topology.world_size)
        stuck = {rank: told for rank in ranks if (told := self._told("stuck", rank))}
        who = {rank: self._told("who", rank) or {} for rank in ranks}
        silent = [rank for rank in ranks if rank not in stuck]
        if self._topology.global_rank == min(stuck):
            verdict = _verdict(stuck, silent, who, self._limit_s)
            log.error(verdict)
            if self._topology.leads:
                self._report(verdict.partition("\n")[0])
            self._tell("said", {})
        else:
            deadline = time.monotonic() + 5
            while not self._told("said", min(stuck)) and time.monotonic() < deadline:
                time.sleep(0.05)
        for rank in silent:
            if who[rank].get("host") == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(who[rank]["pid"], signal.SIGKILL)  # it would ignore all else

    def _tell(self, what: str, content: dict[str, Any]) -> None:
        if self._store is not None:
            self._store.set(f"{what}/{self._topology.global_rank}", json.dumps(content))

    def _told(self, what: str, rank: int) -> dict[str, Any] | None:
        """What a rank has told; None where it has not."""
        if self._store is None:
            return {"rounds": 0, **_place()} if what == "stuck" else {"pid": os.getpid()}
        key = f"{what}/{rank}"
        return dict(json.loads(self._store.get(key))) if self._store.check([key]) else None


def _verdict(
    stuck: dict[int, dict[str, Any]], silent: list[int], who: dict[int, dict[str, Any]],
    limit_s: float,
) -> str:  # fmt: skip
    """Who holds up the run, in the first line; stacks in those after it."""
    order = {rank: (told["rounds"], told["waits"]) for rank, told in stuck.items()}
    behind = [rank for rank, place in order.items() if place == min(order.values())]
    at_fault = silent or (behind if len(behind) < len(stuck) else [])
    names = [f"{r} (process {who[r].get('pid')} on {who[r].get('host', 'this host')})" for r in
             at_fault or stuck]  # fmt: skip
    if silent:
        what = f"no step for {limit_s:g} s: rank {', '.join(names)} does not answer"
    elif at_fault:
        what = f"no step for {limit_s:g} s: the others wait for rank {', '.join(names)}"
    else:
        what = f"no step for {limit_s:g} s on any rank: {', '.join(names)}"
    lines = [f"{what}; the run ends (layout.timeout_s), start it again to resume"]
    lines += [f"rank {rank}: {_from_outside(who[rank])}" for rank in silent]
    lines += [f"rank {rank} is in\n{told['stack']}" for rank, told in sorted(stuck.items())]
    return "\n".join(lines)


def _place() -> dict[str, Any]:
    """Where this process's main thread is: its innermost lines and those of this package, and
    whether it waits for other ranks there (a backward may)."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    lines = traceback.extract_stack(frame)
    ours = [line for line in lines[:-3] if Path(line.filename).is_relative_to(_PACKAGE)]
    waits = any(
        "torch/distributed" in line.filename
        or line.name == "_engine_run_backward"
        or re.search(r"\.(wait|synchronize|cpu|item)\(\)", line.line or "")  # a GPU waits there
        for line in lines
    )
    return {"stack": "".join(traceback.format_list([*ours, *lines[-3:]])), "waits": waits}


def _from_outside(process: dict[str, Any]) -> str:
    """Where a process of this host is, by py-spy where that is installed."""
    beside = Path(sys.executable).with_name("py-spy")
    spy = str(beside) if beside.exists() else shutil.which("py-spy")
    if process.get("host") != socket.gethostname():
        return f"on another host: look there with py-spy dump --pid {process.get('pid')}"
    if spy is None:
        return "where it is, py-spy would tell, were it installed"
    command = [spy, "dump", "--nonblocking", "--pid", str(process["pid"])]
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return "py-spy did not answer either"
    return found.stdout or found.stderr
