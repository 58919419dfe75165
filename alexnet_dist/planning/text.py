"""What `plan` prints: a plan and a forecast as lines of text."""

from collections.abc import Mapping
from typing import Any

from alexnet_dist.errors import counted, printable
from alexnet_dist.planning.forecast import DecodingForecast, Forecast
from alexnet_dist.planning.plan import Misfit, Plan


def plan_lines(planned: Plan) -> list[str]:
    """Return a plan as lines of text."""
    layers, flops = planned.parameters, planned.forward_flops_per_image
    text = [f"{'layer':8}{'parameters':>12}{'forward MFLOP/image':>21}"]
    text += [f"{name:8}{layers[name]:12,}{flops[name] / 1e6:21,.1f}" for name in layers]
    text += [
        f"{'all':8}{sum(layers.values()):12,}{sum(flops.values()) / 1e6:21,.1f}",
        f"training: {planned.training_flops_per_image / 1e9:.2f} GFLOP per image, "
        f"{planned.training_flops_per_image * planned.batch / 1e12:.2f} TFLOP per step",
        "",
        f"on {counted(planned.ranks, 'rank')} with a batch of {planned.batch} in all, for each "
        "rank and step:",
        f"{'':20}{'batch':>6}{'parameters':>12}{'memory, peak':>14}{'bytes sent':>17}",
    ]
    for kind, rank in planned.layouts.items():
        if isinstance(rank, Misfit):
            text.append(f"{kind:20}{rank.problem}")
            continue
        sent = [f"{name} {size / 1e6:,.1f}" for name, size in rank.bytes.items()]
        text.append(
            f"{kind:20}{rank.batch_per_replica:6}{rank.parameters:12,}"
            f"{rank.memory['peak'] / 1e6:11,.0f} MB"
            f"{rank.bytes['total']:17,}  ({', '.join(sent[:-1]) or 'nothing'}; MB)"
        )
    own = planned.layouts[planned.layout]
    if isinstance(own, Misfit):
        return text
    text += ["", f"memory of a rank with {planned.layout}, MB at its peak:"]
    text += [f"  {name:18}{size / 1e6:10,.1f}" for name, size in own.memory.items()]
    return text


def forecast_lines(outlook: Forecast, own: str) -> list[str]:
    """Return a forecast as lines of text; `own` is the config's layout."""
    epochs = f"{outlook.epochs:g} epoch{'' if outlook.epochs == 1 else 's'}"
    decode = outlook.decode
    text = [
        *_speeds(outlook, epochs),
        _recommended(outlook, own, epochs),
        f"decoding: training needs {decode.images_per_s:,.0f} images/s; {_decoded(decode)}",
    ]
    if outlook.data_missing:
        text.append(f"no data set: {printable(outlook.data_missing)}")
    text += ["", *plot(outlook.schedule)]
    if outlook.drops_assumed:
        text.append("when the error stalls cannot be known: evenly spaced drops are assumed")
    if run := outlook.measured:
        text += ["", f"measured in {run['folder']} {_on(run['on'])}: {run['images_per_s']:,.0f} "
                 f"images/s, waiting for data {run['data_wait']:.0%} (median of "
                 f"{counted(run['points'], 'point')}); " + _beside(run)]  # fmt: skip
    return text


def _speeds(outlook: Forecast, epochs: str) -> list[str]:
    """Return the table of the layouts' speeds, and what they are based on."""
    machine, predicted = outlook.machine, outlook.predicted
    devices, nodes = int(machine["devices"]), int(machine["nodes"])
    on_nodes = f" on {nodes} nodes" if nodes > 1 else ""
    text = ["", f"predicted, {devices * nodes} × {machine['name']}{on_nodes} "
            f"({machine['source']}):",
            f"{'':20}{'images/s':>10}{'× one':>8}{epochs:>12}{'step, ms':>10}  of it, ms",
            ]  # fmt: skip
    bases = dict[str, list[str]]()
    for kind, one in predicted.items():
        parts = sorted(one.parts_s.items(), key=lambda part: -part[1])
        beside = " (beside the rest)" * (one.step_s < 0.999 * sum(one.parts_s.values()))
        listed = ", ".join(
            f"{name} {_milliseconds(s)}{beside * (name == 'decode')}"
            for name, s in parts
            if s > 0.01 * one.step_s
        )
        times = one.images_per_s / predicted["one"].images_per_s
        text.append(
            f"{kind:20}{one.images_per_s:10,.0f}{times:8.2f}"
            f"{_hours(one.hours):>12}{1e3 * one.step_s:10.4g}  {listed}"
            + (f"; DOES NOT FIT: {one.too_large}" if one.too_large else "")
        )
        bases.setdefault(one.basis, []).append(kind)
    of = [f"{', '.join(kinds)}: {basis}" for basis, kinds in bases.items()]
    return [*text, f"basis of the times: {'; '.join(of)}"]


def _recommended(outlook: Forecast, own: str, epochs: str) -> str:
    """Say which layout to take, how long it trains, and what limits it."""
    if (best := outlook.recommended) is None:
        return (
            "recommended: none, because none fits: lower train.batch, or raise train.micro_batches"
        )
    speed, listed = outlook.predicted[best], own in outlook.predicted
    yours = f"your layout, {own}, is " + ("in the table" if listed else "only in the first table")
    return (
        f"recommended: {best}: {_hours(speed.hours)} for {epochs} of "
        f"{outlook.images_per_epoch:,} images ({outlook.images_source}); "
        f"its bottleneck: {speed.bottleneck}" + ("" if best == own else f" ({yours})")
    )


def _on(measured: Any) -> str:
    """Say what a run was measured on, as its metrics have it."""
    match measured:
        case {"ranks": int(ranks), "device": str(device), "cores": int(cores)}:
            return f"on {counted(ranks, 'rank')}, {printable(device)}, {counted(cores, 'core')}"
        case _:
            return "on a machine that it did not note"


def _beside(run: Mapping[str, Any]) -> str:
    """Set a prediction beside what was measured, if that was on the same devices."""
    if "predicted_to_measured" in run:
        return f"predicted: {run['predicted_to_measured']:.2f} times that"
    return "not compared: only what is of the same devices and ranks is"


def _decoded(decode: DecodingForecast) -> str:
    """Say how images are decoded, how many there are, and what the alternative would give."""
    by = f"data.pipeline={decode.pipeline} ({decode.why}), {decode.how}"
    if decode.decoded_images_per_s is not None:
        by += f": {decode.decoded_images_per_s:,.0f} images/s ({decode.basis})"
        if decode.gpus is None:
            return f"{by}: {decode.host_cores:.1f} of {decode.host_cores_there:g} cores"
    if decode.pipeline != "torch":
        by += (
            "; the threads of data.pipeline=torch would decode "
            f"{decode.by_threads_images_per_s:,.0f}"
        )
    return by


def _milliseconds(seconds: float) -> str:
    """Return milliseconds with three digits, or as many as they have before the point."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.9995 else f"{1e3 * seconds:.3g}"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} s"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def plot(points: list[tuple[float, float]], height: int = 7) -> list[str]:
    """Plot learning rates over epochs as text, a column for each point."""
    rates = [rate for _, rate in points]
    top = max(rates) or 1.0
    rows = [round(rate / top * (height - 1)) for rate in rates]
    labels = {height - 1: f"{top:.3g}", 0: "0"}
    lines = [
        f"{labels.get(row, ''):>8} |" + "".join("*" if at == row else " " for at in rows)
        for row in reversed(range(height))
    ]
    ends = f"0{points[-1][0]:>{len(points) - 1}.3g}"
    return ["learning rate, by epoch", *lines, f"{'':8} +{'-' * len(points)}", f"{'':10}{ends}"]
