"""Layouts beside one another: the same global batch, ranks of one host, steps in turn."""

import time
from dataclasses import dataclass
from typing import Any

from alexnet_dist.bench import machine, median, ratio
from alexnet_dist.bench.step import profiled
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.batch import Batch
from alexnet_dist.engines.base import on_host
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel import layouts, spawn
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.planning import shared_gpus
from alexnet_dist.planning.dry_run import KINDS
from alexnet_dist.reporting.compare_layouts import on_devices_alike
from alexnet_dist.timing import TIMELINE

_STEPS = 3  # of a pass; one before it warms up


@dataclass(frozen=True)
class OnRank:
    """What one rank measured.

    Attributes:
        seconds: a step.
        sent: bytes a step.
        kernels: of a GPU, a step; 0 on a CPU.
        exchange: share of the step that collectives take, their wait for other ranks too: of a
            CPU's time, or of the time of a GPU's kernels.
    """

    seconds: float
    sent: int
    kernels: float
    exchange: float


def bench_layouts(config: Config, count: int, repeats: int) -> dict[str, Any]:
    """Training steps of every layout that fits on so many ranks, and of one process.

    One process has the threads of all ranks. A pass starts its ranks anew, and is timed within.

    Returns:
        ratios of images/s (medians of pairs), ceilings (of rank 0: what it sends but windows, a
        GPU's kernels, and its collectives' share of the step), machine, recipe, every pass's
        images/s, and what GPUs that are shared cannot show.
    """
    configs = {"one": load_config([flat(config), "layout.kind=one"])}
    for kind in KINDS:
        try:
            other = load_config([flat(config), f"layout.kind={kind}", f"layout.ranks={count}"])
        except ConfigError:
            continue  # a layout that this config cannot have
        if kind != "one" and not layouts.problem(other, count):
            shared_gpus.check(other, count)
            configs[kind] = other
    configs = dict(zip(configs, on_devices_alike(list(configs.values())), strict=True))
    if len(configs) == 1:
        raise ConfigError(f"--ranks {count}: no layout fits on them with this config")
    passes: list[dict[str, list[OnRank]]] = [
        {kind: spawn.call(_steps, 1 if kind == "one" else count, one)
         for kind, one in configs.items()}
        for _ in range(repeats)
    ]  # fmt: skip
    runs = [  # of the slowest rank
        {kind: config.train.batch / max(rank.seconds for rank in ranks)
         for kind, ranks in one.items()}
        for one in passes
    ]  # fmt: skip

    pairs = [(kind, "one") for kind in configs if kind != "one"]
    others = [kind for kind in configs if kind not in ("one", "replicas")]
    pairs += [(kind, "replicas") for kind in others if "replicas" in configs]
    ceilings = {"ranks": float(count)}
    for kind in configs:
        first = [one[kind][0] for one in passes]
        if kernels := median(rank.kernels for rank in first):
            ceilings[f"{kind}, kernels a step"] = kernels
        if kind != "one":
            ceilings[f"{kind}, MB sent a step"] = first[0].sent / 1e6
        share = median(rank.exchange for rank in first)
        if share and (kernels or kind not in layouts.ZERO_STAGES):  # unseen of DeepSpeed on a CPU
            ceilings[f"{kind}, collectives, % of a step"] = 100 * share
    return {
        "ratios": {f"{a} / {b}": ratio(runs, a, b) for a, b in pairs},
        "ceilings": ceilings,
        "machine": machine(config.data.workers),
        "unit": "images/s",
        "recipe": flat(config),
        "runs": runs,
        "unseen": shared_gpus.unseen(config, count),
    }  # fmt: skip


def _steps(config: Config) -> OnRank:
    """What this rank measures."""
    topology = connect(config)
    sent, of_a_cpu = _counted(config, topology)
    engine, batch = make_engine(config, topology), _batch(config, topology)
    on_host(engine.train_step(batch, 0, 1e-4))()
    topology.barrier()
    begin = time.perf_counter()
    for step in range(1, _STEPS + 1):
        numbers = on_host(engine.train_step(batch, step, 1e-4))
    numbers()
    seconds = (time.perf_counter() - begin) / _STEPS
    if topology.device.type == "cpu":
        return OnRank(seconds, sent, 0.0, of_a_cpu)
    found = profiled(lambda: engine.train_step(batch, 0, 1e-4), _STEPS, "cuda")
    collectives = sum(us for name, us, _ in found if "nccl" in name.lower())
    kernels = sum(calls for _, _, calls in found)
    return OnRank(seconds, sent, kernels, collectives / sum(us for _, us, _ in found))


def _counted(config: Config, topology: Topology) -> tuple[int, float]:
    """Bytes that this rank sends in a step, and collectives' share of a CPU's time."""
    if topology.world_size == 1:
        return 0, 0.0
    if config.train.execution == "graph":  # whose collectives nobody dispatches any more
        config = load_config([flat(config), "train.execution=fused"])
    engine, batch, traffic = make_engine(config, topology), _batch(config, topology), Traffic()
    on_host(engine.train_step(batch, 0, 1e-4))()  # warms up
    TIMELINE.start(cuda=False)
    with traffic:
        on_host(engine.train_step(batch, 0, 1e-4))()
    took = TIMELINE.take()
    TIMELINE.stop()
    return traffic.total(), (took.seconds["exchange"] + took.seconds["all_reduce"]) / took.total


def _batch(config: Config, topology: Topology) -> Batch:
    return made_batch(config, topology.device, samples=config.train.batch // topology.replicas)
