"""How fast the pipelines decode, beside ImageFolder and the bare decoder."""

import functools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torchvision.io import decode_jpeg

from alexnet_dist.bench import Pass, in_turn, machine, median, ratio
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.batch import Decoded
from alexnet_dist.data.dataset import INDEX, VERSION, Dataset, Split, open_dataset
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.prepare.merge import described
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.sampler import TrainSampler
from alexnet_dist.parallel.topology import Topology, connect

_KINDS = ("torch", "dali", "resident")


def bench_data(folder: Path, images: int, repeats: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Every pipeline on images of a folder, against ImageFolder and the bare decoder.

    Args:
        folder: train/CLASS/*, as torchvision's ImageFolder reads it.
        images: of a pass.
        repeats: passes of each.
        overrides: key=value of the config.

    Returns:
        ratios (medians of pairs), ceilings (images/s), differences between the pipelines' pixels
        (grey levels), machine, and every pass's images/s.
    """
    with tempfile.TemporaryDirectory(prefix="alexnet-dist-bench-") as scratch:
        packed = {}
        for name, keep in (("256", False), ("kept", True)):
            out = Path(scratch) / name
            prepare("folder", folder, out, Options(keep=keep))
            packed[name] = open_dataset(out)
        data = f"data.path={packed['256'].folder}"
        config = load_config(["layout.kind=one", data, *overrides])
        topology = connect(config)
        workers = config.data.workers or torch.get_num_threads()
        passes: dict[str, Pass] = {
            "ImageFolder": _image_folder(folder / "train", config, workers, images),
            "bare decode": _bare_decode(packed["256"].splits["train"], workers, images),
        }
        for kind in _KINDS:
            ours = load_config([flat(config), f"data.pipeline={kind}"])
            make = functools.partial(_pipeline, ours, topology)
            passes[f"{kind}, decoded"] = make(packed["256"], images, finish=False)
            passes[f"{kind}, beside Python"] = _beside_python(passes[f"{kind}, decoded"])
            for stored, dataset in packed.items():
                passes[f"{kind}, {stored}"] = make(dataset, images)
            if kind == "resident":  # a million images of its own would not fit
                continue
            for name, count in (("1,000", 1_000), ("1,000,000", 1_000_000)):
                large = _of_size(packed["256"], count)
                passes[f"{kind}, of {name}"] = make(large, images)
        runs = in_turn(passes, repeats)
        differences = {
            f"{stored}: {what}": value
            for stored, dataset in packed.items()
            for what, value in _differences(config, topology, dataset, images).items()
        }

    ratios = {}
    for kind in _KINDS:
        for stored in packed:
            ratios[f"{kind}, {stored} / ImageFolder"] = ratio(
                runs, f"{kind}, {stored}", "ImageFolder"
            )
        ratios[f"{kind}, decoded / bare decode"] = ratio(runs, f"{kind}, decoded", "bare decode")
        beside = f"{kind}, beside Python"
        ratios[f"{beside} / decoded"] = ratio(runs, beside, f"{kind}, decoded")
        if kind == "resident":
            continue
        million, thousand = (f"{kind}, of {n}" for n in ("1,000,000", "1,000"))
        ratios[f"{kind}, 1,000,000 / 1,000 samples"] = ratio(runs, million, thousand)
    return {
        "ratios": ratios,
        "ceilings": {
            "bare decode, images/s": median(a["bare decode"] for a in runs),
            **index_cost(1_281_167, config.train.batch),
        },
        "differences": differences,
        "machine": machine(workers),
        "unit": "images/s",
        "runs": runs,
    }


def _rate(batches: Iterator[int]) -> float:
    """Images per second, from the first batch (it waits for the start) to the last."""
    next(batches)
    begin = time.perf_counter()
    images = sum(batches)
    return images / (time.perf_counter() - begin)


def _pipeline(
    config: Config, topology: Topology, dataset: Dataset, images: int, finish: bool = True
) -> Pass:
    """One of our pipelines; with `finish`, up to what conv1 sees."""
    sampler = TrainSampler(config, len(dataset.splits["train"]), dataset.statistics)
    size = config.train.batch
    steps = -(-images // size) + 1

    def used(decoded: Decoded) -> int:
        if not finish:
            return len(decoded.patches)
        return len(decoded.joined([len(decoded.patches)], None).windows)

    def run() -> float:
        pipeline = make_pipeline(config, topology, dataset, "train")
        try:
            plan = sampler.plan(0, steps, range(size))
            return _rate(used(decoded) for decoded in pipeline.batches(plan))
        finally:
            pipeline.close()

    return run


def _beside_python(alone: Pass) -> Pass:
    """A pass while a thread runs Python without a pause, and so wants its lock all the time."""

    def run() -> float:
        ended = False

        def spin() -> None:
            while not ended:
                pass

        thread = threading.Thread(target=spin, name="spin")
        thread.start()
        try:
            return alone()
        finally:
            ended = True
            thread.join()

    return run


def _differences(
    config: Config, topology: Topology, dataset: Dataset, images: int
) -> dict[str, float]:
    """Of the bytes that both pipelines make of the same samples, grey levels."""
    sampler = TrainSampler(config, len(dataset.splits["train"]), dataset.statistics)
    size = config.train.batch
    pipelines = [
        make_pipeline(replace(config, data=replace(config.data, pipeline=kind)), topology, dataset,
                      "train")
        for kind in ("torch", "dali")
    ]  # fmt: skip
    plans = [p.batches(sampler.plan(0, -(-images // size), range(size))) for p in pipelines]
    counts = np.zeros(256, np.int64)  # of pixels' colours, by their difference
    for ours, theirs in zip(*plans, strict=True):
        difference = (ours.patches.int() - theirs.patches.int()).abs().flatten()
        counts += torch.bincount(difference, minlength=256).cpu().numpy()
    for pipeline in pipelines:
        pipeline.close()
    share = counts.cumsum() / counts.sum()
    return {
        "mean": float((counts * np.arange(256)).sum() / counts.sum()),
        "99.9th percentile": float(np.searchsorted(share, 0.999)),
    }


def _image_folder(folder: Path, config: Config, workers: int, images: int) -> Pass:
    """What most PyTorch code does: ImageFolder, the usual transforms, DataLoader's processes."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets, transforms

    lighting = _Lighting(config.data.lighting)
    dataset = datasets.ImageFolder(
        str(folder),
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
    return lambda: _rate(len(labels) for _, labels in loader)


class _Lighting:
    """PCA lighting as it is usually written, on pixels of 0–1."""

    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def __call__(self, image: Tensor) -> Tensor:
        alpha = torch.randn(3) * self.deviation
        return image + (self.vectors @ (alpha * self.values))[:, None, None]


def _bare_decode(split: Split, workers: int, images: int) -> Pass:
    """libjpeg-turbo on the same bytes, in memory, thrown away as soon as they are decoded."""
    encoded = [torch.frombuffer(split.read(i), dtype=torch.uint8) for i in range(len(split))]

    def decode(first: int) -> None:
        for place in range(first, images, workers):
            decode_jpeg(encoded[place % len(encoded)])

    def run() -> float:
        with ThreadPoolExecutor(workers) as pool:
            begin = time.perf_counter()
            list(pool.map(decode, range(workers)))
            return images / (time.perf_counter() - begin)

    return run


def _of_size(dataset: Dataset, samples: int) -> Dataset:
    """The data set as if it had so many samples: each of its own, again and again."""
    split = dataset.splits["train"]
    index = split.index[np.arange(samples) % len(split)]
    return replace(dataset, splits={"train": Split(split.name, split.shards, index)})


def index_cost(samples: int, batch: int) -> dict[str, float]:
    """Seconds and MB until a data set of so many samples gives the order of its first batch.

    In a process of its own: dataset.json read, the index hashed and checked, an epoch permuted.
    """
    with tempfile.TemporaryDirectory(prefix="alexnet-dist-bench-") as scratch:
        folder = Path(scratch) / "data"
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "shard-00000.tar").write_bytes(b"-")
        index = np.zeros(samples, INDEX)
        index["height"] = index["width"] = 256
        np.save(folder / "train" / "samples.npy", index)
        np.save(folder / "mean.npy", np.zeros((256, 256, 3), np.float32))
        shard, samples_npy, mean = (
            described(folder, name)
            for name in ("train/shard-00000.tar", "train/samples.npy", "mean.npy")
        )
        train = {"samples": samples, "index": samples_npy, "shards": [shard]}
        colours = {"mean_rgb": [0] * 3, "eigenvalues": [1] * 3, "eigenvectors": np.eye(3).tolist()}
        meta = {"version": VERSION, "classes": ["one"], "splits": {"train": train}}
        meta |= {"source": {"kind": "zeros"}, "mean_image": mean, **colours}
        (folder / "dataset.json").write_text(json.dumps(meta))
        code = f"from alexnet_dist.bench import data; data.measure_index({str(folder)!r}, {batch})"
        output = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    seconds, megabytes = map(float, output.split())
    return {f"index, order of {samples}, s": seconds, f"index, order of {samples}, MB": megabytes}


def measure_index(folder: str, batch: int) -> None:
    """Of `index_cost`, in its own process: print the seconds, and the MB that memory grew by."""
    config = load_config(["layout.kind=one"])
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc_pid_clear_refs(5)
    begin = time.perf_counter()
    dataset = open_dataset(Path(folder))
    sampler = TrainSampler(config, len(dataset.splits["train"]), dataset.statistics)
    sampler.samples(0, range(batch))
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    print(seconds, (peak - before) / 1e6)
