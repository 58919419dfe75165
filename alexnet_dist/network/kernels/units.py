"""Bias, activation and dropout after a fully-connected layer, in one pass forward and one backward.

Dropout's bits are drawn where they are used, which costs less than reading a mask. In the backward,
ReLU's y says which units were kept and positive; for other activations the bits are drawn again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_dist.network.kernels import custom_op
from alexnet_dist.network.kernels.lanes import (
    activated,
    activation_grad,
    stack,
    sum_dtype,
    sum_rows,
    upcast,
)

_FOURS = 64  # Philox counters, of four units each, per program
_ROWS = 8  # samples per program in the backward
_WARPS = 2
_PURPOSE = tl.constexpr(4)  # philox.Purpose.DROPOUT

DropoutArguments = tuple[Tensor, Tensor, int, int, int, float, bool]


def units(
    x: Tensor, bias: Tensor | None, activation: str | None, dropout: DropoutArguments | None = None
) -> Tensor:
    """Add the bias, activate, and drop units.

    Args:
        x: (n, units), a product without its bias.
        bias: (units,) float32, or float64 where x is.
        activation: relu, tanh or sigmoid.
        dropout: (slots, step, layer, first, seed, drop, at_test): the bits of
            `philox.dropout_mask`; units that stay are divided by 1 − drop unless `at_test`.
            slots: (n,) int64; step: () int64, both on the device of x.
    """
    if dropout is None:
        settings = (None, None, 0, 0, 0, 0, 1.0)
    else:
        slots, step, layer, first, seed, drop, at_test = dropout
        scale = 1.0 if at_test else 1 / (1 - drop)
        settings = (slots, step, layer, first, seed, round(drop * 2**32), scale)
    return _Units.apply(x, bias, activation or "", *settings)  # type: ignore[no-any-return]


class _Units(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, activation: str, slots: Tensor | None,
        step: Tensor | None, *settings: Any,
    ) -> Tensor:  # fmt: skip
        y: Tensor = units_forward(x, bias, activation, slots, step, *settings)
        ctx.save_for_backward(y, slots, step)
        ctx.settings, ctx.activation, ctx.bias = settings, activation, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, slots, step = ctx.saved_tensors
        settings = ctx.activation, slots, step, *ctx.settings
        grad, bias_grad = units_backward(grads[0], y, ctx.bias, *settings)
        return grad, bias_grad if ctx.bias else None, *([None] * (3 + len(ctx.settings)))


@custom_op("alexnet_dist::units", mutates_args=())
def units_forward(
    x: Tensor, bias: Tensor | None, activation: str, slots: Tensor | None, step: Tensor | None,
    layer: int, first: int, seed: int, threshold: int, scale: float,
) -> Tensor:  # fmt: skip
    """As `units`; a unit is dropped if its random word is below `threshold`, of 2³²."""
    x = x.contiguous()
    y, (n, count) = torch.empty_like(x), x.shape
    slots = None if slots is None else slots.contiguous()
    units_kernel[(n, _blocks(first, count))](
        x, bias, y, slots, step, layer, first, count, seed, threshold, activation, scale, _FOURS,
        num_warps=_WARPS,
    )  # fmt: skip
    return y


@custom_op("alexnet_dist::units_backward", mutates_args=())
def units_backward(
    grads: Tensor, y: Tensor, has_bias: bool, activation: str, slots: Tensor | None,
    step: Tensor | None, layer: int, first: int, seed: int, threshold: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and of the bias (float32 or float64; empty without a bias)."""
    grads, (n, count) = grads.contiguous(), y.shape
    slots = None if slots is None else slots.contiguous()
    out, rows = torch.empty_like(y), triton.cdiv(n, _ROWS)
    parts = y.new_empty((rows, count if has_bias else 0), dtype=sum_dtype(y.dtype))
    units_backward_kernel[(rows, _blocks(first, count))](
        grads, y, out, parts, slots, step, n, layer, first, count, seed, threshold, activation,
        scale, has_bias, _ROWS, _FOURS, num_warps=_WARPS,
    )  # fmt: skip
    return out, sum_rows(parts)


@units_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@units_backward.register_fake
def _(grads: Tensor, y: Tensor, has_bias: bool, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty(y.shape[1] if has_bias else 0, dtype=sum_dtype(y.dtype))


@custom_op("alexnet_dist::dropout_mask", mutates_args=())
def dropout_mask(
    slots: Tensor, step: Tensor, layer: int, first: int, count: int, seed: int, threshold: int,
) -> Tensor:  # fmt: skip
    """As `philox.dropout_mask`; step: () int64."""
    slots = slots.contiguous()
    stay = torch.empty(len(slots), count, dtype=torch.uint8, device=slots.device)
    masks_kernel[(len(slots), _blocks(first, count))](
        stay, slots, step, layer, first, count, seed, threshold, _FOURS, num_warps=_WARPS
    )
    return stay.view(torch.bool)


@dropout_mask.register_fake
def _(slots: Tensor, step: Tensor, layer: int, first: int, count: int, *_: int) -> Tensor:
    return slots.new_empty((len(slots), count), dtype=torch.bool)


def _blocks(first: int, count: int) -> int:
    """Return the number of programs for the counters of `count` units, starting at `first`."""
    fours = -(-(first + count) // 4) - first // 4
    return -(-fours // _FOURS)


@triton.jit
def _stays(slots, row, step, four, layer, seed, threshold):
    """Return which units of these counters are kept in this row: (counters, 4) bool."""
    zero = four.to(tl.int64) * 0
    c0, c1, c2 = zero + four, zero + tl.load(slots + row), zero + tl.load(step)
    c3, k0, k1 = zero + layer, zero + seed, zero + _PURPOSE
    w0, w1, w2, w3 = tl.philox_impl(
        c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32),
        k1.to(tl.uint32),
    )  # fmt: skip
    return stack((w0, w1, w2, w3), 4).to(tl.int64) >= threshold


@triton.jit
def masks_kernel(
    stay, slots, step, layer, first, count, seed, threshold, fours: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    four = first // 4 + tl.program_id(1) * fours + tl.arange(0, fours)
    unit = (4 * four - first)[:, None] + tl.arange(0, 4)[None, :]
    stays = _stays(slots, row, step, four, layer, seed, threshold)
    tl.store(stay + row * count + unit, stays, mask=(unit >= 0) & (unit < count))


@triton.jit
def units_kernel(
    x, bias, y, slots, step, layer, first, count, seed, threshold, activation: tl.constexpr,
    scale: tl.constexpr, fours: tl.constexpr,
):  # fmt: skip
    """y = mask · f(x + b) · scale: reads x and writes y, once each."""
    row = tl.program_id(0).to(tl.int64)
    four = first // 4 + tl.program_id(1) * fours + tl.arange(0, fours)
    unit = (4 * four - first)[:, None] + tl.arange(0, 4)[None, :]
    mask = (unit >= 0) & (unit < count)
    z = upcast(tl.load(x + row * count + unit, mask=mask, other=0.0))
    if bias is not None:
        z += tl.load(bias + unit, mask=mask, other=0.0)
    out = activated(z, activation)
    if slots is not None:
        stays = _stays(slots, row, step, four, layer, seed, threshold)
        out = tl.where(stays, out * scale, 0.0)
    tl.store(y + row * count + unit, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def units_backward_kernel(
    grads, y, out, parts, slots, step, n, layer, first, count, seed, threshold,
    activation: tl.constexpr, scale: tl.constexpr, has_bias: tl.constexpr, rows: tl.constexpr,
    fours: tl.constexpr,
):  # fmt: skip
    """Compute dx of `units_kernel`, and parts of db: reads y and dy, writes dx, once each."""
    four = first // 4 + tl.program_id(1) * fours + tl.arange(0, fours)
    unit = (4 * four - first)[:, None] + tl.arange(0, 4)[None, :]
    total = tl.zeros((fours, 4), parts.dtype.element_ty)
    for i in tl.static_range(rows):
        row = tl.program_id(0).to(tl.int64) * rows + i
        mask = (unit >= 0) & (unit < count) & (row < n)
        grad = upcast(tl.load(grads + row * count + unit, mask=mask, other=0.0)) * scale
        made = upcast(tl.load(y + row * count + unit, mask=mask, other=0.0))
        if activation == "relu" or slots is None:
            grad = activation_grad(grad, made, activation)
        else:
            grad = activation_grad(grad, made * (1 / scale), activation)
            there = tl.minimum(row, n - 1)
            grad = tl.where(_stays(slots, there, step, four, layer, seed, threshold), grad, 0.0)
        tl.store(out + row * count + unit, grad.to(out.dtype.element_ty), mask=mask)
        total += grad
    if has_bias:
        at = tl.program_id(0).to(tl.int64) * count + unit
        tl.store(parts + at, total, mask=(unit >= 0) & (unit < count))
