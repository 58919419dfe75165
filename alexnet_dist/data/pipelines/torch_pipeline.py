"""The torchvision pipeline: decode and cut in threads.

Each thread's share of a batch is one call of TorchScript's interpreter, which holds no lock: image
by image, a thread that wants Python's lock again waits for it each time.
"""

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Decoded, Metadata, Samples, to_device
from alexnet_dist.data.dataset import Encoded, IdArray, Split, undecodable
from alexnet_dist.data.preprocess import Canvases, Preprocess
from alexnet_dist.errors import MachineError, filled_by

_Decode = Callable[[list[Tensor], list[list[int]], Tensor], None]


class TorchPipeline:
    """A `Pipeline` on torchvision's decoders, which release the GIL.

    Args:
        threads: that decode.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        device: torch.device,
        preprocess: Preprocess,
        threads: int,
    ) -> None:
        self.split, self.device, self.preprocess, self.threads = split, device, preprocess, threads
        self.canvas, self.crop = config.data.canvas, config.model.crop
        self.prefetch = config.data.prefetch
        self.decoder = Decoder(split, self.canvas)
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
            metadata = Metadata.pack(samples, read, self.split)
            yield Decoded(
                to_device(patches, self.device), to_device(metadata, self.device), self.preprocess
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

        def decode(start: int) -> None:
            share = slice(start, n, self.threads)
            read[share], encoded = self.split.read_whole(samples.ids[share])
            self.decoder(read[share], encoded, origins[share], patches[share])

        parts = [self._pool.submit(decode, start) for start in range(min(n, self.threads))]
        return samples, read, patches, parts


class Decoder:
    """Decodes samples of a split and cuts a square of each one's canvas."""

    def __init__(self, split: Split, canvas: int) -> None:
        self.split, self.canvases = split, Canvases(split.index, canvas)
        self._decode = _released()  # now: Python 3.11 parses in one thread at a time

    def __call__(
        self, samples: IdArray, encoded: list[Encoded], origins: IdArray, out: Tensor
    ) -> None:
        """In one call that does not hold Python's lock, if all goes well.

        Args:
            encoded: of each sample.
            origins: (n, 2), top and left of each square in its canvas, pixels.
            out: (n, side, side, 3) uint8.

        Raises DatasetError, which names it, where an image cannot be decoded.
        """
        where = self.canvases(samples)  # (n, 4, 2)
        where[:, 3] += origins
        places, buffers = where.reshape(-1, 8).tolist(), [*map(torch.from_numpy, encoded)]
        try:
            self._decode(buffers, places, out)
        except RuntimeError:  # of which sample?
            for n, sample in enumerate(samples.tolist()):
                try:
                    with filled_by(f"sample {sample} of {self.split.shards[0].parent}"):
                        _decode(buffers[n : n + 1], places[n : n + 1], out[n : n + 1])
                except MachineError:
                    raise
                except RuntimeError as error:
                    raise undecodable(self.split, [sample], error) from error


def _decode(
    encoded: list[Tensor], places: list[list[int]], out: Tensor,
    mode: int = ImageReadMode.UNCHANGED.value,
) -> None:  # fmt: skip
    """`Decoder`, in the Python that TorchScript knows.

    Args:
        places: of each image, top and left, height and width of what is resized, height and width
            that it is resized to, top and left of the square in that.
    """
    # Copied in parts so small that torch starts no threads of its own for them.
    side = out.size(1)
    rows = max(1, 32_767 // (3 * side))
    for n in range(len(encoded)):
        image = torch.ops.image.decode_image(encoded[n], mode)  # (1 or 3, h, w)
        top, left, height, width, resized_h, resized_w, first, before = places[n]
        image = image[:, top : top + height, left : left + width]
        if height != resized_h or width != resized_w:
            size = [resized_h, resized_w]
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        image = image[:, first : first + side, before : before + side].permute(1, 2, 0)
        for row in range(0, side, rows):
            out[n, row : row + rows].copy_(image[row : row + rows])  # grey fills all three


@functools.cache
def _released() -> _Decode:
    """`_decode` by TorchScript; as it is where there is none, and the threads wait for the lock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and nothing is in its place
        try:
            script: _Decode = torch.jit.script(_decode)
        except (AttributeError, OSError, RuntimeError):
            return _decode
    return script
