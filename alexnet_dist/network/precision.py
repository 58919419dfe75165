"""`train.precision`: the dtype in which the network computes."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# The dtype of the network's input and activations.
DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32,
    "fp64": torch.float64,
}  # fmt: skip
# By how much a loss, of sums over the batch, is scaled so that its gradients are neither lost below
# fp16's least number (6e-8) nor above its largest (65,504): at a power of two nothing is rounded.
GRADIENT_SCALE = {"fp16": 256.0}
FIRST_WITH = {"bf16": (8, 0), "tf32": (8, 0)}  # the lowest compute capability: Ampere's


def parameter_dtype(precision: str) -> torch.dtype:
    """Return the weights' dtype: float64 for fp64, else float32, which bf16 and fp16 cast."""
    return torch.float64 if precision == "fp64" else torch.float32


def product(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return a convolution's or matrix product's outputs, in the dtype of x.

    Where a CPU has no fast products in bf16 or fp16 (no AVX-512), they are computed in float32, and
    their sums rounded, as those are everywhere; torch's own loop takes ten times as long. A plan's
    fake tensors, which may stand for a GPU's, are left alone.
    """
    narrow = type(x) is Tensor and x.dtype.itemsize == 2 and not x.is_cuda
    if not narrow or cpu_multiplies(x.dtype):
        return function(x, weight, bias)
    with torch.autocast("cpu", enabled=False):  # DeepSpeed's
        out = function(x.float(), weight.float(), None if bias is None else bias.float())
    return out.to(x.dtype)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of 16 bits: with AVX-512, or instructions of ARM."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def allow_tf32(precision: str) -> None:
    """Allow TF32 (11-bit factors) in this process's float32 matrix products and convolutions if the
    precision is tf32; else forbid it: by default torch allows it in cuDNN."""
    # Not with torch's newer `fp32_precision`: once that is set, reading these flags raises, and the
    # code of torch 2.11 and 2.14 still reads them.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
