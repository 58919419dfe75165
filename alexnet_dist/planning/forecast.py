"""What a plan means on a machine: speed of each layout, the recommended one, hours, decoding, the
schedule, and what the run has measured since."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import ConfigError, DatasetError, printable
from alexnet_dist.parallel.device import cores, cpu_flags
from alexnet_dist.planning.cost_model import CORE_DECODES, MACHINES, Cluster, Machine, predict
from alexnet_dist.training.metrics import read_metrics

_ILSVRC_2012 = 1_281_167  # training images, where the data set is not here
# Of layouts as fast as one another, the first is recommended.
_SIMPLEST = ("alone", "replicas", "columns", "columns_x_replicas", "sharded_fc", "zero1", "zero2")
_AS_FAST = 0.97


def here(config: Config, machine: Machine | None) -> Cluster | None:
    """This host: its GPUs, or its cores; None where nothing is known of its GPUs."""
    if config.layout.device == "cpu" or not torch.cuda.is_available():
        like = "cpu" if "amx_bf16" in cpu_flags() else "cpu-avx512"
        return Cluster(machine or MACHINES[like], cores())
    name, count = torch.cuda.get_device_name().lower(), torch.cuda.device_count()
    known = machine or next((MACHINES[kind] for kind in MACHINES if kind in name), None)
    return Cluster(known, count) if known else None


def forecast(planned: Mapping[str, Any], config: Config, at: Cluster) -> dict[str, Any]:
    """Of a plan, on a cluster; the keys are those of `--json`.

    Raises:
        ConfigError: the plan has more ranks than the cluster has GPUs.
    """
    machine, ranks = at.machine, planned["ranks"]
    if machine.overlap and ranks > at.total:
        raise ConfigError(
            f"{ranks} ranks on {at.total} × {machine.name}: give --gpus as many, or fewer --ranks"
        )
    places = ({} if ranks == 1 else {"alone": planned["alone"]}) | planned["layouts"]
    found: dict[str, Any] = {}
    for kind, place in places.items():
        if "problem" in place or (kind == "columns_x_replicas" and ranks == 2):
            continue  # the latter is columns, by another name
        found[kind] = predict(planned, kind, at)
        peak = place["memory"]["peak"]
        if machine.capacity and peak > machine.capacity:
            found[kind]["too_large"] = f"{peak / 1e9:.1f} GB of {machine.capacity / 1e9:.0f}"
    images, source, missing = _images(config)
    for one in found.values():
        one["hours"] = config.train.epochs * images / one["images_per_s"] / 3600
    best = recommended(found)
    appetite = found.get(best or planned["layout"], {}).get("training_images_per_s", 0.0)
    return {
        "machine": {"name": machine.name, "source": machine.source, "devices": at.devices,
                    "nodes": at.nodes},
        "images_per_epoch": images,
        "images_source": source,
        "data_missing": missing,
        "epochs": config.train.epochs,
        "predicted": found,
        "recommended": best,
        "decode": {
            "images_per_s": appetite,
            "host_cores": appetite / CORE_DECODES,
            "host_cores_there": machine.cores * at.total,
            "gpus": appetite / machine.decode if machine.decode and machine.overlap else None,
        },
        "schedule": schedule(config, images),
        "measured": _measured(config, planned, found),
    }  # fmt: skip


def recommended(found: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The fastest layout that fits in memory, the simplest of those nearly as fast."""
    speeds = {k: one["images_per_s"] for k, one in found.items() if "too_large" not in one}
    order = [kind for kind in ("one", *_SIMPLEST) if kind in speeds]
    bound = _AS_FAST * max(speeds.values(), default=0.0)
    return next((kind for kind in order if speeds[kind] >= bound), None)


def schedule(config: Config, images: int, points: int = 60) -> list[tuple[float, float]]:
    """(epoch, rate) of evenly spaced steps. Where plateau will fall is not known: it is given as
    if its falls came at even intervals."""
    found = []
    plan = Schedule.of(config, images)
    for point in range(points):
        step = point * (plan.last_step - 1) // (points - 1)
        plan.drops = point * (config.schedule.max_drops + 1) // points
        found.append((step / plan.steps_per_epoch, plan.rate(step)))
    return found


def _images(config: Config) -> tuple[int, str, str]:
    """Training images of an epoch, whose number that is, and why it is not the data set's own.

    Raises ConfigError where a config and its data do not agree.
    """
    try:
        return len(open_for(config).splits[config.data.train_split]), config.data.path, ""
    except DatasetError as error:
        return _ILSVRC_2012, f"ILSVRC-2012's: {config.data.path} is no data set here", f"{error}"


def _measured(
    config: Config, planned: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the run of this config's folder has measured, beside what was predicted of it."""
    folder, same = config.folder, ("layout.kind", "train.batch", "train.precision")
    if not (folder / "metrics.jsonl").is_file() or planned["layout"] not in found:
        return None
    ran = load_config([folder / "config.json"])
    if any(_of(ran, key) != _of(config, key) for key in same):
        return None
    points = [p for p in read_metrics(folder) if p["kind"] == "speed"][1:]  # the first warms up
    if not points:
        return None
    middle = {key: statistics.median(p[key] for p in points)
              for key in ("images_per_s", "data_wait")}  # fmt: skip
    ratio = found[planned["layout"]]["images_per_s"] / middle["images_per_s"]
    return {"folder": str(folder), "points": len(points), **middle, "predicted_to_measured": ratio}


def _of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def lines(told: Mapping[str, Any], own: str) -> list[str]:
    """A forecast as text; `own` is the config's layout."""
    machine, found = told["machine"], told["predicted"]
    count = machine["devices"] * machine["nodes"]
    nodes = f" on {machine['nodes']} nodes" if machine["nodes"] > 1 else ""
    hours = f"{told['epochs']:g} epochs"
    text = ["", f"predicted, {count} × {machine['name']}{nodes} ({machine['source']}):",
            f"{'':20}{'images/s':>10}{'× one':>8}{hours:>12}{'step, ms':>10}  of it, ms",
            ]  # fmt: skip
    base = (found.get("alone") or found.get("one") or {}).get("images_per_s")
    for kind, one in found.items():
        parts = sorted(one["parts_s"].items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {1e3 * s:.3g}" for name, s in parts if s > 0.01 * one["step_s"])
        name = "one, on one device" if kind == "alone" else kind
        text.append(
            f"{name:20}{one['images_per_s']:10,.0f}{one['images_per_s'] / base:8.2f}"
            f"{_hours(one['hours']):>12}{1e3 * one['step_s']:10.4g}  {listed}"
            + (f"; DOES NOT FIT: {one['too_large']}" if "too_large" in one else "")
        )
    best, decode = told["recommended"], told["decode"]
    if best is None:
        text.append("recommended: none fits; a smaller train.batch, or more train.micro_batches")
    else:
        speed = found[best]
        text.append(
            f"recommended: {'one, on one device' if best == 'alone' else best}: "
            f"{_hours(speed['hours'])} for {told['epochs']:g} epochs of "
            f"{told['images_per_epoch']:,} images ({told['images_source']}); "
            f"its bottleneck: {speed['bottleneck']}"
            + (" (yours)" if best == own else f"; yours, {own}, see above")
        )
    text.append(
        f"decoding: training takes {decode['images_per_s']:,.0f} images/s: "
        f"{decode['host_cores']:.1f} host cores of about {decode['host_cores_there']:g}"
        + (f", or {decode['gpus']:.1f} GPUs' JPEG decoders" if decode["gpus"] else "")
    )
    if told["data_missing"]:
        text.append(f"no data set: {printable(told['data_missing'])}")
    text += ["", *plot(told["schedule"])]
    if run := told["measured"]:
        text += [
            "",
            f"measured in {run['folder']}: {run['images_per_s']:,.0f} images/s, waiting for data "
            f"{run['data_wait']:.0%} (median of {run['points']} points); predicted: "
            f"{run['predicted_to_measured']:.2f} of that",
        ]
    return text


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def plot(points: list[tuple[float, float]], height: int = 7) -> list[str]:
    """Rates over epochs, a column a point."""
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
