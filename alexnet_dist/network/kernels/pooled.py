"""The kernels for maps that are max-pooled; windows may overlap (paper, §3.4)."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from alexnet_dist.network.kernels.lanes import (
    activated,
    lanes_of,
    normalised,
    packed,
    unpacked,
    window_sum,
)
from alexnet_dist.network.shapes import pooled_side

_ROWS, _COLUMNS = 3, 3  # pooled values per lane
_AHEAD = 3  # pixels of a row that are read before the row above is computed
REGISTERS = 128  # per lane: 16 warps fit a multiprocessor; enough for the paper's maps
NOWHERE = tl.constexpr(255)  # the place of a value through which no gradient flows
_VALUE, _PLACES = tl.constexpr(0x7FFFFFF0), tl.constexpr(15)  # bit masks of a key


@dataclass(frozen=True)
class Pool:
    """Pooling over windows of window × window pixels, `stride` apart."""

    window: int
    stride: int
    round_up: bool

    def side(self, side: int) -> int:
        return pooled_side(side, self.window, self.stride, self.round_up)


def forward(
    x: Tensor, bias: Tensor | None, y: Tensor, places: Tensor, activation: str, size: int,
    alpha: float, beta: float, k: float, pool: Pool,
) -> None:  # fmt: skip
    """Fill y and places; all tensors are channels_last."""
    lanes, (h, w) = lanes_of(x), y.shape[2:]
    count = len(x) * triton.cdiv(h, _ROWS) * triton.cdiv(w, _COLUMNS)
    pooled_kernel[(triton.cdiv(count, lanes.pixels),)](
        x, bias, y, places, count, activation, size, alpha, beta, k, *x.shape[2:], h, w,
        lanes.chunk, lanes.chunks, lanes.lanes, pool.window, pool.stride, _ROWS, _COLUMNS,
        _AHEAD, num_warps=lanes.warps, maxnreg=REGISTERS,
    )  # fmt: skip


@triton.jit
def _better(value, place, other, there):
    """Return the larger of two values and its place: the first of equals, the last NaN."""
    better = (other > value) | (other != other)
    return tl.where(better, other, value), tl.where(better, there, place)


@triton.jit
def _score(
    z, part, activation: tl.constexpr, size: tl.constexpr, alpha: tl.constexpr, beta: tl.constexpr,
    k: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """Return what is maximised: LRN(f(z)), or its square where that is cheaper and equivalent."""
    a = activated(z, activation)
    if keys and size > 0 and beta == 0.75:  # one root instead of two: a² d^−3/2
        squares = a * a
        root = tl.rsqrt(k + alpha * window_sum(squares, part, chunk, chunks, size // 2))
        return (squares * root) * (root * root)
    else:
        return normalised(a, part, chunk, chunks, size, alpha, beta, k)


@triton.jit
def _pixels(
    x, row, column, mask, first: tl.constexpr, last: tl.constexpr, h: tl.constexpr,
    w: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr,
):  # fmt: skip
    """Read pixels `first` to `last` - 1 of a row, counted from `column`."""
    channel = tl.arange(0, chunk)[None, :]
    pixels = ()
    for i in tl.static_range(first, last):
        inside = (mask & (row < h) & (column + i < w))[:, None]
        at = ((row * w + column + i) * (chunk * chunks))[:, None] + channel
        pixels = pixels + (packed(tl.load(x + at, mask=inside, other=0.0)),)
    return pixels


@triton.jit
def _row(
    pixels, b, row, column, mask, part, activation: tl.constexpr, size: tl.constexpr,
    alpha: tl.constexpr, beta: tl.constexpr, k: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    chunk: tl.constexpr, chunks: tl.constexpr, window: tl.constexpr, stride: tl.constexpr,
    columns: tl.constexpr, edges: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """Return, for each of `columns` windows, the maximum over one row of pixels: a key, or a value
    and its place."""
    scores = ()
    for i in tl.static_range((columns - 1) * stride + window):
        inside = (mask & (row < h) & (column + i < w))[:, None]
        z = unpacked(pixels[i]) + b
        score = _score(z, part, activation, size, alpha, beta, k, chunk, chunks, keys)
        if edges:
            score = tl.where(inside, score, 0.0 if keys else float("-inf"))
        if keys:
            score = score.to(tl.int32, bitcast=True)
        scores = scores + (score,)
    best = ()
    for c in tl.static_range(columns):
        value = scores[c * stride]
        if keys:
            value = value & _VALUE | _PLACES
            for i in tl.static_range(1, window):
                value = tl.maximum(value, scores[c * stride + i] & _VALUE | (_PLACES - i))
            best = best + (value,)
        else:
            place = tl.zeros(value.shape, tl.int32)
            for i in tl.static_range(1, window):
                value, place = _better(value, place, scores[c * stride + i], i)
            best = best + (value, place)
    return best


@triton.jit
def _merged(best, row, offset: tl.constexpr, keys: tl.constexpr, columns: tl.constexpr):
    """Return the maxima over one more row of pixels, whose places begin at `offset`."""
    merged = ()
    for c in tl.static_range(columns):
        if keys:
            merged = merged + (tl.maximum(best[c], row[c] - offset),)
        else:
            value, place = _better(
                best[2 * c], best[2 * c + 1], row[2 * c], row[2 * c + 1] + offset
            )
            merged = merged + (value, place)
    return merged


@triton.jit(do_not_specialize=["count"])
def pooled_kernel(
    x, bias, y, places, count, activation: tl.constexpr, size: tl.constexpr, alpha: tl.constexpr,
    beta: tl.constexpr, k: tl.constexpr, h: tl.constexpr, w: tl.constexpr, pooled_h: tl.constexpr,
    pooled_w: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr, lanes: tl.constexpr,
    window: tl.constexpr, stride: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    ahead: tl.constexpr,
):  # fmt: skip
    """y = max over windows of LRN(f(x + b)), and each maximum's place, the first of equals.

    A lane walks down `rows` rows of `columns` pooled values, and carries over the rows of pixels
    that two windows share: so LRN is computed 1.36 times per pixel for 3 × 3 windows 2 apart, not
    2.25 times. The first `ahead` pixels of a row are read before the row above is computed: lanes
    that start together would wait together. If y is 16 bits wide and never negative, a value and
    its place are packed into one integer key, whose maximum is one instruction: 28 bits of the
    value, and below them 15 − place.
    """
    keys: tl.constexpr = (
        activation == "relu" and window <= 4 and y.dtype.element_ty.primitive_bitwidth == 16
    )
    edges: tl.constexpr = (
        max((pooled_h - 1) * stride + window - h, (pooled_w - 1) * stride + window - w) > 0
    )
    side: tl.constexpr = lanes // chunks  # side-by-side blocks of rows × columns pooled values
    along: tl.constexpr = (pooled_w + columns - 1) // columns
    down: tl.constexpr = (pooled_h + rows - 1) // rows
    shared: tl.constexpr = max(window - stride, 0)  # rows of pixels that two windows share
    each: tl.constexpr = columns if keys else 2 * columns  # tiles per row
    lane, channel = tl.arange(0, lanes), tl.arange(0, chunk)[None, :]
    part = lane % chunks
    block = tl.program_id(0) * side + lane // chunks
    mask = (lane < side * chunks) & (block < count)
    image = block // (along * down)
    i0, j0 = block // along % down * rows, block % along * columns
    wide: tl.constexpr = chunk * chunks
    x += (image.to(tl.int64) * (h * w * wide) + part * chunk)[:, None]
    made = (image.to(tl.int64) * (pooled_h * pooled_w * wide) + part * chunk)[:, None] + channel
    b = 0.0
    if bias is not None:
        b = tl.load(bias + (part * chunk)[:, None] + channel)
    width: tl.constexpr = (columns - 1) * stride + window
    first, j = i0 * stride, j0 * stride
    carried = ()
    early = _pixels(x, first, j, mask, 0, ahead, h, w, chunk, chunks)
    for r in tl.static_range(shared):
        pixels = early + _pixels(x, first + r, j, mask, ahead, width, h, w, chunk, chunks)
        early = _pixels(x, first + r + 1, j, mask, 0, ahead, h, w, chunk, chunks)
        carried = carried + _row(
            pixels, b, first + r, j, mask, part, activation, size, alpha, beta, k,
            h, w, chunk, chunks, window, stride, columns, edges, keys,
        )  # fmt: skip
    for i in range(rows):
        most = carried[:each]
        for r in tl.static_range(1, shared):
            most = _merged(most, carried[r * each : (r + 1) * each], r * window, keys, columns)
        kept = carried[stride * each :]
        for r in tl.static_range(shared, window):
            row = first + i * stride + r
            pixels = early + _pixels(x, row, j, mask, ahead, width, h, w, chunk, chunks)
            after = row + 1 if r + 1 < window else first + (i + 1) * stride + shared
            more = mask & (after < first + rows * stride + shared)
            early = _pixels(x, after, j, more, 0, ahead, h, w, chunk, chunks)
            seen = _row(
                pixels, b, row, j, mask, part, activation, size, alpha, beta, k, h, w, chunk,
                chunks, window, stride, columns, edges, keys,
            )  # fmt: skip
            most = _merged(most, seen, r * window, keys, columns) if r > 0 else seen
            kept = kept + seen if r >= stride else kept
        for column in tl.static_range(columns):
            if keys:
                place, value = (
                    _PLACES - (most[column] & _PLACES),
                    (most[column] & _VALUE).to(tl.float32, bitcast=True),
                )
                if size > 0 and beta == 0.75:
                    value = tl.sqrt(value)
            else:
                value, place = most[2 * column], most[2 * column + 1]
            if activation == "relu":
                place = tl.where(value <= 0, NOWHERE, place)
            inside = (mask & (i0 + i < pooled_h) & (j0 + column < pooled_w))[:, None]
            there = made + (((i0 + i) * pooled_w + j0 + column) * wide)[:, None]
            tl.store(y + there, value.to(y.dtype.element_ty), mask=inside)
            tl.store(places + there, place.to(tl.uint8), mask=inside)
        carried = kept
