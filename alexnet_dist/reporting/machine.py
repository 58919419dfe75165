"""What `doctor` finds out about this machine, whatever the run: packages, processor, memory, GPUs,
Slurm, the clock. Each check yields findings."""

import ctypes
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from alexnet_dist.config.schema import Config
from alexnet_dist.errors import COMPILER, counted
from alexnet_dist.network import kernels
from alexnet_dist.parallel import environment, layouts
from alexnet_dist.parallel.device import CGROUP, cores, cpu_flags, gpus, precision_problem

PING_S = 4  # seconds in which Slurm's controller must answer
DRIVER = Path("/proc/driver/nvidia/version")
_MB = 2**20


@dataclass(frozen=True)
class Finding:
    """One thing that a run depends on.

    Attributes:
        remedy: what to do about it; empty if nothing is to be done.
        broken: whether a run would fail because of it.
    """

    what: str
    found: str
    remedy: str = ""
    broken: bool = False


def packages(config: Config) -> Iterator[Finding]:
    """Check that the required packages are installed; optional ones are left out."""
    there = []
    for text in sorted(metadata.requires("alexnet-dist") or ()):
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            version = "missing"
        if version != "missing" and needed.specifier.contains(version, prereleases=True):
            there.append(f"{needed.name} {version}")
        else:
            remedy = f"{text} is needed: make venv, or pip install '{text}'"
            yield Finding(needed.name, version, remedy, broken=True)
    yield Finding("packages", ", ".join(there))


def processor(config: Config) -> Iterator[Finding]:
    """Report cores, instruction sets, a container's CPU quota, and bf16 support."""
    may_use, flags = cores(), cpu_flags()
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    does = ", ".join(kinds) or platform.machine()
    yield Finding(
        "cpu",
        f"usable: {may_use} of {counted(os.cpu_count() or 1, 'core')}; {does}; torch computes with "
        f"{torch.backends.cpu.get_cpu_capability()}",
    )
    quota = _cores_of_quota()
    if quota and quota < may_use:
        remedy = f"set layout.threads={max(1, int(quota))}, or raise the container's quota"
        yield Finding("cpu quota", f"the time of {quota:g} cores for {may_use} cores", remedy)
    if {"avx512_bf16", "amx_bf16", "bf16"} & flags:
        yield Finding("bf16", "in hardware")
    elif config.train.precision == "bf16" and not gpus(config):
        alike = ": products are computed in float32, as fast as with train.precision=fp32"
        found = "this processor has no bf16 instructions" + alike * ("avx512f" not in flags)
        yield Finding("bf16", found)


def _cores_of_quota() -> float | None:
    """Return the CPU time that the container may use, in cores; None if it has no limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):
        return None


def memory(config: Config) -> Iterator[Finding]:
    """Check memory, the allocator, and the limits that libraries run into."""
    ram = psutil.virtual_memory()
    yield Finding("memory", f"{ram.available / 1e9:.1f} of {ram.total / 1e9:.1f} GB free")
    maps = Path("/proc/self/maps").read_text()
    preloaded = [name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in maps]
    if preloaded:
        yield Finding("allocator", f"{preloaded[0]}, which keeps freed memory by its own rules")
    elif hasattr(ctypes.CDLL(None), "mallopt"):
        yield Finding("allocator", "glibc's; a run tells it to keep freed memory")
    else:
        remedy = "preload jemalloc, or use an image with glibc: getting fresh pages is slow"
        yield Finding("allocator", "not glibc's", remedy)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)  # a run raises the soft limit
    remedy = "have it raised (ulimit -Hn): each shard that is read stays open"
    yield Finding("open files", f"at most {files}", remedy * (files < 4096), files < 128)
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        yield Finding("address space", "bounded", "ulimit -v unlimited: CUDA and DALI reserve much")
    if torch.cuda.device_count() > 1:
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        bounded = locked != resource.RLIM_INFINITY
        remedy = "ulimit -l unlimited, if nodes communicate over InfiniBand" if bounded else ""
        yield Finding("locked memory", f"at most {locked}" if bounded else "unbounded", remedy)
        shared = shutil.disk_usage("/dev/shm").free
        remedy = "docker run --shm-size=1g: NCCL needs it" if shared < 256 * _MB else ""
        yield Finding("/dev/shm", f"{shared / 1e9:.1f} GB free", remedy, broken=bool(remedy))


def graphics(config: Config) -> Iterator[Finding]:
    """Report each GPU, or why there is none."""
    here, precision = gpus(config), config.train.precision
    used = 0 < layouts.ranks_wanted(config, here) <= here
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        problem = precision_problem(precision, torch.device("cuda", index)) if used else ""
        yield Finding(
            f"gpu {index}",
            f"{torch.cuda.get_device_name(index)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, "
            f"capability {major}.{minor}, CUDA {torch.version.cuda}",
            problem,
            broken=bool(problem),
        )
    if torch.cuda.device_count():
        if here:
            yield compiler()
        return
    if DRIVER.exists() or shutil.which("nvidia-smi"):
        driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "an NVIDIA driver"
        wants = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield Finding(
            "gpus", f"torch sees none, although there is {driver}; this torch is built for {wants}",
            "update the driver, or install the torch that is built for it (pytorch.org); start a "
            "container with --gpus all; check CUDA_VISIBLE_DEVICES", broken=True,
        )  # fmt: skip
        return
    wanted = config.layout.device == "cuda"
    remedy = "set layout.device=auto, or use a machine with a GPU" if wanted else ""
    yield Finding("gpus", "none, and no driver for one", remedy, broken=wanted)


def compiler() -> Finding:
    """Report the C compiler that Triton needs to build GPU kernels."""
    if lack := kernels.lacking():
        return Finding("kernels", f"cannot be built: {lack}; steps are slower", COMPILER)
    return Finding("kernels", f"built by Triton with {kernels.compiler()}")


def slurm(config: Config) -> Iterator[Finding]:
    """Report Slurm's commands, and the job that this is."""
    there = [name for name in ("sbatch", "srun", "scontrol", "sacct") if shutil.which(name)]
    job, restarts = environment.job()
    within = f"in job {job}, {counted(restarts, 'restart')}" if job else "not in a job"
    missing = {"srun", "scontrol"} - {*there} if there or job else set()
    remedy = f"install Slurm's client: {', '.join(sorted(missing))} missing" if missing else ""
    if "scontrol" in there and not job:
        try:
            subprocess.run(["scontrol", "ping"], check=True, capture_output=True, timeout=PING_S)
        except (OSError, subprocess.SubprocessError):
            within = "its controller does not answer (scontrol ping)"
            remedy = (
                remedy or "jobs cannot be submitted from here; runs without Slurm are not affected"
            )
    yield Finding("slurm", f"{', '.join(there)}; {within}" if there else "not here", remedy)


def clock(config: Config) -> Iterator[Finding]:
    """Report whether the clock is synchronised."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # struct timex, modes=0
    loose = state in (-1, 5)  # TIME_ERROR
    remedy = "run chrony or ntpd, if logs of several nodes are to be compared" if loose else ""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    yield Finding("clock", f"{now}, {'not ' if loose else ''}synchronised by NTP", remedy)
