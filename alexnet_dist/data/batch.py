"""What a pipeline is given and what it gives: the contract between sampler, decoders and loop.

A pipeline decodes and cuts; nothing else is its business. What it gives are bytes, on the rank's
device: they are what column ranks exchange, and what crosses to a GPU, an eighth of float64 and a
half of bf16. What is done to them after that, `Preprocess` does, once for every pipeline.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.data.dataset import IdArray, Split
from alexnet_dist.parallel.columns import gather_rows
from alexnet_dist.timing import TIMELINE


@dataclass(frozen=True)
class Samples:
    """Which samples, and what was drawn for them. n samples of v windows each.

    Attributes:
        ids: (n,) int64, places in the split's index.
        corners: (n, v, 2) int64, top and left of each window in the canvas, pixels.
        flips: (n, v) bool, mirror the window left to right.
        lighting: (n, 3) float32, added to every red, green and blue of the image, grey levels.
    """

    ids: IdArray
    corners: npt.NDArray[np.int64]
    flips: npt.NDArray[np.bool_]
    lighting: npt.NDArray[np.float32]

    def patch(self, crop: int, canvas: int) -> tuple[IdArray, int]:
        """The part of each canvas to decode: (n, 2) top and left, and its side, pixels.

        Of one window the window, of several the canvas, so that an image is decoded once.
        """
        if self.flips.shape[1] == 1:
            return self.corners[:, 0], crop
        return np.zeros_like(self.corners[:, 0]), canvas


@dataclass(frozen=True)
class Batch:
    """n samples of v windows each, on the rank's device.

    Attributes:
        windows: (n · v, 3, crop, crop), as conv1 takes them: channels_last, the mean off, lit,
            scaled, in the dtype conv1 computes in.
        labels: (n,) int64.
        ids: (n,) int64, places in the split's index.
        lighting: (n, 3) float32, what was added to red, green and blue, grey levels.
        damaged: (n,) bool, where the sample asked for was damaged and another stands in for it.
    """

    windows: Tensor
    labels: Tensor
    ids: Tensor
    lighting: Tensor
    damaged: Tensor


@dataclass(frozen=True)
class Metadata:
    """What goes with the patches of n samples of v windows each. `pack` makes one tensor of it, so
    that one message of each column rank, or one copy to the device, carries all.

    Attributes:
        labels: (n,) int64.
        ids: (n,) int64, places in the split's index.
        damaged: (n,) bool, where the sample asked for was damaged and another stands in for it.
        lighting: (n, 3) float64, added to red, green and blue, grey levels.
        corners: (n, v, 2) int64, top and left of each window in the canvas, pixels.
        flips: (n, v) bool, mirror the window left to right.
    """

    labels: Tensor
    ids: Tensor
    damaged: Tensor
    lighting: Tensor
    corners: Tensor
    flips: Tensor

    @staticmethod
    def pack(samples: Samples, read: IdArray, split: Split) -> Tensor:
        """(n, 6 + 3 · v) float64, of samples of which those in `read` were read."""
        windows = np.concatenate([samples.corners, samples.flips[..., None]], axis=2)
        numbers = [split.labels(read), read, read != samples.ids]
        columns = [
            np.stack(numbers, axis=1),
            samples.lighting,
            windows.reshape(len(read), 3 * windows.shape[1]),
        ]
        return torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float64))

    @classmethod
    def unpack(cls, packed: Tensor) -> "Metadata":
        labels, ids, damaged = packed[:, :3].long().unbind(1)
        windows = packed[:, 6:].long().unflatten(1, (-1, 3))  # (n, v, 3)
        corners, flips = windows[..., :2], windows[..., 2].bool()
        return cls(labels, ids, damaged.bool(), packed[:, 3:6], corners, flips)


@dataclass(frozen=True)
class Decoded:
    """What a pipeline gives of n samples: bytes, and what is to be done with them.

    Attributes:
        patches: (n, side, side, 3) uint8, what `Samples.patch` says of each canvas.
        metadata: what `Metadata.pack` gives.
        preprocess: makes windows of patches, corners, flips and lighting: a `Preprocess`.
    """

    patches: Tensor
    metadata: Tensor
    preprocess: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def joined(self, counts: Sequence[int], group: dist.ProcessGroup | None) -> Batch:
        """The batch of a replica from the parts its column ranks decoded. Collective.

        Args:
            counts: samples of each column rank, in order.
        """
        patches, packed = self.patches, self.metadata
        if group is not None:
            patches = gather_rows(patches, counts, group)
            packed = gather_rows(packed, counts, group)
        its = Metadata.unpack(packed)
        with TIMELINE.span("windows"):
            windows = self.preprocess(patches, its.corners, its.flips, its.lighting)
        return Batch(windows, its.labels, its.ids, its.lighting.float(), its.damaged)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Begin a copy to the device: from pinned memory, it waits for nothing."""
    with TIMELINE.span("to_device"):
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # itself where it is pinned
        return tensor.to(device, non_blocking=True)


class Pipeline(Protocol):
    """Decodes samples of one split and cuts what was drawn; decides nothing itself."""

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        """What is decoded for each entry of the plan, in its order, prepared ahead."""

    def close(self) -> None:
        """Stop its threads; batches not yet taken are lost."""
