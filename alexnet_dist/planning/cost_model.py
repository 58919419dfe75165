"""The cost model: seconds of a training step, from what a rank does and what a machine can do.

A rank's time is a sum of counted quantities, each times what the machine takes for one: FLOP, bytes
of maps and of parameters that are read and written, bytes sent, hops of collectives, and a fixed
time, because of which small batches take longer an image. Every layout gives every rank the same
share of the arithmetic; they differ in the parameters that a rank reads and writes, and in what it
sends.

The memory traffic of a step with fused kernels was counted by running it on fake tensors; that of a
step with torch's operators is counted here. On a CPU a "device" is a core; ranks share the cores,
which also do the sending. On GPUs, all-reduces of gradients overlap the backward pass, and images
are decoded in parallel. On those that run the fused kernels, exchanges of gradients overlap the
computation of the layer's weight gradients; figures of older ones are of others' programs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from alexnet_dist.errors import ConfigError
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.layouts import ZERO_STAGES
from alexnet_dist.planning.machines import CORE_DECODES, MACHINES, Cluster, Machine
from alexnet_dist.planning.plan import Plan, Prediction

# How often a plain layer of torch's operators reads or writes its map, forward and backward: the
# layer writes it (1), ReLU makes another tensor (2), the next layer reads it (1); backward writes
# its gradient (1), reads it for inputs and for weights (2), ReLU's backward (3), reads the map (1).
_MAP_PASSES = 11
# Bytes per parameter. Forward and backward: weights are read, cast, used; gradients are written,
# cast, and their norm is taken. Update: fused SGD reads three values and writes two.
_FORWARD_BYTES = {"bf16": 22, "fp16": 22, "tf32": 16, "fp32": 16, "fp64": 32}
_UPDATE_BYTES = {"bf16": 20, "fp16": 20, "tf32": 20, "fp32": 20, "fp64": 40}
_ZERO_BYTES = 60  # more with ZeRO: flat copies of gradients, buckets, weights; as measured
# Share of an H200's peak that convolutions and matrix products reach with fused kernels, and what
# each kernel of a CUDA graph takes whatever its size, since kernels have gaps between them and do
# not fill the GPU at their ends. Both explain its steps of 128 and of 1,024 images in bf16
# (docs/performance.md); for fp32, what explained a step of 21.2 ms, which had other kernels then.
REACHED = {"bf16": 0.44, "fp16": 0.44, "tf32": 0.44, "fp32": 0.50}
_KERNEL_S = 5.5e-6
_STREAMED = 0.8  # of the data sheet's bytes/s; a copy reached 0.89. An estimate
_LAUNCH_S = 25e-6  # to launch a kernel from Python: steps of about 270 took 6.9 to 8.2 ms
_BASIS = {
    (False, False): "fitted", (True, False): "not run, set by one published speed",
    (True, True): "not run",
}  # fmt: skip
# A process's threads hold Python's lock between images: 4 threads decoded 4,750 images/s of 224
# pixels, 14 threads 4,000 (docs/scaling.md); here of 256 pixels.
_LOCKED_OF_4, _LOCKED_OF_14 = 4750 * (224 / 256) ** 2, 4000 * (224 / 256) ** 2


def quantities(planned: Plan, kind: str, cores: float) -> dict[str, float]:
    """Count what a rank's step does with torch's operators, other than sending.

    Args:
        kind: the layout.
        cores: cores of a rank; 1 for a GPU.

    Returns:
        FLOP, bytes and images by the names that `fit` and `_by_operators` know.
    """
    ranks = planned.ranks_of(kind)
    held, precision = planned.of(kind).parameters, planned.recipe["train.precision"]
    images, width = planned.batch / ranks, DTYPES[precision].itemsize
    flops = planned.training_flops_per_image * images
    values = planned.map_values_per_image
    updated = held / ranks if kind in ZERO_STAGES else held
    passed = held * _FORWARD_BYTES[precision] + updated * _UPDATE_BYTES[precision]
    return {
        "flops": flops / cores,
        "serial": flops * max(0.0, 1 - 1 / cores),
        "map_bytes": _MAP_PASSES * values["all"] * images * width / cores,
        "lrn_bytes": values["normalised"] * images * width / cores,
        "parameter_bytes": (passed + held * _ZERO_BYTES * (kind in ZERO_STAGES)) / cores,
        "images": images / cores,
    }


@dataclass(frozen=True)
class Collective:
    """A rank's calls of one collective in a step.

    Attributes:
        size: bytes that the rank sends, in all calls.
        group: ranks in the group.
        stride: distance between neighbouring ranks of the group.
    """

    name: str
    size: float
    calls: int
    group: int
    stride: int = 1

    @property
    def hops(self) -> int:
        """Sequential messages of a call: up and down a tree for an all-reduce, else one to each
        other rank."""
        reduces = self.name == "all-reduce"
        return 2 * math.ceil(math.log2(self.group)) if reduces else self.group - 1


def collectives(planned: Plan, kind: str) -> list[Collective]:
    """Return the collectives of a rank's step in which it sends anything."""
    found, pairs = [], kind.startswith("columns")
    for name, size in planned.of(kind).bytes.items():
        if name == "total":
            continue
        group, stride = planned.ranks, 1
        if pairs:  # the ranks of a replica exchange; those of a column, one of each replica, sum
            group, stride = (planned.ranks // 2, 2) if name == "all-reduce" else (2, 1)
        found.append(Collective(name, size, planned.of(kind).calls[name], group, stride))
    return found


def transfer_s(one: Collective, cluster: Cluster) -> float:
    """Return the seconds that a collective takes.

    A ring crosses each node's border once, so that the group's share of all of the node's links
    carries it; an all-to-all leaves by each device's own link.
    """
    if one.group <= 1:
        return 0.0
    machine = cluster.machine
    on_node = max(1, cluster.devices // one.stride)  # ranks of the group
    if one.group <= on_node or cluster.nodes == 1:
        return one.size / machine.link + one.calls * one.hops * machine.latency_s
    share = machine.node_link * (1 if one.name == "all-to-all" else on_node) / cluster.devices
    slowest = min(machine.link, share)
    return one.size / slowest + one.calls * one.hops * machine.node_latency_s


def predict(
    planned: Plan, kind: str, cluster: Cluster, pipeline: str = "", factor: float = 1.0,
    basis: str = "",
) -> Prediction:  # fmt: skip
    """Predict a layout's step on a cluster.

    Args:
        pipeline: the pipeline that decodes images; by default the config's.
        factor: measured computing time divided by this model's.
        basis: where the factor comes from, in words.
    """
    machine, precision = cluster.machine, planned.recipe["train.precision"]
    ranks = planned.ranks_of(kind)
    if precision not in machine.peak:
        raise ConfigError(
            f"train.precision={precision}: no speed is known for {machine.name}, only for "
            f"{', '.join(machine.peak)}: set one of these"
        )
    fused = machine.fused and planned.of(kind).passes is not None
    parts = _by_kernels(planned, kind, machine) if fused else _by_operators(planned, kind, cluster)
    parts = {name: seconds * factor for name, seconds in parts.items()}
    parts |= {"exchange": 0.0, "all-reduce": 0.0}
    for one in collectives(planned, kind):
        if one.name == "all-reduce" and machine.overlap and kind not in ZERO_STAGES:
            parts["all-reduce"] = _exposed(planned, kind, one, cluster, parts)
            continue
        seconds = transfer_s(one, cluster)
        if one.name == "all-to-all" and machine.fused:  # others ran programs without it
            seconds = max(0.0, seconds - _beside_exchange(planned, kind, parts))
        summed = kind in ZERO_STAGES or one.name == "all-reduce"
        parts["all-reduce" if summed else "exchange"] += seconds
    training = sum(parts.values())
    # On a CPU, all cores decode for the ranks, which share them.
    share = 1 if machine.overlap else cluster.total / ranks
    decode = planned.batch / ranks / share / decoding(planned, cluster, pipeline).images_per_s
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


def _by_operators(planned: Plan, kind: str, cluster: Cluster) -> dict[str, float]:
    """Return a rank's seconds of computing with torch's operators, by part."""
    machine, precision = cluster.machine, planned.recipe["train.precision"]
    ranks = planned.ranks_of(kind)
    counted = quantities(planned, kind, 1.0 if machine.overlap else cluster.total / ranks)
    exact = machine.fused and precision == "fp32"
    rate = machine.peak[precision] * (REACHED[precision] if exact else machine.reached)
    return {
        "arithmetic": counted["flops"] / rate + counted["serial"] * machine.serial / rate,
        "maps": (counted["map_bytes"] + machine.lrn_passes * counted["lrn_bytes"]) / machine.memory,
        "parameters": counted["parameter_bytes"] / machine.memory,
        "fixed": machine.step_s + machine.zero_s * (kind in ZERO_STAGES),
    }


def _by_kernels(planned: Plan, kind: str, machine: Machine) -> dict[str, float]:
    """Return a GPU's seconds of computing with fused kernels, by part."""
    precision, rank = planned.recipe["train.precision"], planned.of(kind)
    ranks, passes = planned.ranks_of(kind), rank.passes
    assert passes is not None
    rate, memory = machine.peak[precision] * REACHED[precision], machine.memory * _STREAMED
    forward = planned.forward_flops_per_image
    full = 3 * sum(flops for name, flops in forward.items() if name.startswith("fc"))
    maps = planned.training_flops_per_image - full
    images, held = planned.batch / ranks, rank.parameters
    # A fully-connected layer reads its weights twice and writes their gradient, which takes longer
    # than its arithmetic if there are few samples.
    shares = planned.parameters
    weights = held * sum(n for name, n in shares.items() if name.startswith("fc"))
    read = 3 * weights / sum(shares.values()) * DTYPES[precision].itemsize
    updated = held * (_ZERO_BYTES + _UPDATE_BYTES[precision] / ranks) * (kind in ZERO_STAGES)
    parts = {
        "arithmetic": maps * images / rate + max(full * images / rate, read / memory),
        "maps": passes.maps / memory,
        "parameters": (passes.parameters + updated) / memory,
    }
    if rank.execution == "graph":
        return parts | {"fixed": passes.kernels * _KERNEL_S}
    return parts | {"fixed": max(0.0, passes.kernels * _LAUNCH_S - sum(parts.values()))}


def bottleneck(parts: Mapping[str, float], beside: bool) -> str:
    """Return the name of the largest part; decoding beside the rest counts only if it takes
    longer than all of it."""
    rest = {name: seconds for name, seconds in parts.items() if name != "decode"}
    if parts["decode"] > (sum(rest.values()) if beside else max(rest.values())):
        return "decode"
    return max(rest, key=lambda name: rest[name])


@dataclass(frozen=True)
class Decoding:
    """How images are decoded, and how many per second and device; infinity if decoded only once."""

    pipeline: str
    how: str
    images_per_s: float
    basis: str


def decoding(planned: Plan, cluster: Cluster, pipeline: str = "") -> Decoding:
    """Return how fast a pipeline (by default the config's) decodes for one device.

    Images are assumed to be stored at canvas size.
    """
    machine, wanted = cluster.machine, pipeline or planned.recipe["data.pipeline"]
    pixels: float = (256 / planned.recipe["data.canvas"]) ** 2
    on_cores = min(1.0, pixels)  # for small images, overhead dominates
    gpu = machine.overlap and (machine.decode or machine.decode_by_cuda)
    if wanted == "auto":
        wanted = "dali" if gpu else "torch"
    basis = "measured" if machine == MACHINES["h200"] else "not run"
    if wanted == "resident":
        return Decoding(wanted, "each image is decoded once, at the start", math.inf, basis)
    if not machine.overlap:
        rate = (machine.decode or CORE_DECODES) * on_cores
        return Decoding(wanted, "on all cores", rate, "measured")
    if wanted == "dali" and machine.decode:
        how, rate = "the GPU's hardware decoder", machine.decode
    elif wanted == "dali" and machine.decode_by_cuda:
        how, rate = "the GPU's CUDA cores", machine.decode_by_cuda
    else:
        how, rate = f"{machine.cores:g} cores per GPU, which share Python's lock", threads(machine)
        pixels = on_cores
    return Decoding(wanted, how, rate * pixels, basis)


def threads(machine: Machine) -> float:
    """Return the images/s of 256 × 256 pixels that the torch pipeline decodes for one GPU."""
    locked = np.interp(machine.cores, (4, 14), (_LOCKED_OF_4, _LOCKED_OF_14))
    return min(machine.cores * CORE_DECODES, float(locked))


def _exposed(
    planned: Plan, kind: str, all_reduce: Collective, cluster: Cluster, parts: Mapping[str, float]
) -> float:
    """Return the seconds of gradient all-reduces that do not overlap the backward pass. Each
    layer's starts when its gradient is ready and the previous layer's has been sent."""
    flops, whole = planned.forward_flops_per_image, planned.training_flops_per_image
    summed = {
        name: 0 if kind == "sharded_fc" and name.startswith("fc") else count
        for name, count in planned.parameters.items()
    }
    layers_s, now, sent = parts["arithmetic"] + parts["maps"], 0.0, 0.0  # forward and backward
    for name in reversed(list(flops)):
        now += layers_s * (1 if name == "conv1" else 2) * flops[name] / whole
        part = all_reduce.size * summed[name] / sum(summed.values())
        sent = max(now, sent) + transfer_s(replace(all_reduce, size=part, calls=1), cluster)
    return max(0.0, sent - now)


def _beside_exchange(planned: Plan, kind: str, parts: Mapping[str, float]) -> float:
    """Return the seconds in which weight gradients are computed while the gradients of the layers'
    inputs are exchanged between ranks."""
    flops, between = planned.forward_flops_per_image, planned.recipe["model.exchange"]
    meeting = [n for n in between if kind != "sharded_fc" or n.startswith("fc")]
    share = sum(flops[name] for name in meeting) / planned.training_flops_per_image
    return parts["arithmetic"] * share
