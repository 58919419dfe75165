"""The backward of the kernels for maps that are max-pooled."""

import triton
import triton.language as tl
from torch import Tensor

from alexnet_dist.network.kernels.lanes import (
    activated,
    activation_grad,
    lanes_of,
    normalised_backward,
    packed,
    packed_bytes,
    sum_dtype,
    sum_over_pixels,
    unpacked,
    unpacked_bytes,
)
from alexnet_dist.network.kernels.pooled import NOWHERE, Pool

PROGRAMS = 2112  # at most, so that few partial sums are left: an H200 runs as many
_EARLY = 1  # pixels of a block that are read before the block before is done
REGISTERS = 128  # per lane: 16 warps fit a multiprocessor; enough for the paper's maps


def backward(
    grads: Tensor, x: Tensor, bias: Tensor | None, places: Tensor, out: Tensor, activation: str,
    size: int, alpha: float, beta: float, k: float, pool: Pool,
) -> Tensor:  # fmt: skip
    """Fill out, the gradient of x; all tensors are channels_last. Return partial sums of the bias
    gradient, (programs, channels)."""
    lanes, (h, w) = lanes_of(x), x.shape[2:]
    count = len(x) * triton.cdiv(h, pool.stride) * triton.cdiv(w, pool.stride)
    programs = min(triton.cdiv(count, lanes.pixels), PROGRAMS)
    each = triton.cdiv(count, lanes.pixels * programs)
    parts = x.new_empty((programs, x.shape[1]), dtype=sum_dtype(x.dtype))
    pooled_backward_kernel[(programs,)](
        grads, x, bias, places, out, parts, count, activation, size, alpha, beta, k, h, w,
        *places.shape[2:], lanes.chunk, lanes.chunks, lanes.lanes, pool.window, pool.stride,
        each, min(_EARLY, pool.stride**2), num_warps=lanes.warps, maxnreg=REGISTERS,
    )  # fmt: skip
    return parts


@triton.jit
def _pixel(
    x, pixel: tl.constexpr, mask, i0, j0, h: tl.constexpr, w: tl.constexpr, wide: tl.constexpr,
    stride: tl.constexpr,
):  # fmt: skip
    """Read one of the stride × stride pixels of a block that begins at x."""
    dy, dx = pixel // stride, pixel % stride
    inside = (mask & (i0 * stride + dy < h) & (j0 * stride + dx < w))[:, None]
    return packed(tl.load(x + (dy * w + dx) * wide, mask=inside, other=0.0))


@triton.jit
def _block(
    grads, x, places, step, count, h: tl.constexpr, w: tl.constexpr, pooled_h: tl.constexpr,
    pooled_w: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr, lanes: tl.constexpr,
    window: tl.constexpr, stride: tl.constexpr, each: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Read the gradients and places of the windows over a program's block number `step`, and the
    block's first `early` pixels.

    Returns:
        gradients, places and pixels; the block's offset in x; which lanes have one; its row and
        column among blocks.
    """
    side: tl.constexpr = lanes // chunks
    along: tl.constexpr = (w + stride - 1) // stride
    down: tl.constexpr = (h + stride - 1) // stride
    reach: tl.constexpr = (window + stride - 1) // stride
    wide: tl.constexpr = chunk * chunks
    lane, channel = tl.arange(0, lanes), tl.arange(0, chunk)[None, :]
    part = lane % chunks
    block = (tl.program_id(0) * each + step) * side + lane // chunks
    mask = (lane < side * chunks) & (block < count) & (step < each)
    image = (block // (along * down)).to(tl.int64)
    i0, j0 = block // along % down, block % along
    begin = image * (pooled_h * pooled_w * wide) + (i0 * pooled_w + j0) * wide
    made = (begin + part * chunk)[:, None] + channel
    begin = image * (h * w * wide) + (i0 * w + j0) * (stride * wide)
    seen = (begin + part * chunk)[:, None] + channel
    upper = ()
    where = ()
    for r in tl.static_range(reach * reach):
        i, j = i0 - r // reach, j0 - r % reach
        there = (mask & (i >= 0) & (i < pooled_h) & (j >= 0) & (j < pooled_w))[:, None]
        at = made - (r // reach * pooled_w + r % reach) * wide
        upper = upper + (packed(tl.load(grads + at, mask=there, other=0.0)),)
        where = where + (packed_bytes(tl.load(places + at, mask=there, other=NOWHERE)),)
    products = ()
    for pixel in tl.static_range(early):
        products = products + (_pixel(x + seen, pixel, mask, i0, j0, h, w, wide, stride),)
    return upper, where, products, seen, mask, i0, j0


@triton.jit(do_not_specialize=["count"])
def pooled_backward_kernel(
    grads, x, bias, places, out, parts, count, activation: tl.constexpr, size: tl.constexpr,
    alpha: tl.constexpr, beta: tl.constexpr, k: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    pooled_h: tl.constexpr, pooled_w: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr,
    lanes: tl.constexpr, window: tl.constexpr, stride: tl.constexpr, each: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """Compute dx of `pooled_kernel`, and partial sums of db.

    A lane has `each` blocks of stride × stride pixels, one after another. So it is known at compile
    time which windows, at most ⌈window / stride⌉² of them, contain which of these pixels. While it
    computes one block, it reads the next one's gradients and first `early` pixels.
    """
    side: tl.constexpr = lanes // chunks
    reach: tl.constexpr = (window + stride - 1) // stride
    wide: tl.constexpr = chunk * chunks
    lane, channel = tl.arange(0, lanes), tl.arange(0, chunk)[None, :]
    part = lane % chunks
    b = 0.0
    if bias is not None:
        b = tl.load(bias + (part * chunk)[:, None] + channel)
    total = tl.zeros((lanes, chunk), parts.dtype.element_ty)
    ahead = _block(
        grads, x, places, 0, count, h, w, pooled_h, pooled_w, chunk, chunks, lanes, window, stride,
        each, early,
    )  # fmt: skip
    for step in range(each):
        upper, where, products, seen, mask, i0, j0 = ahead
        for pixel in tl.static_range(early, stride * stride):
            products = products + (
                _pixel(x + seen, pixel, mask, i0, j0, h, w, chunk * chunks, stride),
            )
        for pixel in tl.static_range(stride * stride):
            if pixel == stride * stride // 2:  # where registers are left for the next block
                ahead = _block(
                    grads, x, places, step + 1, count, h, w, pooled_h, pooled_w, chunk, chunks,
                    lanes, window, stride, each, early,
                )  # fmt: skip
            dy, dx = pixel // stride, pixel % stride
            if dy < window and dx < window:
                grad = tl.where(
                    unpacked_bytes(where[0]) == dy * window + dx, unpacked(upper[0]), 0.0
                )
            else:
                grad = tl.zeros((lanes, chunk), parts.dtype.element_ty)
            for r in tl.static_range(1, reach * reach):
                if r // reach * stride + dy < window and r % reach * stride + dx < window:
                    place = (r // reach * stride + dy) * window + r % reach * stride + dx
                    grad += tl.where(unpacked_bytes(where[r]) == place, unpacked(upper[r]), 0.0)
            a = activated(unpacked(products[pixel]) + b, activation)
            grad = normalised_backward(grad, a, part, chunk, chunks, size, alpha, beta, k)
            if activation != "relu":  # whose slope is known from places
                grad = activation_grad(grad, a, activation)
            inside = (mask & (i0 * stride + dy < h) & (j0 * stride + dx < w))[:, None]
            at = seen + (dy * w + dx) * wide
            tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)
            total += grad
    if bias is not None:
        total = sum_over_pixels(total, chunk, chunks, side)
        at = tl.program_id(0).to(tl.int64) * wide + part * chunk
        tl.store(parts + at[:, None] + channel, total, mask=(lane < chunks)[:, None])
