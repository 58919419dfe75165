"""The resident pipeline: a split decoded once and kept in memory, its windows cut by arithmetic.

Images lie on the device if they fit there beside the network, else in the host's memory. They are
the bytes that the torch pipeline makes, so batches are the same to the bit.
"""

import dataclasses
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Decoded, Metadata, Samples, to_device
from alexnet_dist.data.dataset import Dataset, IdArray, Split, agree
from alexnet_dist.data.loops import cut
from alexnet_dist.data.pipelines.torch_pipeline import Decoder
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.errors import DatasetError, MachineError
from alexnet_dist.network.flops import multiply_adds
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.device import free_gpu_memory, free_host_memory
from alexnet_dist.parallel.environment import Place
from alexnet_dist.parallel.stop_signals import StopSignals
from alexnet_dist.parallel.topology import Topology

_CHUNK = 2**27  # bytes that each rank decodes before the ranks meet
_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resident:
    """A decoded split.

    Attributes:
        images: (n, canvas, canvas, 3) uint8; in a damaged sample's place what stands in for it.
        read: (n,) int64, the sample whose image lies in each place.
        damaged: what is to be said of each damaged sample.
    """

    images: Tensor
    read: IdArray
    damaged: Mapping[int, str]


@dataclass(frozen=True)
class Room:
    """Bytes that are free for images on every rank, each having its share of its host.

    Attributes:
        device: on the rank's device, beside what the network takes; on a CPU as `host`.
        host: in the host's memory.
    """

    device: float
    host: float

    @classmethod
    def of(cls, config: Config, topology: Topology) -> "Room":
        """What is free now. Collective."""
        place = environment.place() or Place()
        network = _network_takes(config, topology)
        device = host = free_host_memory() / place.local_world
        if topology.device.type == "cuda":
            device = free_gpu_memory(topology.device) - network
        else:
            device = host = host - network
        return cls(*map(min, zip(*topology.each(device, host), strict=True)))


def _network_takes(config: Config, topology: Topology) -> float:
    """Bytes that training and evaluation take on a rank at most, generously: `plan` says less."""
    with FakeTensorMode():
        model = AlexNet(config.model, drawn=False)
        counted = multiply_adds(model)
    values = [macs // layer.weight.numel() * len(layer.weight) for layer, macs in counted.items()]
    # Training keeps all maps for the backward; a forward alone, a few of the largest.
    trained = 8 * sum(values) * config.train.batch / topology.replicas / config.train.micro_batches
    views = config.evaluate.views * config.evaluate.batch / topology.replicas
    maps = DTYPES[config.train.precision].itemsize * max(trained, 4 * max(values) * views)
    # Weights, gradients, optimiser state, buckets, copies; and what libraries work in.
    parameters = 32 * sum(parameter.numel() for parameter in model.parameters())
    return parameters + maps + (2**31 if topology.device.type == "cuda" else 2**29)


def takes(config: Config, dataset: Dataset, splits: Iterable[str]) -> int:
    """Bytes of these splits' images on the canvas."""
    return sum(len(dataset.splits[name]) for name in splits) * 3 * config.data.canvas**2


def hold(
    config: Config, topology: Topology, dataset: Dataset, splits: Sequence[str],
    signals: StopSignals | None = None,
) -> None:  # fmt: skip
    """Decode splits of a data set that are not held yet, on every rank: the order of samples is a
    permutation, so that any rank sees each in time. Collective.

    A signal ends it, and what was decoded is lost.

    Raises, on every rank, MachineError where they do not fit, DatasetError where an image cannot be
    decoded.
    """
    held = dataset.resident
    left = [n for n in dict.fromkeys(splits) if _key(config, topology, n) not in held]
    if not left:
        return
    size, room = takes(config, dataset, left), Room.of(config, topology)
    if size <= room.device:
        device = topology.device
    elif size <= room.host:
        device = _CPU
    else:
        gpu = topology.device.type == "cuda"
        there = f"{gb(room.device)} are free beside the network on the GPU, and " if gpu else ""
        images = " and ".join(f"{len(dataset.splits[name]):,} of {name!r}" for name in left)
        error = MachineError(
            f"data.pipeline=resident: the images ({images}) take {gb(size)} a rank on the canvas "
            f"of data.canvas={config.data.canvas}: {there}{gb(room.host)} of the host's memory are "
            "free for each: set data.pipeline=torch, which gives the same batches, or start fewer "
            "ranks on this host"
        )
        error.on_every_rank = True
        raise error
    for name in left:
        found = _decode_all(config, topology, dataset.splits[name], device, signals)
        if found is None:
            return
        held[_key(config, topology, name)] = found
    where = "the GPU's memory" if device.type == "cuda" else "the host's memory"
    log.info(f"{' and '.join(left)}: {gb(size)} of decoded images a rank, in {where}")


def _key(config: Config, topology: Topology, split: str) -> tuple[str, int, torch.device]:
    return split, config.data.canvas, topology.device


def gb(size: float) -> str:
    """A number of bytes, to be read."""
    return f"{max(0.0, size) / 1e9:,.2f} GB"


def _decode_all(
    config: Config, topology: Topology, split: Split, device: torch.device,
    signals: StopSignals | None,
) -> Resident | None:  # fmt: skip
    """Every image of a split on the canvas; None where a signal stopped it. Ranks meet after each
    part, so that many images outlast no timeout."""
    side, threads = config.data.canvas, config.data.workers or topology.cores
    split = dataclasses.replace(split)  # with files of its own, to close
    images = torch.empty((len(split), side, side, 3), dtype=torch.uint8, device=device)
    read, damaged = np.arange(len(split)), dict[int, str]()
    size = max(threads, _CHUNK // (3 * side**2))
    on_device, decoder = device.type != "cpu", Decoder(split, side)
    buffer = torch.empty((size, side, side, 3), dtype=torch.uint8) if on_device else images[:0]

    def decode(samples: range, into: Tensor) -> None:
        read[samples], encoded, why = split.whole(np.array(samples))
        damaged.update({samples[place]: words for place, words in why.items()})
        decoder(read[samples], encoded, np.zeros((len(samples), 2), np.int64), into)

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
        tqdm(
            total=len(split), unit=" images", desc=f"decoding {split.name}", leave=False,
            disable=not topology.leads, mininterval=0.5 if sys.stderr.isatty() else 30,
            delay=2,
        ) as bar,
    ):  # fmt: skip
        for first in range(0, len(split), size):
            if signals is not None and signals.poll(topology):
                split.close()
                return None
            part = range(first, min(first + size, len(split)))
            into = buffer[: len(part)] if on_device else images[first : part.stop]
            shares = [(part[t::threads], into[t::threads]) for t in range(threads)]
            wrong = ""
            try:
                list(pool.map(decode, *zip(*shares, strict=True)))
            except DatasetError as error:
                wrong = str(error)
            agree(wrong, topology)
            if on_device:
                images[first : part.stop].copy_(into)
            bar.update(len(part))
    split.close()
    return Resident(images, read, damaged)


class ResidentPipeline:
    """A `Pipeline` over decoded images. On a GPU that holds them a batch is a gather there; from
    the host's memory threads cut batches ahead, without Python's lock.

    Args:
        threads: that cut, of the host.
    """

    def __init__(
        self, config: Config, topology: Topology, dataset: Dataset, split: str,
        preprocess: Preprocess, threads: int,
    ) -> None:  # fmt: skip
        self.config, self.topology, self.dataset, self.name = config, topology, dataset, split
        self.preprocess, self.split = preprocess, dataset.splits[split]
        self.device = topology.device
        self.canvas, self.crop = config.data.canvas, config.model.crop
        self.prefetch = config.data.prefetch
        self._pool = ThreadPoolExecutor(min(threads, self.prefetch), thread_name_prefix="cut")

    def batches(self, plan: Iterable[Samples]) -> Iterator[Decoded]:
        """As `Pipeline.batches`. Collective until the first, where the split is not yet held."""
        hold(self.config, self.topology, self.dataset, [self.name])
        found: Resident = self.dataset.resident[_key(self.config, self.topology, self.name)]
        if found.images.device.type == "cpu":
            yield from self._from_host(found, iter(plan))
            return
        for samples in plan:
            metadata = to_device(self._metadata(found, samples), self.device)
            _, side = samples.patch(self.crop, self.canvas)
            patches = gathered(found.images, metadata, side)
            yield Decoded(patches, metadata, self.preprocess)

    def close(self) -> None:
        """Stop its threads. Images stay with the data set, for the next pipeline."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _metadata(self, found: Resident, samples: Samples) -> Tensor:
        """As packed; what is damaged among them is said each time, as by the other pipelines."""
        read = found.read[samples.ids]
        for sample in samples.ids[read != samples.ids].tolist():
            log.warning(found.damaged[sample])
        return Metadata.pack(samples, read, self.split)

    def _from_host(self, found: Resident, plan: Iterator[Samples]) -> Iterator[Decoded]:
        ahead: deque[tuple[Tensor, Tensor, Future[None]]] = deque()
        images, pinned = found.images.flatten(2).numpy(), self.device.type == "cuda"
        while True:
            while len(ahead) <= self.prefetch and (samples := next(plan, None)) is not None:
                corners, side = samples.patch(self.crop, self.canvas)
                shape = (len(samples.ids), side, side, 3)
                patches = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
                into = patches.flatten(2).numpy()
                cutting = self._pool.submit(cut, images, samples.ids, corners, into)
                ahead.append((patches, self._metadata(found, samples), cutting))
            if not ahead:
                return
            patches, metadata, cutting = ahead.popleft()
            cutting.result()
            yield Decoded(
                to_device(patches, self.device), to_device(metadata, self.device), self.preprocess
            )


def gathered(images: Tensor, metadata: Tensor, side: int) -> Tensor:
    """`Decoded.patches` of samples, cut where the images lie; the host waits for nothing.

    Args:
        images: (N, canvas, canvas, 3) uint8.
        metadata: `Decoded.metadata`, on the same device.
        side: of a patch: the canvas, or less: then a sample's one window is cut.
    """
    its = Metadata.unpack(metadata)
    if side == images.shape[1]:
        return images.index_select(0, its.ids)
    along = torch.arange(side, device=images.device)
    rows, columns = (its.corners[:, 0, place, None] + along for place in (0, 1))  # (n, side)
    return images[its.ids[:, None, None], rows[:, :, None], columns[:, None, :]].contiguous()
