"""Passes over a GPU's memory, compiled by Triton: one where torch's operators are twenty.

Those of the network are operators that torch.compile takes as they are. Imported where there is a
GPU; TRITON_INTERPRET=1 runs them on a CPU, slowly (tests/test_gpu_kernels.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

_BLOCK, _WARPS = 256, 8  # an element a thread, so that neighbours' loads are one


@custom_op("alexnet_dist::lrn", mutates_args=())
def lrn(maps: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """As `lrn.local_response_norm` with a β of ¾, in channels_last; float32 inside."""
    maps = maps.contiguous(memory_format=torch.channels_last)
    out, count = torch.empty_like(maps), maps.numel()
    lrn_kernel[(triton.cdiv(count, _BLOCK),)](
        maps, out, count, alpha, k, maps.shape[1], size // 2, _BLOCK, num_warps=_WARPS
    )
    return out


@custom_op("alexnet_dist::lrn_backward", mutates_args=())
def lrn_backward(maps: Tensor, grads: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """The gradient of what `lrn` was given, from the one of what it gave."""
    last = torch.channels_last
    maps, grads = maps.contiguous(memory_format=last), grads.contiguous(memory_format=last)
    out, count, wide = torch.empty_like(maps), maps.numel(), maps.shape[1]
    lrn_backward_kernel[(triton.cdiv(count, _BLOCK),)](
        maps, grads, out, count, alpha, k, wide, size // 2, _BLOCK, num_warps=_WARPS
    )
    return out


@custom_op("alexnet_dist::dropout_mask", mutates_args=())
def dropout_mask(
    slots: Tensor, step: Tensor, layer: int, first: int, count: int, seed: int, purpose: int,
    threshold: int,
) -> Tensor:  # fmt: skip
    """As `draws.dropout_mask`; step: () int64."""
    slots = slots.contiguous()
    stay = torch.empty(len(slots), count, dtype=torch.uint8, device=slots.device)
    blocks = -(-(first + count) // 4) - first // 4
    masks_kernel[(len(slots), triton.cdiv(blocks, _BLOCK))](
        stay, slots, step, layer, first, count, seed, purpose, threshold, _BLOCK, num_warps=_WARPS
    )
    return stay.view(torch.bool)


def windows(
    patches: Tensor, inside: Tensor, corners: Tensor, flips: Tensor, light: Tensor, mean: Tensor,
    divide_by: Tensor, crop: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `Finish.by_loop`: (n, v, crop, crop, 3)."""
    (n, views), rows = flips.shape, patches.contiguous()
    out = torch.empty((n, views, crop, crop, 3), dtype=dtype, device=patches.device)
    grid = (n * views, triton.cdiv(3 * crop * crop, _BLOCK))
    windows_kernel[grid](
        rows, inside.contiguous(), corners.contiguous(), flips.contiguous().view(torch.uint8),
        light.contiguous(), mean, divide_by, out, views, rows.shape[1], mean.shape[0], crop, _BLOCK,
        num_warps=_WARPS,
    )  # fmt: skip
    return out


@lrn.register_fake
def _(maps: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


@lrn_backward.register_fake
def _(maps: Tensor, grads: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


@dropout_mask.register_fake
def _(
    slots: Tensor, step: Tensor, layer: int, first: int, count: int, seed: int, purpose: int,
    threshold: int,
) -> Tensor:  # fmt: skip
    return slots.new_empty((len(slots), count), dtype=torch.bool)


@triton.jit
def _power(d):
    """d^−3/4"""
    root = 1.0 / tl.sqrt(d)
    return root * tl.sqrt(root)


@triton.jit
def _denominator(
    maps, at, place, inside, alpha, k,
    shift: tl.constexpr, wide: tl.constexpr, half: tl.constexpr,
):  # fmt: skip
    """d = k + α Σ a² around the elements `shift` after these, whose place in a pixel is `place`."""
    total = tl.zeros(at.shape, tl.float32)
    for near in tl.static_range(shift - half, shift + half + 1):
        here = inside & (place + near >= 0) & (place + near < wide)
        a = tl.load(maps + at + near, mask=here, other=0.0).to(tl.float32)
        total += a * a
    return k + alpha * total


@triton.jit
def _places(count, wide: tl.constexpr, block: tl.constexpr):
    """Of this program's elements: where they are, whether they are, their place in a pixel."""
    begin = tl.program_id(0).to(tl.int64) * block
    along = tl.arange(0, block)
    at = begin + along
    return at, at < count, ((begin % wide).to(tl.int32) + along) % wide


@triton.jit
def lrn_kernel(
    maps, out, count, alpha, k, wide: tl.constexpr, half: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    at, inside, place = _places(count, wide, block)
    a = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32)
    d = _denominator(maps, at, place, inside, alpha, k, 0, wide, half)
    tl.store(out + at, a * _power(d), mask=inside)


@triton.jit
def lrn_backward_kernel(
    maps, grads, out, count, alpha, k, wide: tl.constexpr,
    half: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # db_i/da_j = [i=j] d_i^−β − 2αβ a_i a_j d_i^(−β−1), where i and j are neighbours
    at, inside, place = _places(count, wide, block)
    crossed = tl.zeros(at.shape, tl.float32)
    for near in tl.static_range(-half, half + 1):
        here = inside & (place + near >= 0) & (place + near < wide)
        a = tl.load(maps + at + near, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grads + at + near, mask=here, other=0.0).to(tl.float32)
        d = _denominator(maps, at, place, inside, alpha, k, near, wide, half)
        crossed += g * a * _power(d) / d
    a = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    d = _denominator(maps, at, place, inside, alpha, k, 0, wide, half)
    tl.store(out + at, g * _power(d) - 1.5 * alpha * a * crossed, mask=inside)


@triton.jit
def masks_kernel(
    stay, slots, step, layer, first, count, seed, purpose,
    threshold, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    four = first // 4 + tl.program_id(1) * block + tl.arange(0, block)  # units of one counter
    zero = tl.zeros((block,), tl.int64)
    c0, c1, c2 = zero + four, zero + tl.load(slots + row), zero + tl.load(step)
    c3, k0, k1 = zero + layer, zero + seed, zero + purpose
    w0, w1, w2, w3 = tl.philox_impl(
        c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32),
        k1.to(tl.uint32),
    )  # fmt: skip
    unit, out = 4 * four - first, stay + row * count
    tl.store(out + unit, w0.to(tl.int64) >= threshold, mask=(unit >= 0) & (unit < count))
    unit += 1
    tl.store(out + unit, w1.to(tl.int64) >= threshold, mask=(unit >= 0) & (unit < count))
    unit += 1
    tl.store(out + unit, w2.to(tl.int64) >= threshold, mask=(unit >= 0) & (unit < count))
    unit += 1
    tl.store(out + unit, w3.to(tl.int64) >= threshold, mask=(unit >= 0) & (unit < count))


@triton.jit
def windows_kernel(
    patches, inside, corners, flips, light, mean, divide_by,
    out, views, side, canvas, crop: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)  # (crop, crop, 3) in a line
    known = at < 3 * crop * crop
    colour, x, y = at % 3, at // 3 % crop, at // (3 * crop)
    x = tl.where(tl.load(flips + window) != 0, crop - 1 - x, x)
    n = window // views
    row, column = tl.load(inside + 2 * window) + y, tl.load(inside + 2 * window + 1) + x
    pixel = tl.load(patches + ((n * side + row) * side + column) * 3 + colour, mask=known, other=0)
    row, column = tl.load(corners + 2 * window) + y, tl.load(corners + 2 * window + 1) + x
    m = tl.load(mean + (row * canvas + column) * 3 + colour, mask=known, other=0.0)
    lit = pixel.to(m.dtype) - m + tl.load(light + 3 * n + colour)
    scale = tl.load(divide_by + colour)
    # Plain division of float32 is less exact on a GPU.
    value = lit / scale if m.dtype == tl.float64 else tl.div_rn(lit, scale)
    tl.store(out + window * 3 * crop * crop + at, value, mask=known)
