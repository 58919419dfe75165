"""`train.precision`: the dtype in which the network computes."""

import torch

# The dtype of the network's input and activations.
DTYPES = {
    "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
FIRST_WITH = {"bf16": (8, 0), "tf32": (8, 0)}  # the least compute capability: Ampere's


def parameter_dtype(precision: str) -> torch.dtype:
    """Return the weights' dtype: float64 for fp64, else float32, of which bf16 casts copies."""
    return torch.float64 if precision == "fp64" else torch.float32


def allow_tf32(precision: str) -> None:
    """Allow TF32 (11-bit factors) in this process's float32 matrix products and convolutions if the
    precision is tf32; else forbid it: by default torch allows it in cuDNN."""
    # Not with torch's newer `fp32_precision`: once that is set, reading these flags raises, and the
    # code of torch 2.11 and 2.14 still reads them.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
