"""The resident pipeline: a split is decoded once and kept in memory, and windows are cut from that.

Images are kept on the device if they fit beside the network, otherwise in the host's memory. They
are the bytes that the torch pipeline decodes, so its batches are the same to the bit.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
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
from alexnet_dist.data.dataset import Dataset, raised_on_every_rank
from alexnet_dist.data.loops import cut
from alexnet_dist.data.pipelines.torch_pipeline import Decoder
from alexnet_dist.data.split import Ints, Split
from alexnet_dist.errors import MachineError
from alexnet_dist.network.flops import map_values, multiply_adds
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.device import free_gpu_memory, free_host_memory
from alexnet_dist.parallel.environment import Place
from alexnet_dist.parallel.stop_signals import StopSignals
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.progress import progress_bar

_CHUNK = 2**27  # bytes that each rank decodes before the ranks meet, whose cores may differ
_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resident:
    """A decoded split.

    Attributes:
        images: (n, canvas, canvas, 3) uint8; a damaged sample's place holds the one read instead.
        read: (n,) int64, the sample whose image is in each place.
        damaged: the warning to log for each damaged sample.
    """

    images: Tensor
    read: Ints
    damaged: Mapping[int, str]

    def read_for(self, samples: Samples) -> Ints:
        """Return the samples that were read for these, and log the damaged ones each time, as the
        other pipelines do."""
        read = self.read[samples.ids]
        for sample in samples.ids[read != samples.ids].tolist():
            log.warning(self.damaged[sample])
        return read


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that are free for images on every rank, which has an equal share of its host's memory.

    Attributes:
        device: bytes on the rank's device, beside what the network takes; on a CPU the same as
            `host`.
        host: bytes of the host's memory.
    """

    device: float
    host: float

    @classmethod
    def of(cls, config: Config, topology: Topology) -> "FreeMemory":
        """Measure what is free now, and return the least of all ranks. Collective."""
        place = environment.place() or Place()
        network = _network_bytes(config, topology)
        host = free_host_memory() / place.local_world
        if topology.device.type == "cuda":
            device = free_gpu_memory(topology.device) - network
        else:
            device = host = host - network
        return cls(*map(min, zip(*topology.gather(device, host), strict=True)))


def _network_bytes(config: Config, topology: Topology) -> float:
    """Return a generous bound on the bytes that training and evaluation take on a rank; `plan`
    gives a closer one."""
    with torch.device("meta"):
        model = AlexNet(config.model, init_weights=False)
        values = map_values(multiply_adds(model)).values()
    # Training keeps all maps for the backward; a forward alone, a few of the largest.
    trained = 8 * sum(values) * config.train.batch / topology.replicas / config.train.micro_batches
    views = config.evaluate.views * config.evaluate.batch / topology.replicas
    maps = DTYPES[config.train.precision].itemsize * max(trained, 4 * max(values) * views)
    # Weights, gradients, optimiser state, buckets, copies; and what libraries work in.
    parameters = 32 * sum(parameter.numel() for parameter in model.parameters())
    return parameters + maps + (2**31 if topology.device.type == "cuda" else 2**29)


def decoded_bytes(config: Config, dataset: Dataset, splits: Iterable[str]) -> int:
    """Return the size of these splits' images on the canvas, bytes."""
    return sum(len(dataset.splits[name]) for name in splits) * 3 * config.data.canvas**2


def decode_to_memory(
    config: Config, topology: Topology, dataset: Dataset, splits: Sequence[str],
    signals: StopSignals | None = None,
) -> None:  # fmt: skip
    """Decode the splits of a data set that are not yet in memory. Collective.

    Every rank decodes whole splits: samples are shuffled over ranks, so each rank needs all of
    them in time. A signal stops the decoding, and what was decoded so far is lost.

    Raises on every rank MachineError where the images do not fit, and DatasetError where one cannot
    be decoded.
    """
    held = dataset.resident
    left = [n for n in dict.fromkeys(splits) if _key(config, topology, n) not in held]
    if not left:
        return
    device = _device_with_room(config, topology, dataset, left)
    for name in left:
        with closing(dataclasses.replace(dataset.splits[name])) as split:  # with files of its own
            found = _decode_all(config, topology, split, device, signals)
        if found is None:
            return
        held[_key(config, topology, name)] = found
    where = "the GPU's memory" if device.type == "cuda" else "the host's memory"
    size = gb(decoded_bytes(config, dataset, left))
    log.info(f"{' and '.join(left)}: {size} of decoded images per rank, in {where}")


def _device_with_room(
    config: Config, topology: Topology, dataset: Dataset, splits: Sequence[str]
) -> torch.device:
    """Return the rank's device if the images of these splits fit there, else the CPU; raise
    MachineError on every rank where they fit in neither's memory. Collective."""
    size, room = decoded_bytes(config, dataset, splits), FreeMemory.of(config, topology)
    if size <= room.device:
        return topology.device
    if size <= room.host:
        return _CPU
    gpu = topology.device.type == "cuda"
    there = f"{gb(room.device)} are free on the GPU beside the network, and " if gpu else ""
    images = " and ".join(f"{len(dataset.splits[name]):,} of {name!r}" for name in splits)
    raise MachineError(
        f"data.pipeline=resident: the decoded images ({images}) take {gb(size)} per rank at "
        f"data.canvas={config.data.canvas}, but {there}{gb(room.host)} of the host's memory "
        "are free for each: set data.pipeline=torch, which gives the same batches, or start "
        "fewer ranks on this host",
        on_every_rank=True,
    )


def _key(config: Config, topology: Topology, split: str) -> tuple[str, int, torch.device]:
    return split, config.data.canvas, topology.device


def gb(size: float) -> str:
    """Format a number of bytes for people."""
    return f"{max(0.0, size) / 1e9:,.2f} GB"


def _decode_all(
    config: Config, topology: Topology, split: Split, device: torch.device,
    signals: StopSignals | None,
) -> Resident | None:  # fmt: skip
    """Decode every image of a split; return None where a signal stopped it. Collective: ranks meet
    after each part, so that decoding many images does not run into a timeout."""
    side, threads = config.data.canvas, config.data.workers or topology.cores
    images = torch.empty((len(split), side, side, 3), dtype=torch.uint8, device=device)
    read, damaged = np.arange(len(split)), dict[int, str]()
    size = max(1, _CHUNK // (3 * side**2))
    on_device, decoder = device.type != "cpu", Decoder(split, side)
    buffer = torch.empty((size, side, side, 3), dtype=torch.uint8) if on_device else images[:0]

    def decode(samples: range, into: Tensor) -> None:
        read[samples], encoded, why = split.read_with_warnings(np.array(samples))
        damaged.update({samples[place]: words for place, words in why.items()})
        decoder(read[samples], encoded, np.zeros((len(samples), 2), np.int64), into)

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
        progress_bar(
            f"decoding {split.name}", total=len(split), unit=" images", leave=False,
            disable=not topology.is_rank_0, delay=2,
        ) as bar,
    ):  # fmt: skip
        for first in range(0, len(split), size):
            if signals is not None and signals.poll(topology):
                return None
            part = range(first, min(first + size, len(split)))
            into = buffer[: len(part)] if on_device else images[first : part.stop]
            shares = [(part[t::threads], into[t::threads]) for t in range(min(threads, len(part)))]
            with raised_on_every_rank(topology):
                list(pool.map(decode, *zip(*shares, strict=True)))
            if on_device:
                images[first : part.stop].copy_(into)
            bar.update(len(part))
    return Resident(images, read, damaged)


class ResidentPipeline(Pipeline):
    """A `Pipeline` over decoded images, which stay with the data set for the next pipeline. A step
    cuts its windows from them where they are on its device; for a GPU, threads cut patches from the
    host's memory, without holding the GIL.

    Args:
        threads: number of the host's threads that cut.
    """

    def __init__(
        self, config: Config, topology: Topology, dataset: Dataset, split: str,
        preprocess: Preprocessor, threads: int,
    ) -> None:  # fmt: skip
        self.config, self.topology, self.dataset = config, topology, dataset
        pool = ThreadPoolExecutor(min(threads, config.data.prefetch), thread_name_prefix="cut")
        super().__init__(config, dataset.splits[split], topology.device, preprocess, pool)

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        """As `Pipeline.batches`. Collective up to the first batch if the split is not decoded."""
        name = self.split.name
        decode_to_memory(self.config, self.topology, self.dataset, [name])
        resident: Resident = self.dataset.resident[_key(self.config, self.topology, name)]
        if resident.images.device != self.device:
            yield from self._from_host(resident, plan)
            return
        for samples in plan:
            read = resident.read_for(samples)
            yield self.decoded(samples, read, resident.images, resident=True)

    def _from_host(self, resident: Resident, plan: Iterable[Samples]) -> Iterator[Decoded]:
        images, pinned = resident.images.flatten(2).numpy(), self.device.type == "cuda"

        def start(samples: Samples) -> tuple[Samples, Ints, Tensor, Future[None]]:
            corners, side = samples.patch(self.crop, self.canvas)
            shape = (len(samples.ids), side, side, 3)
            patches = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
            into = patches.flatten(2).numpy()
            cutting = self.pool.submit(cut, images, samples.ids, corners, into)
            return samples, resident.read_for(samples), patches, cutting

        for samples, read, patches, cutting in started_ahead(plan, start, self.prefetch):
            cutting.result()
            yield self.decoded(samples, read, to_device(patches, self.device))
