"""`compare`: every layout against the plain grouped network in one process (the oracle), trained
for some steps on this machine's real ranks.

| row | what must hold |
|---|---|
| all but ZeRO | in float64, after all steps: parameters and optimiser tensors within 1e-12 |
| zero1, zero2 | in float32, from the oracle's state at each step: one update within 1e-5 |

A difference is a tensor's largest absolute difference divided by the oracle's largest value. In
float32, trajectories drift apart by rounding alone; how far the parameters do is shown next to the
drift between one and four micro-batches in one process.
"""

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from alexnet_dist.config.load import overridden
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch, StepInput
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines.make import for_one_pass, train_batches
from alexnet_dist.engines.base import AT, Engine
from alexnet_dist.engines.make import make_engine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import ConfigError, counted
from alexnet_dist.parallel import layouts, spawn
from alexnet_dist.parallel.device import gpus, ranks_per_gpu
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.partition import share
from alexnet_dist.planning import shared_gpus
from alexnet_dist.tensor_files import Shape

log = logging.getLogger(__name__)

BOUND, ZERO_BOUND = 1e-12, 1e-5
_DEFAULTS = ("one:1", "columns:2", "replicas:2", "columns_x_replicas:4", "sharded_fc:2",
             "zero1:2", "zero2:2")  # fmt: skip
_ALONE = ("layout.kind=one", "layout.ranks=1")
_SPEED_STEPS = 8  # of which the first two are warm-up


@dataclass(frozen=True)
class Row:
    """What was measured of one layout; the fields are the keys of `--json`.

    Attributes:
        final_loss: loss of the last step of the compared run, nats a sample.
        max_difference: largest relative difference from the oracle, over all tensors.
        images_per_s: throughput of all ranks together, in the config's own precision.
        bytes_per_rank_step: bytes that rank 0 sends in a step, in the config's own precision.
        ranks_per_gpu: 0 on a CPU; if more than 1, images_per_s is that of a GPU that they share.
    """

    layout: str
    ranks: int
    final_loss: float
    max_difference: float
    bound: float
    holds: bool
    images_per_s: float
    bytes_per_rank_step: int
    ranks_per_gpu: int


HEADING = (
    "layout              ranks  final loss  difference    bound  holds  images/s  "
    "bytes/rank/step  fp32 drift"
)


def line(row: Row, drift: float | None, floor: float | None) -> str:
    """Return a row of the table under HEADING."""
    beside = "" if drift is None else f"{drift:.1e}"
    if floor is not None:
        beside = f"noise floor {floor:.1e}"
    return (
        f"{row.layout:18}  {row.ranks:5}  {row.final_loss:10.6f}  {row.max_difference:10.1e}  "
        f"{row.bound:7.0e}  {'yes' if row.holds else 'NO':>5}  {row.images_per_s:8.1f}  "
        f"{row.bytes_per_rank_step:15,}  {beside}"
    )


@dataclass(frozen=True)
class Run:
    """What one set of ranks measured: the loss of each step, throughput, bytes that rank 0 sent."""

    losses: list[float]
    images_per_s: float
    bytes_per_step: int


class InMemory:
    """Whole tensors in memory, in the form in which an engine loads a checkpoint's."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def rows(self, name: str, rows: slice) -> Tensor:
        tensor = self.tensors[name]
        return tensor[rows] if tensor.dim() else tensor


def chosen(config: Config, names: str | None) -> list[Config]:
    """Return a config for each layout of `LAYOUT[:RANKS],…`, the oracle's first; of all layouts
    that this config can have, if `names` is None.

    Raises:
        ConfigError: a layout is unknown, or the config cannot have it.
    """
    configs = [overridden(config, *_ALONE)]
    for name in names.split(",") if names else _DEFAULTS:
        kind, _, count = name.strip().partition(":")
        if not count.isdecimal() and count:
            raise ConfigError(f"--layouts {name}: must be LAYOUT or LAYOUT:RANKS, as in replicas:2")
        try:
            one = overridden(config, f"layout.kind={kind}", f"layout.ranks={int(count or 0)}")
            wanted = layouts.ranks_wanted(one, gpus=0)
            one = overridden(one, f"layout.ranks={wanted}")
            layouts.check(one, wanted)
        except ConfigError:
            if names:
                raise
            continue
        if kind != "one":
            configs.append(one)
    for one in configs:
        shared_gpus.check(_bounded(one), one.layout.ranks)
    return on_devices_alike(configs)


def on_devices_alike(configs: Sequence[Config]) -> list[Config]:
    """Move all layouts to the CPU if this host has enough GPUs for some of them only, and they may
    not be shared: otherwise their numbers could not be compared."""
    here, most = gpus(configs[0]), max(one.layout.ranks for one in configs)
    layout = configs[0].layout
    if 0 < here < most and layout.device == "auto" and not layout.share_gpu:
        log.warning(
            f"only {counted(here, 'GPU')} for up to {most} ranks: all layouts run on the CPU; with "
            "--share-gpu, all share what is here"
        )
        return [overridden(one, "layout.device=cpu") for one in configs]
    return list(configs)


def compare(
    configs: Sequence[Config], steps: int
) -> Iterator[tuple[Row, float | None, float | None]]:
    """Yield each layout's row, the oracle's first, with its float32 drift from the oracle, and, in
    the oracle's row, the noise floor: how far four micro-batches drift from one."""
    with tempfile.TemporaryDirectory() as folder:
        oracle = Path(folder) / "oracle"
        for place, laid_out in enumerate(configs):
            path = Path(folder) / f"{place}" if place else oracle
            yield _row(laid_out, steps, path, oracle)


def _row(
    config: Config, steps: int, path: Path, oracle: Path
) -> tuple[Row, float | None, float | None]:
    """Start a layout's ranks, and compare what they computed with the oracle's tensors."""
    zero = config.layout.kind in layouts.ZERO_STAGES
    fp32 = overridden(config, "train.precision=fp32")
    runs = {} if zero else {"bounded": (_bounded(config), steps)}
    runs["fp32"] = (fp32, steps)
    own = config.train.micro_batches
    parts = next((p for p in (4, 3, 2, 1) if config.train.batch % p == 0 and p != own), own)
    if path == oracle and parts != own:
        runs["parts"] = (overridden(fp32, f"train.micro_batches={parts}"), steps)
    runs["own"] = (config, min(steps, _SPEED_STEPS))
    results, update = spawn.call(measure, config.layout.ranks, runs, path, zero)[0]
    difference, where = (update, "") if zero else _difference(path / "bounded", oracle / "bounded")
    only = ("parameters",)
    drift = None if path == oracle else _difference(path / "fp32", oracle / "fp32", only)[0]
    floor = _difference(path / "parts", path / "fp32", only)[0] if "parts" in runs else None
    bound = ZERO_BOUND if zero else BOUND
    if where and difference > bound:
        log.warning(f"layout.kind={config.layout.kind}: {where} differs most from one process's")
    row = Row(
        config.layout.kind,
        config.layout.ranks,
        results["fp32" if zero else "bounded"].losses[-1],
        difference,
        bound,
        difference <= bound,
        round(results["own"].images_per_s, 1),
        results["own"].bytes_per_step,
        ranks_per_gpu(config, config.layout.ranks),
    )
    return row, drift, floor


def measure(
    runs: Mapping[str, tuple[Config, int]], path: Path, zero: bool
) -> tuple[dict[str, Run], float]:
    """Run each config for its number of steps, on each rank; rank 0 saves the whole tensors in
    `path`/NAME. With `zero`, also measure the largest difference of a single update."""
    results = {name: _run(config, steps, path / name) for name, (config, steps) in runs.items()}
    return results, _updates(*runs["fp32"]) if zero else 0.0


def _run(config: Config, steps: int, path: Path) -> Run:
    """Train for some steps; save the result, and measure losses, throughput and traffic."""
    topology = connect(config)
    engine = make_engine(config, topology)
    losses, traffic, begin = [], Traffic(), time.perf_counter()
    batches = _batches(config, topology, steps)
    for step in range(steps):
        with traffic if step == 1 else contextlib.nullcontext():  # step 0 is warm-up
            batch, rate = next(batches)
            stats = engine.train_step(batch, step, rate)
        losses.append(stats[AT.loss].item() / config.train.batch)
        begin = time.perf_counter() if step == 1 else begin
    batches.close()
    speed = (steps - 2) * config.train.batch / (time.perf_counter() - begin)
    tensors = engine.whole_tensors()
    if topology.is_rank_0:
        path.mkdir(parents=True)
        for name, part in zip(("parameters", "optimizer"), tensors, strict=True):
            save_file(part, path / name)
    return Run(losses, speed, traffic.total())


def _updates(config: Config, steps: int) -> float:
    """Return the largest relative difference of a single update, starting at each step from the
    oracle's state. Every rank computes the oracle as well.

    Adam's ε is 1: it divides a gradient by its own size + ε, so that with a small ε the rounding
    errors of a gradient near 0 move its weight by up to twice the learning rate.
    """
    config = overridden(config, "optimizer.eps=1")
    topology = connect(config)
    alone = Topology(device=topology.device)
    engine: Engine = make_engine(config, topology)
    oracle: Engine = make_engine(overridden(config, *_ALONE), alone)
    mine, largest = share(config.train.batch, topology.replica, topology.replicas), 0.0
    for step, (samples, rate) in enumerate(_batches(config, alone, steps)):
        engine.load(*map(InMemory, oracle.whole_tensors()))
        whole = samples.batch()
        part = Batch(**{name: tensor[mine] for name, tensor in whole.changing().items()})
        engine.train_step(part, step, rate)
        oracle.train_step(whole, step, rate)
        ours = engine.whole_tensors()
        for some, theirs in zip(ours, oracle.whole_tensors(), strict=True):
            largest = max([largest, *(relative(some[name], theirs[name]) for name in some)])
    return largest


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return ‖ours − theirs‖∞ ÷ ‖theirs‖∞; infinity where it is not a number."""
    difference = (ours.double() - theirs.double()).abs().max()
    apart = difference / theirs.double().abs().max()
    return apart.nan_to_num(nan=math.inf, posinf=math.inf).item() if difference else 0.0


def _batches(config: Config, topology: Topology, steps: int) -> Generator[tuple[StepInput, float]]:
    """Yield this rank's part of each batch, as in the training loop, and the learning rate."""
    dataset = open_for(config)
    schedule = Schedule.of(config, len(dataset.splits[config.data.train_split]))
    with contextlib.closing(
        train_batches(for_one_pass(config), topology, dataset, 0, steps)
    ) as batches:
        for step, batch in enumerate(batches):
            yield batch, schedule.rate(step)


def _difference(
    ours: Path, theirs: Path, names: Sequence[str] = ("parameters", "optimizer")
) -> tuple[float, str]:
    """Return the largest relative difference between two saved runs, and in what tensor it is."""
    largest = 0.0, ""
    for name in names:
        mine, other = load_file(ours / name), load_file(theirs / name)
        apart = ((relative(mine[key], other[key]), f"{name}: {key}") for key in other)
        largest = max([largest, *apart])
    return largest


def _bounded(config: Config) -> Config:
    """Return the config in the precision in which differences are bounded."""
    zero = config.layout.kind in layouts.ZERO_STAGES
    return overridden(config, f"train.precision={'fp32' if zero else 'fp64'}")
