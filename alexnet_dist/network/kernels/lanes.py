"""Shared code of the kernels of maps, in which a lane owns a few adjacent channels of one pixel.

A program is one warp, or more if a pixel has more channels than a warp reads at once. Its lanes run
along (pixel, chunk of channels), so that a warp's loads and stores are contiguous, 16 bytes per
lane. A tile is (lanes, channels per chunk) and stays in registers: `unstack` and `stack` cost
nothing, and a neighbour's values come by shuffles, never through shared memory.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP = 32
_TALL, _VALUES = 512, 2048  # of `sum_rows`: rows that a program reads at once, and values


@dataclass(frozen=True)
class Lanes:
    """How the channels of a pixel are distributed over lanes.

    Attributes:
        chunk: channels per lane.
        chunks: lanes per pixel.
        lanes: lanes per program, a power of two.
        pixels: pixels per program that are read side by side.
    """

    chunk: int
    chunks: int
    lanes: int
    pixels: int

    @property
    def warps(self) -> int:
        return max(1, self.lanes // WARP)


def lanes_of(x: Tensor) -> Lanes:
    """Return the distribution over lanes for maps (n, c, h, w); the same in every run."""
    channels = x.shape[1]
    chunk = math.gcd(channels, 16 // x.element_size())
    chunks = channels // chunk
    lanes = max(WARP, triton.next_power_of_2(chunks))
    return Lanes(chunk, chunks, lanes, lanes // chunks)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of this dtype are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_rows(parts: Tensor) -> Tensor:
    """Sum (rows, columns) over its rows, always in the same order, in one launch: torch's reduction
    of as few columns takes two."""
    rows, columns = parts.shape
    if not columns:
        return parts.new_empty(0)
    tall = min(_TALL, triton.next_power_of_2(rows))
    wide = _VALUES // tall
    out = parts.new_empty(columns)
    sum_rows_kernel[(triton.cdiv(columns, wide),)](
        parts, out, rows, columns, triton.cdiv(rows, tall), tall, wide,
        num_warps=_VALUES // (4 * WARP),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(
    parts, out, rows, columns, each: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr
):
    """A program sums `wide` columns; the columns that a warp reads lie side by side."""
    column = tl.program_id(0) * wide + tl.arange(0, wide)
    read = ()  # issue all loads before the first use
    for i in tl.static_range(each):
        row = i * tall + tl.arange(0, tall)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        read = read + (tl.load(parts + at, mask=inside, other=0.0),)
    total = read[0]
    for i in tl.static_range(1, each):
        total += read[i]
    tl.store(out + column, tl.sum(total, 0), mask=column < columns)


@triton.jit
def upcast(values):
    """Convert to float32; float64 stays."""
    if values.dtype == tl.bfloat16:  # shifted: from its own conversion come two instructions
        bits = values.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return values if values.dtype == tl.float64 else values.to(tl.float32)


@triton.jit
def packed(tile):
    """Pack pairs of bfloat16 into 32 bits, as they lie in memory; other tiles stay. Values that a
    loop carries to its next round cost instructions if they are narrower."""
    if tile.dtype == tl.bfloat16 and tile.shape[1] % 2 == 0:
        pairs = tile.to(tl.uint16, bitcast=True).reshape(tile.shape[0], tile.shape[1] // 2, 2)
        low, high = tl.split(pairs)
        return low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    else:
        return tile


@triton.jit
def unpacked(tile):
    """Return what was `packed`, upcast."""
    if tile.dtype == tl.uint32:
        low = (tile << 16).to(tl.float32, bitcast=True)
        high = (tile & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(tile.shape[0], 2 * tile.shape[1])
    else:
        return upcast(tile)


@triton.jit
def packed_bytes(tile):
    """Pack fours of bytes into 32 bits, as they lie in memory, if there are fours."""
    if tile.shape[1] % 4 == 0:
        evens, odds = tl.split(tile.reshape(tile.shape[0], tile.shape[1] // 4, 2, 2))
        b0, b2 = tl.split(evens)
        b1, b3 = tl.split(odds)
        low = b0.to(tl.uint32) | (b1.to(tl.uint32) << 8)
        return low | (b2.to(tl.uint32) << 16) | (b3.to(tl.uint32) << 24)
    else:
        return tile


@triton.jit
def unpacked_bytes(tile):
    """Return what was packed by `packed_bytes`, as integers."""
    if tile.dtype == tl.uint32:
        evens = tl.join(tile & 255, (tile >> 16) & 255)
        odds = tl.join((tile >> 8) & 255, tile >> 24)
        return tl.join(evens, odds).reshape(tile.shape[0], 4 * tile.shape[1])
    else:
        return tile


@triton.jit
def unstack(tile):
    """Split (lanes, n) into n tensors (lanes,)."""
    lanes: tl.constexpr = tile.shape[0]
    n: tl.constexpr = tile.shape[1]
    if n == 1:
        return (tile.reshape(lanes),)
    else:
        low, high = tl.split(tl.permute(tile.reshape(lanes, 2, n // 2), (0, 2, 1)))
        return unstack(low) + unstack(high)


@triton.jit
def stack(parts, n: tl.constexpr):
    """Join n tensors (lanes,) to (lanes, n)."""
    if n == 1:
        return parts[0].reshape(parts[0].shape[0], 1)
    else:
        low, high = stack(parts[: n // 2], n // 2), stack(parts[n // 2 :], n // 2)
        return tl.permute(tl.join(low, high), (0, 2, 1)).reshape(low.shape[0], n)


@triton.jit
def window_sum(tile, part, chunk: tl.constexpr, chunks: tl.constexpr, half: tl.constexpr):
    """Sum, for each channel, itself and the `half` channels on either side.

    part: (lanes,), the index of each lane's chunk within its pixel.
    """
    if half == 0:
        return tile
    else:
        own, lane = unstack(tile), tl.arange(0, tile.shape[0])
        near = ()
        for i in tl.static_range(-half, chunk + half):
            if i >= 0 and i < chunk:
                near = near + (own[i],)
            else:
                there = part + i // chunk
                mask = (there >= 0) & (there < chunks) & (lane + i // chunk < tile.shape[0])
                source = tl.where(mask, lane + i // chunk, lane)
                near = near + (tl.where(mask, tl.gather(own[i % chunk], source, 0), 0.0),)
        # A window is the end of one block of 2 · half channels and the beginning of the next. With
        # running sums of both, each window takes two or three additions, whatever its size.
        begins, ends = (near[0],), (near[chunk + 2 * half - 1],)
        for i in tl.static_range(1, chunk + 2 * half):
            if i % (2 * half) == 0:
                begins = begins + (near[i],)
            else:
                begins = begins + (begins[i - 1] + near[i],)
        for i in tl.static_range(chunk + 2 * half - 2, -1, -1):
            if i % (2 * half) == 2 * half - 1:
                ends = (near[i],) + ends
            else:
                ends = (near[i] + ends[0],) + ends
        sums = ()
        for i in tl.static_range(chunk):
            sums = sums + (ends[i] + begins[i + 2 * half],)
        return stack(sums, chunk)


@triton.jit
def sum_over_pixels(tile, chunk: tl.constexpr, chunks: tl.constexpr, pixels: tl.constexpr):
    """Sum over a program's side-by-side pixels; the result is valid on the first `chunks` lanes."""
    own, lane = unstack(tile), tl.arange(0, tile.shape[0])
    sums = ()
    for i in tl.static_range(chunk):
        total = own[i]
        for pixel in tl.static_range(1, pixels):
            source = tl.where(lane < chunks, lane + pixel * chunks, lane)
            total += tl.gather(own[i], source, 0)
        sums = sums + (total,)
    return stack(sums, chunk)


@triton.jit
def activated(z, activation: tl.constexpr):
    """Return f(z); NaN stays NaN."""
    if activation == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif activation == "sigmoid":
        return 1 / (1 + tl.exp(-z))
    elif activation == "tanh":
        t = tl.exp(-2 * tl.abs(z))
        far = (1 - t) / (1 + t)
        far = tl.where(z < 0, -far, far)
        if z.dtype == tl.float64:
            return far
        else:  # Lambert's fraction, where 1 − t would lose digits
            s = z * z
            close = z * (945 + s * (105 + s)) / (945 + s * (420 + 15 * s))
            return tl.where(tl.abs(z) < 0.5, close, far)
    else:
        tl.static_assert(activation == "", "no kernel for this activation: train.execution=eager")
        return z


@triton.jit
def activation_grad(grad, a, activation: tl.constexpr):
    """Return the gradient of z, given that of a = f(z)."""
    if activation == "relu":
        return tl.where(a <= 0, 0.0, grad)
    elif activation == "sigmoid":
        return grad * (a * (1 - a))
    elif activation == "tanh":
        return grad * (1 - a * a)
    else:
        tl.static_assert(activation == "", "no kernel for this activation: train.execution=eager")
        return grad


@triton.jit
def powers(d, beta: tl.constexpr):
    """Return d^−β and 1/d; for the paper's ¾ with two square roots."""
    if beta == 0.75 or beta == 0.5:
        root = 1 / tl.sqrt(d) if d.dtype == tl.float64 else tl.rsqrt(d)
        return root * tl.sqrt(root) if beta == 0.75 else root, root * root
    elif beta == 1:
        return 1 / d, 1 / d
    else:
        return tl.exp2(-beta * tl.log2(d)), 1 / d


@triton.jit
def normalised(
    a, part, chunk: tl.constexpr, chunks: tl.constexpr, size: tl.constexpr, alpha: tl.constexpr,
    beta: tl.constexpr, k: tl.constexpr,
):  # fmt: skip
    """Return a · d^−β with d = k + α Σ a²; a itself if size is 0."""
    if size == 0:
        return a
    else:
        falling, _ = powers(k + alpha * window_sum(a * a, part, chunk, chunks, size // 2), beta)
        return a * falling


@triton.jit
def normalised_backward(
    grad, a, part, chunk: tl.constexpr, chunks: tl.constexpr, size: tl.constexpr,
    alpha: tl.constexpr, beta: tl.constexpr, k: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a: g_j d_j^−β − 2αβ a_j Σ g_i a_i d_i^(−β−1), where g is `grad`."""
    if size == 0:
        return grad
    else:
        d = k + alpha * window_sum(a * a, part, chunk, chunks, size // 2)
        falling, inverse = powers(d, beta)
        scaled = grad * falling
        crossed = window_sum(scaled * (a * inverse), part, chunk, chunks, size // 2)
        return scaled - ((2 * alpha * beta) * a) * crossed
