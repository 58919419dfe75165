"""Cut the sample of Fashion-MNIST that lies in configs/fashion-mnist-sample.

    apt-get install dataset-fashion-mnist
    python configs/fashion-mnist-sample/cut.py /usr/share/datasets/fashion-mnist OUT

The first 1,000 training and 200 test images of each class, in their order. The same files again
give the same bytes.
"""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np

from alexnet_dist.data.prepare.arrays import read_idx


def cut(source: Path, out: Path) -> None:
    for stem, per_class in (("train", 1000), ("t10k", 200)):
        images = read_idx(source / f"{stem}-images-idx3-ubyte.gz", dims=3)
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz", dims=1)
        firsts = [np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]
        chosen = np.sort(np.concatenate(firsts))
        for name, values in (("images-idx3", images[chosen]), ("labels-idx1", labels[chosen])):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            packed = gzip.compress(header + values.tobytes(), compresslevel=9, mtime=0)
            (out / f"{stem}-{name}-ubyte.gz").write_bytes(packed)


if __name__ == "__main__":
    cut(Path(sys.argv[1]), Path(sys.argv[2]))
