"""What it costs a rank to read a large data set's index and to order its samples."""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from alexnet_dist.config.load import load_config
from alexnet_dist.data.dataset import VERSION, open_dataset
from alexnet_dist.data.prepare.merge import described
from alexnet_dist.data.sampler import TrainSampler
from alexnet_dist.data.split import INDEX


def index_cost(samples: int, batch: int) -> dict[str, float]:
    """Return the seconds and MB until a data set of so many samples gives its first batch's order.

    In a process of its own, dataset.json is read, the index hashed and checked, an epoch permuted.
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
        code = (
            f"from alexnet_dist.bench import index; index.measure_index({str(folder)!r}, {batch})"
        )
        output = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    seconds, megabytes = map(float, output.split())
    return {f"index, order of {samples}, s": seconds, f"index, order of {samples}, MB": megabytes}


def measure_index(folder: str, batch: int) -> None:
    """Print the seconds and the MB by which memory grew, in `index_cost`'s own process."""
    config = load_config(["layout.kind=one"])
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak (proc_pid_clear_refs(5))
    begin = time.perf_counter()
    dataset = open_dataset(Path(folder))
    sampler = TrainSampler(config, len(dataset.splits["train"]), dataset.statistics)
    sampler.samples(0, range(batch))
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    print(seconds, (peak - before) / 1e6)
