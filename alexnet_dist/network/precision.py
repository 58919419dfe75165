"""`train.precision`: what the network computes in."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def parameter_dtype(precision: str) -> torch.dtype:
    """Of the weights: float32, of which bf16 casts copies; float64 all through."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What a network computes under, in training and when it answers."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
