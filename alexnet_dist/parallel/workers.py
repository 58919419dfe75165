"""Processes of this host that read and convert images for another one."""

import ctypes
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch


def worker_pool(count: int) -> ProcessPoolExecutor:
    """Return a pool of processes of one thread each, which ignore stop signals and are killed when
    this process ends."""
    # Spawned, since forking a process that has threads can hang.
    return ProcessPoolExecutor(count, get_context("spawn"), _begin_worker, (os.getpid(),))


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
