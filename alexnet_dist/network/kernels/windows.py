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

from alexnet_dist.network.kernels import custom_op

_BLOCK, _ROWS, _WARPS = 256, 64, 8  # windows: one pixel per lane; rows of values when folded


def windows(
    patches: Tensor, places: Tensor, inside: Tensor, corners: Tensor, flips: Tensor, light: Tensor,
    mean: Tensor, divide_by: Tensor, crop: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `Preprocess.by_loop`: return (n, v, crop, crop, 3)."""
    (n, views), rows = flips.shape, patches.contiguous()
    out = torch.empty((n, views, crop, crop, 3), dtype=dtype, device=patches.device)
    windows_kernel[(n * views, triton.cdiv(crop * crop, _BLOCK))](
        rows, places.contiguous(), inside.contiguous(), corners.contiguous(),
        flips.contiguous().view(torch.uint8), light.contiguous(), mean, divide_by, out, views,
        rows.shape[1], mean.shape[0], crop, _BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return out


@custom_op("alexnet_dist::fold", mutates_args=())
def fold(x: Tensor, stride: int, padding: int, cells_h: int, cells_w: int) -> Tensor:
    """Fold (n, 3, h, w) to (n, 3 · stride², cells_h, cells_w), both channels_last; no gradient."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = _folded(x, stride, cells_h, cells_w)
    columns = triton.next_power_of_2(3 * stride)
    fold_kernel[(len(x), triton.cdiv(cells_h * cells_w * stride, _ROWS))](
        x, out, *x.shape[2:], stride, padding, cells_h, cells_w, _ROWS, columns, num_warps=_WARPS
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
    down: tl.constexpr, along: tl.constexpr, block: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Read x and write out, once each. A tile holds rows of pixels of cells, whose 3 · stride
    values lie side by side in both; `columns` is a power of two, at least as many.
    """
    n = tl.program_id(0).to(tl.int64)
    rows: tl.constexpr = down * along * stride
    values: tl.constexpr = 3 * stride
    row, column = tl.program_id(1) * block + tl.arange(0, block), tl.arange(0, columns)[None, :]
    cell = row // stride
    i, j = cell % along * stride - padding, cell // along * stride + row % stride - padding
    there = (column < values) & (row < rows)[:, None]
    at = (3 * i)[:, None] + column  # in a row of x
    inside = there & ((j >= 0) & (j < h))[:, None] & (at >= 0) & (at < 3 * w)
    value = tl.load(x + n * (h * w * 3) + (j * (w * 3))[:, None] + at, mask=inside, other=0.0)
    tl.store(out + n * (rows * values) + (row * values)[:, None] + column, value, mask=there)


@triton.jit
def _corner(places, window):
    """Return a window's top and left, int32."""
    row, column = tl.load(places + 2 * window), tl.load(places + 2 * window + 1)
    return row.to(tl.int32), column.to(tl.int32)


@triton.jit
def windows_kernel(
    patches, places, inside, corners, flips, light, mean, divide_by, out, views, side, canvas,
    crop: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A lane makes a pixel: its three colours share what is to be known of its place."""
    window = tl.program_id(0).to(tl.int64)
    n = window // views
    at = tl.program_id(1) * block + tl.arange(0, block)
    mask = at < crop * crop
    x, y = at % crop, at // crop
    x = tl.where(tl.load(flips + window) != 0, crop - 1 - x, x)
    # Only the offsets of images need 64 bits.
    row, column = _corner(inside, window)
    patches += tl.load(places + n) * (side * side * 3) + ((row + y) * side + column + x) * 3
    row, column = _corner(corners, window)
    mean += ((row + y) * canvas + column + x) * 3
    out += window * (crop * crop * 3) + at * 3
    for colour in tl.static_range(3):
        pixel = tl.load(patches + colour, mask=mask, other=0)
        m = tl.load(mean + colour, mask=mask, other=0.0)
        lit = pixel.to(m.dtype) - m + tl.load(light + 3 * n + colour)
        scale = tl.load(divide_by + colour)
        # Triton's plain float32 division is not correctly rounded.
        value = lit / scale if m.dtype == tl.float64 else tl.div_rn(lit, scale)
        tl.store(out + colour, value, mask=mask)
