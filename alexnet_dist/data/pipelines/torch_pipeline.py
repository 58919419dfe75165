"""The torchvision pipeline: decode and cut in threads.

Each thread decodes its share of a batch in one call of TorchScript's interpreter, which does not
hold the GIL. Decoding image by image from Python, threads would wait for the GIL after each image.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import (
    Decoded,
    Pipeline,
    Preprocessor,
    Samples,
    started_ahead,
    to_device,
)
from alexnet_dist.data.codecs import UNCHANGED, operators
from alexnet_dist.data.preprocess import Canvases
from alexnet_dist.data.split import Encoded, Ints, Split, undecodable
from alexnet_dist.errors import MachineError, filled_by

_Decode = Callable[[list[Tensor], list[list[int]], Tensor], None]
_Started = tuple[Samples, Ints, Tensor, list[Future[None]]]


class TorchPipeline(Pipeline):
    """A `Pipeline` that decodes with torchvision.

    Args:
        threads: number of decoding threads.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, preprocess: Preprocessor,
        threads: int,
    ) -> None:  # fmt: skip
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        super().__init__(config, split, device, preprocess, pool)
        self.threads, self.decoder = threads, Decoder(split, self.canvas)

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        started = started_ahead(plan, self._start, self.prefetch)
        for samples, read, patches, parts in started:
            for part in parts:
                part.result()
            yield self.decoded(samples, read, to_device(patches, self.device))

    def _start(self, samples: Samples) -> _Started:
        """Start to decode samples; return them with the ids read and the patches, both complete
        once every future is done."""
        origins, side = samples.patch(self.crop, self.canvas)
        n = len(samples.ids)
        read = np.empty_like(samples.ids)
        pinned = self.device.type == "cuda"
        patches = torch.empty((n, side, side, 3), dtype=torch.uint8, pin_memory=pinned)

        def decode(start: int) -> None:
            share = slice(start, n, self.threads)
            read[share], encoded = self.split.read_batch(samples.ids[share])
            self.decoder(read[share], encoded, origins[share], patches[share])

        parts = [self.pool.submit(decode, start) for start in range(min(n, self.threads))]
        return samples, read, patches, parts


class Decoder:
    """Decodes samples of a split and cuts a square from the canvas of each."""

    def __init__(self, split: Split, canvas: int) -> None:
        self.split, self.canvases = split, Canvases(split.index, canvas)
        self._decode = _compiled()  # here, since Python 3.11 can parse in one thread at a time only

    def __call__(self, samples: Ints, encoded: list[Encoded], origins: Ints, out: Tensor) -> None:
        """Decode samples in one call that does not hold the GIL, unless one of them fails.

        Args:
            encoded: the encoded image of each sample.
            origins: (n, 2), top and left pixel of each square on its canvas.
            out: (n, side, side, 3) uint8, receives the squares.

        Raises DatasetError, naming the sample, where an image cannot be decoded.
        """
        where = self.canvases(samples)  # (n, 4, 2)
        where[:, 3] += origins
        places, buffers = where.reshape(-1, 8).tolist(), [*map(torch.from_numpy, encoded)]
        try:
            self._decode(buffers, places, out)
        except RuntimeError:  # decode one by one, to find the sample that fails
            for n, sample in enumerate(samples.tolist()):
                try:
                    with filled_by(f"sample {sample} of {self.split.shards[0].parent}"):
                        _decode(buffers[n : n + 1], places[n : n + 1], out[n : n + 1])
                except MachineError:
                    raise
                except RuntimeError as error:
                    raise undecodable(self.split, [sample], error) from error


def _decode(
    encoded: list[Tensor], places: list[list[int]], out: Tensor, mode: int = UNCHANGED
) -> None:
    """Decode, resize and cut images, in the subset of Python that TorchScript compiles.

    Args:
        places: for each image, eight numbers: top, left, height and width of the part that is
            resized, height and width it is resized to, top and left of the square in that.
        mode: always UNCHANGED; a default value, since TorchScript reads no global.
    """
    # Rows are copied in parts so small that torch starts no threads of its own for them.
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
            out[n, row : row + rows].copy_(image[row : row + rows])  # grey is broadcast to RGB


@functools.cache
def _compiled() -> _Decode:
    """Return `_decode` compiled by TorchScript; where there is none, `_decode` itself, with threads
    that wait for the GIL."""
    operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, without a replacement
        try:
            script: _Decode = torch.jit.script(_decode)
        except (AttributeError, OSError, RuntimeError):
            return _decode
    return script
