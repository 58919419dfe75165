"""`doctor`: what it finds on this machine, and what it reports of machines with a problem."""

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import alexnet_dist, as_overrides

from alexnet_dist.cli.main import main
from alexnet_dist.config.schema import Config
from alexnet_dist.data import inspect
from alexnet_dist.network import kernels
from alexnet_dist.parallel import device, spawn
from alexnet_dist.parallel.stop_signals import handlers_restored
from alexnet_dist.reporting import doctor, machine
from alexnet_dist.reporting.machine import Finding

Usage = namedtuple("Usage", "total used free")
Patch = pytest.MonkeyPatch


@pytest.fixture
def examined(tiny: Callable[..., Config], monkeypatch: Patch) -> Callable[..., dict[str, Finding]]:
    """Findings by name, of an exchange that is not made."""
    monkeypatch.setattr(spawn, "call", lambda *_: [0.002, 0.001])

    def examine(*overrides: str) -> dict[str, Finding]:
        return {one.what: one for one in doctor.examine(tiny(*overrides), named=True)}

    return examine


def test_doctor_says_what_a_run_would_use(tiny: Callable[..., Config]) -> None:
    result = alexnet_dist("doctor", "--json", *as_overrides(tiny("data.pipeline=dali")))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["sound"]
    said = {one["what"]: one["found"] for one in found["findings"]}
    assert {"python", "cpu", "memory", "allocator", "slurm", "disk", "clock"} <= said.keys()
    assert f"torch {metadata.version('torch')}" in said["packages"]
    assert said["layout"].startswith("columns: 2 processes on the CPU, 1 thread each, over gl")
    assert "2 ranks gathered and summed correctly" in said["exchange, gloo"]
    assert "decodes on the CPU" in said["dali"]
    assert "10 classes, train 60, test 23 images" in said["data"]


def test_what_is_amiss_is_a_line_with_a_remedy_and_the_exit_code(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spawn, "call", lambda *_: [0.002, 0.001])
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 0)
    gone = f"data.path={tmp_path / 'gone'}"
    with handlers_restored():
        assert main(["doctor", gone, "layout.device=cuda"]) == 1
    lines = capsys.readouterr().out.splitlines()
    data = next(place for place, line in enumerate(lines) if line.startswith("✗ data"))
    assert "→" in lines[data + 1]
    assert "alexnet-dist prepare" in lines[data + 1]
    assert lines[-1] == "a run would fail: fix gpus, layout, data"


def no_room(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))


def no_locks(patch: Patch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    patch.setattr(fcntl, "flock", refuse)


def driver_that_torch_cannot_use(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82\n")
    patch.setattr(machine, "DRIVER", tmp_path / "version")
    patch.setattr(machine.torch.cuda, "device_count", lambda: 0)


def wrong_sums(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(spawn, "call", lambda *_: [0.1, "wrong: sum 2.0, gathered [1.0, 1.0]"])


def ranks_that_die(patch: Patch, tmp_path: Path) -> None:
    def die(*_: Any) -> None:
        raise RuntimeError("a rank was killed")

    patch.setattr(spawn, "call", die)


def old_package(patch: Patch, tmp_path: Path) -> None:
    version = metadata.version
    patch.setattr(metadata, "version", lambda name: "0.1" if name == "tqdm" else version(name))


def half_a_core(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    patch.setattr(machine, "CGROUP", tmp_path)


def one_gpu(patch: Patch, tmp_path: Path) -> None:
    for module in (doctor, machine, device):
        patch.setattr(module, "gpus", lambda config: 1)


def no_controller(patch: Patch, tmp_path: Path) -> None:
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def no_dali(patch: Patch, tmp_path: Path) -> None:
    patch.setitem(sys.modules, "nvidia.dali", None)


@pytest.mark.parametrize(
    ("amiss", "what", "said", "broken"),
    [
        (no_room, "disk", "make room, lower checkpoint.keep_last", True),
        (no_locks, "run folders", "on a file system with locks", True),
        (driver_that_torch_cannot_use, "gpus", "update the driver, or install the torch", True),
        (wrong_sums, "exchange, gloo", "GLOO_SOCKET_IFNAME", True),
        (ranks_that_die, "exchange", "a rank was killed", True),
        (old_package, "tqdm", "tqdm>=4.70 is needed", True),
        (no_dali, "dali", "nvidia-dali-cuda120", False),
        (half_a_core, "cpu quota", "set layout.threads=1", False),
        (no_controller, "slurm", "its controller does not answer (scontrol ping)", False),
        (one_gpu, "layout", "layout.kind=one would use the GPU", False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_amiss_is_named(
    amiss: Callable[[Patch, Path], None], what: str, said: str, broken: bool,
    examined: Callable[..., dict[str, Finding]], monkeypatch: Patch, tmp_path: Path,
) -> None:  # fmt: skip
    amiss(monkeypatch, tmp_path)
    found = examined("train.precision=bf16")
    assert said in found[what].found + found[what].remedy
    assert found[what].remedy
    assert found[what].broken == broken
    assert not any(one.broken for one in found.values() if one.what != what)


def test_a_controller_that_does_not_answer_is_waited_for_for_a_few_seconds(
    tiny: Callable[..., Config], monkeypatch: Patch, tmp_path: Path
) -> None:
    no_controller(monkeypatch, tmp_path)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert machine.PING_S <= 5
    monkeypatch.setattr(machine, "PING_S", 0.2)
    begin = time.monotonic()
    (found,) = machine.slurm(tiny())
    assert "does not answer" in found.found
    assert time.monotonic() - begin < 15


def test_bf16_in_hardware_is_the_processors_own(
    tiny: Callable[..., Config], monkeypatch: Patch
) -> None:
    """Also where there is a GPU, which may have none either, as a T4."""
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(machine, "gpus", lambda config: 1)
    assert "bf16" not in [one.what for one in machine.processor(tiny("train.precision=bf16"))]
    monkeypatch.setattr(machine, "gpus", lambda config: 0)
    (said,) = [one for one in machine.processor(tiny("train.precision=bf16")) if one.what == "bf16"]
    assert "as fast as with train.precision=fp32" in said.found
    assert not said.remedy  # fp32 would be another run, and no faster


def test_what_builds_a_gpus_kernels_is_named(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    found = machine.compiler()
    assert not found.broken  # by torch's operators a run is slower, and the same
    assert "no C compiler" in found.found
    assert "gcc python3-dev" in found.remedy
    for name in ("", "gcc-12"):
        monkeypatch.setenv("CC", name)
        assert f"CC={name!r} is no program" in machine.compiler().found
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name or None)
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in machine.compiler().found
    (tmp_path / "Python.h").touch()
    assert machine.compiler() == Finding("kernels", "built by Triton with gcc-12")


def test_what_a_run_does_not_use_need_not_work(
    examined: Callable[..., dict[str, Finding]], monkeypatch: Patch, tmp_path: Path
) -> None:
    no_dali(monkeypatch, tmp_path)
    assert not examined("data.pipeline=torch")["dali"].broken
    assert examined("data.pipeline=dali")["dali"].broken
    assert "set train.precision=fp32" in examined("train.precision=tf32")["precision"].remedy
    for module in (doctor, machine, device):
        monkeypatch.setattr(module, "gpus", lambda config: 4)
    found = examined("layout.kind=columns_x_replicas", "layout.device=auto")["layout"].found
    assert found.startswith("columns_x_replicas: 4 processes on a GPU each, over NCCL")


def test_a_quick_look_at_a_data_set_takes_some_of_each(packed: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(inspect, "QUICK", 5)
    found = inspect.inspect(packed, None)
    assert (found["train"]["samples"], found["train"]["decoded"]) == (60, "5, evenly spread")
    assert "contact sheet" not in found
