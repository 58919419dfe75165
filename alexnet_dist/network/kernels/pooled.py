"""The kernels of maps that are pooled over windows that may overlap (paper, §3.4)."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from alexnet_dist.network.kernels.lanes import (
    activated,
    lanes_of,
    normalised,
    normalised_backward,
    over_pixels,
    sloped,
    wide,
    widened,
)

_ROWS, _COLUMNS = 3, 2  # pooled values of a lane
_EACH_BACK = 8  # blocks of stride × stride pixels of a lane
_NOWHERE = tl.constexpr(255)  # the place of a value that no gradient passes


@dataclass(frozen=True)
class Pool:
    """Windows of window × window pixels, `stride` apart."""

    window: int
    stride: int
    round_up: bool

    def side(self, side: int) -> int:
        """How many windows lie along a side, as `F.max_pool2d` counts them."""
        if not self.round_up:
            return (side - self.window) // self.stride + 1
        count = -(-(side - self.window) // self.stride) + 1
        return count - ((count - 1) * self.stride >= side)  # each begins inside


def forward(
    x: Tensor, bias: Tensor | None, y: Tensor, places: Tensor, activation: str, size: int,
    alpha: float, beta: float, k: float, pool: Pool,
) -> None:  # fmt: skip
    """Fill y and places; all in channels_last."""
    lanes, (h, w) = lanes_of(x), y.shape[2:]
    count = len(x) * triton.cdiv(h, _ROWS) * triton.cdiv(w, _COLUMNS)
    pooled_kernel[(triton.cdiv(count, lanes.pixels),)](
        x, bias, y, places, count, activation, size, alpha, beta, k, *x.shape[2:], h, w,
        lanes.chunk, lanes.chunks, lanes.lanes, pool.window, pool.stride, _ROWS, _COLUMNS,
        num_warps=lanes.warps,
    )  # fmt: skip


def backward(
    grads: Tensor, x: Tensor, bias: Tensor | None, places: Tensor, out: Tensor, activation: str,
    size: int, alpha: float, beta: float, k: float, pool: Pool,
) -> Tensor:  # fmt: skip
    """Fill out, x's gradient; all in channels_last. Gives (programs, channels): parts of the bias
    gradient."""
    lanes, (h, w) = lanes_of(x), x.shape[2:]
    count = len(x) * triton.cdiv(h, pool.stride) * triton.cdiv(w, pool.stride)
    programs = triton.cdiv(count, lanes.pixels * _EACH_BACK)
    parts = x.new_empty((programs, x.shape[1]), dtype=wide(x.dtype))
    pooled_backward_kernel[(programs,)](
        grads, x, bias, places, out, parts, count, activation, size, alpha, beta, k, h, w,
        *places.shape[2:], lanes.chunk, lanes.chunks, lanes.lanes, pool.window, pool.stride,
        _EACH_BACK, num_warps=lanes.warps,
    )  # fmt: skip
    return parts


@triton.jit
def _row(
    x, b, row, column, known, part, activation: tl.constexpr, size: tl.constexpr,
    alpha: tl.constexpr, beta: tl.constexpr, k: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    chunk: tl.constexpr, chunks: tl.constexpr, window: tl.constexpr, stride: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """Of a row of pixels, the largest in each of `columns` windows and its place there: values
    and places in turn."""
    channel = tl.arange(0, chunk)[None, :]
    lowest = float("-inf")
    values = ()
    for i in tl.static_range((columns - 1) * stride + window):
        inside = (known & (row < h) & (column + i < w))[:, None]
        at = ((row * w + column + i) * (chunk * chunks))[:, None] + channel
        z = widened(tl.load(x + at, mask=inside, other=0.0)) + b
        a = normalised(activated(z, activation), part, chunk, chunks, size, alpha, beta, k)
        values = values + (tl.where(inside, a, lowest),)
    best = ()
    for c in tl.static_range(columns):
        value = values[c * stride]
        place = tl.zeros(value.shape, tl.int32)
        for i in tl.static_range(1, window):
            other = values[c * stride + i]
            better = (other > value) | (other != other)
            value = tl.where(better, other, value)
            place = tl.where(better, i, place)
        best = best + (value, place)
    return best


@triton.jit(do_not_specialize=["count"])
def pooled_kernel(
    x, bias, y, places, count, activation: tl.constexpr, size: tl.constexpr, alpha: tl.constexpr,
    beta: tl.constexpr, k: tl.constexpr, h: tl.constexpr, w: tl.constexpr, pooled_h: tl.constexpr,
    pooled_w: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr, lanes: tl.constexpr,
    window: tl.constexpr, stride: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """y = max over windows of LRN(f(x + b)), and each maximum's place, the first of equals."""
    side: tl.constexpr = lanes // chunks  # blocks of rows × columns pooled values side by side
    along: tl.constexpr = (pooled_w + columns - 1) // columns
    down: tl.constexpr = (pooled_h + rows - 1) // rows
    shared: tl.constexpr = max(window - stride, 0)  # rows of pixels of two windows
    lane, channel = tl.arange(0, lanes), tl.arange(0, chunk)[None, :]
    part = lane % chunks
    block = tl.program_id(0) * side + lane // chunks
    known = (lane < side * chunks) & (block < count)
    image = block // (along * down)
    i0, j0 = block // along % down * rows, block % along * columns
    wide: tl.constexpr = chunk * chunks
    x += (image.to(tl.int64) * (h * w * wide) + part * chunk)[:, None]
    made = (image.to(tl.int64) * (pooled_h * pooled_w * wide) + part * chunk)[:, None] + channel
    b = 0.0
    if bias is not None:
        b = tl.load(bias + (part * chunk)[:, None] + channel)
    carried = ()
    for r in tl.static_range(shared):
        carried = carried + _row(
            x, b, i0 * stride + r, j0 * stride, known, part, activation, size, alpha, beta, k,
            h, w, chunk, chunks, window, stride, columns,
        )  # fmt: skip
    for i in range(rows):
        seen = carried
        for r in tl.static_range(shared, window):
            seen = seen + _row(
                x, b, (i0 + i) * stride + r, j0 * stride, known, part, activation, size, alpha,
                beta, k, h, w, chunk, chunks, window, stride, columns,
            )  # fmt: skip
        for column in tl.static_range(columns):
            value, place = seen[2 * column], seen[2 * column + 1]
            for r in tl.static_range(1, window):
                other = seen[2 * (r * columns + column)]
                better = (other > value) | (other != other)
                value = tl.where(better, other, value)
                there = seen[2 * (r * columns + column) + 1] + r * window
                place = tl.where(better, there, place)
            if activation == "relu":
                place = tl.where(value <= 0, _NOWHERE, place)
            inside = (known & (i0 + i < pooled_h) & (j0 + column < pooled_w))[:, None]
            at = made + (((i0 + i) * pooled_w + j0 + column) * wide)[:, None]
            tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
            tl.store(places + at, place.to(tl.uint8), mask=inside)
        carried = seen[(window - shared) * columns * 2 :]


@triton.jit(do_not_specialize=["count"])
def pooled_backward_kernel(
    grads, x, bias, places, out, parts, count, activation: tl.constexpr, size: tl.constexpr,
    alpha: tl.constexpr, beta: tl.constexpr, k: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    pooled_h: tl.constexpr, pooled_w: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr,
    lanes: tl.constexpr, window: tl.constexpr, stride: tl.constexpr, each: tl.constexpr,
):  # fmt: skip
    """dx of `pooled_kernel`, and db's parts. A lane has stride × stride pixels, so that it knows
    while it is compiled which windows, at most ⌈window / stride⌉² of them, see which of these."""
    side: tl.constexpr = lanes // chunks
    along: tl.constexpr = (w + stride - 1) // stride
    down: tl.constexpr = (h + stride - 1) // stride
    reach: tl.constexpr = (window + stride - 1) // stride
    wide: tl.constexpr = chunk * chunks
    lane, channel = tl.arange(0, lanes), tl.arange(0, chunk)[None, :]
    part = lane % chunks
    b = 0.0
    if bias is not None:
        b = tl.load(bias + (part * chunk)[:, None] + channel)
    total = tl.zeros((lanes, chunk), parts.dtype.element_ty)
    for step in range(each):
        block = (tl.program_id(0) * each + step) * side + lane // chunks
        known = (lane < side * chunks) & (block < count)
        image = (block // (along * down)).to(tl.int64)
        i0, j0 = block // along % down, block % along
        made = (image * (pooled_h * pooled_w * wide) + part * chunk)[:, None] + channel
        seen = (image * (h * w * wide) + part * chunk)[:, None] + channel
        upper = ()
        where = ()
        for r in tl.static_range(reach * reach):
            i, j = i0 - r // reach, j0 - r % reach
            there = (known & (i >= 0) & (i < pooled_h) & (j >= 0) & (j < pooled_w))[:, None]
            at = made + ((i * pooled_w + j) * wide)[:, None]
            upper = upper + (tl.load(grads + at, mask=there, other=0.0),)
            where = where + (tl.load(places + at, mask=there, other=_NOWHERE),)
        for pixel in tl.static_range(stride * stride):
            dy, dx = pixel // stride, pixel % stride
            grad = tl.zeros((lanes, chunk), parts.dtype.element_ty)
            for r in tl.static_range(reach * reach):
                if r // reach * stride + dy < window and r % reach * stride + dx < window:
                    place = (r // reach * stride + dy) * window + r % reach * stride + dx
                    here = where[r] == place
                    grad += tl.where(here, widened(upper[r]), 0.0)
            row, column = i0 * stride + dy, j0 * stride + dx
            inside = (known & (row < h) & (column < w))[:, None]
            at = seen + ((row * w + column) * wide)[:, None]
            a = activated(widened(tl.load(x + at, mask=inside, other=0.0)) + b, activation)
            grad = normalised_backward(grad, a, part, chunk, chunks, size, alpha, beta, k)
            if activation != "relu":  # whose places say it
                grad = sloped(grad, a, activation)
            tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)
            total += grad
    if bias is not None:
        total = over_pixels(total, chunk, chunks, side)
        at = tl.program_id(0).to(tl.int64) * wide + part * chunk
        tl.store(parts + at[:, None] + channel, total, mask=(lane < chunks)[:, None])
