"""How fast the pipelines decode, beside ImageFolder and the bare decoder."""

import functools
import itertools
import json
import operator
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
from alexnet_dist.bench.decoders import differences
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.batch import Decoded
from alexnet_dist.data.dataset import VERSION, Dataset, open_dataset
from alexnet_dist.data.pipelines.dali_pipeline import on_a_gpu
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.prepare.merge import described
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.sampler import TrainSampler
from alexnet_dist.data.split import INDEX, Split
from alexnet_dist.parallel.topology import Topology, connect

_KINDS = ("torch", "dali", "resident")
_FEW = 4  # threads that decode, beside all
_BY_FEW = f"torch, decoded by {_FEW} threads"


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
        train, own = packed["256"].splits["train"], dict[str, list[float]]()
        passes: dict[str, Pass] = {
            "ImageFolder": _image_folder(folder / "train", config, workers, images),
            "bare decode": _bare_decode(train, workers, images),
            "bare DALI": _bare_dali(train, topology.device, workers, config.train.batch, images),
        }
        for kind in _KINDS:
            ours = load_config([flat(config), f"data.pipeline={kind}"])
            make = functools.partial(_pipeline, ours, topology)
            mine = own.setdefault(kind, [])
            passes[f"{kind}, decoded"] = make(packed["256"], images, finish=False, own=mine)
            passes[f"{kind}, beside Python"] = _beside(passes[f"{kind}, decoded"], python=True)
            passes[f"{kind}, beside a process"] = _beside(passes[f"{kind}, decoded"], python=False)
            for stored, dataset in packed.items():
                passes[f"{kind}, {stored}"] = make(dataset, images)
            if kind == "torch" and workers > _FEW:
                few = load_config([flat(ours), f"data.workers={_FEW}"])
                passes[_BY_FEW] = _pipeline(few, topology, packed["256"], images, finish=False)
            if kind == "resident":  # a million images of its own would not fit
                continue
            for name, count in (("1,000", 1_000), ("1,000,000", 1_000_000)):
                large = _of_size(packed["256"], count)
                passes[f"{kind}, of {name}"] = make(large, images)
        runs = in_turn(passes, repeats)
        apart: dict[str, float] = {}
        for stored, dataset in packed.items():
            parts = differences(config, topology, dataset, images).values()
            figures = functools.reduce(operator.add, parts).figures()
            apart |= {f"{stored}: {what}": value for what, value in figures.items()}

    ratios = {}
    for kind in _KINDS:
        for stored in packed:
            ratios[f"{kind}, {stored} / ImageFolder"] = ratio(
                runs, f"{kind}, {stored}", "ImageFolder"
            )
        ratios[f"{kind}, decoded / bare decode"] = ratio(runs, f"{kind}, decoded", "bare decode")
        beside = f"{kind}, beside Python"
        ratios[f"{beside} / decoded"] = ratio(runs, beside, f"{kind}, decoded")
        ratios[f"{beside} / beside a process"] = ratio(runs, beside, f"{kind}, beside a process")
        if kind == "resident":
            continue
        million, thousand = (f"{kind}, of {n}" for n in ("1,000,000", "1,000"))
        ratios[f"{kind}, 1,000,000 / 1,000 samples"] = ratio(runs, million, thousand)
    ratios["dali, decoded / bare DALI"] = ratio(runs, "dali, decoded", "bare DALI")
    if _BY_FEW in runs[0]:
        ratios[f"torch, decoded / by {_FEW} threads"] = ratio(runs, "torch, decoded", _BY_FEW)
    return {
        "ratios": ratios,
        "ceilings": {
            "bare decode, images/s": median(a["bare decode"] for a in runs),
            **{f"{kind}, the loop's own time, µs a batch": median(own[kind]) for kind in _KINDS},
            **index_cost(1_281_167, config.train.batch),
        },
        "differences": apart,
        "machine": machine(workers),
        "unit": "images/s",
        "runs": runs,
    }


def _rate(batches: Iterator[int], own: list[float] | None = None) -> float:
    """Images per second, from the first batch (it waits for the start) to the last.

    Args:
        own: takes the processor's time of this thread, µs a batch.
    """
    next(batches)
    begin, mine = time.perf_counter(), time.thread_time()
    counts = list(batches)
    seconds, mine = time.perf_counter() - begin, time.thread_time() - mine
    if own is not None:
        own.append(mine / len(counts) * 1e6)
    return sum(counts) / seconds


def _pipeline(
    config: Config, topology: Topology, dataset: Dataset, images: int, finish: bool = True,
    own: list[float] | None = None,
) -> Pass:  # fmt: skip
    """One of our pipelines.

    Args:
        finish: up to what conv1 sees.
        own: as `_rate`'s, a number each pass.
    """
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
            return _rate(map(used, pipeline.batches(plan)), own)
        finally:
            pipeline.close()

    return run


def _beside(alone: Pass, python: bool) -> Pass:
    """A pass while Python runs without a pause: in a thread, which wants the lock all the time, or
    in a process of its own, which takes a core as the thread does, and nothing else."""

    def run() -> float:
        ended = False

        def spin() -> None:
            while not ended:
                pass

        def wait() -> None:
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            while not ended:
                time.sleep(0.05)
            process.kill()
            process.wait()

        thread = threading.Thread(target=spin if python else wait, name="spin")
        thread.start()
        try:
            return alone()
        finally:
            ended = True
            thread.join()

    return run


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


def _bare_dali(split: Split, device: torch.device, workers: int, batch: int, images: int) -> Pass:
    """DALI on the same bytes, in memory: whole images, which are thrown away."""
    from nvidia.dali import Pipeline, fn, types

    encoded = [np.frombuffer(split.read(i), np.uint8) for i in range(len(split))]
    endless = itertools.cycle(encoded)
    how: dict[str, Any] = {"device": "cpu"}
    if device.type == "cuda":
        how |= on_a_gpu(device)
    graph = Pipeline(
        batch_size=batch, num_threads=workers, device_id=device.index, prefetch_queue_depth=3
    )
    with graph:
        source = fn.external_source(
            source=lambda: [*itertools.islice(endless, batch)], batch=True, no_copy=True,
            dtype=types.DALIDataType.UINT8, ndim=1,
        )  # fmt: skip
        graph.set_outputs(fn.decoders.image(source, jpeg_fancy_upsampling=True, **how))

    def run() -> float:
        return _rate(len(graph.run()[0]) for _ in range(-(-images // batch) + 1))

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
