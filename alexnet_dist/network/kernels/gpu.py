"""Passes over a GPU's memory, compiled by Triton: one where torch's operators are twenty.

Those of the network are operators that torch.compile takes as they are. Imported where there is a
GPU; TRITON_INTERPRET=1 runs them on a CPU, slowly (tests/test_gpu_kernels.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from alexnet_dist.network.kernels.units import dropout_mask as dropout_mask
from alexnet_dist.network.kernels.windows import windows as windows

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


@lrn.register_fake
def _(maps: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


@lrn_backward.register_fake
def _(maps: Tensor, grads: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


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
