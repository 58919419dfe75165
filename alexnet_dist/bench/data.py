"""`bench data`: how fast the pipelines decode, beside ImageFolder and the bare decoders."""

import functools
import operator
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from alexnet_dist.bench import Pass, Result, in_turn, machine, ratio, references
from alexnet_dist.bench.decoders import differences
from alexnet_dist.bench.index import index_cost
from alexnet_dist.config.load import load_config, overridden
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Decoded
from alexnet_dist.data.dataset import Dataset, open_dataset
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.sampler import TrainSampler
from alexnet_dist.data.split import Split
from alexnet_dist.parallel.topology import Topology, connect

_KINDS = ("torch", "dali", "resident")
_FEW = 4  # threads that decode, in a pass besides the one with all
_BY_FEW = f"torch, decoded by {_FEW} threads"
_LARGE = 4  # batches at once, in a pass of DALI's that shows what it costs to decode one by one
_AT_ONCE = f"dali, decoded {_LARGE} batches at once"


def bench_data(folder: Path, images: int, repeats: int, overrides: Sequence[str]) -> Result:
    """Time every pipeline on the images of a folder, and ImageFolder and the bare decoders.

    Args:
        folder: train/CLASS/*, or CLASS/*.
        images: images of a pass.
        repeats: passes of each.
        overrides: key=value arguments of the config.

    Returns:
        ratios (medians of pairs), ceilings (images/s), differences between the pipelines' pixels
        (grey levels), machine, and every pass's images/s.
    """
    with tempfile.TemporaryDirectory(prefix="alexnet-dist-bench-") as scratch:
        packed = _packed(folder, Path(scratch))
        data = f"data.path={packed['256'].folder}"
        config = load_config(["layout.kind=one", data, *overrides])
        topology = connect(config)
        workers = config.data.workers or torch.get_num_threads()
        own: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        train, batch = packed["256"].splits["train"], config.train.batch
        passes: dict[str, Pass] = {
            "ImageFolder": references.image_folder(folder, config, workers, images),
            "bare decode": references.bare_decode(train, workers, images),
            "bare DALI": references.bare_dali(train, topology.device, workers, batch, images),
        }
        for kind in _KINDS:
            ours = overridden(config, f"data.pipeline={kind}")
            passes |= _passes_of(ours, topology, packed, images, own[kind])
        runs = in_turn(passes, repeats)
        apart: dict[str, float] = {}
        for stored, dataset in packed.items():
            parts = differences(config, topology, dataset, images).values()
            figures = functools.reduce(operator.add, parts).figures()
            apart |= {f"{stored}: {what}": value for what, value in figures.items()}
    return {
        "ratios": _ratios(runs, packed),
        "ceilings": {
            "bare decode, images/s": statistics.median(a["bare decode"] for a in runs),
            **{
                f"{kind}, the loop's own time, µs a batch": statistics.median(own[kind])
                for kind in _KINDS
            },
            **index_cost(1_281_167, config.train.batch),
        },
        "differences": apart,
        "machine": machine(workers),
        "unit": "images/s",
        "runs": runs,
    }


def _packed(folder: Path, scratch: Path) -> dict[str, Dataset]:
    """Pack a folder's images at canvas size and as they are; return both data sets by name."""
    packed = {}
    for name, keep in (("256", False), ("kept", True)):
        prepare("folder", folder, scratch / name, Options(keep=keep))
        packed[name] = open_dataset(scratch / name)
    return packed


def _passes_of(
    config: Config, topology: Topology, packed: Mapping[str, Dataset], images: int,
    own: list[float],
) -> dict[str, Pass]:  # fmt: skip
    """Return the passes of the config's pipeline: decoding alone, and beside a busy thread and a
    busy process; whole batches from images stored at canvas size and larger, and of small and large
    data sets.

    Args:
        packed: the data set by how its images are stored.
        own: as `references.rate`'s.
    """
    kind = config.data.pipeline
    make = functools.partial(_pipeline, config, topology)
    decoded = make(packed["256"], images, finish=False, own=own)
    passes = {
        f"{kind}, decoded": decoded,
        f"{kind}, beside Python": _beside(decoded, python=True),
        f"{kind}, beside a process": _beside(decoded, python=False),
        **{f"{kind}, {stored}": make(dataset, images) for stored, dataset in packed.items()},
    }
    if kind == "torch" and (config.data.workers or torch.get_num_threads()) > _FEW:
        few = overridden(config, f"data.workers={_FEW}")
        passes[_BY_FEW] = _pipeline(few, topology, packed["256"], images, finish=False)
    if kind == "dali":
        large = overridden(config, f"train.batch={_LARGE * config.train.batch}")
        passes[_AT_ONCE] = _pipeline(large, topology, packed["256"], images, finish=False)
    if kind != "resident":  # it could not keep a million images
        for name, count in (("1,000", 1_000), ("1,000,000", 1_000_000)):
            passes[f"{kind}, of {name}"] = make(_of_size(packed["256"], count), images)
    return passes


def _ratios(runs: Sequence[Mapping[str, float]], packed: Iterable[str]) -> dict[str, float]:
    """Return the ratios that are claimed, medians of pairs."""
    ratios = {}
    for kind in _KINDS:
        decoded, beside = f"{kind}, decoded", f"{kind}, beside Python"
        for stored in packed:
            name = f"{kind}, {stored}"
            ratios[f"{name} / ImageFolder"] = ratio(runs, name, "ImageFolder")
        ratios[f"{decoded} / bare decode"] = ratio(runs, decoded, "bare decode")
        ratios[f"{beside} / decoded"] = ratio(runs, beside, decoded)
        ratios[f"{beside} / beside a process"] = ratio(runs, beside, f"{kind}, beside a process")
        if kind != "resident":
            million, thousand = (f"{kind}, of {n}" for n in ("1,000,000", "1,000"))
            ratios[f"{kind}, 1,000,000 / 1,000 samples"] = ratio(runs, million, thousand)
    ratios["dali, decoded / bare DALI"] = ratio(runs, "dali, decoded", "bare DALI")
    ratios[f"dali, decoded / {_LARGE} batches at once"] = ratio(runs, "dali, decoded", _AT_ONCE)
    if _BY_FEW in runs[0]:
        ratios[f"torch, decoded / by {_FEW} threads"] = ratio(runs, "torch, decoded", _BY_FEW)
    return ratios


def _pipeline(
    config: Config, topology: Topology, dataset: Dataset, images: int, finish: bool = True,
    own: list[float] | None = None,
) -> Pass:  # fmt: skip
    """Return a pass of one of our pipelines.

    Args:
        finish: whether batches are made as conv1 sees them, rather than only decoded.
        own: as `references.rate`'s, a number for each pass.
    """
    sampler = TrainSampler(config, len(dataset.splits["train"]), dataset.statistics)
    size = config.train.batch
    steps = -(-images // size) + 1

    def used(decoded: Decoded) -> int:
        return len(decoded.batch().windows if finish else decoded.metadata)

    def run() -> float:
        pipeline = make_pipeline(config, topology, dataset, "train")
        try:
            plan = sampler.plan(0, steps, range(size))
            return references.rate(map(used, pipeline.batches(plan)), own)
        finally:
            pipeline.close()

    return run


def _beside(alone: Pass, python: bool) -> Pass:
    """Return a pass beside which Python runs without a pause: in a thread, which wants Python's
    lock all the time, or in another process, which takes a core as the thread does, but no lock."""

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


def _of_size(dataset: Dataset, samples: int) -> Dataset:
    """Return the data set as if it had so many samples, repeating its own."""
    split = dataset.splits["train"]
    index = split.index[np.arange(samples) % len(split)]
    return replace(dataset, splits={"train": Split(split.name, split.shards, index)})
