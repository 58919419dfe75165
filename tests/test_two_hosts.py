"""Two hosts: network namespaces joined by a virtual cable, a torchrun in each, and shared files.

Needs root and iproute2.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import TINY, alexnet_dist, assert_checkpoints_near
from shared import SHARED
from small_runs import final_state
from test_run import Started

from alexnet_dist.files import read_run

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and iproute2 (apt-get install iproute2)",
    ),
]

TIMEOUT_S = 10
# 60 images, 8 a step: 60 steps, a save every 4.
RUN = [
    *TINY,
    "train.epochs=8",
    "train.precision=fp64",
    "evaluate.every_epochs=4",
    "checkpoint.every_steps=4",
    "log.every_steps=2",
    "schedule.rate=0.02",
    "model.lrn.alpha=0.05",
    f"layout.timeout_s={TIMEOUT_S}",
]
CABLE = "alexnet0"  # the name of either end, in its namespace
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


class Hosts:
    """Two network namespaces and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"alexnet-{os.getpid()}-{place}" for place in range(2)]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = [["name", CABLE, "netns", name] for name in self.names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
        self.plug("up")

    def plug(self, state: str) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", CABLE, state)

    def remove(self) -> None:
        for name in self.names:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def command(self, place: int, ranks: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What starts `ranks` ranks on a host: torchrun's options, and the way in."""
        launcher = (
            "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks),
            "--node-rank", str(place), "--master-addr", ADDRESSES[0], "--master-port", "29400",
            "--local-addr", ADDRESSES[place], "-m", "alexnet_dist",
        )  # fmt: skip
        variables = (
            f"GLOO_SOCKET_IFNAME={CABLE}",
            f"NCCL_SOCKET_IFNAME={CABLE}",
            f"NCCL_HOSTID={self.names[place]}",  # else NCCL takes both for one host
            "NCCL_DEBUG=INFO",  # so that it says by what it sends
        )
        within = ("ip", "netns", "exec", self.names[place], "env", *variables)
        return launcher, within


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    try:
        hosts.make()
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        hosts.remove()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-hosts")


Start = Callable[..., list[Started]]


@pytest.fixture
def start(hosts: Hosts, packed: Path, runs: Path) -> Iterator[Start]:
    """Starts a run on both hosts: start(NAME, LAYOUT, RANKS of a host, key=value …)."""
    started: list[Started] = []

    def begin(name: str, kind: str, ranks: int, *more: str) -> list[Started]:
        more += (f"data.path={packed}", f"output_dir={runs}", f"name={name}", f"layout.kind={kind}")
        both = [Started(["train", *RUN, *more], *hosts.command(p, ranks)) for p in range(2)]
        started.extend(both)
        return both

    yield begin
    for one in started:
        if one.process.poll() is None:
            for process in one.all():
                process.kill()


@pytest.fixture(scope="module")
def one(packed: Path, runs: Path) -> Path:
    """The folder of the run on one process."""
    where = [f"data.path={packed}", f"output_dir={runs}", "name=one", "layout.kind=one"]
    result = alexnet_dist("train", *RUN, *where)
    assert result.returncode == 0, result.stderr
    return runs / "one"


def ended(both: list[Started]) -> str:
    """What they said; both ended well."""
    ends = [one.end() for one in both]
    assert [code for code, _ in ends] == [0, 0], ends
    return ends[0][1]


@pytest.mark.drill
def test_columns_across_hosts_are_the_run_of_one_process(
    start: Start, runs: Path, one: Path
) -> None:
    ended(start("columns", "columns", 1))
    assert_checkpoints_near(runs / "columns", one, 1e-12)


def test_columns_within_and_replicas_across_hosts_survive_a_cut_link(
    start: Start, hosts: Hosts, runs: Path, one: Path
) -> None:
    """Uninterrupted: the run of one process. Cut: both hosts leave, and the same commands resume
    to what was never interrupted, to the bit."""
    kind = "columns_x_replicas"
    ended(start("whole", kind, 2))
    assert_checkpoints_near(runs / "whole", one, 1e-12)

    both = start("cut", kind, 2)
    both[0].wait_for_step(runs / "cut", 12)
    both[0].wait_for_checkpoint(runs / "cut")
    processes = [process for host in both for process in host.all()]
    hosts.plug("down")
    begin = time.monotonic()
    codes: list[Any] = [host.end()[0] for host in both]
    took = time.monotonic() - begin
    print(f"both hosts left {took:.1f} s after the cut")
    _, left = psutil.wait_procs(processes, timeout=1)
    hosts.plug("up")
    assert all(codes), codes
    assert not left
    assert took < TIMEOUT_S + 6
    assert read_run(runs / "cut")["state"] == "failed"

    assert "cut continues at step" in ended(start("cut", kind, 2))
    assert final_state(runs / "cut") == final_state(runs / "whole")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["columns", "replicas"])
def test_two_hosts_that_share_a_gpu_meet_over_nccls_sockets(
    kind: str, start: Start, runs: Path, one: Path
) -> None:
    """Each takes the GPU for its own: to NCCL they are two hosts, and what they send leaves it."""
    said = ended(start(f"nccl-{kind}", kind, 1, *SHARED))
    assert "via NET/Socket" in said
    assert_checkpoints_near(runs / f"nccl-{kind}", one, 1e-9)  # the other is a CPU's
