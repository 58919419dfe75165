"""What a plan means on a machine: each layout's speed, the recommended one, hours, decoding, the
learning-rate schedule, and what the run has measured so far."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alexnet_dist.config.from_data import AUTO
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines.auto import SHARE, splits_of
from alexnet_dist.data.pipelines.resident import gb
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import ConfigError, DatasetError, printable
from alexnet_dist.parallel.device import cores, cpu_flags, gpus
from alexnet_dist.planning.cost_model import decoding, predict
from alexnet_dist.planning.dry_run import needed_of
from alexnet_dist.planning.machines import CORE_DECODES, MACHINES, Cluster, Machine, known
from alexnet_dist.planning.measured import correction
from alexnet_dist.planning.plan import Plan, Prediction, Rank
from alexnet_dist.training.metrics_file import read_metrics

_ILSVRC_2012 = 1_281_167, 50_000  # training, validation images; used if the data set is not here
# Of layouts that are about equally fast, the first is recommended.
_SIMPLEST = ("alone", "replicas", "columns", "columns_x_replicas", "sharded_fc", "zero1", "zero2")
_AS_FAST = 0.97


@dataclass(frozen=True)
class Appetite:
    """How images are decoded for the recommended layout, and how many training needs.

    Attributes:
        pipeline: the pipeline.
        how: what decodes: cores, hardware decoders, CUDA cores.
        why: whether the config set it, or how it was chosen.
        images_per_s: images that training needs.
        decoded_images_per_s: images decoded for all devices; None: they are decoded only once.
        host_cores: cores that torchvision's pipeline would need for that.
        gpus: GPUs whose decoders would suffice for that; None: no decoder is known.
        by_threads_images_per_s: images that the torch pipeline would decode for all devices.
        basis: where the decoding speed comes from.
    """

    pipeline: str
    how: str
    why: str
    images_per_s: float
    decoded_images_per_s: float | None
    host_cores: float
    host_cores_there: float
    gpus: float | None
    by_threads_images_per_s: float
    basis: str


@dataclass(frozen=True)
class Forecast:
    """What a plan means on a cluster; the fields are the keys of its JSON."""

    machine: Mapping[str, str | int]
    images_per_epoch: int
    images_source: str
    data_missing: str
    epochs: float
    predicted: Mapping[str, Prediction]
    recommended: str | None
    decode: Appetite
    schedule: list[tuple[float, float]]
    measured: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        predicted = {kind: one.to_json() for kind, one in self.predicted.items()}
        return dataclasses.asdict(self) | {"predicted": predicted}


def here(config: Config, machine: Machine | None) -> Cluster | None:
    """Return this host's GPUs or cores as a cluster; None if its GPUs are not a known kind."""
    count = gpus(config)
    if not count:
        like = "cpu" if "amx_bf16" in cpu_flags() else "cpu-avx512"
        return Cluster(machine or MACHINES[like], cores())
    found = machine or known(torch.cuda.get_device_name())
    return Cluster(found, count) if found else None


def forecast(planned: Plan, config: Config, at: Cluster) -> Forecast:
    """Predict what a plan means on a cluster.

    Raises:
        ConfigError: the plan has more ranks than the cluster has GPUs.
    """
    machine, ranks = at.machine, planned.ranks
    if machine.overlap and ranks > at.total:
        raise ConfigError(
            f"{ranks} ranks on {at.total} × {machine.name}: give --gpus as many, or fewer --ranks"
        )
    images, kept, source, missing = _images(config)
    places = {} if ranks == 1 else {"alone": planned.alone}
    places |= {kind: rank for kind, rank in planned.layouts.items() if isinstance(rank, Rank)}
    if ranks == 2:  # then it is the same as columns
        places.pop("columns_x_replicas", None)
    needs = {kind: needed_of(rank) if machine.overlap else rank.memory["peak"]
             for kind, rank in places.items()}  # fmt: skip
    pipeline, why = assumed(config, machine, kept, max(needs.values(), default=0))
    found: dict[str, Prediction] = {}
    for kind in places:
        factor, basis = correction(planned, kind, machine)
        one = predict(planned, kind, at, pipeline, factor, basis)
        large = machine.capacity and needs[kind] > machine.capacity
        room = f"{needs[kind] / 1e9:.1f} GB of {machine.capacity / 1e9:.0f}"
        hours = config.train.epochs * images / one.images_per_s / 3600
        found[kind] = dataclasses.replace(one, hours=hours, too_large=room if large else "")
    best = recommended(found)
    ours = found.get(best or planned.layout)
    appetite, by = ours.training_images_per_s if ours else 0.0, decoding(planned, at, pipeline)
    own = decoding(planned, at, "dali") if machine.overlap else None
    one_gpu = own.images_per_s if own and own.how.startswith("the GPU") else 0.0
    devices = 1 if machine.overlap and best == "alone" else at.total
    all_devices = by.images_per_s * devices
    return Forecast(
        machine={"name": machine.name, "source": machine.source, "devices": at.devices,
                 "nodes": at.nodes},
        images_per_epoch=images,
        images_source=source,
        data_missing=missing,
        epochs=config.train.epochs,
        predicted=found,
        recommended=best,
        decode=Appetite(
            pipeline=by.pipeline, how=by.how, why=why, images_per_s=appetite,
            decoded_images_per_s=None if math.isinf(all_devices) else all_devices,
            host_cores=appetite / CORE_DECODES,
            host_cores_there=machine.cores * at.total,
            gpus=appetite / one_gpu if one_gpu else None,
            by_threads_images_per_s=decoding(planned, at, "torch").images_per_s * devices,
            basis=by.basis,
        ),
        schedule=schedule(config, images),
        measured=_measured(config, planned, found),
    )  # fmt: skip


def assumed(config: Config, machine: Machine, kept: int, needs: float) -> tuple[str, str]:
    """Return the pipeline that a run would choose there, as far as memory decides, and why.

    Args:
        kept: number of images in the splits that a run uses.
        needs: bytes of a device's memory that the network needs.
    """
    wanted = config.data.pipeline
    if wanted != AUTO:
        return wanted, "set"
    if not machine.overlap:
        return "torch", "auto, on a CPU"
    size, free = 3.0 * config.data.canvas**2 * kept, machine.capacity - needs
    if not (machine.decode or machine.decode_by_cuda):
        return "torch", "auto: DALI is not for this GPU"
    kind = "resident" if size <= SHARE * free else "dali"
    return kind, f"auto: images decoded once take {gb(size)} a rank, of {gb(free)} free"


def recommended(found: Mapping[str, Prediction]) -> str | None:
    """Return the fastest layout that fits in memory, or a simpler one that is nearly as fast."""
    speeds = {kind: one.images_per_s for kind, one in found.items() if not one.too_large}
    order = [kind for kind in ("one", *_SIMPLEST) if kind in speeds]
    bound = _AS_FAST * max(speeds.values(), default=0.0)
    return next((kind for kind in order if speeds[kind] >= bound), None)


def schedule(config: Config, images: int, points: int = 60) -> list[tuple[float, float]]:
    """Return (epoch, learning rate) of evenly spaced steps. When `plateau` will lower the rate
    cannot be known: evenly spaced drops are assumed."""
    found = []
    plan = Schedule.of(config, images)
    for point in range(points):
        step = point * (plan.last_step - 1) // (points - 1)
        plan.drops = point * (config.schedule.max_drops + 1) // points
        found.append((step / plan.steps_per_epoch, plan.rate(step)))
    return found


def _images(config: Config) -> tuple[int, int, str, str]:
    """Return the number of training images, the number in all splits that a run uses, whose numbers
    these are, and why they are not the data set's own.

    Raises ConfigError if the config and its data set do not agree.
    """
    try:
        splits = open_for(config).splits
        kept = sum(len(splits[name]) for name in splits_of(config) if name in splits)
        return len(splits[config.data.train_split]), kept, config.data.path, ""
    except DatasetError as error:
        source = f"ILSVRC-2012's: {config.data.path} is no data set here"
        return _ILSVRC_2012[0], sum(_ILSVRC_2012), source, f"{error}"


def _measured(
    config: Config, planned: Plan, found: Mapping[str, Prediction]
) -> dict[str, Any] | None:
    """Return what a run in this config's folder has measured, beside the prediction; None if there
    is none like it."""
    folder, same = config.folder, ("layout.kind", "train.batch", "train.precision")
    if not (folder / "metrics.jsonl").is_file() or planned.layout not in found:
        return None
    ran = load_config([folder / "config.json"])
    if any(_of(ran, key) != _of(config, key) for key in same):
        return None
    points = [p for p in read_metrics(folder) if p["kind"] == "speed"][1:]  # the first is warm-up
    if not points:
        return None
    middle = {key: statistics.median(p[key] for p in points)
              for key in ("images_per_s", "data_wait")}  # fmt: skip
    ratio = found[planned.layout].images_per_s / middle["images_per_s"]
    return {"folder": str(folder), "points": len(points), **middle, "predicted_to_measured": ratio}


def _of(config: Config, key: str) -> Any:
    """Return the value of a key, as in train.batch."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def lines(outlook: Forecast, own: str) -> list[str]:
    """Return a forecast as lines of text; `own` is the config's layout."""
    machine, found = outlook.machine, outlook.predicted
    devices, nodes = int(machine["devices"]), int(machine["nodes"])
    on_nodes = f" on {nodes} nodes" if nodes > 1 else ""
    hours = f"{outlook.epochs:g} epochs"
    text = ["", f"predicted, {devices * nodes} × {machine['name']}{on_nodes} "
            f"({machine['source']}):",
            f"{'':20}{'images/s':>10}{'× one':>8}{hours:>12}{'step, ms':>10}  of it, ms",
            ]  # fmt: skip
    base = found.get("alone") or found.get("one")
    for kind, one in found.items():
        parts = sorted(one.parts_s.items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {_ms(s)}" for name, s in parts if s > 0.01 * one.step_s)
        name = "one, on one device" if kind == "alone" else kind
        times = one.images_per_s / base.images_per_s if base else 1.0
        text.append(
            f"{name:20}{one.images_per_s:10,.0f}{times:8.2f}"
            f"{_hours(one.hours):>12}{1e3 * one.step_s:10.4g}  {listed}"
            + (f"; DOES NOT FIT: {one.too_large}" if one.too_large else "")
        )
    bases: dict[str, list[str]] = {}
    for kind, one in found.items():
        bases.setdefault(one.basis, []).append("one" if kind == "alone" else kind)
    text.append("times of steps: " + "; ".join(
        f"{', '.join(dict.fromkeys(kinds))}: {basis}" for basis, kinds in bases.items()
    ))  # fmt: skip
    best, decode = outlook.recommended, outlook.decode
    if best is None:
        text.append("recommended: none fits; a smaller train.batch, or more train.micro_batches")
    else:
        speed = found[best]
        text.append(
            f"recommended: {'one, on one device' if best == 'alone' else best}: "
            f"{_hours(speed.hours)} for {outlook.epochs:g} epochs of "
            f"{outlook.images_per_epoch:,} images ({outlook.images_source}); "
            f"its bottleneck: {speed.bottleneck}"
            + (" (yours)" if best == own else f"; yours, {own}, see above")
        )
    text.append(f"decoding: training takes {decode.images_per_s:,.0f} images/s; {_decoded(decode)}")
    if outlook.data_missing:
        text.append(f"no data set: {printable(outlook.data_missing)}")
    text += ["", *plot(outlook.schedule)]
    if run := outlook.measured:
        text += [
            "",
            f"measured in {run['folder']}: {run['images_per_s']:,.0f} images/s, waiting for data "
            f"{run['data_wait']:.0%} (median of {run['points']} points); predicted: "
            f"{run['predicted_to_measured']:.2f} of that",
        ]
    return text


def _decoded(decode: Appetite) -> str:
    """Say how images are decoded, how many there are, and what the alternative would give."""
    by = f"data.pipeline={decode.pipeline} ({decode.why}), {decode.how}"
    if decode.decoded_images_per_s is not None:
        by += f": {decode.decoded_images_per_s:,.0f} images/s ({decode.basis})"
    if decode.gpus is None:
        return f"{by}: {decode.host_cores:.1f} of {decode.host_cores_there:g} cores"
    if decode.pipeline != "torch":
        by += f"; threads of data.pipeline=torch give {decode.by_threads_images_per_s:,.0f}"
    return by


def _ms(seconds: float) -> str:
    """Return milliseconds with three digits, or as many as they have before the point."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.9995 else f"{1e3 * seconds:.3g}"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def plot(points: list[tuple[float, float]], height: int = 7) -> list[str]:
    """Plot learning rates over epochs as text, a column for each point."""
    rates = [rate for _, rate in points]
    top = max(rates) or 1.0
    rows = [round(rate / top * (height - 1)) for rate in rates]
    labels = {height - 1: f"{top:.3g}", 0: "0"}
    drawn = [
        f"{labels.get(row, ''):>8} |" + "".join("*" if at == row else " " for at in rows)
        for row in reversed(range(height))
    ]
    ends = f"0{points[-1][0]:>{len(points) - 1}.3g}"
    return ["learning rate, by epoch", *drawn, f"{'':8} +{'-' * len(points)}", f"{'':10}{ends}"]
