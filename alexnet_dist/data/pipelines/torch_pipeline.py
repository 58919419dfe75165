"""The torchvision pipeline: decode and cut in threads."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import (
    Decoded,
    IdArray,
    Samples,
    facts_of,
    to_device,
)
from alexnet_dist.data.dataset import Split, undecodable
from alexnet_dist.data.preprocess import Finish, on_canvas
from alexnet_dist.errors import filled_by


class TorchPipeline:
    """A `Pipeline` on torchvision's decoders, which release the GIL.

    Args:
        threads: that decode.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, finish: Finish, threads: int
    ) -> None:
        self.split, self.device, self.finish, self.threads = split, device, finish, threads
        self.canvas, self.crop = config.data.canvas, config.model.crop
        self.prefetch = config.data.prefetch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        ahead: deque[tuple[Samples, IdArray, Tensor, list[Future[None]]]] = deque()
        plan = iter(plan)
        while True:
            while len(ahead) <= self.prefetch and (samples := next(plan, None)) is not None:
                ahead.append(self._begin(samples))
            if not ahead:
                return
            samples, read, patches, parts = ahead.popleft()
            for part in parts:
                part.result()
            facts = facts_of(samples, read, self.split)
            yield Decoded(
                to_device(patches, self.device), to_device(facts, self.device), self.finish
            )

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.split.close()

    def _begin(self, samples: Samples) -> tuple[Samples, IdArray, Tensor, list[Future[None]]]:
        """Start decoding; ids read and patches will be whole when every future is done."""
        origins, side = samples.patch(self.crop, self.canvas)
        n = len(samples.ids)
        read = np.empty_like(samples.ids)
        pinned = self.device.type == "cuda"
        patches = torch.empty((n, side, side, 3), dtype=torch.uint8, pin_memory=pinned)
        filled = patches.numpy()

        def decode(places: range) -> None:
            for place in places:
                read[place], encoded = self.split.read_whole(int(samples.ids[place]))
                image = decoded(self.split, int(read[place]), encoded, self.canvas)
                top, left = origins[place].tolist()
                fill(filled[place], image[:, top : top + side, left : left + side])

        starts = range(min(n, self.threads))
        parts = [self._pool.submit(decode, range(start, n, self.threads)) for start in starts]
        return samples, read, patches, parts


def decoded(split: Split, sample: int, encoded: bytearray, canvas: int) -> Tensor:
    """A sample's image on the canvas: (1 or 3, canvas, canvas) uint8."""
    try:
        bytes_of_it = torch.frombuffer(encoded, dtype=torch.uint8)
        image = decode_image(bytes_of_it, ImageReadMode.UNCHANGED)
    except RuntimeError as error:
        raise undecodable(split, [sample], error) from error
    with filled_by(f"sample {sample} of {split.shards[0].parent}"):
        return on_canvas(image, canvas)


def fill(into: npt.NDArray[np.uint8], image: Tensor) -> None:
    """Copy an image of 1 or 3 colours (first) into one of 3 (last)."""
    colours = image.numpy()
    for colour in range(3):  # one after another: twice as fast; grey fills all three
        into[..., colour] = colours[colour % len(colours)]
