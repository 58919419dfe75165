"""What decoding is timed against: ImageFolder as most code uses it, and the bare decoders; and the
rate that all passes measure."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_dist.bench import Pass
from alexnet_dist.config.schema import Config
from alexnet_dist.data.codecs import decode_image
from alexnet_dist.data.pipelines.dali_pipeline import decoding
from alexnet_dist.data.split import Split


def rate(counts: Iterator[int], own: list[float] | None = None) -> float:
    """Return the images per second after the first batch, which waits for the start.

    Args:
        counts: yields each batch's number of images.
        own: list to which this thread's CPU time is appended, µs a batch.
    """
    next(counts)
    begin, mine = time.perf_counter(), time.thread_time()
    each = list(counts)
    seconds, mine = time.perf_counter() - begin, time.thread_time() - mine
    if own is not None:
        own.append(mine / len(each) * 1e6)
    return sum(each) / seconds


def image_folder(folder: Path, config: Config, workers: int, images: int) -> Pass:
    """Return a pass of what most PyTorch code does: ImageFolder, the usual transforms, and the
    processes of a DataLoader.

    Args:
        folder: train/CLASS/*, or CLASS/*.
    """
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets, transforms

    lighting, train = _Lighting(config.data.lighting), folder / "train"
    dataset = datasets.ImageFolder(
        train if train.is_dir() else folder,
        transforms.Compose(
            [
                transforms.Resize(config.data.canvas),
                transforms.CenterCrop(config.data.canvas),
                transforms.RandomCrop(config.model.crop),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                lighting,
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        ),
    )
    size = config.train.batch
    count = (-(-images // size) + 1) * size
    loader: Any = DataLoader(
        dataset, size, sampler=RandomSampler(dataset, replacement=True, num_samples=count),
        num_workers=workers, persistent_workers=True,
    )  # fmt: skip
    return lambda: rate(len(labels) for _, labels in loader)


class _Lighting:
    """PCA lighting as it is usually written, for pixels in 0–1."""

    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def __call__(self, image: Tensor) -> Tensor:
        alpha = torch.randn(3) * self.deviation
        return image + (self.vectors @ (alpha * self.values))[:, None, None]


def bare_decode(split: Split, workers: int, images: int) -> Pass:
    """Return a pass in which torchvision decodes the same images in memory, and drops them."""
    encoded = [torch.frombuffer(split.read(i), dtype=torch.uint8) for i in range(len(split))]

    def decode(first: int) -> None:
        for place in range(first, images, workers):
            decode_image(encoded[place % len(encoded)])

    def run() -> float:
        with ThreadPoolExecutor(workers) as pool:
            begin = time.perf_counter()
            list(pool.map(decode, range(workers)))
            return images / (time.perf_counter() - begin)

    return run


def bare_dali(split: Split, device: torch.device, workers: int, batch: int, images: int) -> Pass:
    """Return a pass in which DALI decodes the same images in memory, and drops them."""
    from nvidia.dali import Pipeline, fn, types

    encoded = [np.frombuffer(split.read(i), np.uint8) for i in range(len(split))]
    endless = itertools.cycle(encoded)
    graph = Pipeline(
        batch_size=batch, num_threads=workers, device_id=device.index, prefetch_queue_depth=3
    )
    with graph:
        source = fn.external_source(
            source=lambda: [*itertools.islice(endless, batch)], batch=True, no_copy=True,
            dtype=types.DALIDataType.UINT8, ndim=1,
        )  # fmt: skip
        graph.set_outputs(fn.decoders.image(source, **decoding(device)))

    def run() -> float:
        return rate(len(graph.run()[0]) for _ in range(-(-images // batch) + 1))

    return run
