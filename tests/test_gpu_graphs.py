"""CUDA graphs of several ranks' steps, with NCCL collectives, on as few GPUs as there are."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import shared
import torch
from conftest import alexnet_dist, as_overrides, on_ranks
from shared import SHARED
from test_execution import SMALL, after, assert_equal
from test_gpu_runs import FOREVER, TIMEOUT_S
from test_run import RUN
from test_watchdog import started

from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.engines.base import on_host
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.make import make_engine
from alexnet_dist.parallel.topology import connect
from alexnet_dist.training.metrics_file import read_metrics

pytestmark = [
    *shared.marks,
    pytest.mark.skipif(shared.REHEARSED, reason="a CPU has no graphs"),
]

LAYOUTS = {
    "columns": [], "replicas": [], "sharded_fc": [],
    "replicas, micro-batches": ["train.micro_batches=2"],
    "replicas, bf16 sums": ["layout.compress_gradients=true"],
    "replicas, adam": ["optimizer.kind=adam"],
    "sharded_fc, lars": ["optimizer.kind=lars"],
    "zero1": [], "zero2": [],
}  # fmt: skip


def config_for(way: str, *more: str) -> Config:
    kind = way.partition(",")[0]
    return load_config(["train.batch=32", *SHARED, f"layout.kind={kind}", "layout.ranks=2",
                        *LAYOUTS[way], *more])  # fmt: skip


@contextmanager
def without_doubt() -> Iterator[None]:
    """A capture that fails is an error here."""
    import alexnet_dist.engines.graph as module

    def fails(error: RuntimeError) -> None:
        raise AssertionError("a capture failed") from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_warn", fails)
        yield


def by_each(config: Config) -> list[dict[str, torch.Tensor]]:
    """What five steps of the paper's network make as a graph, kernel by kernel, as a graph again;
    the last keeps gradients."""
    found = []
    for execution in ("graph", "fused", "graph"):
        one = load_config([flat(config), f"train.execution={execution}"])
        topology = connect(one)
        batch = made_batch(one, topology.device, samples=one.train.batch // topology.replicas)
        batch.windows.mul_(1 + topology.replica)
        with without_doubt():
            engine = make_engine(one, topology)
            made = after(engine, batch, 5)
        if isinstance(engine, TorchEngine):
            assert list(engine.graphs) == ([False, True] if execution == "graph" else [])
        else:
            captured = execution == "graph" and one.layout.kind == "zero1"  # not with stage 2
            assert ("forward" in vars(engine.model)) == captured
        found.append({name: tensor.cpu() for name, tensor in made.items()})
    return found


@pytest.mark.parametrize("way", LAYOUTS)
def test_a_graph_of_ranks_is_its_kernels_to_the_bit(way: str) -> None:
    for graph, fused, again in on_ranks(2, by_each, config_for(way)):
        assert graph["numbers/4"][3] == 0
        assert_equal(graph, fused)
        assert_equal(again, fused)


def wait_for_nothing(config: Config) -> list[int]:
    """Steps during which anything that waits for the device is an error, and the last's flag."""
    topology = connect(config)
    batch = made_batch(config, topology.device, samples=config.train.batch // topology.replicas)
    with without_doubt():
        engine = make_engine(config, topology)
        on_host(engine.train_step(batch, 0, 0.001))()
    torch.cuda.set_sync_debug_mode("error")
    numbers = [on_host(engine.train_step(batch, step, 0.001)) for step in range(1, 9)]
    torch.cuda.set_sync_debug_mode("default")
    return [len(numbers), int(numbers[-1]()[3])]


@pytest.mark.parametrize("kind", ["columns", "replicas", "sharded_fc"])
def test_a_replay_waits_for_nothing(kind: str) -> None:
    assert on_ranks(2, wait_for_nothing, config_for(kind)) == [[8, 0]] * 2


@pytest.mark.parametrize("kind", ["columns", "replicas"])
def test_a_run_of_graphs_ends_by_itself(tiny: Callable[..., Config], kind: str) -> None:
    """NCCL ends no communicator that a graph holds."""
    config = tiny(*RUN, *SHARED, f"layout.kind={kind}", "layout.ranks=2", "name=ends")
    begin = time.monotonic()
    ended = alexnet_dist("train", *as_overrides(config))
    assert ended.returncode == 0, ended.stderr
    assert "could not be captured" not in ended.stderr
    assert time.monotonic() - begin < 120
    last = [point for point in read_metrics(config.folder) if point["kind"] == "speed"][-1]
    assert 0 < last["time"]["exchange" if kind == "columns" else "all_reduce"] < 1
    assert last["time"]["forward"] > 0  # by the graph's own events


def test_a_rank_that_stops_amid_replays_is_named(tiny: Callable[..., Config]) -> None:
    """torch looks after no exchange of a graph: our own watchdog does."""
    config = tiny(*RUN, *FOREVER, "name=frozen")
    run = started(config)
    run.wait_for_step(config.folder, 6)
    frozen = run.all()[2]
    frozen.suspend()
    begin = time.monotonic()
    code, output = run.end()
    assert time.monotonic() - begin < TIMEOUT_S + 15
    assert code == 1
    assert f"rank 1 (process {frozen.pid} on {os.uname().nodename}) does not answer" in output


def sums_of_small(config: Config) -> Any:
    """Of four layouts' worth of small steps on one process group: what the last one made."""
    return [by_each(load_config([flat(config), f"layout.kind={kind}"]))[0]["numbers/4"].tolist()
            for kind in ("columns", "replicas", "sharded_fc", "columns")]  # fmt: skip


def test_graphs_of_several_engines_share_their_ranks() -> None:
    """As `compare` makes one after another."""
    two = ["layout.kind=columns", "layout.ranks=2", "train.batch=4"]
    config = load_config([*SMALL, *SHARED, *two])
    first, *_, last = on_ranks(2, sums_of_small, config)[0]
    assert first == last
