"""Loops that Numba compiles for this CPU at their first use, and caches on disk."""

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, set_num_threads
from torch import Tensor

# NumPy has no bfloat16, so the loops read and write bits.
_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32, torch.float64: torch.uint64}


def bits(tensor: Tensor) -> Any:
    """Return a tensor's bits as a NumPy array of unsigned integers that shares its memory."""
    return tensor.view(_BITS[tensor.dtype]).numpy()


def rounding(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Return (shift, below, odd) with which (b + below + (b >> shift & odd)) >> shift rounds the
    bits b of a float32 (or float64) to a dtype's, ties to even; b << shift converts back."""
    word = np.uint64 if dtype == torch.float64 else np.uint32
    of = (16, 0x7FFF, 1) if dtype == torch.bfloat16 else (0, 0, 0)
    shift, below, odd = map(word, of)
    return shift, below, odd


def compiled(function: Callable[..., None], **how: Any) -> Any:
    """Compile a function with Numba, cached on disk if there is a place for it."""
    try:
        made = njit(cache=True, **how)(function)
    except RuntimeError:
        return njit(**how)(function)
    # A full home, or another user's files there, ends no run: Numba ignores that on Windows only.
    made._cache._guard_against_spurious_io_errors = lambda: suppress(OSError)
    return made


def parallel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function of arrays and numbers; its `prange` loops use as many threads as torch.

    No fast-math: with it, freshly compiled code and code loaded from the cache give different bits.
    """
    loop = compiled(function, parallel=True)

    @functools.wraps(function)
    def called(*arguments: Any) -> None:
        most = _most_threads()
        set_num_threads(min(torch.get_num_threads(), most))
        loop(*arguments)

    return called


@functools.cache
def _most_threads() -> int:
    """Return Numba's number of threads. Starting them changes torch's number, which is restored."""
    torchs = torch.get_num_threads()
    most = int(get_num_threads())
    torch.set_num_threads(torchs)
    return most
