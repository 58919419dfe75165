"""Cutting the network's input windows from images, and folding them for a strided convolution.

Folded by a stride s, a cell of s × s pixels becomes one pixel of 3 · s² channels, so that a
convolution with stride s over pixels becomes one with stride 1 over cells:

    out[n, (dy · s + dx) · 3 + c, i, j] = x[n, c, s · i + dy − padding, s · j + dx − padding]

and zeros outside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

_BLOCK, _WARPS = 256, 8  # one element per thread, so that neighbours' loads coalesce


def windows(
    patches: Tensor, inside: Tensor, corners: Tensor, flips: Tensor, light: Tensor, mean: Tensor,
    divide_by: Tensor, crop: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `Preprocess.by_loop`: return (n, v, crop, crop, 3)."""
    (n, views), rows = flips.shape, patches.contiguous()
    out = torch.empty((n, views, crop, crop, 3), dtype=dtype, device=patches.device)
    windows_kernel[(n * views, triton.cdiv(3 * crop * crop, _BLOCK))](
        rows, inside.contiguous(), corners.contiguous(), flips.contiguous().view(torch.uint8),
        light.contiguous(), mean, divide_by, out, views, rows.shape[1], mean.shape[0], crop,
        _BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return out


@custom_op("alexnet_dist::fold", mutates_args=())
def fold(x: Tensor, stride: int, padding: int, cells_h: int, cells_w: int) -> Tensor:
    """Fold (n, 3, h, w) to (n, 3 · stride², cells_h, cells_w), both channels_last; no gradient."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = _folded(x, stride, cells_h, cells_w)
    fold_kernel[(len(x), triton.cdiv(out[0].numel(), _BLOCK))](
        x, out, *x.shape[2:], stride, padding, cells_h, cells_w, _BLOCK, num_warps=_WARPS
    )
    return out


@fold.register_fake
def _(x: Tensor, stride: int, padding: int, cells_h: int, cells_w: int) -> Tensor:
    return _folded(x, stride, cells_h, cells_w)


def _folded(x: Tensor, stride: int, cells_h: int, cells_w: int) -> Tensor:
    return torch.empty(
        (len(x), 3 * stride**2, cells_h, cells_w), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


@triton.jit
def fold_kernel(
    x, out, h: tl.constexpr, w: tl.constexpr, stride: tl.constexpr, padding: tl.constexpr,
    down: tl.constexpr, along: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Read x and write out, once each."""
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    count: tl.constexpr = down * along * 3 * stride * stride
    within, cell = at % (3 * stride * stride), at // (3 * stride * stride)
    colour = within % 3
    i = cell % along * stride + within // 3 % stride - padding
    j = cell // along * stride + within // (3 * stride) - padding
    inside = (at < count) & (i >= 0) & (i < w) & (j >= 0) & (j < h)
    value = tl.load(x + n * (h * w * 3) + (j * w + i) * 3 + colour, mask=inside, other=0.0)
    tl.store(out + n * count + at, value, mask=at < count)


@triton.jit
def windows_kernel(
    patches, inside, corners, flips, light, mean, divide_by, out, views, side, canvas,
    crop: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)  # (crop, crop, 3) in a line
    mask = at < 3 * crop * crop
    colour, x, y = at % 3, at // 3 % crop, at // (3 * crop)
    x = tl.where(tl.load(flips + window) != 0, crop - 1 - x, x)
    n = window // views
    row, column = tl.load(inside + 2 * window) + y, tl.load(inside + 2 * window + 1) + x
    pixel = tl.load(patches + ((n * side + row) * side + column) * 3 + colour, mask=mask, other=0)
    row, column = tl.load(corners + 2 * window) + y, tl.load(corners + 2 * window + 1) + x
    m = tl.load(mean + (row * canvas + column) * 3 + colour, mask=mask, other=0.0)
    lit = pixel.to(m.dtype) - m + tl.load(light + 3 * n + colour)
    scale = tl.load(divide_by + colour)
    # Triton's plain float32 division is not correctly rounded.
    value = lit / scale if m.dtype == tl.float64 else tl.div_rn(lit, scale)
    tl.store(out + window * 3 * crop * crop + at, value, mask=mask)
