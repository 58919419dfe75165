"""What a step costs: seconds, from what a rank does and what a machine can do.

A rank's seconds are a sum of counted things, each times what the machine takes for one: FLOP,
bytes of maps and of parameters passed over, bytes sent, hops of collectives, and a fixed time,
which is why a small batch is slower an image. Every layout gives every rank the same share of the
arithmetic; they differ in the parameters a rank passes over and in what it sends.

Of a CPU a device is a core, ranks share them, and what is sent takes the cores' time. On GPUs sums
of gradients overlap the rest of the backward, and images are decoded beside it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_dist.errors import ConfigError
from alexnet_dist.files import read_bytes, write
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.device import PEAK_FLOPS

CORE_DECODES = 2400.0  # images/s: docs/data.md, torchvision's pipeline, 256 × 256 JPEGs, a core
_ZERO = ("zero1", "zero2")
# Times a map is read or written, forward and backward, of a plain layer: written by the layer (1),
# ReLU in another tensor (2), read by the next (1); backward its gradient made (1), read for inputs
# and for weights (2), ReLU's backward (3), and the map itself read again (1).
_MAP_PASSES = 11
# Bytes a parameter: read, narrowed, used forward and backward; its gradient written, widened, its
# norm taken; fused SGD reads three values and writes two.
_FORWARD_BYTES = {"bf16": 22, "tf32": 16, "fp32": 16, "fp64": 32}
_UPDATE_BYTES = {"bf16": 20, "tf32": 20, "fp32": 20, "fp64": 40}
_ZERO_BYTES = 60  # more: flat copies of gradients, buckets and weights; by measured layouts


@dataclass(frozen=True)
class Machine:
    """What a device and the links between devices can do.

    Attributes:
        peak: FLOP/s of a device, by precision.
        reached: share of it that large layers reach.
        serial: seconds of a rank's arithmetic that more cores do not help, a second of one core.
        zero_s: seconds that a step of ZeRO takes more, whatever its size.
        memory: bytes/s read or written.
        lrn_passes: times a normalised map is read or written, forward and backward.
        step_s: seconds a step whatever its size: starting kernels, Python, layers that do not
            fill the device.
        link: bytes/s a rank sends inside a node.
        latency_s: seconds a hop of a collective takes inside a node.
        node_link: bytes/s a node sends, all its devices together.
        node_latency_s: seconds a hop between nodes takes.
        decode: JPEG images/s a device decodes itself; 0: it does not.
        cores: host cores a device.
        capacity: bytes of a device's memory; 0: not known.
        overlap: sums of gradients go on beside the backward, and decoding beside all.
        source: where the numbers are from.
    """

    name: str
    peak: Mapping[str, float]
    reached: float
    memory: float
    step_s: float
    link: float
    latency_s: float
    node_link: float
    node_latency_s: float
    source: str
    decode: float = 0.0
    cores: float = 1.0
    capacity: float = 0.0
    serial: float = 0.0
    zero_s: float = 0.0
    lrn_passes: float = 0.0
    overlap: bool = True


# Links: 0.8 of the data sheet's, one direction. LRN: by bench lrn 12 copies on an H200.
# Reached: published speeds, taken to be of 512 images a GPU. Hops and fixed times are estimates.
_LRN, _LRN_FUSED, _LINK = 24.0, 8.0, 0.8
MACHINES = {
    "h100": Machine(
        "H100 SXM 80 GB",
        {"bf16": PEAK_FLOPS["H100"], "tf32": PEAK_FLOPS["H100"] / 2, "fp32": 67e12},
        0.26, 3.35e12, 4e-3,
        _LINK * 450e9, 3e-6, _LINK * 8 * 50e9, 6e-6,
        "data sheet; a DGX H100's NVLink 4, 8 × 400 Gb/s and 112 cores; reached: the A100's; "
        "fixed: what an uncompiled step took beyond that on an H200; "
        "decode: the A100's × 7/5 by its JPEG engines",
        5400.0, 14.0, 80e9, lrn_passes=_LRN,
    ),
    "a100": Machine(
        "A100 SXM 80 GB",
        {"bf16": PEAK_FLOPS["A100"], "tf32": PEAK_FLOPS["A100"] / 2, "fp32": 19.5e12},
        0.26, 2.04e12, 1e-3,
        _LINK * 300e9, 3e-6, _LINK * 8 * 25e9, 6e-6,
        "data sheet; a DGX A100's NVLink 3, 8 × 200 Gb/s and 128 cores; reached: 16,487 images/s "
        "published of one; decode: 30,695 published of 8 with real JPEGs",
        3837.0, 16.0, 80e9, lrn_passes=_LRN,
    ),
    "v100": Machine(
        "V100 SXM2 16 GB", {"bf16": 125e12, "fp32": 15.7e12}, 0.378, 0.9e12, 1e-3,
        _LINK * 150e9, 3e-6, _LINK * 7e9, 6e-6,
        "data sheet; it has no bf16: its fp16 stands there; NVLink 2, and between nodes the "
        "56 Gb/s of the published 512; reached: 9,319 images/s published of one; decode: a quarter "
        "of the A100's; 40 cores of 8",
        960.0, 5.0, 16e9, lrn_passes=_LRN,
    ),
    "k20": Machine(
        "K20", {"fp32": 3.52e12}, 0.40, 208e9, 1e-3, 6e9, 2e-5, 12e9, 5e-5,
        "data sheet; Krizhevsky 2014: PCIe 2 at 6 GB/s between 4 of a socket (a node, here), half "
        "of it between sockets; reached: its 98 hours on one",
        0.0, 2.0, 5e9, lrn_passes=_LRN_FUSED,
    ),
    "gtx580": Machine(
        "GTX 580 3 GB", {"fp32": 1.58e12}, 0.33, 192e9, 1e-3, 5e9, 2e-5, 0.5e9, 5e-5,
        "data sheet; PCIe 2 at 5 GB/s; reached: the paper's 5 to 6 days on two",
        0.0, 2.0, 3e9, lrn_passes=_LRN_FUSED,
    ),
    "cpu": Machine(
        "a core of an Intel Xeon with AMX", {"bf16": 5.0e11, "fp32": 1.5e11}, 1.0, 2.56e10, 0.0456,
        1.17e9, 8.2e-4, 1.25e9, 1e-3,
        "fitted to 30 steps of bench layouts on two cores; fp32 by bench step's ratio; between "
        "nodes 10 Gb/s",
        CORE_DECODES, serial=0.015, zero_s=0.154, overlap=False,
    ),
    "cpu-avx512": Machine(
        "a core of an AMD EPYC with AVX-512 and no AMX", {"bf16": 2.19e11, "fp32": 1.12e11}, 1.0,
        9.6e9, 0.0, 2.94e9, 3.3e-4, 1.25e9, 1e-3,
        "fitted to 30 steps of bench layouts on two cores; fp32 by bench step's ratio; between "
        "nodes 10 Gb/s",
        CORE_DECODES, zero_s=0.062, overlap=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Nodes of as many devices each; written KIND:DEVICES or KIND:DEVICESxNODES."""

    machine: Machine
    devices: int
    nodes: int = 1

    @classmethod
    def of(cls, text: str, machine: Machine | None = None) -> "Cluster":
        """h100:8x4 is 4 nodes of 8; h100 is one device; raises ConfigError."""
        kind, _, size = text.partition(":")
        devices, by, nodes = (size or "1").partition("x")
        numbers = [int(n) if n.isdecimal() else 0 for n in (devices, nodes if by else "1")]
        if kind not in MACHINES or min(numbers) < 1:
            raise ConfigError(
                f"--gpus {text}: write KIND:DEVICES or KIND:DEVICESxNODES, as in h100:8x4, with a "
                f"kind of {', '.join(MACHINES)}"
            )
        return cls(machine or MACHINES[kind], *numbers)

    @property
    def total(self) -> int:
        return self.devices * self.nodes


def quantities(planned: Mapping[str, Any], kind: str, cores: float = 1.0) -> dict[str, float]:
    """What is counted of a rank's step, but what it sends.

    Args:
        planned: of plan.plan.
        kind: the layout; `alone` for all on one device.
        cores: of a rank; GPUs count as one.
    """
    ranks = 1 if kind == "alone" else planned["ranks"]
    held, precision = laid(planned, kind)["parameters"], planned["recipe"]["train.precision"]
    images, width = planned["batch"] / ranks, DTYPES[precision].itemsize
    flops = planned["training_flops_per_image"] * images
    values = planned["map_values_per_image"]
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


def laid(planned: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What `plan` says of a layout, or of one process on a share of the batch."""
    found: dict[str, Any] = planned["alone"] if kind == "alone" else planned["layouts"][kind]
    return found


def collectives(planned: Mapping[str, Any], kind: str) -> list[tuple[str, float, int, int]]:
    """Of a rank's step: what, its bytes, its calls, and the ranks of its group."""
    ranks, found = planned["ranks"], laid(planned, kind)
    pairs = kind.startswith("columns")
    sent = []
    for name, size in found["bytes"].items():
        if name != "total":
            group = ranks // 2 if pairs and name == "all-reduce" else 2 if pairs else ranks
            sent.append((name, size, found["calls"][name], group))
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


def predict(planned: Mapping[str, Any], kind: str, at: Cluster) -> dict[str, Any]:
    """A layout's step on a cluster.

    Returns:
        images_per_s of training with its images decoded, training_images_per_s without, step_s,
        its parts in seconds, and the bottleneck: the largest part.
    """
    machine, precision = at.machine, planned["recipe"]["train.precision"]
    ranks = 1 if kind == "alone" else planned["ranks"]
    cores = 1.0 if machine.overlap else at.total / ranks
    if precision not in machine.peak:
        raise ConfigError(
            f"train.precision={precision}: no figure for {machine.name}, only for "
            f"{', '.join(machine.peak)}"
        )
    counted = quantities(planned, kind, cores)
    rate = machine.peak[precision] * machine.reached
    parts = {
        "arithmetic": counted["flops"] / rate + counted["serial"] * machine.serial / rate,
        "maps": (counted["map_bytes"] + machine.lrn_passes * counted["lrn_bytes"]) / machine.memory,
        "parameters": counted["parameter_bytes"] / machine.memory,
        "fixed": machine.step_s + machine.zero_s * (kind in _ZERO),
        "exchange": 0.0,
        "all-reduce": 0.0,
    }
    if kind != "alone":
        for name, size, calls, group in collectives(planned, kind):
            stride = 2 if kind.startswith("columns") and name == "all-reduce" else 1
            if name == "all-reduce" and machine.overlap and kind not in _ZERO:
                backward = parts["arithmetic"] + parts["maps"]
                parts[name] = _exposed(planned, kind, size, group, stride, at, backward)
            else:
                place = "all-reduce" if kind in _ZERO or name == "all-reduce" else "exchange"
                parts[place] += transfer_s(name, size, calls, group, stride, at)
    training = sum(parts.values())
    decode = counted["images"] / decode_rate(planned, at)
    step = max(training, decode) if machine.overlap else training + decode
    parts["decode"] = decode
    return {
        "ranks": ranks,
        "images_per_s": planned["batch"] / step,
        "training_images_per_s": planned["batch"] / training,
        "step_s": step,
        "parts_s": parts,
        "bottleneck": bottleneck(parts, beside=machine.overlap),
    }


def bottleneck(parts: Mapping[str, float], beside: bool) -> str:
    """The largest part; decoding that goes on beside the rest only where it takes longer."""
    rest = {name: seconds for name, seconds in parts.items() if name != "decode"}
    if parts["decode"] > (sum(rest.values()) if beside else max(rest.values())):
        return "decode"
    return max(rest, key=lambda name: rest[name])


def decode_rate(planned: Mapping[str, Any], at: Cluster) -> float:
    """Images/s that a device decodes by data.pipeline: itself where DALI runs on it, or on the
    host's cores; no bound where they are decoded once."""
    pipeline = planned["recipe"]["data.pipeline"]
    if pipeline == "resident":
        return math.inf
    by_gpu = pipeline in ("dali", "auto") and at.machine.overlap
    own = at.machine.decode if by_gpu or not at.machine.overlap else 0.0
    return own or at.machine.cores * CORE_DECODES


def _exposed(
    planned: Mapping[str, Any], kind: str, size: float, group: int, stride: int, at: Cluster,
    step_s: float,
) -> float:  # fmt: skip
    """Seconds of sums of gradients that outlast the backward; each layer's begins when the layer's
    gradient is made and the one before it is sent."""
    flops: dict[str, float] = planned["forward_flops_per_image"]
    whole: float = planned["training_flops_per_image"]
    summed = {
        name: 0 if kind == "sharded_fc" and name.startswith("fc") else count
        for name, count in planned["parameters"].items()
    }
    now = sent = 0.0
    for name in reversed(list(flops)):
        now += step_s * (1 if name == "conv1" else 2) * flops[name] / whole
        part = size * summed[name] / sum(summed.values())
        sent = max(now, sent) + transfer_s("all-reduce", part, 1, group, stride, at)
    return max(0.0, sent - now)


@dataclass(frozen=True)
class Measured:
    """A layout's step on one host's cores, and its plan."""

    planned: Mapping[str, Any]
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
    precision = measured[0].planned["recipe"]["train.precision"]
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
    ranks = 1 if kind == "alone" else one.planned["ranks"]
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


def read_machine(path: Path) -> Machine:
    """A machine that `write_machine` wrote; raises ConfigError."""
    try:
        return Machine(**json.loads(read_bytes(path)))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--machine {path}: not a machine that plan --fit wrote: {error}"
        ) from error


def write_machine(machine: Machine, path: Path) -> None:
    """For `read_machine`; raises ConfigError."""
    try:
        write(path, (json.dumps(dataclasses.asdict(machine), indent=1) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"--machine {path}: cannot be written: {error.strerror}") from error
