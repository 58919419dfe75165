"""The machines that steps are predicted for: what a device, and the links between devices, can do.

A GPU's figures are from its data sheet, other than those measured on an H200, which say so.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alexnet_dist.errors import ConfigError
from alexnet_dist.files import json_object, read_bytes, write
from alexnet_dist.parallel.device import PEAK_FLOPS

CORE_DECODES = 2400.0  # images/s of a core: torchvision, JPEGs of 256 × 256 pixels (docs/data.md)


@dataclass(frozen=True)
class Machine:
    """What a device and the links between devices can do.

    Attributes:
        peak: FLOP/s of a device, by precision.
        reached: share of the peak that large layers reach with torch's operators.
        serial: seconds of a rank's arithmetic that more cores do not speed up, per second of one
            core.
        zero_s: additional seconds of a step with ZeRO, whatever its size.
        memory: bytes/s read or written.
        lrn_passes: how often torch's operators read or write a normalised map, forward and
            backward.
        step_s: seconds of a step with torch's operators whatever its size: kernel launches, Python,
            layers that do not fill the device.
        link: bytes/s that a rank sends inside a node.
        latency_s: seconds for a hop of a collective inside a node.
        node_link: bytes/s that a node sends, all its devices together.
        node_latency_s: seconds for a hop between nodes.
        decode: JPEG images/s of 256 × 256 pixels that a CPU core, or a GPU's hardware decoder,
            decodes.
        cores: host cores per device.
        capacity: bytes of a device's memory; 0 if not known.
        overlap: whether gradients' all-reduces overlap the backward, and decoding everything.
        source: where the figures come from.
        decode_by_cuda: JPEG images/s of 256 × 256 pixels on a GPU's CUDA cores.
        fused: whether steps use fused kernels, unless train.execution is eager.
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
    decode_by_cuda: float = 0.0
    fused: bool = False


# Decoders: an H200 decoded 49,000 images/s of 224 × 224 pixels with its seven JPEG engines and
# 19,000 on CUDA cores (docs/scaling.md); other GPUs are scaled by their data sheets.
_PIXELS = (224 / 256) ** 2
_ENGINE, _BY_CUDA, _H200_FP32 = 49_000 * _PIXELS / 7, 19_000 * _PIXELS, 67e12
_LINK = 0.8  # share of the data sheet's figure for one direction that is reached
# LRN by torch's operators: 32 copies on an H100 in `bench lrn`; that benchmark is no more.
_LRN, _LRN_THEN = 64.0, 8.0
_PCIE4 = _LINK * 32e9


def _card(
    name: str, *, bf16: float, fp32: float, memory: float, capacity: float, link: float, nic: float,
    cores: float, source: str, engines: int = 0, step_s: float = 3.5e-3, fp16: float = 0.0,
) -> Machine:  # fmt: skip
    """Return a GPU that can run the fused kernels, one of eight in a node.

    Args:
        bf16, fp32: peak FLOP/s; bf16 is 0 if it has none, nor TF32.
        fp16: its peak if that is not bf16's.
        nic: bytes/s of a GPU's share of the network.
        engines: number of hardware JPEG decoders.
    """
    narrow = {"bf16": bf16, "fp16": bf16, "tf32": bf16 / 2} if bf16 else {"fp16": fp16}
    return Machine(
        name, peak=narrow | {"fp32": fp32}, reached=0.26, memory=memory, step_s=step_s,
        link=link, latency_s=3e-6, node_link=_LINK * 8 * nic, node_latency_s=6e-6, source=source,
        decode=engines * _ENGINE, decode_by_cuda=_BY_CUDA * fp32 / _H200_FP32, cores=cores,
        capacity=capacity, lrn_passes=_LRN, fused=True,
    )  # fmt: skip


MACHINES = {
    "b200": _card(
        "B200 180 GB", bf16=PEAK_FLOPS["B200"], fp32=75e12, memory=8e12, capacity=180e9,
        link=_LINK * 900e9, nic=50e9, cores=14.0, engines=7,
        source="data sheet, not run; a DGX B200's NVLink 5, 8 × 400 Gb/s and 112 cores",
    ),
    "h200": _card(
        "H200 SXM 141 GB", bf16=PEAK_FLOPS["H200"], fp32=_H200_FP32, memory=4.8e12, capacity=141e9,
        link=_LINK * 450e9, nic=50e9, cores=16.0, engines=7,
        source="its links were not measured but are a DGX H200's NVLink 4 and 8 × 400 Gb/s; how "
        "much of its data sheet it reaches, and its decoders, were measured on one",
    ),
    "h100": _card(
        "H100 SXM 80 GB", bf16=PEAK_FLOPS["H100"], fp32=67e12, memory=3.35e12, capacity=80e9,
        link=_LINK * 450e9, nic=50e9, cores=14.0, engines=7,
        source="data sheet, not run; a DGX H100's NVLink 4, 8 × 400 Gb/s and 112 cores",
    ),
    "a100": _card(
        "A100 SXM 80 GB", bf16=PEAK_FLOPS["A100"], fp32=19.5e12, memory=2.04e12, capacity=80e9,
        link=_LINK * 300e9, nic=25e9, cores=16.0, engines=5, step_s=1e-3,
        source="data sheet, not run; a DGX A100's NVLink 3, 8 × 200 Gb/s and 128 cores; one "
        "reached 16,487 images/s with torch's operators, as published",
    ),
    "l40s": _card(
        "L40S 48 GB", bf16=PEAK_FLOPS["L40S"], fp32=91.6e12, memory=864e9, capacity=48e9,
        link=_PCIE4, nic=25e9, cores=8.0,
        source="data sheet, not run; PCIe 4; a host of 64 cores and 8 × 200 Gb/s is assumed; "
        "its JPEG engines are not known",
    ),
    "a10": _card(
        "A10 24 GB", bf16=PEAK_FLOPS["A10"], fp32=31.2e12, memory=600e9, capacity=24e9,
        link=_PCIE4, nic=12.5e9, cores=8.0,
        source="data sheet, not run; PCIe 4; a host of 64 cores and 8 × 100 Gb/s is assumed",
    ),
    "t4": _card(
        "T4 16 GB", bf16=0.0, fp16=65e12, fp32=8.1e12, memory=300e9, capacity=16e9,
        link=_LINK * 16e9, nic=12.5e9, cores=8.0,
        source="data sheet, not run; it has neither bf16 nor TF32; PCIe 3; a host of 64 cores and "
        "8 × 100 Gb/s is assumed",
    ),
    "rtx4090": _card(
        "RTX 4090 24 GB", bf16=PEAK_FLOPS["4090"], fp32=82.6e12, memory=1.008e12, capacity=24e9,
        link=_PCIE4, nic=12.5e9, cores=8.0,
        source="data sheet, not run; PCIe 4; a host of 64 cores and 8 × 100 Gb/s is assumed",
    ),
    "v100": Machine(
        "V100 SXM2 16 GB", peak={"fp16": 125e12, "fp32": 15.7e12}, reached=0.378, memory=0.9e12,
        step_s=1e-3, link=_LINK * 150e9, latency_s=3e-6, node_link=_LINK * 7e9,
        node_latency_s=6e-6, cores=5.0, capacity=16e9, lrn_passes=_LRN,
        decode_by_cuda=_BY_CUDA * 15.7e12 / _H200_FP32,
        source="data sheet, not run; it has no bf16; "
        "NVLink 2, and between nodes the 56 Gb/s of the published 512; one reached 9,319 "
        "images/s, as published; 40 cores for 8; no fused kernels",
    ),
    "k20": Machine(
        "K20", peak={"fp32": 3.52e12}, reached=0.40, memory=208e9, step_s=1e-3, link=6e9,
        latency_s=2e-5, node_link=12e9, node_latency_s=5e-5, cores=2.0, capacity=5e9,
        lrn_passes=_LRN_THEN,
        source="data sheet; as in Krizhevsky 2014: PCIe 2 at 6 GB/s between the 4 of a socket "
        "(here, a node), half of it between sockets; reached: his 98 hours on one",
    ),
    "gtx580": Machine(
        "GTX 580 3 GB", peak={"fp32": 1.58e12}, reached=0.33, memory=192e9, step_s=1e-3, link=5e9,
        latency_s=2e-5, node_link=0.5e9, node_latency_s=5e-5, cores=2.0, capacity=3e9,
        lrn_passes=_LRN_THEN,
        source="data sheet; PCIe 2 at 5 GB/s; reached: the paper's 5 to 6 days on two",
    ),
    "cpu": Machine(
        "a core of an Intel Xeon with AMX", peak={"bf16": 5.0e11, "fp32": 1.5e11}, reached=1.0,
        memory=2.56e10, step_s=0.0456, link=1.17e9, latency_s=8.2e-4, node_link=1.25e9,
        node_latency_s=1e-3, decode=CORE_DECODES, serial=0.015, zero_s=0.154, overlap=False,
        source="fitted to 30 steps of bench layouts on two cores; fp32 by bench step's ratio; "
        "between nodes 10 Gb/s",
    ),
    "cpu-avx512": Machine(
        "a core of an AMD EPYC with AVX-512 and no AMX", peak={"bf16": 2.19e11, "fp32": 1.12e11},
        reached=1.0, memory=9.6e9, step_s=0.0, link=2.94e9, latency_s=3.3e-4, node_link=1.25e9,
        node_latency_s=1e-3, decode=CORE_DECODES, zero_s=0.062, overlap=False,
        source="fitted to 30 steps of bench layouts on two cores; fp32 by bench step's ratio; "
        "between nodes 10 Gb/s",
    ),
    "cpu-avx2": Machine(
        "a core of an AMD EPYC without AVX-512", peak={"bf16": 7.66e10, "fp32": 7.9e10},
        reached=1.0, memory=8.9e9, step_s=0.0, link=1.16e9, latency_s=1.77e-4, node_link=1.25e9,
        node_latency_s=1e-3, decode=CORE_DECODES, overlap=False,
        source="fitted to 30 steps of bench layouts on two cores; fp32 by the demo's images/s; "
        "between nodes 10 Gb/s",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Nodes with the same number of devices each."""

    machine: Machine
    devices: int
    nodes: int = 1

    @classmethod
    def of(cls, text: str, machine: Machine | None = None) -> "Cluster":
        """Parse h100:8x4 (4 nodes of 8), h100 (one device) or 8xH100; raises ConfigError."""
        name = re.sub(r"[\s_]|(?<=rtx)-", "", text.lower())
        if count_first := re.fullmatch(r"(\d+)x(.+)", name):
            name = f"{count_first[2]}:{count_first[1]}"
        kind, _, size = name.partition(":")
        kind = kind.removeprefix("nvidia").replace("geforce", "")
        devices, by, nodes = (size or "1").partition("x")
        numbers = [int(n) if n.isdecimal() else 0 for n in (devices, nodes if by else "1")]
        kind = kind if kind in MACHINES else f"rtx{kind}"
        if kind not in MACHINES or min(numbers) < 1:
            raise ConfigError(
                f"--gpus {text}: must be KIND, KIND:DEVICES, DEVICESxKIND or KIND:DEVICESxNODES, "
                f"as in h100:8x4, with one of the kinds {', '.join(MACHINES)}"
            )
        return cls(machine or MACHINES[kind], *numbers)

    @property
    def total(self) -> int:
        """All devices of all nodes."""
        return self.devices * self.nodes


def kind_of(device: str) -> str | None:
    """Return the name in MACHINES of a GPU by torch's name for it, as NVIDIA H100 80GB HBM3."""
    name = device.lower().replace("rtx ", "rtx")
    gpus = (kind for kind, machine in MACHINES.items() if machine.overlap)  # many CPUs say CPU
    return next((kind for kind in gpus if re.search(rf"\b{kind}\b", name)), None)


def known(device: str) -> Machine | None:
    """Return the machine of a GPU by torch's name for it; None if it is not known."""
    return MACHINES.get(kind_of(device) or "")


_DIVISORS = ("peak", "reached", "memory", "link", "node_link", "cores")  # of the cost model


def read_machine(path: Path) -> Machine:
    """Read a machine that `write_machine` wrote; raises ConfigError."""
    try:
        found = json_object(read_bytes(path))
        for name, like in dataclasses.asdict(MACHINES["cpu"]).items():
            if not _as(like, found.get(name, like), name in _DIVISORS):
                raise TypeError(f"{name} is {found[name]!r}")
        return Machine(**found)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--machine {path}: is not a machine that plan --fit wrote: {error}"
        ) from error


def _as(like: object, value: object, divides: bool) -> bool:
    """Whether a value is of the same JSON type as another, and a number is at least 0, or above it
    if it divides."""
    if isinstance(like, dict):
        return isinstance(value, dict) and all(_as(0.0, one, divides) for one in value.values())
    if isinstance(like, (bool, str)):
        return type(value) is type(like)
    if not isinstance(value, (int, float)) or not value < math.inf:
        return False
    return value > 0 if divides else value >= 0


def write_machine(machine: Machine, path: Path) -> None:
    """Write a machine as JSON; raises ConfigError."""
    try:
        write(path, (json.dumps(dataclasses.asdict(machine), indent=1) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"--machine {path}: cannot be written: {error.strerror}") from error
