"""Loops that Numba compiles for this CPU when they are first used, and keeps on disk."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from numba import get_num_threads, njit, set_num_threads

_FAST = {"contract", "arcp", "nsz", "reassoc", "afn"}  # NaN and infinity stay themselves


def parallel(function: Callable[..., None]) -> Callable[..., None]:
    """A function of arrays and numbers, its `prange` loops on as many threads as torch's."""
    try:
        loop: Any = njit(parallel=True, fastmath=_FAST, cache=True)(function)
    except RuntimeError:  # there is nowhere to keep it
        loop = njit(parallel=True, fastmath=_FAST)(function)

    @functools.wraps(function)
    def called(*arguments: Any) -> None:
        threads = get_num_threads()
        set_num_threads(min(torch.get_num_threads(), threads))
        try:
            loop(*arguments)
        finally:
            set_num_threads(threads)

    return called
