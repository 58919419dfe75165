"""`bench end-to-end`: training from a packed data set beside training on a batch that is ready;
evaluation beside its forward passes; the time to the first step; memory over many steps."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from alexnet_dist.bench import Result, in_turn, machine, ratio
from alexnet_dist.bench.contestants import Contestant, Work
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.bench.trainers import compile_ours
from alexnet_dist.config.from_data import NO_SPLIT
from alexnet_dist.config.load import IN_ONE_PROCESS, overridden
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.batch import StepInput, to_host
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.sampler import TrainSampler, evaluation_plan
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel.device import gpus
from alexnet_dist.parallel.topology import connect
from alexnet_dist.planning.dry_run import plan
from alexnet_dist.training.metrics_file import read_metrics

_VIEWS, _IMAGES = 10, 32  # of a piece of evaluation
_NEVER = 10**9  # steps: more than are made


def contestant(name: str, config: Config) -> Work:
    """Return the work of a contestant, whose result is a number of images: a training step, the
    windows of a step alone, or the evaluation of ten views of some images."""
    topology, dataset = connect(config), open_for(config)
    if name == _LIBRARIES:
        return lambda: 0.0
    evaluates, trains = name.startswith("ten views"), name.startswith("steps")
    if trains:
        compile_ours(config, topology)
    engine = make_engine(config, topology)
    split = config.data.train_split
    if evaluates and config.data.eval_split != NO_SPLIT:
        split = config.data.eval_split
    pipeline, count = make_pipeline(config, topology, dataset, split), len(dataset.splits[split])
    size = min(_IMAGES, count) if evaluates else config.train.batch
    if evaluates:
        starts = range(0, count - size + 1, size)
        turns = (range(start, start + size) for start in itertools.cycle(starts))
        plan = evaluation_plan(config, turns)
    else:
        sampler = TrainSampler(config, count, dataset.statistics)
        plan = sampler.plan(0, _NEVER, range(size))
    decoded: Iterator[StepInput] = iter(pipeline.batches(plan))
    ready = name.endswith("ready")
    first = made_batch(config, topology.device) if trains and ready else next(decoded).batch()
    batches = itertools.repeat(first) if ready else decoded
    if ready:
        pipeline.close()
    steps = itertools.count()
    read: Callable[[], object] = int

    def step() -> float:
        nonlocal read
        batch = next(batches)
        if evaluates:
            before, read = read, to_host(engine.predict(batch.batch().windows).softmax(1))
        elif trains:
            before, read = read, to_host(engine.train_step(batch, next(steps), 1e-5))
        else:
            before, read = read, to_host(batch.batch().windows[0, 0, 0, 0])
        before()  # as in training, only now: while the device is busy with the next one
        return float(size)

    return step


_LIBRARIES = "the libraries alone"
_CONTESTANTS = (
    "steps from shards", "steps, batch ready", "ten views", "ten views, windows ready",
    "windows from shards",
)  # fmt: skip


def bench_end_to_end(config: Config, repeats: int, steps: int, cold: bool) -> Result:
    """Time contestants in a process each, on the packed data set that the config names.

    Args:
        steps: number of steps over which memory is watched; 0 for none.
        cold: whether to time, on a GPU, also a start for which no kernel has been built before.

    Returns:
        ratios (medians of pairs; of memory), ceilings (seconds to the first step, memory), machine,
        and every pass's images/s.
    """
    config = overridden(config, *IN_ONE_PROCESS)
    ten = overridden(config, f"evaluate.views={_VIEWS}")
    # Many more steps than the batches that are decoded ahead while others have their turn.
    many = (16 if gpus(config) else 4) * config.data.prefetch
    pieces = {n: 4 if n.startswith("ten") else many for n in _CONTESTANTS}
    contestants = {n: Contestant("end_to_end", n, ten, pieces[n]) for n in _CONTESTANTS}
    memory: dict[str, float] = {}
    try:
        for one in contestants.values():
            one.wait()
        seconds = in_turn(contestants, repeats)
        if steps:
            memory = _memory(contestants["steps from shards"], config, steps)
    finally:
        for one in contestants.values():
            one.close()
    runs = [{n: contestants[n].results[0] / run[n] for n in run} for run in seconds]
    started = _first_step(config, "start to first step")
    if cold and gpus(config):
        started |= _first_step(config, "the same, no kernel built before", cold=True)
    shards, ready, ten_views, ten_ready, alone = _CONTESTANTS
    return {
        "ratios": {
            "steps from shards / batch ready": ratio(runs, shards, ready),
            "steps from shards / the lesser of batch ready and windows alone": statistics.median(
                run[shards] / min(run[ready], run[alone]) for run in runs
            ),
            "ten views / windows ready": ratio(runs, ten_views, ten_ready),
            **{name: value for name, value in memory.items() if "/" in name},
        },
        "ceilings": {
            **started,
            **{name: value for name, value in memory.items() if "/" not in name},
        },
        "machine": machine(config.data.workers),
        "unit": "images/s",
        "runs": runs,
    }


def _memory(one: Contestant, config: Config, steps: int) -> dict[str, float]:
    """Return resident memory after a tenth of the steps and after all, in MB, and as a ratio to the
    plan's."""
    libraries = Contestant("end_to_end", _LIBRARIES, config)
    libraries()
    beside = libraries.memory()
    libraries.close()
    after: list[int] = []
    for share in (0.1, 0.9):
        one.pieces = max(1, int(share * steps))
        one()
        after.append(one.memory())
    planned = plan(config, 1).of("one").memory["peak"]
    return {
        f"resident after {steps // 10} steps, MB": after[0] / 1e6,
        f"resident after {steps} steps, MB": after[1] / 1e6,
        "resident of the libraries alone, MB": beside / 1e6,
        "planned, MB": planned / 1e6,
        f"resident after {steps} steps / after {steps // 10}": after[1] / after[0],
        "resident but for the libraries / planned": (after[1] - beside) / planned,
        "resident / planned and the libraries": after[1] / (planned + beside),
    }


def _first_step(config: Config, name: str, cold: bool = False) -> dict[str, float]:
    """Return the seconds from typing `alexnet-dist train` to the end of the first step, and those
    of each stage, by name.

    Args:
        name: what the whole is called.
        cold: whether to start without kernels that Triton and torch.compile have cached.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": folder, "log.every_steps": 1, "log.embedding": 0}
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(flat(config) | own))
        kept = {
            name: f"{folder}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        }
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "alexnet_dist", "train", str(path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | kept if cold else None,
        )  # fmt: skip
        assert process.stderr is not None
        said = ""
        for said in process.stderr:
            if "step 1/" in said:
                break
        else:
            raise ConfigError(f"bench end-to-end: the run ended before its first step: {said}")
        seconds = time.perf_counter() - begin
        process.terminate()
        process.communicate()
        (start,) = (p for p in read_metrics(Path(folder) / config.name) if p["kind"] == "start")
    stages = {f"{name}: {stage}, s": float(took) for stage, took in start["stages_s"].items()}
    return {f"{name}, s": seconds, **stages}
