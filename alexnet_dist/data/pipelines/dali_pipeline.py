"""The DALI pipeline: one graph that decodes, resizes and cuts, on a GPU where there is one.

The sampler's choices come in by `external_source`, so that DALI draws, shuffles and skips nothing.
"""

import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import (
    Decoded,
    IdArray,
    Samples,
    facts_of,
    to_device,
)
from alexnet_dist.data.dataset import Split, undecodable
from alexnet_dist.data.preprocess import Finish, canvas_in, centre_of
from alexnet_dist.errors import MachineError

Bytes = npt.NDArray[np.uint8]


class DaliPipeline:
    """A `Pipeline` on NVIDIA DALI: nvJPEG on a GPU, libjpeg-turbo on a CPU.

    Args:
        threads: of the host, that decode or prepare decoding.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, finish: Finish, threads: int
    ) -> None:
        self.split, self.device, self.finish, self.threads = split, device, finish, threads
        self.canvas, self.crop = config.data.canvas, config.model.crop
        self.prefetch = config.data.prefetch
        self.resizes = not split.uniform(self.canvas)
        shapes = np.unique(split.index[["height", "width"]]).tolist()
        self.cuts = any(centre_of(*shape)[1] != shape for shape in shapes)  # before it resizes
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        """As `Pipeline.batches`; no later batch may be larger than the first."""
        plan = iter(plan)
        first = next(plan, None)
        if first is None:
            return
        _, side = first.patch(self.crop, self.canvas)
        inside: deque[tuple[Samples, IdArray, list[Bytes]]] = deque()  # fed, and not yet out
        feed = self._feed(itertools.chain([first], plan), inside)
        try:
            graph = self._graph(feed, max(1, len(first.ids)), side)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise MachineError(
                f"data.pipeline=dali: no pipeline can be built on {self.device} ({reason}): "
                "update the GPU's driver, or set data.pipeline=torch"
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
                raise undecodable(self.split, inside[0][1].tolist(), error) from error
            while len(inside[0][1]) == 0:
                yield self._decoded(*inside.popleft(), empty)
            yield self._decoded(*inside.popleft(), from_dlpack(patches.as_tensor()))
        while inside:
            yield self._decoded(*inside.popleft(), empty)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self.split.close()

    def _graph(self, feed: Iterator[Any], batch: int, side: int) -> Any:
        """The graph: encoded images in, patches (batch, side, side, 3) uint8 out, on the device."""
        from nvidia.dali import Pipeline, fn, types

        graph = Pipeline(
            batch_size=batch,
            num_threads=self.threads,
            device_id=self.device.index,
            prefetch_queue_depth=self.prefetch,
        )
        how = {
            "device": "mixed" if self.device.type == "cuda" else "cpu",
            "output_type": types.DALIImageType.RGB,
            "adjust_orientation": False,  # prepare has settled it
            "jpeg_fancy_upsampling": True,  # as libjpeg does; nvJPEG's default is cruder
        }
        with graph:
            dtype = types.DALIDataType
            dtypes = [dtype.UINT8, dtype.INT32, dtype.FLOAT, dtype.INT32, dtype.INT32]
            inputs = 2 + self.resizes + 2 * self.cuts
            encoded, start, *canvas = fn.external_source(
                source=feed,
                num_outputs=inputs,
                batch=True,
                no_copy=True,  # `inside` keeps them alive
                dtype=dtypes[:inputs],
                ndim=1,
            )
            where = {"start": start, "shape": (side, side), "axes": (0, 1)}
            if self.resizes:  # as torchvision does: bilinear, antialiased, the whole of the image
                image = fn.decoders.image(encoded, **how)
                if self.cuts:
                    image = fn.slice(image, start=canvas[1], shape=canvas[2], axes=(0, 1))
                image = fn.resize(
                    image, size=canvas[0], interp_type=types.DALIInterpType.INTERP_LINEAR,
                    antialias=True, subpixel_scale=False,
                )  # fmt: skip
                patches = fn.slice(image, **where)
            else:
                patches = fn.decoders.image_slice(encoded, **how, **where)
            graph.set_outputs(patches)
        graph.build()
        return graph

    def _feed(
        self, plan: Iterator[Samples], inside: deque[tuple[Samples, IdArray, list[Bytes]]]
    ) -> Iterator[tuple[Any, ...]]:
        """Of each entry of the plan: encoded images, corners, and sizes where it resizes."""
        ahead: deque[Future[tuple[Samples, IdArray, list[Bytes]]]] = deque()
        while True:
            while len(ahead) <= self.prefetch and (samples := next(plan, None)) is not None:
                ahead.append(self._reader.submit(self._read, samples))
            if not ahead:
                return
            samples, read, encoded = ahead.popleft().result()
            inside.append((samples, read, encoded))
            if not encoded:  # DALI knows no batch of no samples
                continue
            origins, _ = samples.patch(self.crop, self.canvas)
            if not self.resizes:
                yield encoded, np.ascontiguousarray(origins, np.int32)
                continue
            sizes = self.split.index[["height", "width"]][read].tolist()
            centres = [centre_of(height, width) for height, width in sizes]
            canvases = [canvas_in(*shape, self.canvas) for _, shape in centres]
            size, offset = np.array(canvases).swapaxes(0, 1)  # (n, 2) each
            start = np.ascontiguousarray(origins + offset, np.int32)
            cuts = np.array(centres, np.int32).swapaxes(0, 1) if self.cuts else ()
            resized = np.ascontiguousarray(size, np.float32)
            yield encoded, start, resized, *map(np.ascontiguousarray, cuts)

    def _read(self, samples: Samples) -> tuple[Samples, IdArray, list[Bytes]]:
        found = [self.split.read_whole(sample) for sample in samples.ids.tolist()]
        read = np.array([sample for sample, _ in found], np.int64)
        return samples, read, [np.frombuffer(encoded, np.uint8) for _, encoded in found]

    def _decoded(
        self, samples: Samples, read: IdArray, encoded: list[Bytes], patches: Tensor
    ) -> Decoded:
        facts = facts_of(samples, read, self.split)
        return Decoded(patches, to_device(facts, self.device), self.finish)


def check_dali(device: int | None) -> None:
    """Decode one image as a run would: by a GPU of this number, or by the CPU.

    Raises whatever DALI does where it cannot, MachineError where what it makes is wrong.
    """
    from nvidia.dali import Pipeline, fn
    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(encoded, "JPEG")
    image = np.frombuffer(encoded.getvalue(), np.uint8)
    graph = Pipeline(batch_size=1, num_threads=1, device_id=device)
    with graph:
        source = fn.external_source(source=lambda: [image], batch=True, ndim=1)
        graph.set_outputs(fn.decoders.image(source, device="cpu" if device is None else "mixed"))
    graph.build()
    shape = tuple(graph.run()[0].shape()[0])
    if shape != (48, 64, 3):
        raise MachineError(f"an image of 48 × 64 pixels came out as {shape}")
