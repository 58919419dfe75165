"""What `plan` finds out about a run: types, whose fields are the keys of its JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Passes:
    """The work of a rank's step on a GPU besides convolutions and matrix products.

    Attributes:
        maps: bytes read and written of maps and units.
        parameters: bytes read and written by the update and by the gradient norm.
        kernels: number of kernels launched in all, convolutions and products included.
    """

    maps: int
    parameters: int
    kernels: int


@dataclass(frozen=True)
class Rank:
    """What a step in one layout requires of a rank.

    Attributes:
        batch_per_replica: samples in a replica's share of the batch.
        parameters: number of parameters that this rank holds.
        memory: bytes at the peak by part, and "peak", their sum.
        bytes: bytes sent by collective, and "total".
        calls: number of calls by collective.
        execution: how a GPU executes the step: graph, fused or eager; eager on a CPU.
        passes: memory traffic of fused kernels; None if it was not counted.
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
    """Why a layout cannot have a number of ranks, and which layouts can."""

    problem: str


@dataclass(frozen=True)
class Plan:
    """A config on a number of ranks.

    Attributes:
        recipe: every key of the config with its value.
        layout: the config's own layout.
        batch: the global batch.
        parameters, forward_flops_per_image: by layer.
        map_values_per_image: values in the maps of all layers, and of those that are normalised.
        layouts: by kind, the config's own among them; `one` is the whole batch on one device,
            however many ranks the others have.
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

    def of(self, kind: str) -> Rank:
        """Return a layout that fits."""
        rank = self.layouts[kind]
        assert isinstance(rank, Rank), kind
        return rank

    def ranks_of(self, kind: str) -> int:
        """Return the number of ranks that a layout uses."""
        return 1 if kind == "one" else self.ranks


@dataclass(frozen=True)
class Prediction:
    """A layout's predicted step on a machine.

    Attributes:
        images_per_s: throughput of training, decoding included.
        training_images_per_s: throughput if decoding took no time.
        parts_s: seconds of the step by part, and of decoding.
        bottleneck: the largest part.
        basis: where the step's time comes from.
        hours: time for all epochs.
        too_large: memory needed and available, as text, if a device has too little; else empty.
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
