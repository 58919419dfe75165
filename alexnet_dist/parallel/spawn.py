"""Start a layout's ranks on this host with torchrun's elastic API, when no launcher did."""

import logging
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from alexnet_dist.compat import elastic_launch
from alexnet_dist.errors import AlexNetDistError, RanksFailed, in_words, killed_by, printable
from alexnet_dist.files import read_run
from alexnet_dist.parallel.rendezvous import LOOPBACK, store_at
from alexnet_dist.parallel.stop_signals import EXITS, FLAGS, handlers_restored, signals_heeded
from alexnet_dist.parallel.workers import signal_at_parents_end
from alexnet_dist.timing import START, process_began

# Environment variables for ranks: the launcher's process id, and when it was asked for the run.
_LAUNCHER, _BEGAN = "ALEXNET_DIST_LAUNCHER", "ALEXNET_DIST_BEGAN"


def start(
    arguments: Sequence[str], ranks: int, folder: Path, killed: Callable[[str, int], bool]
) -> int:
    """Run `alexnet-dist ARGUMENTS` on this many ranks, and return the exit code they agreed on.

    Signals are passed on to every rank, which saves and exits; a second SIGINT ends them at once.

    Args:
        folder: the run folder, whose run.json says how the ranks stopped.
        killed: called with a description of the ranks that were killed, and the number of earlier
            attempts; returns whether this is still to be printed.
    """
    os.environ |= {_LAUNCHER: str(os.getpid()), _BEGAN: str(START.began)}
    command = ["-m", "alexnet_dist", *arguments]
    attempts_before = read_run(folder).get("attempt", 0)
    try:
        launch_ranks(sys.executable, ranks, 120, *command)
        return 0
    except ChildFailedError as error:
        if dead := _killed_ranks(error):
            if killed(dead, attempts_before):
                print(f"{dead}; run again to resume", file=sys.stderr)
            return 1
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        run = read_run(folder)
        ended = run.get("state") in ("stopped", "finished")
        if ended and run["attempt"] > attempts_before:  # else it tells of an earlier attempt
            return int(run["exit"])
        number = signal.Signals(error.sigval)
        if run.get("attempt", 0) == attempts_before:
            print(f"{folder}: stopped by {number.name} before it began", file=sys.stderr)
            return EXITS[FLAGS[number]]
        print(f"{folder}: stopped by {number.name} before it could save", file=sys.stderr)
        return 1
    finally:
        del os.environ[_LAUNCHER], os.environ[_BEGAN]  # what this process starts later has others


def begin_start() -> None:
    """Note that the start of a run begins: when this process did, or when its launcher was asked
    for the run."""
    began = process_began()
    START.begin(float(os.environ.get(_BEGAN, began)))
    if _BEGAN in os.environ:
        START.reached("launch", began)


def _killed_ranks(error: ChildFailedError) -> str:
    """Describe the ranks that were killed by signals; empty if none was. (Others may have failed
    right after, because those were gone.)"""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    killed = [f"rank {rank} was {killed_by(-code)}" for rank, code in codes.items() if code < 0]
    return "; ".join(killed)


def call(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call a module-level function on this many ranks, and return what it returned on each.

    Raises:
        AlexNetDistError: the function raised it on all ranks.
        RanksFailed: a rank failed, and has printed why.
    """
    try:
        with handlers_restored():
            results = launch_ranks(_mistake_or, ranks, 10, function, *args)
    except SignalException as error:
        signal.raise_signal(error.sigval)  # now to this program's own handler
        if signal.getsignal(error.sigval) == signal.SIG_IGN:  # SIGINT, in a shell's background
            raise KeyboardInterrupt from error
        raise
    except ChildFailedError as error:
        why = _killed_ranks(error) or "a rank failed, and reported why"
        raise RanksFailed(f"{why} ({function.__name__})") from error
    if isinstance(results[0], AlexNetDistError):
        raise results[0]
    return [results[rank] for rank in range(ranks)]


def _mistake_or(function: Callable[..., Any], *args: Any) -> Any:
    """Return a function's result, or the error that every rank raises; print any other error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback: the launcher reports it
    try:
        return function(*args)
    except Exception as error:
        if isinstance(error, AlexNetDistError) and error.on_every_rank:
            return error
        said = in_words(error)
        words = traceback.format_exc() if said is None else printable(str(said))
        print(f"[r{os.environ['RANK']}] {words}", file=sys.stderr, flush=True)
        raise


def launch_ranks(entry: Any, ranks: int, shutdown_timeout_s: int, *args: Any) -> dict[int, Any]:
    """Run a function, or a command, on this many ranks of this host; return the results by rank.

    The ranks meet at a store on the loopback. torchelastic's static rendezvous is given its port,
    finds that this process serves it, and opens none of its own: those would listen on every
    interface, and its c10d rendezvous unpickles what it finds there.
    """
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.setLevel(logging.CRITICAL)  # ranks and this module report failures themselves
    elastic.getChild("agent.server.api").disabled = True  # has a level of its own
    store = store_at(LOOPBACK, timedelta(minutes=1))  # lives as long as the ranks
    config = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": ranks,
        "run_id": uuid.uuid4().hex,
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{store.host}:{store.port}",
        "rdzv_configs": {"rank": 0},
        "max_restarts": 0,
        "signals_to_handle": "",
        "logs_specs": DefaultLogsSpecs(log_dir=os.devnull),  # else a folder in /tmp each time
    }
    with _signals_stop_ranks():
        return elastic_launch(config, shutdown_timeout_s, entry, *args)


@contextmanager
def _signals_stop_ranks() -> Iterator[None]:
    """Have the first signal raise SignalException, at which torchelastic passes it on and waits for
    the ranks; later ones are only passed on, and a second SIGINT ends ranks and launcher at once.
    Afterwards, when the ranks have ended, signals change nothing.

    torchelastic's own handler raises each time: the second signal begins the wait anew, and the
    third leaves threads that never end, so that the launcher does not either.
    """
    arrived: list[int] = []

    def heard(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) == 1:
            sent = signal.Signals(number)
            raise SignalException(f"{sent.name} arrived", sigval=sent)
        ranks = psutil.Process().children()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if arrived.count(signal.SIGINT) > 1:
            for rank in psutil.wait_procs(ranks, timeout=2)[1]:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()  # checkpoints survive it
            os._exit(EXITS[FLAGS[signal.SIGINT]])

    for number in signals_heeded():
        signal.signal(number, heard)
    try:
        yield
    finally:
        for number in signals_heeded():
            signal.signal(number, lambda *_: None)


def leave_with_parent(parent: int) -> None:
    """Have SIGTERM sent when the launcher dies, so that this rank saves and exits. It comes once
    for each of the launcher's threads, so it cannot be SIGINT.

    Args:
        parent: this rank's parent process id at start; if the launcher has died since, no signal
            would come, and the rank exits now.
    """
    signal_at_parents_end(signal.SIGTERM)
    if os.getppid() != int(os.environ.get(_LAUNCHER, parent)):
        os._exit(EXITS[FLAGS[signal.SIGTERM]])
