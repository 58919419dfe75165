"""All that follows a convolution, y = pool(LRN(f(x + b))), in one pass forward and one backward.

The backward needs x, the product, and, if maps are pooled, one byte per pooled value: the maximum's
place in its window. Everything else is recomputed from x, which costs less than reading it. The
bias gradient is summed in the same pass, by each program over its own pixels, then over programs by
one small kernel: in a fixed order, so that every run gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_dist.network.kernels import custom_op, pooled, pooled_backward
from alexnet_dist.network.kernels.lanes import (
    activated,
    activation_grad,
    lanes_of,
    normalised,
    normalised_backward,
    sum_dtype,
    sum_over_pixels,
    sum_rows,
    upcast,
)
from alexnet_dist.network.kernels.pooled import Pool

_EACH = 4  # groups of pixels read at once by a program
_LAST = torch.channels_last


def maps(
    x: Tensor, bias: Tensor | None, activation: str | None,
    lrn: tuple[int, float, float, float] | None = None,
    pool: tuple[int, int, bool] | None = None, activation_last: bool = False,
) -> Tensor:  # fmt: skip
    """Add the bias, activate, normalise and pool maps, in this order.

    Args:
        x: (n, channels, h, w), a convolution's product without its bias; channels_last.
        bias: (channels,) float32, or float64 where x is.
        activation: relu, tanh or sigmoid.
        lrn: (size, alpha, beta, k), as `lrn.local_response_norm` takes them.
        pool: (window, stride, round_up), as `F.max_pool2d` takes them.
        activation_last: the activation comes after the pooling.

    Returns:
        (n, channels, pooled h, pooled w), x's dtype, channels_last.
    """
    if activation_last:
        return maps(maps(x, bias, None, lrn, pool), None, activation)
    return _Maps.apply(  # type: ignore[no-any-return]
        x, bias, activation or "", *(lrn or (0, 0.0, 0.0, 0.0)), *(pool or (1, 1, False))
    )


class _Maps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        y: Tensor
        y, places = maps_forward(x, bias, *settings)
        ctx.save_for_backward(x, bias, places)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, places = ctx.saved_tensors
        grad, bias_grad = maps_backward(grads[0], x, bias, places, *ctx.settings)
        return grad, None if bias is None else bias_grad, *([None] * len(ctx.settings))


@custom_op("alexnet_dist::maps", mutates_args=())
def maps_forward(
    x: Tensor, bias: Tensor | None, activation: str, size: int, alpha: float, beta: float,
    k: float, window: int, stride: int, round_up: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the maps, and each maximum's place in its window: (n, channels, pooled h, pooled w)
    uint8."""
    x, pool = x.contiguous(memory_format=_LAST), Pool(window, stride, round_up)
    y, places = _outputs(x, pool)
    if pool.window > 1 or pool.stride > 1:
        pooled.forward(x, bias, y, places, activation, size, alpha, beta, k, pool)
        return y, places
    lanes, pixels = lanes_of(x), x.numel() // x.shape[1]
    maps_kernel[(triton.cdiv(pixels, lanes.pixels * _EACH),)](
        x, bias, y, pixels, activation, size, alpha, beta, k, lanes.chunk, lanes.chunks,
        lanes.lanes, _EACH, num_warps=lanes.warps,
    )  # fmt: skip
    return y, places


@custom_op("alexnet_dist::maps_backward", mutates_args=())
def maps_backward(
    grads: Tensor, x: Tensor, bias: Tensor | None, places: Tensor, activation: str, size: int,
    alpha: float, beta: float, k: float, window: int, stride: int, round_up: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and of the bias (float32 or float64; empty without a bias)."""
    x, grads = x.contiguous(memory_format=_LAST), grads.contiguous(memory_format=_LAST)
    out, pool = torch.empty_like(x, memory_format=_LAST), Pool(window, stride, round_up)
    if pool.window > 1 or pool.stride > 1:
        parts = pooled_backward.backward(
            grads, x, bias, places, out, activation, size, alpha, beta, k, pool
        )
    else:
        lanes, pixels = lanes_of(x), x.numel() // x.shape[1]
        programs = min(triton.cdiv(pixels, lanes.pixels * _EACH), pooled_backward.PROGRAMS)
        steps = triton.cdiv(pixels, lanes.pixels * _EACH * programs)
        parts = x.new_empty((programs, x.shape[1]), dtype=sum_dtype(x.dtype))
        maps_backward_kernel[(programs,)](
            grads, x, bias, out, parts, pixels, activation, size, alpha, beta, k, lanes.chunk,
            lanes.chunks, lanes.lanes, _EACH, steps, num_warps=lanes.warps,
        )  # fmt: skip
    return out, parts.new_empty(0) if bias is None else sum_rows(parts)


@maps_forward.register_fake
def _(x: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    return _outputs(x, Pool(*settings[-3:]))


@maps_backward.register_fake
def _(grads: Tensor, x: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    bias_grad = x.new_empty(0 if bias is None else x.shape[1], dtype=sum_dtype(x.dtype))
    return torch.empty_like(x, memory_format=_LAST), bias_grad


def _outputs(x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Allocate the maps and the places of their maxima."""
    n, channels, *sides = x.shape
    shape = (n, channels, *(pool.side(side) for side in sides))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAST)
    if pool.window == pool.stride == 1:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=_LAST)


@triton.jit
def _at(
    group, pixels, chunk: tl.constexpr, chunks: tl.constexpr, lanes: tl.constexpr
):  # fmt: skip
    """Return the offsets of the channels of a group of side-by-side pixels, and which exist."""
    side: tl.constexpr = lanes // chunks
    lane = tl.arange(0, lanes)
    pixel = group * side + lane // chunks
    at = pixel.to(tl.int64) * (chunk * chunks) + lane % chunks * chunk
    mask = (lane < side * chunks) & (pixel < pixels)
    return at[:, None] + tl.arange(0, chunk)[None, :], mask[:, None]


@triton.jit(do_not_specialize=["pixels"])
def maps_kernel(
    x, bias, y, pixels, activation: tl.constexpr, size: tl.constexpr, alpha: tl.constexpr,
    beta: tl.constexpr, k: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr,
    lanes: tl.constexpr, each: tl.constexpr,
):  # fmt: skip
    """y = LRN(f(x + b)): reads x and writes y, once each."""
    part = tl.arange(0, lanes) % chunks
    b = 0.0
    if bias is not None:
        b = tl.load(bias + (part * chunk)[:, None] + tl.arange(0, chunk)[None, :])
    products = ()  # issue all loads before the first use
    for i in tl.static_range(each):
        at, mask = _at(tl.program_id(0) * each + i, pixels, chunk, chunks, lanes)
        products = products + (tl.load(x + at, mask=mask, other=0.0),)
    for i in tl.static_range(each):
        at, mask = _at(tl.program_id(0) * each + i, pixels, chunk, chunks, lanes)
        a = activated(upcast(products[i]) + b, activation)
        out = normalised(a, part, chunk, chunks, size, alpha, beta, k)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def maps_backward_kernel(
    grads, x, bias, out, parts, pixels, activation: tl.constexpr, size: tl.constexpr,
    alpha: tl.constexpr, beta: tl.constexpr, k: tl.constexpr, chunk: tl.constexpr,
    chunks: tl.constexpr, lanes: tl.constexpr, each: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """Compute dx of `maps_kernel`, and partial sums of db: reads x and dy, writes dx, once each."""
    part, channel = tl.arange(0, lanes) % chunks, tl.arange(0, chunk)[None, :]
    b = 0.0
    if bias is not None:
        b = tl.load(bias + (part * chunk)[:, None] + channel)
    total = tl.zeros((lanes, chunk), parts.dtype.element_ty)
    for step in range(steps):
        group = (tl.program_id(0) * steps + step) * each
        products, upper = (), ()
        for i in tl.static_range(each):
            at, mask = _at(group + i, pixels, chunk, chunks, lanes)
            products = products + (tl.load(x + at, mask=mask, other=0.0),)
            upper = upper + (tl.load(grads + at, mask=mask, other=0.0),)
        for i in tl.static_range(each):
            at, mask = _at(group + i, pixels, chunk, chunks, lanes)
            a = activated(upcast(products[i]) + b, activation)
            grad = upcast(upper[i])
            grad = normalised_backward(grad, a, part, chunk, chunks, size, alpha, beta, k)
            grad = activation_grad(grad, a, activation)
            tl.store(out + at, grad.to(out.dtype.element_ty), mask=mask)
            total += grad
    if bias is not None:
        total = sum_over_pixels(total, chunk, chunks, lanes // chunks)
        at = tl.program_id(0).to(tl.int64) * (chunk * chunks) + part * chunk
        first = tl.arange(0, lanes) < chunks
        tl.store(parts + at[:, None] + channel, total, mask=first[:, None])
