"""`train.precision`: what the network computes in."""

import torch

# Of what the network sees.
DTYPES = {
    "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
FIRST_WITH = {"bf16": (8, 0), "tf32": (8, 0)}  # compute capability of GPUs: Ampere's


def parameter_dtype(precision: str) -> torch.dtype:
    """Of the weights: float32, of which bf16 casts copies; float64 all through."""
    return torch.float64 if precision == "fp64" else torch.float32


def allow_tf32(precision: str) -> None:
    """Let this process's GPU round the factors of float32 products and convolutions to TF32's 11
    bits under tf32, and under no other: torch lets cuDNN do so by default."""
    # By the flags that torch 2.11's and 2.14's own code still reads: after torch's newer
    # `fp32_precision` reading these raises.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
