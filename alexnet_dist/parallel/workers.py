"""Processes of this host that read and convert images for another one."""

import ctypes
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess

import torch

from alexnet_dist.errors import MachineError, of_memory


@contextmanager
def worker_pool(count: int, does: str, remedy: str) -> Iterator[ProcessPoolExecutor]:
    """Provide a pool of processes of one thread each, which ignore stop signals and are killed when
    this process ends.

    Args:
        does: what each of them does, in the words of an error.
        remedy: what the user can do if one was killed.

    Raises MachineError where one of them ended before its time.
    """
    others, own = {*active_children()}, set[BaseProcess]()
    # Spawned, since forking a process that has threads can hang.
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin_worker, (os.getpid(),))
    try:
        for _ in range(count):  # each starts a process, since none is idle yet
            pool.submit(int)
        own = {*active_children()} - others
        yield pool
    except BrokenProcessPool as error:
        pool.shutdown()  # until the exit codes are known: negative where a signal killed it
        if any((process.exitcode or 0) > 0 for process in own):
            raise MachineError(
                f"a process that {does} failed, and reported why; as a rule, the program that "
                'starts it must do so under if __name__ == "__main__":'
            ) from error
        raise MachineError(f"a process that {does} was killed{of_memory()}; {remedy}") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in own:
            process.terminate()


def _begin_worker(parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
    torch.set_num_threads(1)


def signal_at_parents_end(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent ends: prctl(2). It sends one for
    each of the parent's threads."""
    set_parent_death_signal = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
