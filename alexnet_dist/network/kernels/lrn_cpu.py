"""Local response normalisation on a CPU: one pass over memory forward, one backward.

A pixel's values stay in the L1 cache, and one parallel loop does a whole call; each of torch's
operators would be a pass of its own, and wait for the slowest thread. Computes in float32, also for
bfloat16.
"""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from numba import prange
from torch import Tensor

from alexnet_dist.network.kernels.numba_loops import bits, parallel, rounding

Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
_BLOCKS = 64  # blocks of pixels, distributed over threads


def fits(maps: Tensor, beta: float) -> bool:
    """Whether these loops support the tensor and β."""
    narrow = maps.dtype in (torch.bfloat16, torch.float32)
    return maps.device.type == "cpu" and narrow and beta == 0.75


def forward(maps: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """Normalise (n, channels, h, w); the result is in channels_last."""
    return _called(_forward_loop, (maps,), size, alpha, k)


def backward(maps: Tensor, grads: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """Return the gradient of `forward`'s input, given that of its output."""
    return _called(_backward_loop, (maps, grads), size, alpha, k)


def _called(
    loop_of: Callable[[torch.dtype, int], Callable[..., None]], given: tuple[Tensor, ...],
    size: int, alpha: float, k: float,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(given[0], memory_format=torch.channels_last)
    last = [t.permute(0, 2, 3, 1).contiguous().view(-1, t.shape[1]) for t in (*given, out)]
    loop = loop_of(out.dtype, size)
    loop(*map(bits, last), np.float32(alpha), np.float32(k))
    return out


@functools.cache
def _forward_loop(dtype: torch.dtype, size: int) -> Callable[..., None]:
    """Return the compiled loop of `forward`, for which dtype and size are constants."""
    half, zero = size // 2, np.float32(0)
    shift, below, odd = rounding(dtype)

    @parallel
    def forward(maps: Bits, out: Bits, alpha: float, k: float) -> None:
        pixels, wide = maps.shape
        for block in prange(_BLOCKS):
            squares = np.zeros(wide + size - 1, np.float32)  # 0 beyond the ends
            a, sums = np.empty(wide, np.float32), np.empty(wide, np.float32)
            a_bits, sum_bits = a.view(np.uint32), sums.view(np.uint32)
            for pixel in range(block * pixels // _BLOCKS, (block + 1) * pixels // _BLOCKS):
                here, result = maps[pixel], out[pixel]
                for i in range(wide):
                    a_bits[i] = np.uint32(here[i]) << shift
                for i in range(wide):
                    squares[i + half] = a[i] * a[i]
                for i in range(wide):
                    total = zero
                    for near in range(size):
                        total += squares[i + near]
                    root = np.float32(1) / np.sqrt(k + alpha * total)
                    sums[i] = a[i] * root * np.sqrt(root)
                for i in range(wide):
                    b = sum_bits[i]
                    result[i] = (b + below + ((b >> shift) & odd)) >> shift

    return forward


@functools.cache
def _backward_loop(dtype: torch.dtype, size: int) -> Callable[..., None]:
    """Return the compiled loop of `backward`, for which dtype and size are constants."""
    half, zero = size // 2, np.float32(0)
    shift, below, odd = rounding(dtype)

    @parallel
    def backward(maps: Bits, grads: Bits, out: Bits, alpha: float, k: float) -> None:
        # db_i/da_j = [i=j] d_i^−β − 2αβ a_i a_j d_i^(−β−1), where i and j are neighbours
        pixels, wide = maps.shape
        for block in prange(_BLOCKS):
            squares = np.zeros(wide + size - 1, np.float32)
            crossed = np.zeros(wide + size - 1, np.float32)
            a, g = np.empty(wide, np.float32), np.empty(wide, np.float32)
            a_bits, g_bits = a.view(np.uint32), g.view(np.uint32)
            for pixel in range(block * pixels // _BLOCKS, (block + 1) * pixels // _BLOCKS):
                here, upper, result = maps[pixel], grads[pixel], out[pixel]
                for i in range(wide):
                    a_bits[i] = np.uint32(here[i]) << shift
                    g_bits[i] = np.uint32(upper[i]) << shift
                for i in range(wide):
                    squares[i + half] = a[i] * a[i]
                for i in range(wide):
                    total = zero
                    for near in range(size):
                        total += squares[i + near]
                    root = np.float32(1) / np.sqrt(k + alpha * total)
                    g[i] *= root * np.sqrt(root)
                    crossed[i + half] = g[i] * a[i] * root * root
                for i in range(wide):
                    total = zero
                    for near in range(size):
                        total += crossed[i + near]
                    g[i] -= np.float32(1.5) * alpha * a[i] * total
                for i in range(wide):
                    b = g_bits[i]
                    result[i] = (b + below + ((b >> shift) & odd)) >> shift

    return backward
