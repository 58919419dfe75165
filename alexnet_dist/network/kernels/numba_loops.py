"""Loops that Numba compiles for this CPU when they are first used, and keeps on disk."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, set_num_threads
from torch import Tensor

# NumPy lacks bfloat16: loops read and write the bits of every kind.
_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32, torch.float64: torch.uint64}


def bits(tensor: Tensor) -> Any:
    """Its bits as a NumPy array of unsigned integers, which share its memory."""
    return tensor.view(_BITS[tensor.dtype]).numpy()


def rounding(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(shift, below, odd) of which (b + below + (b >> shift & odd)) >> shift rounds the bits b of a
    float32, or of a float64, to those of a dtype, ties to even; b << shift is the way back."""
    word = np.uint64 if dtype == torch.float64 else np.uint32
    of = (16, 0x7FFF, 1) if dtype == torch.bfloat16 else (0, 0, 0)
    shift, below, odd = map(word, of)
    return shift, below, odd


def compiled(function: Callable[..., None], **how: Any) -> Any:
    """A function as Numba compiles it, kept on disk where there is a place for it."""
    try:
        return njit(cache=True, **how)(function)
    except RuntimeError:
        return njit(**how)(function)


def parallel(function: Callable[..., None]) -> Callable[..., None]:
    """A function of arrays and numbers, its `prange` loops on as many threads as torch's.

    Without fast-math: with it the code that a process compiles and the code that the next one loads
    give different bits.
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
    """Numba's; to start them sets how many torch has, which is set back."""
    torchs = torch.get_num_threads()
    most = int(get_num_threads())
    torch.set_num_threads(torchs)
    return most
