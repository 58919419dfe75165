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
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines.make import choose_on_gpu, splits_of
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import ConfigError, DatasetError
from alexnet_dist.parallel.device import cores, cpu_flags, gpus
from alexnet_dist.parallel.device import machine as this_machine
from alexnet_dist.planning.cost_model import decoding, predict
from alexnet_dist.planning.dry_run import gpu_memory
from alexnet_dist.planning.machines import MACHINES, Cluster, Machine, known
from alexnet_dist.planning.measured import correction
from alexnet_dist.planning.plan import Plan, Prediction, Rank
from alexnet_dist.training.metrics_file import read_metrics

_ILSVRC_2012 = 1_281_167, 50_000  # training, validation images; used if the data set is not here
# Of layouts that are about equally fast, the first is recommended.
_SIMPLEST = ("one", "replicas", "columns", "columns_x_replicas", "sharded_fc", "zero1", "zero2")
_AS_FAST = 0.97
# Keys beside the network's that a step's time depends on.
_STEP = ("layout.kind", "train.batch", "train.micro_batches", "train.precision", "train.execution")


@dataclass(frozen=True)
class DecodingForecast:
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
    decode: DecodingForecast
    schedule: list[tuple[float, float]]
    drops_assumed: bool
    measured: Mapping[str, Any] | None


def here(config: Config, machine: Machine | None) -> Cluster | None:
    """Return this host's GPUs or cores as a cluster; None if its GPUs are not a known kind.

    Raises:
        ConfigError: layout.device is cuda, and there is no GPU.
    """
    count = gpus(config)
    if not count:
        if config.layout.device == "cuda":
            raise ConfigError(
                "layout.device=cuda: this machine has no GPU to predict for: name what the run "
                "would have, as in --gpus h100:8"
            )
        return Cluster(machine or _own_cpu(), cores())
    found = machine or known(torch.cuda.get_device_name())
    return Cluster(found, count) if found else None


def _own_cpu() -> Machine:
    """Return this host's kind of CPU, by its instructions."""
    flags = cpu_flags()
    if {"avx512f", "bf16"} & flags:
        return MACHINES["cpu" if "amx_bf16" in flags else "cpu-avx512"]
    return MACHINES["cpu-avx2"]


def forecast(planned: Plan, config: Config, cluster: Cluster) -> Forecast:
    """Predict what a plan means on a cluster.

    Raises:
        ConfigError: the plan has more ranks than the cluster has GPUs.
    """
    machine, ranks = cluster.machine, planned.ranks
    if machine.overlap and ranks > cluster.total:
        raise ConfigError(
            f"{ranks} ranks do not fit on {cluster.total} × {machine.name}: give more --gpus, or "
            "fewer --ranks"
        )
    images, kept, source, missing = _images(config)
    layouts = {kind: rank for kind, rank in planned.layouts.items() if isinstance(rank, Rank)}
    if ranks == 2:  # then it is the same as columns
        layouts.pop("columns_x_replicas", None)
    needs = {kind: gpu_memory(rank) if machine.overlap else rank.memory["peak"]
             for kind, rank in layouts.items()}  # fmt: skip
    fitting = (need for need in needs.values() if need <= machine.capacity)
    pipeline, why = assumed(config, machine, kept, max(fitting, default=0))
    predicted: dict[str, Prediction] = {}
    for kind in layouts:
        factor, basis = correction(planned, kind, machine)
        one = predict(planned, kind, cluster, pipeline, factor, basis)
        too_large = machine.capacity and needs[kind] > machine.capacity
        room = f"{needs[kind] / 1e9:.1f} GB of {machine.capacity / 1e9:.0f}"
        hours = config.train.epochs * images / one.images_per_s / 3600
        predicted[kind] = dataclasses.replace(one, hours=hours, too_large=room if too_large else "")
    best = recommended(predicted)
    training = predicted.get(best or planned.layout)
    return Forecast(
        machine={"name": machine.name, "source": machine.source, "devices": cluster.devices,
                 "nodes": cluster.nodes},
        images_per_epoch=images,
        images_source=source,
        data_missing=missing,
        epochs=config.train.epochs,
        predicted=predicted,
        recommended=best,
        decode=_decoding(planned, cluster, pipeline, why, best, training),
        schedule=schedule(config, images),
        drops_assumed=config.schedule.kind == "plateau" and config.schedule.max_drops > 0,
        measured=_measured(config, planned, cluster, predicted),
    )  # fmt: skip


def _decoding(
    planned: Plan, cluster: Cluster, pipeline: str, why: str, best: str | None,
    training: Prediction | None,
) -> DecodingForecast:  # fmt: skip
    """Return what decodes the images of the recommended layout, and what it must achieve.

    Args:
        pipeline, why: as `assumed` returns them.
        best: the recommended layout.
        training: its prediction, or that of the config's layout; None if neither is possible.
    """
    machine, needs = cluster.machine, training.training_images_per_s if training else 0.0
    # Each rank's GPU decodes for it; on a CPU, all cores decode.
    devices = planned.ranks_of(best or planned.layout) if machine.overlap else cluster.total
    by = decoding(planned, cluster, pipeline)
    decoded = by.images_per_s * devices
    dali = decoding(planned, cluster, "dali") if machine.overlap else None
    one_gpu = dali.images_per_s if dali and dali.how.startswith("the GPU") else 0.0
    return DecodingForecast(
        pipeline=by.pipeline,
        how=by.how,
        why=why,
        images_per_s=needs,
        decoded_images_per_s=None if math.isinf(decoded) else decoded,
        host_cores=needs / decoding(planned, Cluster(MACHINES["cpu"], 1), "torch").images_per_s,
        host_cores_there=machine.cores * cluster.total,
        gpus=needs / one_gpu if one_gpu else None,
        by_threads_images_per_s=decoding(planned, cluster, "torch").images_per_s * devices,
        basis=by.basis,
    )


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
    decodes = machine.decode or machine.decode_by_cuda
    return choose_on_gpu(
        3.0 * config.data.canvas**2 * kept,
        machine.capacity - needs,
        lambda: "" if decodes else f"it does not support a {machine.name}",
    )


def recommended(found: Mapping[str, Prediction]) -> str | None:
    """Return the fastest layout that fits in memory, or a simpler one that is nearly as fast."""
    speeds = {kind: one.images_per_s for kind, one in found.items() if not one.too_large}
    order = [kind for kind in _SIMPLEST if kind in speeds]
    bound = _AS_FAST * max(speeds.values(), default=0.0)
    return next((kind for kind in order if speeds[kind] >= bound), None)


def schedule(config: Config, images: int, points: int = 60) -> list[tuple[float, float]]:
    """Return (epoch, learning rate) of evenly spaced steps. When `plateau` will lower the rate
    cannot be known: evenly spaced drops are assumed."""
    rates = []
    planned = Schedule.of(config, images)
    for point in range(points):
        step = point * (planned.last_step - 1) // (points - 1)
        planned.drops = point * (config.schedule.max_drops + 1) // points
        rates.append((step / planned.steps_per_epoch, planned.rate(step)))
    return rates


def _images(config: Config) -> tuple[int, int, str, str]:
    """Return the number of training images, the number in all splits that a run uses, whose numbers
    these are, and why they are not the data set's own.

    Raises ConfigError if the config and its data set do not agree.
    """
    try:
        splits = open_for(config).splits
        kept = sum(len(splits[name]) for name in splits_of(config))
        return len(splits[config.data.train_split]), kept, config.data.path, ""
    except DatasetError as error:
        source = f"ILSVRC-2012's, because {config.data.path} holds no data set"
        return _ILSVRC_2012[0], sum(_ILSVRC_2012), source, f"{error}"


def _measured(
    config: Config, planned: Plan, cluster: Cluster, predicted: Mapping[str, Prediction]
) -> dict[str, Any] | None:
    """Return what a run in this config's folder has measured, and on what; beside the prediction if
    that is of as many ranks on the same device. None if no run like it was measured."""
    folder = config.folder
    if not (folder / "metrics.jsonl").is_file() or planned.layout not in predicted:
        return None
    ran, asked = flat(load_config([folder / "config.json"])), flat(config)
    network = [key for key in asked if key.startswith("model.") and key != "model.classes"]
    if any(ran[key] != asked[key] for key in (*network, *_STEP)):
        return None
    points = [point for point in read_metrics(folder) if point["kind"] == "speed"]
    alike = [point for point in points if _is_on(point.get("on"), planned, cluster)]
    points = alike or [point for point in points if point.get("on") == points[-1].get("on")]
    if len(points) < 2:
        return None
    middle = {key: statistics.median(p[key] for p in points[1:])  # the first is warm-up
              for key in ("images_per_s", "data_wait")}  # fmt: skip
    found = {"folder": str(folder), "points": len(points) - 1, "on": points[-1].get("on"), **middle}
    ratio = predicted[planned.layout].images_per_s / middle["images_per_s"]
    return found | ({"predicted_to_measured": ratio} if alike else {})


def _is_on(measured: Any, planned: Plan, cluster: Cluster) -> bool:
    """Return whether a point was measured on as many ranks as planned and on the same kind of
    device; on CPUs, on as many cores of this host's, since another's kind is not known by its name.

    Args:
        measured: the point's `on`; None in runs of older versions, which did not write it.
    """
    match measured:
        case {"ranks": planned.ranks, "device": str(device), "cores": cores}:
            machine = known(device)
            if cluster.machine.overlap:
                return machine is not None and machine.name == cluster.machine.name
            fitted = cluster.machine not in MACHINES.values()  # --machine
            own = device == this_machine()["cpu"] and (fitted or cluster.machine == _own_cpu())
            return machine is None and own and cores == cluster.total
        case _:
            return False
