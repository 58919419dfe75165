"""Layouts beside one another: the same global batch, ranks of one host, steps in turn."""

import time
from typing import Any

from alexnet_dist.bench import machine, ratio
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.engines.base import on_host
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel import layouts, spawn
from alexnet_dist.parallel.topology import connect
from alexnet_dist.planning.dry_run import KINDS
from alexnet_dist.reporting.compare_layouts import on_devices_alike

_STEPS = 3  # of a pass; one before it warms up


def bench_layouts(config: Config, count: int, repeats: int) -> dict[str, Any]:
    """Training steps of every layout that fits on so many ranks, and of one process.

    One process has the threads of all ranks. A pass starts its ranks anew, and is timed within.

    Returns:
        ratios of images/s (medians of pairs), machine, recipe, and every pass's images/s.
    """
    configs = {"one": load_config([flat(config), "layout.kind=one"])}
    for kind in KINDS:
        try:
            other = load_config([flat(config), f"layout.kind={kind}", f"layout.ranks={count}"])
        except ConfigError:
            continue  # a layout that this config cannot have
        if kind != "one" and not layouts.problem(other, count):
            configs[kind] = other
    configs = dict(zip(configs, on_devices_alike(list(configs.values())), strict=True))
    if len(configs) == 1:
        raise ConfigError(f"--ranks {count}: no layout fits on them with this config")
    runs = [
        {kind: _images_per_s(one, 1 if kind == "one" else count) for kind, one in configs.items()}
        for _ in range(repeats)
    ]

    pairs = [(kind, "one") for kind in configs if kind != "one"]
    others = [kind for kind in configs if kind not in ("one", "replicas")]
    pairs += [(kind, "replicas") for kind in others if "replicas" in configs]
    return {
        "ratios": {f"{a} / {b}": ratio(runs, a, b) for a, b in pairs},
        "ceilings": {"ranks": float(count)},
        "machine": machine(config.data.workers),
        "unit": "images/s",
        "recipe": flat(config),
        "runs": runs,
    }  # fmt: skip


def _images_per_s(config: Config, count: int) -> float:
    """Of the slowest rank."""
    seconds: list[float] = spawn.call(_steps, count, config)
    return config.train.batch / max(seconds)


def _steps(config: Config) -> float:
    """Seconds a step, on this rank."""
    topology = connect(config)
    engine = make_engine(config, topology)
    batch = made_batch(config, topology.device, samples=config.train.batch // topology.replicas)
    on_host(engine.train_step(batch, 0, 1e-4))()
    topology.barrier()
    begin = time.perf_counter()
    for step in range(1, _STEPS + 1):
        numbers = on_host(engine.train_step(batch, step, 1e-4))
    numbers()
    return (time.perf_counter() - begin) / _STEPS
