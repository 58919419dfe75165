"""The DALI pipeline: one graph that decodes, resizes and cuts, on a GPU where there is one.

The sampler's choices are fed to it by `external_source`; DALI draws, shuffles and skips nothing.
"""

import functools
import io
import itertools
import logging
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Decoded, Pipeline, Preprocessor, Samples, started_ahead
from alexnet_dist.data.preprocess import Canvases
from alexnet_dist.data.split import Encoded, Ints, Split, undecodable
from alexnet_dist.errors import MachineError, one_line

log = logging.getLogger(__name__)
_HARDWARE_SHARE = 0.9  # of a batch: 49,000 images/s of an H200, its CUDA cores alone 19,000
# nvImageCodec's warnings are the same from each graph; the probe of a GPU gives them once.
_QUIET = ("DALI_NVIMGCODEC_LOG_LEVEL", "1")


@dataclass(frozen=True)
class _Read:
    """Samples, the ids that were read for them, and DALI's list of their encoded images."""

    samples: Samples
    read: Ints
    encoded: Any


class DaliPipeline(Pipeline):
    """A `Pipeline` on NVIDIA DALI: nvJPEG on a GPU, libjpeg-turbo on a CPU.

    Args:
        threads: number of the host's threads, which decode or prepare decoding.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, preprocess: Preprocessor,
        threads: int,
    ) -> None:  # fmt: skip
        readers = min(threads, config.data.prefetch + 1)
        pool = ThreadPoolExecutor(readers, thread_name_prefix="read")
        super().__init__(config, split, device, preprocess, pool)
        self.threads, self.canvases = threads, Canvases(split.index, self.canvas)

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        """As `Pipeline.batches`. A graph is built for the first batch, and another one whenever a
        batch is larger than all before it."""
        futures = started_ahead(plan, lambda s: self.pool.submit(self._read, s), self.prefetch)
        reads = (future.result() for future in futures)
        first = next(reads, None)
        while first is not None:
            first = yield from self._by_one_graph(first, reads)

    def _by_one_graph(
        self, first: _Read, reads: Iterator[_Read]
    ) -> Generator[Decoded, None, _Read | None]:
        """Yield batches up to one that is larger than the first; return that one, or None."""
        batch, (_, side) = max(1, len(first.read)), first.samples.patch(self.crop, self.canvas)
        inside, larger = deque[_Read](), list[_Read]()  # fed and not yet out; too large to be fed
        feed = self._feed(itertools.chain([first], reads), batch, inside, larger)
        try:
            graph = self.graph(feed, batch, side)
            graph.build()
        except RuntimeError as error:
            raise MachineError(
                f"data.pipeline=dali: no pipeline can be built on {self.device} "
                f"({one_line(error)}): update the GPU's driver, or set data.pipeline=torch"
            ) from error
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        empty = torch.empty((0, side, side, 3), dtype=torch.uint8, device=self.device)
        while True:
            try:
                (patches,) = graph.run(stream)
            except StopIteration:
                break
            except RuntimeError as error:
                if not re.search("decoders|resize|bad_alloc", str(error)):
                    raise
                raise undecodable(self.split, inside[0].read.tolist(), error) from error
            while len(inside[0].read) == 0:
                yield self.decoded(inside[0].samples, inside.popleft().read, empty)
            done = inside.popleft()
            yield self.decoded(done.samples, done.read, from_dlpack(patches.as_tensor()))
        for left in inside:
            yield self.decoded(left.samples, left.read, empty)
        return larger[0] if larger else None

    def graph(self, feed: Iterator[Any], batch: int, side: int) -> Any:
        """Make the graph: encoded images to patches (batch, side, side, 3), uint8, on the device.

        A CPU decodes only the patch. A GPU decodes whole images and then cuts: its hardware decoder
        cannot decode a part, and nvImageCodec silently leaves parts to the CPU where they are
        upsampled as in libjpeg.
        """
        from nvidia.dali import Pipeline, fn, types

        os.environ.setdefault(*_QUIET)
        graph = Pipeline(
            batch_size=batch, num_threads=self.threads, device_id=self.device.index,
            prefetch_queue_depth=self.prefetch,
            exec_dynamic=True,  # what a batch returns is then its own memory
        )  # fmt: skip
        resizes, cuts, how = self.canvases.resizes, self.canvases.cuts, decoding(self.device)
        with graph:
            dtype = types.DALIDataType
            dtypes = [dtype.UINT8, dtype.INT32, dtype.FLOAT, dtype.INT32, dtype.INT32]
            inputs = 2 + resizes + 2 * cuts
            encoded, start, *canvas = fn.external_source(
                source=feed, num_outputs=inputs, batch=True, dtype=dtypes[:inputs], ndim=1,
                no_copy=True,  # `inside` keeps them alive
            )  # fmt: skip
            where = {"start": start, "shape": (side, side), "axes": (0, 1)}
            if self.device.type == "cuda" or resizes:
                image = fn.decoders.image(encoded, **how)
                if cuts:
                    image = fn.slice(image, start=canvas[1], shape=canvas[2], axes=(0, 1))
                if resizes:  # as torchvision does: bilinear, antialiased, the whole of the image
                    image = fn.resize(
                        image, size=canvas[0], interp_type=types.DALIInterpType.INTERP_LINEAR,
                        antialias=True, subpixel_scale=False,
                    )  # fmt: skip
                patches = fn.slice(image, **where)
            else:
                patches = fn.decoders.image_slice(encoded, **how, **where)
            graph.set_outputs(patches)
        return graph

    def _feed(
        self, reads: Iterator[_Read], batch: int, inside: deque[_Read], larger: list[_Read]
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the graph's inputs for each batch: encoded images, corners, and the sizes and parts
        that it resizes, if any; end at a batch that is too large, which is added to `larger`."""
        for read in reads:
            if len(read.read) > batch:
                larger.append(read)
                return
            inside.append(read)
            if not len(read.read):  # DALI knows no batch of no samples
                continue
            origins, _ = read.samples.patch(self.crop, self.canvas)
            corner, kept, size, offset = self.canvases(read.read).swapaxes(0, 1)  # (n, 2) each
            numbers: list[tuple[Ints, type]] = [(origins + offset, np.int32)]
            numbers += [(size, np.float32)] * self.canvases.resizes
            numbers += [(corner, np.int32), (kept, np.int32)] * self.canvases.cuts
            yield read.encoded, *(np.ascontiguousarray(value, dtype) for value, dtype in numbers)

    def _read(self, samples: Samples) -> _Read:
        from nvidia.dali import tensors

        read, encoded = self.split.read_batch(samples.ids)
        # DALI's own list here, so that the thread that runs the graph need not make it.
        given = tensors.TensorListCPU([tensors.TensorCPU(one) for one in encoded])
        return _Read(samples, read, given)


@dataclass(frozen=True)
class GpuDecoders:
    """Which of nvImageCodec's decoders accept a JPEG with the pipeline's options.

    Attributes:
        hardware: the GPU's JPEG decoder does, for baseline JPEG.
        cores: its CUDA cores do, together with the CPU.
        lack: why neither does.
    """

    hardware: bool
    cores: bool
    lack: str = ""

    def __str__(self) -> str:
        by = ["its JPEG decoder"] * self.hardware + ["its CUDA cores"] * self.cores
        return f"on the GPU, by {' and '.join(by)}" if by else "on the CPU, although there is a GPU"


def decoding(device: torch.device) -> dict[str, Any]:
    """Return the arguments with which DALI decodes on a device."""
    how: dict[str, Any] = {
        "device": "cpu",
        "adjust_orientation": False,  # prepare has settled it
        "jpeg_fancy_upsampling": True,  # as libjpeg does; nvJPEG's default is cruder
    }
    if device.type == "cuda":
        hardware = gpu_decoders(device.index or 0).hardware
        how |= {"device": "mixed", "hw_decoder_load": _HARDWARE_SHARE if hardware else 0.0}
    return how


@functools.cache
def gpu_decoders(device: int) -> GpuDecoders:
    """Try each decoder on an image; log a warning where none accepts it."""
    found, lack = list[bool](), ""
    for kinds in (("HW_GPU_ONLY",), ("HYBRID_CPU_GPU", "GPU_ONLY")):
        try:
            from nvidia import nvimgcodec as codec

            backends = [codec.Backend(getattr(codec.BackendKind, kind)) for kind in kinds]
            decoder = codec.Decoder(
                device_id=device, max_num_cpu_threads=1, backends=backends,
                options=":fancy_upsampling=1",
            )  # fmt: skip
            found.append(decoder.decode(_encoded().tobytes()) is not None)
        except (ImportError, AttributeError, RuntimeError) as error:
            found.append(False)
            lack = one_line(error)
    hardware, cores = found
    if hardware or cores:
        return GpuDecoders(hardware, cores)
    lack = lack or "nvImageCodec gives no reason"
    log.warning(
        "data.pipeline=dali: images are decoded on the CPU, because none of the GPU's decoders "
        f"can be used ({lack}): update the GPU's driver"
    )
    return GpuDecoders(hardware, cores, lack)


def _encoded() -> Encoded:
    """Return a JPEG of 48 × 64 pixels."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(encoded, "JPEG")
    return np.frombuffer(encoded.getvalue(), np.uint8)


def check_dali(device: int | None) -> str:
    """Decode one image as a run would; return what decoded it, in words.

    Args:
        device: number of the GPU; None for the CPU.

    Raises whatever DALI raises where it cannot decode, MachineError where the result is wrong.
    """
    from nvidia.dali import Pipeline, fn

    os.environ.setdefault(*_QUIET)
    image = _encoded()
    graph = Pipeline(batch_size=1, num_threads=1, device_id=device)
    with graph:
        source = fn.external_source(source=lambda: [image], batch=True, ndim=1)
        graph.set_outputs(fn.decoders.image(source, device="cpu" if device is None else "mixed"))
    graph.build()
    shape = tuple(graph.run()[0].shape()[0])
    if shape != (48, 64, 3):
        raise MachineError(f"an image of 48 × 64 pixels came out as {shape}")
    return "on the CPU" if device is None else f"{gpu_decoders(device)}"
