"""What the devices of this host are, and can do."""

import re

# bf16 without sparsity, FLOP/s, by what a device's name holds; NVIDIA's data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12,
    "3090": 71e12,
}  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Of a GPU of this name, in bf16, FLOP/s; None where it is not known."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device)), None
    )
