"""What a step costs: seconds, from what a rank does and what a machine can do.

A rank's seconds are a sum of counted things, each times what the machine takes for one: FLOP,
bytes of maps and of parameters passed over, bytes sent, hops of collectives, and a fixed time,
which is why a small batch is slower an image. Every layout gives every rank the same share of the
arithmetic; they differ in the parameters a rank passes over and in what it sends.

What a step of fused kernels passes over was counted by running it on shapes; what one of torch's
operators does is counted here. Of a CPU a device is a core, ranks share them, and what is sent
takes the cores' time. On GPUs sums of gradients overlap the rest of the backward, gradients that
columns exchange those of the layer's weights, and images are decoded beside it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alexnet_dist.errors import ConfigError
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.planning.machines import CORE_DECODES, MACHINES, Cluster, Machine
from alexnet_dist.planning.plan import Plan, Prediction

_ZERO = ("zero1", "zero2")
# Times a map is read or written, forward and backward, of a plain layer of torch's operators:
# written by the layer (1), ReLU in another tensor (2), read by the next (1); backward its gradient
# made (1), read for inputs and for weights (2), ReLU's backward (3), and the map itself again (1).
_MAP_PASSES = 11
# Bytes a parameter: read, narrowed, used forward and backward; its gradient written, widened, its
# norm taken; fused SGD reads three values and writes two.
_FORWARD_BYTES = {"bf16": 22, "tf32": 16, "fp32": 16, "fp64": 32}
_UPDATE_BYTES = {"bf16": 20, "tf32": 20, "fp32": 20, "fp64": 40}
_ZERO_BYTES = 60  # more: flat copies of gradients, buckets and weights; by measured layouts
# Fused kernels, of an H200 (docs/performance.md): shares of its peak that convolutions and products
# reached by themselves; in fp32 what leaves 21.2 ms for a step, which had other kernels then.
REACHED = {"bf16": 0.39, "tf32": 0.39, "fp32": 0.50}
_STREAMED = 0.8  # of the data sheet's bytes/s; a copy reached 0.89. An estimate
_GAP_S = 1.5e-6  # between a graph's kernels: an estimate
_LAUNCH_S = 25e-6  # a kernel, by Python: steps of some 270 took 6.9 to 8.2 ms
_BASIS = {
    (False, False): "fitted", (True, False): "not run, set by one published speed",
    (True, True): "not run",
}  # fmt: skip
# One process's threads hold Python's lock between images: 4,750/s of 224 pixels by 4 threads and
# 4,000 by 14 (docs/performance.md), here of 256.
_LOCKED, _LOCKED_BY_MORE = 4750 * (224 / 256) ** 2, 4000 * (224 / 256) ** 2


def quantities(planned: Plan, kind: str, cores: float = 1.0) -> dict[str, float]:
    """What is counted of a rank's step by torch's operators, but what it sends.

    Args:
        kind: the layout; `alone` for all on one device.
        cores: of a rank; GPUs count as one.
    """
    ranks = 1 if kind == "alone" else planned.ranks
    held, precision = planned.of(kind).parameters, planned.recipe["train.precision"]
    images, width = planned.batch / ranks, DTYPES[precision].itemsize
    flops = planned.training_flops_per_image * images
    values = planned.map_values_per_image
    updated = held / ranks if kind in _ZERO else held
    passed = held * _FORWARD_BYTES[precision] + updated * _UPDATE_BYTES[precision]
    return {
        "flops": flops / cores,
        "serial": flops * max(0.0, 1 - 1 / cores),
        "map_bytes": _MAP_PASSES * values["all"] * images * width / cores,
        "lrn_bytes": values["normalised"] * images * width / cores,
        "parameter_bytes": (passed + held * _ZERO_BYTES * (kind in _ZERO)) / cores,
        "images": images / cores,
    }


def collectives(planned: Plan, kind: str) -> list[tuple[str, float, int, int]]:
    """Of a rank's step: what, its bytes, its calls, and the ranks of its group."""
    ranks, found = planned.ranks, planned.of(kind)
    pairs = kind.startswith("columns")
    sent: list[tuple[str, float, int, int]] = []
    for name, size in found.bytes.items():
        if name != "total":
            group = ranks // 2 if pairs and name == "all-reduce" else 2 if pairs else ranks
            sent.append((name, size, found.calls[name], group))
    return sent


def hops(name: str, group: int) -> int:
    """One after another, of a call: a tree's up and down, else a message to each other rank."""
    return 2 * math.ceil(math.log2(group)) if name == "all-reduce" else group - 1


def transfer_s(name: str, size: float, calls: int, group: int, stride: int, at: Cluster) -> float:
    """Seconds of a collective.

    A ring crosses each node's border once, so that the group's share of all the node's links
    carries it; an all-to-all leaves by each device's own.

    Args:
        size: bytes a rank sends.
        stride: the group's ranks are so many apart.
    """
    machine, here = at.machine, max(1, at.devices // stride)
    if group <= 1:
        return 0.0
    if group <= here or at.nodes == 1:
        return size / machine.link + calls * hops(name, group) * machine.latency_s
    share = machine.node_link * (1 if name == "all-to-all" else here) / at.devices
    slowest = min(machine.link, share)
    return size / slowest + calls * hops(name, group) * machine.node_latency_s


def predict(
    planned: Plan, kind: str, at: Cluster, pipeline: str = "", factor: float = 1.0,
    basis: str = "",
) -> Prediction:  # fmt: skip
    """A layout's step on a cluster.

    Args:
        pipeline: which decodes; the config's, if left out.
        factor: what computing took where it was measured, ÷ what this model says.
        basis: what the factor is from.
    """
    machine, precision = at.machine, planned.recipe["train.precision"]
    ranks = 1 if kind == "alone" else planned.ranks
    if precision not in machine.peak:
        raise ConfigError(
            f"train.precision={precision}: no figure for {machine.name}, only for "
            f"{', '.join(machine.peak)}: set one of these"
        )
    fused = machine.fused and planned.of(kind).passes is not None
    parts = _by_kernels(planned, kind, machine) if fused else _by_operators(planned, kind, at)
    parts = {name: seconds * factor for name, seconds in parts.items()}
    parts |= {"exchange": 0.0, "all-reduce": 0.0}
    if kind != "alone":
        for name, size, calls, group in collectives(planned, kind):
            stride = 2 if kind.startswith("columns") and name == "all-reduce" else 1
            if name == "all-reduce" and machine.overlap and kind not in _ZERO:
                backward = parts["arithmetic"] + parts["maps"]
                parts[name] = _exposed(planned, kind, size, group, stride, at, backward)
            else:
                place = "all-reduce" if kind in _ZERO or name == "all-reduce" else "exchange"
                seconds = transfer_s(name, size, calls, group, stride, at)
                if name == "all-to-all" and machine.overlap:
                    seconds = max(0.0, seconds - _beside_exchange(planned, kind, parts))
                parts[place] += seconds
    training = sum(parts.values())
    # Of a CPU all cores decode for the ranks, which share them.
    share = 1 if machine.overlap else at.total / ranks
    decode = planned.batch / ranks / share / decoding(planned, at, pipeline).images_per_s
    step = max(training, decode) if machine.overlap else training + decode
    parts["decode"] = decode
    return Prediction(
        ranks=ranks,
        images_per_s=planned.batch / step,
        training_images_per_s=planned.batch / training,
        step_s=step,
        parts_s=parts,
        bottleneck=bottleneck(parts, beside=machine.overlap),
        basis=basis or _BASIS[machine.overlap, machine.fused],
    )


def _by_operators(planned: Plan, kind: str, at: Cluster) -> dict[str, float]:
    """Seconds of a rank's computing by torch's operators."""
    machine, precision = at.machine, planned.recipe["train.precision"]
    ranks = 1 if kind == "alone" else planned.ranks
    counted = quantities(planned, kind, 1.0 if machine.overlap else at.total / ranks)
    exact = machine.fused and precision == "fp32"
    rate = machine.peak[precision] * (REACHED[precision] if exact else machine.reached)
    return {
        "arithmetic": counted["flops"] / rate + counted["serial"] * machine.serial / rate,
        "maps": (counted["map_bytes"] + machine.lrn_passes * counted["lrn_bytes"]) / machine.memory,
        "parameters": counted["parameter_bytes"] / machine.memory,
        "fixed": machine.step_s + machine.zero_s * (kind in _ZERO),
    }


def _by_kernels(planned: Plan, kind: str, machine: Machine) -> dict[str, float]:
    """Seconds of a GPU's computing by fused kernels."""
    precision, rank = planned.recipe["train.precision"], planned.of(kind)
    ranks, passes = 1 if kind == "alone" else planned.ranks, rank.passes
    assert passes is not None
    rate, memory = machine.peak[precision] * REACHED[precision], machine.memory * _STREAMED
    forward = planned.forward_flops_per_image
    full = 3 * sum(flops for name, flops in forward.items() if name.startswith("fc"))
    maps = planned.training_flops_per_image - full
    images, held = planned.batch / ranks, rank.parameters
    # A fully-connected layer's weights are read twice and their gradient is written, which takes
    # longer than its arithmetic where there are few samples.
    shares = planned.parameters
    weights = held * sum(n for name, n in shares.items() if name.startswith("fc"))
    read = 3 * weights / sum(shares.values()) * DTYPES[precision].itemsize
    updated = 0.0
    if kind in _ZERO:
        updated = held * (_ZERO_BYTES + _UPDATE_BYTES[precision] / ranks)
    parts = {
        "arithmetic": maps * images / rate + max(full * images / rate, read / memory),
        "maps": passes.maps / memory,
        "parameters": (passes.parameters + updated) / memory,
    }
    if rank.execution == "graph":
        return parts | {"fixed": passes.kernels * _GAP_S}
    return parts | {"fixed": max(0.0, passes.kernels * _LAUNCH_S - sum(parts.values()))}


def bottleneck(parts: Mapping[str, float], beside: bool) -> str:
    """The largest part; decoding that goes on beside the rest only where it takes longer."""
    rest = {name: seconds for name, seconds in parts.items() if name != "decode"}
    if parts["decode"] > (sum(rest.values()) if beside else max(rest.values())):
        return "decode"
    return max(rest, key=lambda name: rest[name])


@dataclass(frozen=True)
class Decoding:
    """Who decodes, and how many images/s of a device; `math.inf` where they are decoded once."""

    pipeline: str
    how: str
    images_per_s: float
    basis: str


def decoding(planned: Plan, at: Cluster, pipeline: str = "") -> Decoding:
    """Of a device, by a pipeline: the config's, if left out.

    Images are taken to be stored at canvas size.
    """
    machine, wanted = at.machine, pipeline or planned.recipe["data.pipeline"]
    pixels: float = (256 / planned.recipe["data.canvas"]) ** 2
    gpu = machine.overlap and (machine.decode or machine.decode_by_cuda)
    if wanted == "auto":
        wanted = "dali" if gpu else "torch"
    basis = "measured" if machine == MACHINES["h200"] else "not run"
    if wanted == "resident":
        return Decoding(wanted, "each image once, at the start", math.inf, basis)
    if not machine.overlap:
        return Decoding(wanted, "a core", machine.decode or CORE_DECODES, "measured")
    if wanted == "dali" and machine.decode:
        how, rate = "the GPU's hardware decoder", machine.decode
    elif wanted == "dali" and machine.decode_by_cuda:
        how, rate = "the GPU's CUDA cores", machine.decode_by_cuda
    else:
        how, rate = f"{machine.cores:g} cores a GPU, which share Python's lock", threads(machine)
        pixels = min(1.0, pixels)  # of small images the rest takes the time
    return Decoding(wanted, how, rate * pixels, basis)


def threads(machine: Machine) -> float:
    """Images/s of 256 × 256 that the torch pipeline's threads decode for one GPU."""
    slower = (machine.cores - 4) / (14 - 4) * (_LOCKED - _LOCKED_BY_MORE)
    locked = min(_LOCKED, max(_LOCKED_BY_MORE, _LOCKED - slower))
    return min(machine.cores * CORE_DECODES, locked)


def _exposed(
    planned: Plan, kind: str, size: float, group: int, stride: int, at: Cluster,
    step_s: float,
) -> float:  # fmt: skip
    """Seconds of sums of gradients that outlast the backward; each layer's begins when the layer's
    gradient is made and the one before it is sent."""
    flops, whole = planned.forward_flops_per_image, planned.training_flops_per_image
    summed = {
        name: 0 if kind == "sharded_fc" and name.startswith("fc") else count
        for name, count in planned.parameters.items()
    }
    now = sent = 0.0
    for name in reversed(list(flops)):
        now += step_s * (1 if name == "conv1" else 2) * flops[name] / whole
        part = size * summed[name] / sum(summed.values())
        sent = max(now, sent) + transfer_s("all-reduce", part, 1, group, stride, at)
    return max(0.0, sent - now)


def _beside_exchange(planned: Plan, kind: str, parts: Mapping[str, float]) -> float:
    """Seconds of the gradients of weights that are computed while those of what a layer saw are
    exchanged between ranks."""
    flops, between = planned.forward_flops_per_image, planned.recipe["model.exchange"]
    meeting = [n for n in between if kind != "sharded_fc" or n.startswith("fc")]
    share = sum(flops[name] for name in meeting) / planned.training_flops_per_image
    return parts["arithmetic"] * share


@dataclass(frozen=True)
class Measured:
    """A layout's step on one host's cores, and its plan."""

    planned: Plan
    kind: str
    cores: int
    seconds: float


def fit(measured: Sequence[Measured]) -> Machine:
    """The CPU that took these seconds: least relative errors, nothing negative.

    Raises:
        ConfigError: too few layouts or batches.
    """
    from scipy.optimize import nnls  # takes half a second, and only this needs it

    names = ("flops", "serial", "bytes", "sent", "hops", "steps", "zero")
    rows = [_row(one) for one in measured]
    if len(rows) <= len(names):
        raise ConfigError(
            f"--fit: {len(rows)} measured steps do not fix {len(names)} numbers: give several "
            "files of bench layouts, of different batches"
        )
    matrix = np.array([[row[name] / one.seconds for name in names]
                       for row, one in zip(rows, measured, strict=True)])  # fmt: skip
    scale = matrix.max(0).clip(1e-300)
    weights = np.ones(len(rows))
    for _ in range(30):  # towards least absolute errors: a disturbed measurement counts for little
        found, _ = nnls(matrix / scale * weights[:, None], weights)
        weights = 1 / np.sqrt(np.abs(matrix / scale @ found - 1).clip(0.02))
    cost = dict(zip(names, found / scale, strict=True))
    precision = measured[0].planned.recipe["train.precision"]
    off = np.median(np.abs(matrix / scale @ found - 1))
    return dataclasses.replace(
        MACHINES["cpu"],
        peak={precision: 1 / max(cost["flops"], 1e-18)},
        serial=cost["serial"] / max(cost["flops"], 1e-18),
        memory=1 / max(cost["bytes"], 1e-15),
        link=1 / max(cost["sent"], 1e-15),
        latency_s=cost["hops"],
        step_s=cost["steps"],
        zero_s=cost["zero"],
        source=f"fitted to {len(rows)} measured steps, half of them within {off:.0%}",
    )


def _row(one: Measured) -> dict[str, float]:
    kind = one.kind
    ranks = 1 if kind == "alone" else one.planned.ranks
    counted = quantities(one.planned, kind, one.cores / ranks)
    sent = [] if kind == "alone" else collectives(one.planned, kind)
    return {
        "flops": counted["flops"],
        "serial": counted["serial"],
        "bytes": counted["map_bytes"] + counted["parameter_bytes"],
        "sent": sum(size for _, size, _, group in sent if group > 1),
        "hops": sum(calls * hops(name, g) for name, _, calls, g in sent if g > 1),
        "steps": 1.0,
        "zero": float(kind in _ZERO),
    }
