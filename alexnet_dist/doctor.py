"""What is installed here, and what a run would use."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

_PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda120",
    "deepspeed",
    "tensorboard",
    "submitit",
    "omegaconf",
    "safetensors",
)


def report(output_dir: Path) -> list[tuple[str, str]]:
    """(what, finding) for each thing a run depends on."""
    cores = len(os.sched_getaffinity(0))
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, _version(name)) for name in _PACKAGES]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows += [
        ("cpu", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}"),
        ("gpus", ", ".join(gpus) or "none: ranks compute on the CPU and meet over gloo"),
        ("layout.kind=columns", _columns(len(gpus), cores)),
        ("backends", ", ".join(n for n in ("gloo", "nccl") if dist.is_backend_available(n))),
    ]
    folder = next(p for p in (output_dir.resolve(), *output_dir.resolve().parents) if p.exists())
    free = shutil.disk_usage(folder).free / 1e9
    rows.append(("disk", f"{free:.0f} GB free for {output_dir} (a full checkpoint: 0.5 GB)"))
    return rows


def _columns(gpus: int, cores: int) -> str:
    if gpus >= 2:
        return "two processes, a GPU each, NCCL"
    one = "; the one GPU is used by layout.kind=one" if gpus == 1 else ""
    return f"two processes on the CPU, {max(1, cores // 2)} thread(s) each, gloo{one}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing: pip install -e ."
