"""What is here, what a run would use of it and why, and what to mend before one is started."""

import ctypes
import fcntl
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from alexnet_dist.compat import all_gather_single
from alexnet_dist.config.schema import Config
from alexnet_dist.data.inspect import inspect
from alexnet_dist.data.pipelines.dali_pipeline import check_dali, gpu_decoders
from alexnet_dist.errors import COMPILER, AlexNetDistError, in_words
from alexnet_dist.network import kernels
from alexnet_dist.network.model import AlexNet
from alexnet_dist.parallel import environment, layouts, spawn
from alexnet_dist.parallel.device import (
    CGROUP,
    cores,
    cpu_flags,
    gpus,
    nccl_version,
    own_device,
    precision_problem,
    ranks_per_gpu,
    share_problem,
)
from alexnet_dist.parallel.rendezvous import keep_to_this_host

DRIVER = Path("/proc/driver/nvidia/version")
_MB = 2**20


@dataclass(frozen=True)
class Finding:
    """One thing that a run depends on.

    Attributes:
        remedy: what to do about it; empty where there is nothing to.
        broken: a run would fail by it.
    """

    what: str
    found: str
    remedy: str = ""
    broken: bool = False


def examine(config: Config, named: bool) -> Iterator[Finding]:
    """Every finding, as it is made; seconds, of which the exchange takes the most.

    Args:
        named: the user named the config, so that its data set is expected to be there.
    """
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for check in (_packages, _processor, _memory, _gpus, _layout, _exchange, _dali, _slurm, _disk,
                  _clock):  # fmt: skip
        try:
            yield from check(config)
        except Exception as error:  # a doctor examines on
            what, said = check.__name__.strip("_"), in_words(error)
            yield Finding(
                what,
                f"{said or repr(error)}",
                "mend what it says; a run may fail by it too",
                broken=True,
            )
    yield _data(Path(config.data.path), named)


def _packages(config: Config) -> Iterator[Finding]:
    """What is needed, and what is installed of it; what is optional is left out."""
    there = []
    for text in sorted(metadata.requires("alexnet-dist") or ()):
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != "missing" and needed.specifier.contains(found, prereleases=True):
            there.append(f"{needed.name} {found}")
        else:
            remedy = f"{text} is needed: make venv, or pip install '{text}'"
            yield Finding(needed.name, found, remedy, broken=True)
    yield Finding("packages", ", ".join(there))


def _processor(config: Config) -> Iterator[Finding]:
    may_use, flags = cores(), cpu_flags()
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    does = ", ".join(kinds) or platform.machine()
    yield Finding(
        "cpu",
        f"{may_use} of {os.cpu_count()} cores may be used; {does}; "
        f"torch computes by {torch.backends.cpu.get_cpu_capability()}",
    )
    quota = _cores_of_quota()
    if quota and quota < may_use:
        remedy = f"set layout.threads={max(1, int(quota))}, or give the container more"
        yield Finding("cpu quota", f"{quota:g} cores' time for {may_use} cores", remedy)
    if not {"avx512_bf16", "amx_bf16", "bf16"} & flags and not gpus(config):
        if config.train.precision == "bf16":
            remedy = "try train.precision=fp32, which may be faster here"
            yield Finding("bf16", "this processor has no bf16 instructions", remedy)
    else:
        yield Finding("bf16", "by the device's own instructions")


def _cores_of_quota() -> float | None:
    """CPU time that the container may take, in cores; None where it is not bounded."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):
        return None


def _memory(config: Config) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    maps = Path("/proc/self/maps").read_text()
    preloaded = [name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in maps]
    if preloaded:
        yield Finding("allocator", f"{preloaded[0]}, which keeps freed memory by its own rules")
    elif hasattr(ctypes.CDLL(None), "mallopt"):
        yield Finding("allocator", "glibc's, which a run tells to keep what it frees")
    else:
        remedy = "preload jemalloc, or use an image with glibc: fresh pages cost much time"
        yield Finding("allocator", "not glibc's", remedy)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = files != resource.RLIM_INFINITY and files < 1024
    yield Finding("open files", f"at most {files}", "ulimit -n 65536" if low else "", files < 128)
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        yield Finding("address space", "bounded", "ulimit -v unlimited: CUDA and DALI reserve much")
    if torch.cuda.device_count() > 1:
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        bounded = locked != resource.RLIM_INFINITY
        remedy = "ulimit -l unlimited, where nodes meet over InfiniBand" if bounded else ""
        yield Finding("locked memory", f"at most {locked}" if bounded else "unbounded", remedy)
        shared = shutil.disk_usage("/dev/shm").free
        remedy = "docker run --shm-size=1g: NCCL needs it" if shared < 256 * _MB else ""
        yield Finding("/dev/shm", f"{shared / 1e9:.1f} GB free", remedy, broken=bool(remedy))


def _gpus(config: Config) -> Iterator[Finding]:
    here, precision = gpus(config), config.train.precision
    used = 0 < layouts.ranks_wanted(config, here) <= here
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        yield Finding(
            f"gpu {index}",
            f"{torch.cuda.get_device_name(index)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, "
            f"capability {major}.{minor}, CUDA {torch.version.cuda}",
            problem := precision_problem(precision, torch.device("cuda", index)) if used else "",
            broken=bool(problem),
        )
    if torch.cuda.device_count():
        if gpus(config):
            yield compiler()
        return
    if DRIVER.exists() or shutil.which("nvidia-smi"):
        driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "an NVIDIA driver"
        wants = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA at all"
        yield Finding(
            "gpus", f"torch sees none, though there is {driver}; this torch is built for {wants}",
            "update the driver, or install the torch built for it (pytorch.org); in a container "
            "start it with --gpus all; look at CUDA_VISIBLE_DEVICES", broken=True,
        )  # fmt: skip
        return
    wanted = config.layout.device == "cuda"
    remedy = "set layout.device=auto, or use a machine with a GPU" if wanted else ""
    yield Finding("gpus", "none, nor a driver for one", remedy, broken=wanted)


def compiler() -> Finding:
    """What Triton builds a GPU's kernels with."""
    if lack := kernels.lacking():
        return Finding("kernels", f"not to be built: {lack}; steps are slower", COMPILER)
    return Finding("kernels", f"built by Triton with {kernels.compiler()}")


def _layout(config: Config) -> Iterator[Finding]:
    """What would be used, and why."""
    here, may_use = gpus(config), cores()
    count = layouts.ranks_wanted(config, here)
    per_gpu, each = ranks_per_gpu(config, count), " each" if count > 1 else ""
    own, shared = per_gpu > 0, per_gpu > 1
    if problem := layouts.problem(config, count) or share_problem(config, count):
        yield Finding("layout", f"{config.layout.kind} on {count} rank(s)", problem, broken=True)
        return
    threads = config.layout.threads or max(1, may_use // count)
    if shared:
        on, why = f"a GPU for up to {per_gpu} of them", f"{here} GPU(s) here, shared"
    elif own:
        on, why = f"a GPU{each}", f"{here} GPU(s) here"
    else:
        on, why = f"the CPU, {threads} thread(s){each}", f"{here or 'no'} GPU(s) here"
        why += ", and a rank needs its own" if here else ""
    by = f", over {'NCCL' if own else 'gloo'}" if count > 1 else ""
    forced = config.layout.device == "cuda" and not own
    yield Finding(
        "layout",
        f"{config.layout.kind}: {count} process(es) on {on}{by} ({why}); {config.train.precision}; "
        f"images by data.pipeline={config.data.pipeline}",
        "layout.device=cuda asks for more: set it to auto" if forced
        else "layout.kind=one uses the GPU; so do ranks that share it: layout.share_gpu=true"
        if here and not own else "",
        broken=forced,
    )  # fmt: skip
    on_cpu = precision_problem(config.train.precision, torch.device("cpu"))
    if on_cpu and not own:
        yield Finding("precision", config.train.precision, on_cpu, broken=True)
    backends = [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    version = ".".join(map(str, nccl_version()))
    yield Finding("backends", ", ".join(backends) + (version and f" {version}"))


def _exchange(config: Config) -> Iterator[Finding]:
    """Two real processes, over what a run would meet by."""
    for backend in ("gloo", "nccl") if ranks_per_gpu(config, 2) else ("gloo",):
        found = spawn.call(_meet, 2, backend, config)
        wrong = [word for word in found if isinstance(word, str)]
        if wrong:
            names = {"gloo": "unset GLOO_SOCKET_IFNAME, and see that the loopback is up (ip link)",
                     "nccl": "NCCL_DEBUG=INFO says why; try NCCL_P2P_DISABLE=1"}  # fmt: skip
            yield Finding(f"exchange, {backend}", wrong[0], names[backend], broken=True)
        else:
            speed = f"8 MiB summed in {max(map(float, found)) * 1e3:.1f} ms"
            yield Finding(f"exchange, {backend}", f"2 ranks gathered and summed rightly; {speed}")


def _meet(backend: str, config: Config) -> float | str:
    """Seconds of a sum of 8 MiB; or what is wrong. In each of two ranks."""
    try:
        here = environment.place()
        assert here is not None
        keep_to_this_host(here)
        device = own_device(config, here) if backend == "nccl" else torch.device("cpu")
        dist.init_process_group(
            backend, timeout=timedelta(seconds=30),
            device_id=device if backend == "nccl" else None,
        )  # fmt: skip
        mine = torch.full((2 * _MB,), here.rank + 1.0, device=device)
        gathered = torch.empty(4 * _MB, device=device)
        all_gather_single(gathered, mine)
        dist.all_reduce(mine.clone())  # the first makes connections
        begin = time.perf_counter()
        dist.all_reduce(mine)
        total = mine.mean().item()  # waits for it
        seconds = time.perf_counter() - begin
        dist.destroy_process_group()
        both = gathered.view(2, -1).mean(1).tolist()
        return seconds if (total, both) == (3, [1, 2]) else f"wrong: sum {total}, gathered {both}"
    except Exception as error:
        return f"{in_words(error) or error}".partition("\n")[0]


def _dali(config: Config) -> Iterator[Finding]:
    """A graph that decodes one image, built and run as a run would."""
    wanted = config.data.pipeline == "dali"
    on_gpu = torch.cuda.is_available() and config.layout.device != "cpu"
    how = "on the GPU" if on_gpu else "on the CPU"
    try:
        found = check_dali(0 if on_gpu else None)
        lack = gpu_decoders(0).lack if on_gpu else ""
        remedy = f"update the GPU's driver: none of its decoders works ({lack})" if lack else ""
        yield Finding("dali", f"decodes {found}", remedy)
    except Exception as error:
        reason = f"{in_words(error) or ' '.join(str(error).split())[:200]}"
        remedy = "set data.pipeline=torch, or update the GPU's driver"
        yield Finding("dali", f"cannot decode {how}: {reason}", remedy, broken=wanted)


def _slurm(config: Config) -> Iterator[Finding]:
    there = [name for name in ("sbatch", "srun", "scontrol", "sacct") if shutil.which(name)]
    job, restarts = environment.job()
    within = f"in job {job}, started {restarts + 1} time(s)" if job else "not in a job"
    missing = {"srun", "scontrol"} - {*there} if there or job else set()
    remedy = f"install Slurm's client: {', '.join(sorted(missing))} missing" if missing else ""
    yield Finding("slurm", f"{', '.join(there)}; {within}" if there else "not here", remedy)


def _disk(config: Config) -> Iterator[Finding]:
    with torch.device("meta"):
        model = AlexNet(config.model, config.seed, drawn=False)
    size = 8 if config.train.precision == "fp64" else 4
    copies = {"adam": 3}.get(config.optimizer.kind, 2)  # weights, and what the optimiser keeps
    one = copies * size * sum(p.numel() for p in model.parameters())
    needed = one * (config.checkpoint.keep_last + 2)  # the best, and the one being written
    out = Path(config.output_dir).resolve()
    folder = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free for {out}; a run keeps {needed / 1e9:.1f} GB of checkpoints"
    remedy = "make room, lower checkpoint.keep_last, or set output_dir= to another disk"
    yield Finding("disk", found, remedy if free < needed else "", broken=free < needed)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(b"x")
            file.flush()
            ahead = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as error:
        remedy = "set output_dir= to a folder that is yours, on a file system with locks"
        yield Finding("run folders", f"{folder}: {error.strerror}", remedy, broken=True)
        return
    remedy = "set both clocks by NTP: restarts and make compare times" if abs(ahead) > 2 else ""
    yield Finding("run folders", f"{folder}: writable, with locks, {ahead:+z.1f} s ahead", remedy)


def _clock(config: Config) -> Iterator[Finding]:
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # struct timex, modes 0
    loose = state in (-1, 5)  # TIME_ERROR
    remedy = "run chrony or ntpd, where several nodes write logs to be compared" if loose else ""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    yield Finding("clock", f"{now}, {'not ' if loose else ''}held by NTP", remedy)


def _data(folder: Path, named: bool) -> Finding:
    if not named and not (folder / "dataset.json").exists():
        return Finding("data", f"{folder} is not there; `alexnet-dist prepare` makes data sets")
    try:
        found = inspect(folder, None)
    except (AlexNetDistError, OSError) as error:
        return Finding("data", f"{folder}: not sound", f"{in_words(error) or error}", broken=True)
    splits = [f"{name} {part['samples']}" for name, part in found.items()
              if isinstance(part, dict)]  # fmt: skip
    disk = shutil.disk_usage(folder).free / 1e9
    return Finding(
        "data",
        f"{folder}: {found['classes']} classes, {', '.join(splits)} images; sizes right, some "
        f"decoded (all: `alexnet-dist inspect {folder}`); {disk:.1f} GB free",
    )
