"""The contract between sampler, pipelines and training loop: `Samples`, `Decoded`, `Batch`.

The sampler draws `Samples`. A pipeline decodes them and returns `Decoded`, which holds bytes on the
rank's device; it does nothing else. Column ranks exchange these bytes, and a GPU is sent them: half
the size of bf16, an eighth of float64's. The training step begins by making the `Batch` of windows
from them (`Preprocess`), in the same way for every pipeline, and in its CUDA graph if it has one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.config.schema import Config
from alexnet_dist.data.split import Ints, Split
from alexnet_dist.parallel.columns import gather_rows
from alexnet_dist.timing import TIMELINE

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """n samples and their random draws, with v windows each.

    Attributes:
        ids: (n,) int64, places in the split's index.
        corners: (n, v, 2) int64, top and left pixel of each window on the canvas.
        flips: (n, v) bool, whether the window is mirrored left to right.
        lighting: (n, 3) float32, added to every pixel's red, green and blue, grey levels.
    """

    ids: Ints
    corners: Ints
    flips: npt.NDArray[np.bool_]
    lighting: npt.NDArray[np.float32]

    def patch(self, crop: int, canvas: int) -> tuple[Ints, int]:
        """Return the part of each canvas to decode: top and left (n, 2), and its side, pixels.

        With one window it is the window; with several it is the canvas, so that an image is decoded
        only once.
        """
        if self.flips.shape[1] == 1:
            return self.corners[:, 0], crop
        return np.zeros_like(self.corners[:, 0]), canvas


@dataclass(frozen=True)
class Batch:
    """n samples of v windows each, on the rank's device, ready for conv1.

    Attributes:
        windows: (n · v, 3, crop, crop), channels_last, in the dtype conv1 computes in: the mean
            subtracted, lighting added, scaled.
        labels: (n,) int64.
        ids: (n,) int64, places in the split's index.
        lighting: (n, 3) float32, what was added to red, green and blue, grey levels.
        damaged: (n,) bool, whether the sample was damaged and another was read in its place.
    """

    windows: Tensor
    labels: Tensor
    ids: Tensor
    lighting: Tensor
    damaged: Tensor

    def batch(self) -> "Batch":
        """As `StepInput`."""
        return self

    def changing(self) -> dict[str, Tensor]:
        """As `StepInput`."""
        return dict(vars(self))


class StepInput(Protocol):
    """What a training step is given, on the rank's device: `Decoded`, or a `Batch` that is ready.

    Must be a dataclass, since a captured step replaces its fields.
    """

    def batch(self) -> Batch:
        """Return the batch that the network is trained on; does not synchronise the host."""

    def changing(self) -> dict[str, Tensor]:
        """Return the fields whose tensors differ from step to step."""


@dataclass(frozen=True)
class Metadata:
    """What belongs to the patches of n samples of v windows each. `pack` makes one tensor of it, so
    that a column rank sends it as one message, and it is copied to the device at once.

    Attributes:
        labels: (n,) int64.
        ids: (n,) int64, places in the split's index.
        damaged: (n,) bool, whether the sample was damaged and another was read in its place.
        lighting: (n, 3) float64, added to red, green and blue, grey levels.
        corners: (n, v, 2) int64, top and left pixel of each window on the canvas.
        flips: (n, v) bool, whether the window is mirrored left to right.
    """

    labels: Tensor
    ids: Tensor
    damaged: Tensor
    lighting: Tensor
    corners: Tensor
    flips: Tensor

    @staticmethod
    def width(windows: int) -> int:
        """Return how many numbers `pack` makes of a sample of so many windows."""
        return 6 + 3 * windows

    @staticmethod
    def pack(samples: Samples, read: Ints, split: Split) -> Tensor:
        """Return the metadata of samples as (n, width) float64.

        Args:
            read: (n,), the sample that was read for each: another one if it was damaged.
        """
        windows = np.concatenate([samples.corners, samples.flips[..., None]], axis=2)  # (n, v, 3)
        flat = windows.reshape(len(read), 3 * windows.shape[1])
        of_each = split.labels(read), read, read != samples.ids  # (n,)
        return torch.from_numpy(np.column_stack([*of_each, samples.lighting, flat]))

    @classmethod
    def unpack(cls, packed: Tensor) -> "Metadata":
        """Return what `pack` packed."""
        labels, ids, damaged = packed[:, :3].long().unbind(1)
        windows = packed[:, 6:].long().unflatten(1, (-1, 3))  # (n, v, 3)
        corners, flips = windows[..., :2], windows[..., 2].bool()
        return cls(labels, ids, damaged.bool(), packed[:, 3:6], corners, flips)


# (patches, corners, flips, lighting, places) to windows, as `Preprocess` does.
Preprocessor = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Decoded:
    """n samples as a pipeline returns them: bytes, and what their windows are made with.

    Attributes:
        patches: (n, side, side, 3) uint8, the part of each canvas that `Samples.patch` names; if
            `resident`, the canvases of the whole split.
        metadata: packed by `Metadata.pack`.
        preprocess: a `Preprocess`, which turns patches, corners, flips and lighting into windows.
        resident: whether the patches stay on the device from step to step, on every rank.
    """

    patches: Tensor
    metadata: Tensor
    preprocess: Preprocessor
    resident: bool = False

    def joined(self, counts: Sequence[int], group: dist.ProcessGroup | None) -> "Decoded":
        """Join the parts that a replica's column ranks decoded into all its samples. Collective.

        Args:
            counts: number of samples of each column rank, in order.
            group: the replica's column ranks; None where this rank decoded all of them.
        """
        if group is None:
            return self
        patches = self.patches if self.resident else gather_rows(self.patches, counts, group)
        return replace(self, patches=patches, metadata=gather_rows(self.metadata, counts, group))

    def batch(self) -> Batch:
        """As `StepInput`: cut and preprocess the windows."""
        meta = Metadata.unpack(self.metadata)
        places = meta.ids if self.resident else None
        with TIMELINE.span("windows"):
            windows = self.preprocess(self.patches, meta.corners, meta.flips, meta.lighting, places)
        return Batch(windows, meta.labels, meta.ids, meta.lighting.float(), meta.damaged)

    def changing(self) -> dict[str, Tensor]:
        """As `StepInput`."""
        patches = {} if self.resident else {"patches": self.patches}
        return {**patches, "metadata": self.metadata}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Start a copy to the device, through pinned memory so that the host does not wait for it."""
    with TIMELINE.span("to_device"):
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # a no-op where it is pinned already
        return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a copy to the host; the function returned waits for this copy alone, not for later work
    on the device, and returns the copy."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Tensor:
        copied.synchronize()
        return host

    return read


class Pipeline:
    """Decodes samples of one split and cuts their patches, with no random choices of its own.

    A subclass implements `batches`: it reads by `Split.read_batch`, decodes, makes the canvas as
    `on_canvas` does (preprocess.py), cuts the part that `Samples.patch` names, and yields what
    `decoded` returns.

    Attributes:
        pool: threads that work ahead.
        prefetch: number of batches prepared ahead.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, preprocess: Preprocessor,
        pool: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        self.split, self.device, self.preprocess, self.pool = split, device, preprocess, pool
        self.canvas, self.crop = config.data.canvas, config.model.crop
        self.prefetch = config.data.prefetch

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        """Yield the decoded samples of each entry of the plan, in order, prepared ahead."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the pipeline's threads; batches not yet taken are lost."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.split.close()

    def decoded(
        self, samples: Samples, read: Ints, patches: Tensor, resident: bool = False
    ) -> Decoded:
        """Return samples with their patches, which are on the device.

        Args:
            read: as in `Metadata.pack`.
            patches, resident: as in `Decoded`.
        """
        metadata = to_device(Metadata.pack(samples, read, self.split), self.device)
        return Decoded(patches, metadata, self.preprocess, resident)


def started_ahead(entries: Iterable[S], start: Callable[[S], T], count: int) -> Iterator[T]:
    """Yield `start(entry)` for each entry, in order; each is started `count` entries ahead."""
    ahead = deque[T]()
    for entry in entries:
        ahead.append(start(entry))
        if len(ahead) > count:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()
