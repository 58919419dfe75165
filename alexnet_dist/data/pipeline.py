"""What a pipeline is given and what it gives: the contract between sampler, decoders and loop."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.columns import gather_rows


@dataclass(frozen=True)
class Samples:
    """Which samples, and what was drawn for them. n samples of v windows each.

    Attributes:
        ids: (n,) int64, places in the split's index.
        corners: (n, v, 2) int64, top and left of each window in the canvas, pixels.
        flips: (n, v) bool, mirror the window left to right.
        lighting: (n, 3) float32, added to every red, green and blue of the image, grey levels.
    """

    ids: npt.NDArray[np.int64]
    corners: npt.NDArray[np.int64]
    flips: npt.NDArray[np.bool_]
    lighting: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """n samples of v windows each, on the rank's device.

    Attributes:
        windows: (n · v, 3, crop, crop), as conv1 takes them: channels_last, the mean off, lit,
            scaled, in the dtype conv1 computes in.
        labels: (n,) int64.
        ids: (n,) int64, places in the split's index.
        lighting: (n, 3) float32, what was added to red, green and blue, grey levels.
    """

    windows: Tensor
    labels: Tensor
    ids: Tensor
    lighting: Tensor

    def joined(
        self, counts: Sequence[int], group: dist.ProcessGroup | None, views: int = 1
    ) -> "Batch":
        """The batch of a replica from the parts its column ranks decoded. Collective.

        Args:
            counts: samples of each column rank, in order.
        """
        if group is None:
            return self

        windows = [count * views for count in counts]
        return Batch(
            windows=gather_rows(self.windows.movedim(1, -1), windows, group).movedim(-1, 1),
            labels=gather_rows(self.labels, counts, group),
            ids=gather_rows(self.ids, counts, group),
            lighting=gather_rows(self.lighting, counts, group),
        )


class Pipeline(Protocol):
    """Decodes samples of one split and applies what was drawn; decides nothing itself."""

    def batches(self, plan: Iterable[Samples]) -> Iterator[Batch]:
        """A batch for each entry of the plan, in its order, prepared ahead."""

    def close(self) -> None:
        """Stop its threads; batches not yet taken are lost."""
