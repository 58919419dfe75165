"""`bench layouts`: every layout on this host's ranks, with the same global batch."""

import statistics
import time
from dataclasses import dataclass

from alexnet_dist.bench import Result, machine, ratio
from alexnet_dist.bench.kernel_times import profiled
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import overridden
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

_STEPS = 3  # steps of a pass; one before them is warm-up


@dataclass(frozen=True)
class OnRank:
    """What one rank measured.

    Attributes:
        seconds: time of a step.
        sent: bytes that it sends in a step.
        kernels: GPU kernels launched in a step; 0 on a CPU.
        exchange: share of a step spent in collectives, waiting for other ranks included: of the
            time on a CPU, of the kernels' time on a GPU.
    """

    seconds: float
    sent: int
    kernels: float
    exchange: float


def bench_layouts(config: Config, count: int, repeats: int) -> Result:
    """Time the training steps of every layout that can have so many ranks, and of one process with
    the threads of all ranks. Each pass starts its ranks anew; only steps are timed.

    Returns:
        ratios of images/s (medians of pairs), ceilings (of rank 0: bytes sent other than windows,
        GPU kernels, and the collectives' share of a step), machine, recipe, every pass's images/s,
        and what speeds of shared GPUs do not tell.
    """
    configs = _fitting(config, count)
    passes: list[dict[str, list[OnRank]]] = [
        {kind: spawn.call(_steps, 1 if kind == "one" else count, one)
         for kind, one in configs.items()}
        for _ in range(repeats)
    ]  # fmt: skip
    runs = [  # by the slowest rank
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
        if kernels := statistics.median(rank.kernels for rank in first):
            ceilings[f"{kind}, kernels a step"] = kernels
        if kind != "one":
            ceilings[f"{kind}, MB sent a step"] = first[0].sent / 1e6
        share = statistics.median(rank.exchange for rank in first)
        if share and (kernels or kind not in layouts.ZERO_STAGES):  # on a CPU, ZeRO's are unseen
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


def _fitting(config: Config, count: int) -> dict[str, Config]:
    """Return a config for one process, and one for each layout that can have `count` ranks; raises
    ConfigError if none can."""
    configs = {"one": overridden(config, "layout.kind=one")}
    for kind in KINDS:
        try:
            other = overridden(config, f"layout.kind={kind}", f"layout.ranks={count}")
        except ConfigError:
            continue  # this config cannot have that layout
        if kind != "one" and not layouts.problem(other, count):
            shared_gpus.check(other, count)
            configs[kind] = other
    configs = dict(zip(configs, on_devices_alike(list(configs.values())), strict=True))
    if len(configs) == 1:
        raise ConfigError(f"--ranks {count}: no layout of this config fits that number")
    return configs


def _steps(config: Config) -> OnRank:
    """Time steps on this rank."""
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
    profile = profiled(lambda: engine.train_step(batch, 0, 1e-4), _STEPS, "cuda")
    collectives = sum(us for name, us, _ in profile if "nccl" in name.lower())
    kernels = sum(calls for _, _, calls in profile)
    return OnRank(seconds, sent, kernels, collectives / sum(us for _, us, _ in profile))


def _counted(config: Config, topology: Topology) -> tuple[int, float]:
    """Return the bytes that this rank sends in a step, and the collectives' share of a CPU's
    time."""
    if topology.world_size == 1:
        return 0, 0.0
    if config.train.execution == "graph":  # a replayed graph dispatches no collectives to count
        config = overridden(config, "train.execution=fused")
    engine, batch, traffic = make_engine(config, topology), _batch(config, topology), Traffic()
    on_host(engine.train_step(batch, 0, 1e-4))()  # warm-up
    TIMELINE.start(cuda=False)
    with traffic:
        on_host(engine.train_step(batch, 0, 1e-4))()
    took = TIMELINE.take()
    TIMELINE.stop()
    return traffic.total(), (took.seconds["exchange"] + took.seconds["all_reduce"]) / took.total


def _batch(config: Config, topology: Topology) -> Batch:
    return made_batch(config, topology.device, samples=config.train.batch // topology.replicas)
