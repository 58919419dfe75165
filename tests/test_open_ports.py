"""The ports on which the program listens, seen by `ss` in a network namespace of its own, on a host
whose name is not the loopback's. Needs iproute2, and root or user namespaces.
"""

import ctypes
import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch.distributed as dist
from conftest import as_overrides
from forks import Fork
from torch.distributed import TCPStore

from alexnet_dist.config.schema import Config
from alexnet_dist.parallel import environment, rendezvous, spawn
from alexnet_dist.parallel.environment import Place
from launch import submit

HOST = "10.213.9.1"  # where a stranger on the network finds the host
NETWORK = f"ip link set lo up; ip address add {HOST}/32 dev lo; hostname {HOST}; ss -Hltnp"
FORKED = multiprocessing.get_context("fork")
KINDS = ("columns", "replicas", "sharded_fc", "zero1", "zero2")


@pytest.fixture(scope="module")
def _namespaces() -> None:
    try:
        subprocess.run(
            ["unshare", "--map-root-user", "--net", "--uts", "sh", "-ec", NETWORK], check=True,
            capture_output=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here, or no iproute2: {error}")


pytestmark = pytest.mark.usefixtures("_namespaces")


def on_the_host(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process on that host, and all that it starts; as JSON."""
    folder = Path(tempfile.mkdtemp())
    printed, returned = folder / "printed", folder / "returned"
    process = Fork(_on_the_host, returned, function, args, prints=(printed, printed))
    try:
        assert process.wait(timeout=200) == 0, printed.read_text()
    finally:
        process.kill()
    return json.loads(returned.read_text())


def _on_the_host(returned: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """As `unshare` does, in this process: one that has a single thread."""
    user, group = os.getuid(), os.getgid()
    new_user, new_uts, new_net = 0x10000000, 0x04000000, 0x40000000  # linux/sched.h
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(new_user | new_uts | new_net) == 0, os.strerror(ctypes.get_errno())
    for file, line in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", file).write_text(line)
    subprocess.run(["sh", "-ec", NETWORK], check=True)
    returned.write_text(json.dumps(function(*args)))


def listens(*started: tuple[dict[str, str], list[str]]) -> dict[str, str]:
    """Addresses at which anything listened while these commands ran, with more in their
    environment, all to a good end; with the line that `ss` gave of one."""
    found: dict[str, str] = on_the_host(_watched, started)
    assert found, "nothing was seen to listen"
    return found


def _watched(started: Sequence[tuple[dict[str, str], list[str]]]) -> dict[str, str]:
    """On the host: run them all, and look ten times a second."""
    running = [FORKED.Process(target=_run, args=one) for one in started]
    for process in running:
        process.start()
    seen: dict[str, str] = {}
    while None in [process.exitcode for process in running]:
        told = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
        for line in told.splitlines():
            seen.setdefault(line.split()[3].rpartition(":")[0], line)
        time.sleep(0.1)
    assert [process.exitcode for process in running] == [0] * len(running)
    return seen


def _run(more: dict[str, str], words: list[str]) -> None:
    """In a fork, run `python -m WORDS`."""
    os.environ.update(more)
    program, *arguments = words
    if program == "alexnet_dist":
        forks.run(arguments)
    submit.subprocess = SimpleNamespace(Popen=_Training)  # type: ignore[attr-defined]
    sys.exit(submit.main(arguments))


class _Training:
    """What `submit --local` starts, as a fork."""

    def __init__(self, command: list[str], start_new_session: bool) -> None:
        assert command[1:3] == ["-m", "alexnet_dist"]
        self._process = FORKED.Process(target=forks.run, args=(command[3:],))
        self._process.start()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def test_what_is_started_on_one_host_listens_on_the_loopback_alone(
    tiny: Callable[..., Config],
) -> None:
    """Both at once, for speed: `--local` starts `train`, which starts two columns."""
    run = as_overrides(tiny("train.epochs=0.2", "evaluate.every_epochs=1"))
    found = listens(
        ({}, ["launch.submit", *run, "--local"]), ({}, ["alexnet_dist", "doctor", *run])
    )
    assert found.keys() == {"127.0.0.1"}


@pytest.mark.drill
@pytest.mark.parametrize(
    ("more", "words"),
    [
        *((["train"], [f"layout.kind={kind}", "layout.ranks=2"]) for kind in KINDS),
        (["train"], ["layout.kind=columns_x_replicas", "layout.ranks=4"]),
        (["compare"], ["--steps", "3", "--layouts", "columns,sharded_fc:2"]),
        (["bench", "layouts"], ["--ranks", "2", "--repeats", "1"]),
    ],
    ids=lambda words: words[0],
)
def test_every_start_listens_on_the_loopback_alone(
    more: list[str], words: list[str], tiny: Callable[..., Config]
) -> None:
    run = as_overrides(tiny("train.epochs=0.2"))
    assert listens(({}, ["alexnet_dist", *more, *run, *words])).keys() == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("tasks", "addresses"),
    [pytest.param("2", {"127.0.0.1"}, marks=pytest.mark.drill), ("1(x2)", {HOST})],
)
def test_a_step_of_slurm_listens_on_its_nodes_address_alone(
    tasks: str, addresses: set[str], tiny: Callable[..., Config]
) -> None:
    """Of one node, and of two that this host plays; with Slurm's variables, and no Slurm."""
    run = as_overrides(tiny("train.epochs=0.2", "layout.kind=replicas"))
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURMD_NODENAME": HOST,
    }
    nodes = len(environment.tasks_per_node(tasks))
    ranks = [
        {"SLURM_PROCID": f"{r}", "SLURM_NODEID": f"{r % nodes}", "SLURM_LOCALID": f"{r // nodes}"}
        for r in range(2)
    ]
    assert listens(*((step | rank, ["alexnet_dist", "train", *run]) for rank in ranks)).keys() == (
        addresses
    )


def test_a_node_is_found_at_the_interface_that_gloo_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its name may be the loopback's to itself, as Debian installs it."""
    node = Place(world=2, node=0, address="n1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert rendezvous.own_address(dataclasses.replace(node, local_world=2)) == "127.0.0.1"
    assert rendezvous.own_address(node) == "n1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert rendezvous.own_address(node) == "127.0.0.1"


class Mark:
    """What a hostile pickle does: makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


def _stranger(mark: str) -> list[str]:
    """The keys that stores show at the host's own address; a rendezvous is replaced by a pickle."""
    told = subprocess.run(["ss", "-Hltn"], check=True, capture_output=True, text=True).stdout
    found: list[str] = []
    for line in told.splitlines():
        port = int(line.split()[3].rpartition(":")[2])
        try:
            store = TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=1))
        except dist.DistError:
            continue
        found += (keys := store.list_keys())
        for key in keys:
            if "torch.rendezvous" in key:
                store.set(key, b64encode(pickle.dumps(Mark(mark))).decode())
    time.sleep(1)  # the launcher looks ten times a second
    return found


def attacked(mark: str) -> list[str]:
    forks.fork_ranks()
    keys: list[str] = spawn.call(_stranger, 1, mark)[0]
    return keys


def test_a_stranger_neither_lists_the_launchers_keys_nor_runs_his_command(tmp_path: Path) -> None:
    mark = tmp_path / "was here"
    keys = on_the_host(attacked, str(mark))
    assert (mark.exists(), keys) == (False, [])
