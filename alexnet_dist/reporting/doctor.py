"""`doctor`: what is here, what a run would use and why, and what to mend before one is started."""

import fcntl
import math
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from alexnet_dist.compat import all_gather_single
from alexnet_dist.config.schema import Config
from alexnet_dist.data.inspect import inspect
from alexnet_dist.data.pipelines.dali_pipeline import check_dali, gpu_decoders
from alexnet_dist.engines.optimizer import state_shapes
from alexnet_dist.errors import AlexNetDistError, counted, in_words, one_line
from alexnet_dist.network.model import whole_shapes
from alexnet_dist.parallel import environment, layouts, spawn
from alexnet_dist.parallel.device import (
    cores,
    gpus,
    nccl_version,
    own_device,
    precision_problem,
    ranks_per_gpu,
    share_problem,
)
from alexnet_dist.parallel.rendezvous import keep_to_this_host
from alexnet_dist.reporting import machine
from alexnet_dist.reporting.machine import Finding

_MB = 2**20


def examine(config: Config, named: bool) -> Iterator[Finding]:
    """Yield every finding as it is made. Takes seconds, mostly for the exchange between two ranks.

    Args:
        named: whether the user named a config, so that its data set is expected to exist.
    """
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    checks = {
        "packages": machine.packages, "processor": machine.processor, "memory": machine.memory,
        "gpus": machine.graphics, "layout": _layout, "exchange": _exchange, "dali": _dali,
        "slurm": machine.slurm, "disk": _disk, "clock": machine.clock,
    }  # fmt: skip
    for name, check in checks.items():
        try:
            yield from check(config)
        except Exception as error:  # a failed check is a finding too
            remedy = "fix what it says; a run may fail for the same reason"
            yield Finding(name, f"{in_words(error) or repr(error)}", remedy, broken=True)
    yield _data(Path(config.data.path), named)


def _layout(config: Config) -> Iterator[Finding]:
    """Report which processes, devices, precision and backends the run would use, and why."""
    kind, here, may_use = config.layout.kind, gpus(config), cores()
    count = layouts.ranks_wanted(config, here)
    per_gpu, each = ranks_per_gpu(config, count), " each" if count > 1 else ""
    own, shared = per_gpu > 0, per_gpu > 1
    if problem := layouts.problem(config, count) or share_problem(config, count):
        yield Finding("layout", f"{kind} on {counted(count, 'rank')}", problem, broken=True)
        return
    threads = config.layout.threads or max(1, may_use // count)
    why = f"{counted(here, 'GPU')} here"
    if shared:
        on, why = f"a GPU for up to {per_gpu} of them", f"{why}, shared"
    elif own:
        on = f"a GPU{each}"
    else:
        on = f"the CPU, {counted(threads, 'thread')}{each}"
        why += ", but each rank needs its own" if here else ""
    by = f", over {'NCCL' if own else 'gloo'}" if count > 1 else ""
    forced = config.layout.device == "cuda" and not own
    yield Finding(
        "layout",
        f"{kind}: {counted(count, 'process')} on {on}{by} ({why}); {config.train.precision}; "
        f"images by data.pipeline={config.data.pipeline}",
        "set layout.device=auto: there are too few GPUs for layout.device=cuda" if forced
        else "layout.kind=one would use the GPU, and so would ranks that share it: "
             "layout.share_gpu=true"
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
    """Start two processes, and let them communicate over each backend that the run would use."""
    for backend in ("gloo", "nccl") if ranks_per_gpu(config, 2) else ("gloo",):
        answers = spawn.call(_meet, 2, backend, config)
        wrong = [word for word in answers if isinstance(word, str)]
        if wrong:
            names = {"gloo": "unset GLOO_SOCKET_IFNAME, and see that the loopback is up (ip link)",
                     "nccl": "set NCCL_DEBUG=INFO to see why; try NCCL_P2P_DISABLE=1"}  # fmt: skip
            yield Finding(f"exchange, {backend}", wrong[0], names[backend], broken=True)
        else:
            speed = f"8 MiB summed in {max(map(float, answers)) * 1e3:.1f} ms"
            yield Finding(f"exchange, {backend}", f"2 ranks gathered and summed correctly; {speed}")


def _meet(backend: str, config: Config) -> float | str:
    """Return the time of an all-reduce of 8 MiB in seconds, or what is wrong, on each of two
    ranks."""
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
        dist.all_reduce(mine.clone())  # the first one opens connections
        begin = time.perf_counter()
        dist.all_reduce(mine)
        total = mine.mean().item()  # waits for the result
        seconds = time.perf_counter() - begin
        dist.destroy_process_group()
        both = gathered.view(2, -1).mean(1).tolist()
        if (total, both) == (3, [1, 2]):
            return seconds
        return f"wrong: the sum is {total}, and {both} were gathered"
    except Exception as error:
        return f"{in_words(error) or error}".partition("\n")[0]


def _dali(config: Config) -> Iterator[Finding]:
    """Build and run a DALI pipeline that decodes one image, on the run's device."""
    wanted = config.data.pipeline == "dali"
    on_gpu = torch.cuda.is_available() and config.layout.device != "cpu"
    how = "on the GPU" if on_gpu else "on the CPU"
    try:
        found = check_dali(0 if on_gpu else None)
        lack = gpu_decoders(0).lack if on_gpu else ""
        remedy = f"update the GPU's driver: none of its decoders works ({lack})" if lack else ""
        yield Finding("dali", f"decodes {found}", remedy)
    except Exception as error:
        reason = in_words(error) or one_line(error)
        remedy = "set data.pipeline=torch, or update the GPU's driver"
        yield Finding("dali", f"cannot decode {how}: {reason}", remedy, broken=wanted)


def _disk(config: Config) -> Iterator[Finding]:
    """Check the space for checkpoints, and that the file system has locks and a common clock."""
    size = 8 if config.train.precision == "fp64" else 4
    weights = whole_shapes(config.model)
    tensors = (*weights.values(), *state_shapes(config.optimizer, weights).values())
    one = size * sum(map(math.prod, tensors))
    needed = one * (config.checkpoint.keep_last + 2)  # plus the best, and the one being written
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
        remedy = "set output_dir= to a folder of your own, on a file system with locks"
        yield Finding("run folders", f"{folder}: {error.strerror}", remedy, broken=True)
        return
    remedy = "set both clocks by NTP: restarts and make compare times" if abs(ahead) > 2 else ""
    yield Finding("run folders", f"{folder}: writable, with locks, {ahead:+z.1f} s ahead", remedy)


def _data(folder: Path, named: bool) -> Finding:
    """Check the data set: sizes of all files, and that some images decode."""
    if not named and not (folder / "dataset.json").exists():
        return Finding("data", f"{folder} does not exist; `alexnet-dist prepare` makes data sets")
    try:
        summary = inspect(folder, None)
    except (AlexNetDistError, OSError) as error:
        return Finding("data", f"{folder}: not usable", f"{in_words(error) or error}", broken=True)
    splits = [f"{name} {part['samples']}" for name, part in summary.items()
              if isinstance(part, dict)]  # fmt: skip
    disk = shutil.disk_usage(folder).free / 1e9
    return Finding(
        "data",
        f"{folder}: {summary['classes']} classes, {', '.join(splits)} images; file sizes are "
        f"right, and some images were decoded (`alexnet-dist inspect {shlex.quote(str(folder))}` "
        f"checks all); {disk:.1f} GB free",
    )
