"""What `plan` found of a run; its JSON is these fields by name."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Passes:
    """What a rank's step on a GPU does besides convolutions and products.

    Attributes:
        maps: bytes read and written over maps and units.
        parameters: bytes read and written by the update and the norm of the gradient.
        kernels: how many are launched in all, convolutions and products among them.
    """

    maps: int
    parameters: int
    kernels: int


@dataclass(frozen=True)
class Rank:
    """What one layout asks of a rank, a step.

    Attributes:
        batch_per_replica: samples.
        parameters: of this rank.
        memory: bytes by part at the peak, and `peak`, their sum.
        bytes: sent, by collective, and `total`.
        calls: by collective.
        execution: how a GPU is given the step: graph, fused or eager; on a CPU eager.
        passes: of fused kernels; None where they were not counted.
    """

    batch_per_replica: int
    parameters: int
    memory: Mapping[str, int]
    bytes: Mapping[str, int]
    calls: Mapping[str, int]
    execution: str = "eager"
    passes: Passes | None = None


@dataclass(frozen=True)
class Misfit:
    """Why a layout does not lie on so many ranks, and what would."""

    problem: str


@dataclass(frozen=True)
class Plan:
    """A config on a number of ranks.

    Attributes:
        recipe: every key of the config.
        layout: the config's own.
        batch: of all replicas.
        parameters, forward_flops_per_image: by layer.
        map_values_per_image: of all layers, and of those that are normalised.
        layouts: by kind, the config's own among them.
        alone: all of the batch on one device.
    """

    recipe: Mapping[str, Any]
    layout: str
    ranks: int
    batch: int
    parameters: Mapping[str, int]
    forward_flops_per_image: Mapping[str, int]
    training_flops_per_image: int
    map_values_per_image: Mapping[str, int]
    layouts: Mapping[str, Rank | Misfit]
    alone: Rank

    def of(self, kind: str) -> Rank:
        """A layout that fits, or `alone`."""
        found = self.alone if kind == "alone" else self.layouts[kind]
        assert isinstance(found, Rank), kind
        return found

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Prediction:
    """A layout's step on a machine.

    Attributes:
        images_per_s: of training with its images decoded.
        training_images_per_s: without decoding.
        parts_s: seconds of the step, and of decoding.
        bottleneck: the largest part.
        basis: what the step's time is from.
        hours: of all epochs.
        too_large: what it needs of a device's memory, where that is more than there is.
    """

    ranks: int
    images_per_s: float
    training_images_per_s: float
    step_s: float
    parts_s: Mapping[str, float]
    bottleneck: str
    basis: str
    hours: float = 0.0
    too_large: str = ""

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return found if self.too_large else {k: v for k, v in found.items() if k != "too_large"}
