"""Loops over a batch that run beside Python: compiled by Numba, without Python's lock."""

from collections.abc import Callable
from typing import Any

from numba import njit


def released(function: Callable[..., None]) -> Callable[..., None]:
    """A function of arrays, compiled at its first call and kept on disk, that holds no lock."""
    try:
        loop: Callable[..., None] = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # there is nowhere to keep it
        loop = njit(nogil=True)(function)
    return loop


@released
def cut(images: Any, samples: Any, corners: Any, out: Any) -> None:
    """Copy a square of each of some images.

    Args:
        images: (N, side, 3 · side) uint8, rows of pixels.
        samples: (n,), which images.
        corners: (n, 2), top and left of each square, pixels.
        out: (n, s, 3 · s) uint8.
    """
    length = out.shape[2]
    for n in range(len(out)):
        image, top, left = images[samples[n]], corners[n, 0], 3 * corners[n, 1]
        for row in range(out.shape[1]):
            out[n, row] = image[top + row, left : left + length]
