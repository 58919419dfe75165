"""The devices of this host: what they can do, and which of them this rank uses."""

import contextlib
import ctypes
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from alexnet_dist.config.schema import Config
from alexnet_dist.errors import ConfigError, counted
from alexnet_dist.network.precision import FIRST_WITH
from alexnet_dist.parallel.environment import Place

CGROUP = Path("/sys/fs/cgroup")
NCCL_SHARES_FROM = (2, 30)  # first version in which ranks can share a GPU
_BESIDE_TENSORS = 10**9  # estimated bytes of GPU memory for the CUDA context, libraries, NCCL
log = logging.getLogger(__name__)
# Peak bf16 FLOP/s without sparsity, by a part of the device's name; from NVIDIA's data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12,
    "3090": 71e12,
}  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Return the peak bf16 FLOP/s of a GPU of this name; None if unknown."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device)), None
    )


def gpus(config: Config) -> int:
    """Return the number of this host's GPUs that a run may use."""
    return 0 if config.layout.device == "cpu" else torch.cuda.device_count()


def ranks_per_gpu(config: Config, ranks: int) -> int:
    """Return how many of this host's ranks use each GPU; 0 if they compute on the CPU."""
    found = gpus(config)
    if ranks <= found:
        return 1
    return -(-ranks // found) if found and config.layout.share_gpu else 0


def share_problem(config: Config, ranks: int) -> str:
    """Return why this host's ranks cannot share its GPUs, and what to do; empty if they can, or if
    layout.share_gpu is not set."""
    if not config.layout.share_gpu:
        return ""
    if not (found := gpus(config)):
        return (
            "layout.share_gpu=true: this machine has no GPU to share: set layout.share_gpu=false "
            "to compute on the CPU; `alexnet-dist doctor` says why there is none"
        )
    if ranks <= found or (version := nccl_version()) >= NCCL_SHARES_FROM:
        return ""
    return (
        f"layout.share_gpu=true: {ranks} ranks but only {counted(found, 'GPU')}, and NCCL "
        f"{'.'.join(map(str, version)) or 'is missing, which'} cannot give a GPU to several "
        "ranks: install torch 2.14, whose NCCL 2.30 can, or set layout.share_gpu=false"
    )


def nccl_version() -> tuple[int, ...]:
    """Return the version of the loaded NCCL, which LD_PRELOAD may have set; () if none."""
    try:
        nccl, found = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD), ctypes.c_int()
        nccl.ncclGetVersion(ctypes.byref(found))
    except OSError:  # NCCL is linked into torch's own library, or there is none
        return tuple(torch.cuda.nccl.version()) if dist.is_nccl_available() else ()
    return found.value // 10000, found.value // 100 % 100, found.value % 100


def memory_share(total: int, ranks: int) -> int:
    """Return the bytes of a GPU's memory that each of the ranks sharing it may use for tensors."""
    each = total // ranks
    return max(each - _BESIDE_TENSORS, each // 2)


def free_gpu_memory(device: torch.device) -> int:
    """Return the bytes of its GPU's memory that this rank may still allocate."""
    free, total = torch.cuda.mem_get_info(device)
    bound = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, bound - torch.cuda.memory_reserved(device))


def take_device(config: Config, place: Place) -> torch.device:
    """Select and return this rank's device; raise ConfigError if it has none, or if the device
    cannot compute in train.precision."""
    device = own_device(config, place)
    if problem := precision_problem(config.train.precision, device):
        raise ConfigError(problem)
    return device


def own_device(config: Config, place: Place) -> torch.device:
    """Select and return this rank's device, whatever the precision; raise ConfigError if
    layout.device=cuda and there are too few GPUs, or if they cannot be shared."""
    found, ranks = gpus(config), place.local_world
    if config.layout.share_gpu:  # all ranks need it when NCCL makes the first group
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    # With --gpus-per-task Slurm may show each task only its own GPU, as device 0.
    if found == 1 and (place.gpus_on_node or 0) >= ranks:
        return _current(0)
    if problem := share_problem(config, ranks):
        raise ConfigError(problem)
    match ranks_per_gpu(config, ranks):
        case 0:
            if config.layout.device == "cuda":
                remedy = (", layout.kind=one or layout.share_gpu=true" if found
                          else "; `alexnet-dist doctor` says why there is none")  # fmt: skip
                raise ConfigError(
                    f"layout.device=cuda: this host's ranks need {counted(ranks, 'GPU')}, but it "
                    f"has {found}; set layout.device=auto{remedy}"
                )
            if found and place.rank == 0:
                log.warning(
                    f"{ranks} ranks but only {counted(found, 'GPU')}: computing on the CPU; to use "
                    f"the GPU, set layout.kind=one, layout.ranks={found}, or layout.share_gpu=true"
                )
            return torch.device("cpu")
        case 1:
            return _current(place.local_rank)
        case each:
            device = _current(place.local_rank * found // ranks)  # neighbours on one
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(memory_share(total, each) / total, device)
            return device


def _current(index: int) -> torch.device:
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def precision_problem(precision: str, device: torch.device) -> str:
    """Return why a device cannot compute in this precision, and what to set; empty if it can."""
    if device.type == "cpu":
        if precision != "tf32":
            return ""
        return (
            "train.precision=tf32: only GPUs have it, but this run computes on the CPU: set "
            "train.precision=fp32 or bf16"
        )
    capability = torch.cuda.get_device_capability(device)
    first = FIRST_WITH.get(precision, (0, 0))
    if capability >= first:
        return ""
    return (
        f"train.precision={precision}: needs compute capability {first[0]}.{first[1]}, but "
        f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: set "
        f"train.precision={'fp16' if precision == 'bf16' else 'fp32'}"
    )


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cores_of(place: Place) -> int:
    """Return the number of CPU cores that a rank may use: Slurm's allocation for its task, or an
    equal share of this host's."""
    return min(cores(), place.cores or max(1, cores() // place.local_world))


def free_host_memory() -> int:
    """Return the bytes of memory that this process may still take, within this host and its control
    groups."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left in each control group that limits this process's memory, versions 1 and
    2, with cached files counted as free. See cgroups(7)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number == "0":
            root, most, used, total = CGROUP, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, total = CGROUP / "memory", "total_"
            most, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for group in (own, *own.parents[: len(own.relative_to(root).parts)]):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no limit, or not readable
                left = int((group / most).read_text()) - int((group / used).read_text())
                stat = (group / "memory.stat").read_text().splitlines()
                counts = dict(line.split() for line in stat)
                files = [counts[f"{total}{which}_file"] for which in ("active", "inactive")]
                yield max(0, left + sum(map(int, files)))


def machine() -> dict[str, Any]:
    """Describe what a measurement made here depends on: processor, GPU, versions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_flags() -> set[str]:
    """Return the processor's features as the Linux kernel names them: amx_bf16, …"""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.lower().startswith(("flags", "features"))
            for flag in line.partition(":")[2].split()}  # fmt: skip


def shorten_switch_interval() -> None:
    """Make threads release Python's lock after 0.5 ms instead of 5 ms: the decoding threads and the
    one that feeds the device need it for microseconds, many times a second."""
    sys.setswitchinterval(5e-4)


def keep_freed_memory() -> None:
    """Keep freed memory in the process, since fresh pages cost as much as the arithmetic on them.

    Uses glibc's mallopt(3): no mmap for blocks below 1 GiB, no trimming. Elsewhere does nothing.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(mmap_max, 0)
