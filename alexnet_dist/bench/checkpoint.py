"""`bench checkpoint`: the time that a save costs the training loop."""

import statistics
import tempfile
import time
from pathlib import Path

from alexnet_dist.bench import Result, machine
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.writer import Saver
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch
from alexnet_dist.engines.base import Engine, on_host
from alexnet_dist.engines.make import make_engine
from alexnet_dist.parallel.topology import connect

_STEPS = 5  # steps without a save, and the least number with one
_BETWEEN = 100  # the ratio is given for one save in so many steps


def bench_checkpoint(config: Config, repeats: int) -> Result:
    """Time steps on synthetic images in one process, with and without a save to a temporary
    folder.

    Returns:
        ratios: time lost to a save divided by the time of 100 steps (median of pairs); ceilings:
        a checkpoint's size; and every pass's seconds.
    """
    topology = connect(config)
    engine, batch = make_engine(config, topology), made_batch(config, topology.device)
    runs = []
    with tempfile.TemporaryDirectory(prefix="alexnet-dist-bench-") as scratch:
        folder = Path(scratch)
        for pair in range(repeats + 1):  # the first is warm-up
            plain = [_step(engine, batch) for _ in range(_STEPS)]
            run = {"step": statistics.median(plain)} | _saving(config, engine, batch, folder, pair)
            run["lost to a save"] = run.pop("steps with it") - run.pop("steps") * run["step"]
            runs.append(run)
        size = sum(p.stat().st_size for p in checkpoints.steps(folder)[-1].iterdir())
    runs = runs[1:]
    lost = statistics.median(run["lost to a save"] / (_BETWEEN * run["step"]) for run in runs)
    return {
        "ratios": {f"lost to one save in {_BETWEEN} steps / those steps": lost},
        "ceilings": {"a checkpoint, MB": size / 1e6},
        "machine": machine(config.data.workers),
        "unit": "seconds",
        "runs": runs,
    }


def _saving(
    config: Config, engine: Engine, batch: Batch, folder: Path, number: int
) -> dict[str, float]:
    """Start a save, make steps until it is on the disk, and return the times."""
    saver, written = Saver(lambda: False), []
    begin = time.perf_counter()
    parameters, optimizer = engine.whole_tensors()

    def write() -> None:
        checkpoints.save(folder, config, "", parameters, optimizer, {"step": number}, None)
        checkpoints.prune(folder, 1, 0, None)
        written.append(time.perf_counter() - begin)

    saver.begin(write)
    copied, steps = time.perf_counter() - begin, 0
    while not (written or saver.failed) or steps < _STEPS:
        _step(engine, batch)
        steps += 1
    took = time.perf_counter() - begin
    saver.finish()  # raises what went wrong
    return {"copy, the loop waits": copied, "on the disk after": written[0],
            "steps": float(steps), "steps with it": took}  # fmt: skip


def _step(engine: Engine, batch: Batch) -> float:
    """Make one step, and return its seconds."""
    begin = time.perf_counter()
    on_host(engine.train_step(batch, 0, 1e-4))()
    return time.perf_counter() - begin
