"""The SGD update in one pass over memory, including the narrow copy of the weights."""

import triton
import triton.language as tl
from torch import Tensor

from alexnet_dist.network.kernels import custom_op

_BLOCK, _WARPS = 1024, 8  # four elements per thread and tensor, whatever the dtype


@custom_op("alexnet_dist::sgd_update", mutates_args=("weight", "velocity", "narrow"))
def sgd_update(
    weight: Tensor, velocity: Tensor, grad: Tensor, narrow: Tensor | None, rates: Tensor,
    skip: Tensor,
) -> None:  # fmt: skip
    """Make v ← momentum · v + (factor · g + decay · w); w ← w − lr · v; narrow ← w; or nothing if
    skip ≠ 0.

    Args:
        weight, velocity: float32 or float64; these, grad and narrow must have the same layout in
            memory.
        grad: of weight's dtype, or a narrower one.
        narrow: a bfloat16 or float16 copy of the weight.
        rates: (4,): lr, weight decay, momentum and the gradient's factor, of weight's dtype.
        skip: () float32.
    """
    alike = [velocity, grad] if narrow is None else [velocity, grad, narrow]
    assert all(_lies(t) == _lies(weight) for t in alike)
    assert rates.shape == (4,)
    count = weight.numel()
    assert weight.untyped_storage().nbytes() >= count * weight.element_size()
    sgd_kernel[(triton.cdiv(count, _BLOCK),)](
        weight, velocity, grad, narrow, rates, skip, count, _BLOCK, num_warps=_WARPS
    )


def _lies(tensor: Tensor) -> list[tuple[int, int]]:
    """Return sizes and strides, without dimensions of size 1, whose strides torch leaves open."""
    return [each for each in zip(tensor.shape, tensor.stride(), strict=True) if each[0] != 1]


@sgd_update.register_fake
def _(*_: Tensor | None) -> None:
    return None


@triton.jit
def sgd_kernel(weight, velocity, grad, narrow, rates, skip, count, block: tl.constexpr):
    """Read w, v and g, and write w, v and the narrow copy, once each."""
    if tl.load(skip) == 0:
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        mask = at < count
        lr, decay, momentum = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
        w = tl.load(weight + at, mask=mask)
        v = tl.load(velocity + at, mask=mask)
        g = tl.load(grad + at, mask=mask).to(w.dtype)
        v = momentum * v + (tl.load(rates + 3) * g + decay * w)
        w = w - lr * v
        tl.store(weight + at, w, mask=mask)
        tl.store(velocity + at, v, mask=mask)
        if narrow is not None:
            tl.store(narrow + at, w.to(narrow.dtype.element_ty), mask=mask)
