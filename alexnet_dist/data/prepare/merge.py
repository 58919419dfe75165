"""Merge shards into a data set: write its index, statistics and description, each durably."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_dist.data.dataset import VERSION
from alexnet_dist.data.prepare.shards import Shard
from alexnet_dist.data.prepare.sources import Source
from alexnet_dist.data.split import INDEX
from alexnet_dist.errors import DatasetError
from alexnet_dist.files import sha256, write, written_aside


def merge(
    source: Source, identity: Mapping[str, Any], shards: Mapping[str, list[Shard]], aside: Path
) -> None:
    """Write the data set's own files from all shards.

    Args:
        identity: of the source, with the options it was packed with.
        aside: the folder that holds the shards.
    """
    meta: dict[str, Any] = {
        "version": VERSION,
        "source": dict(identity),
        "classes": list(source.classes),
        "splits": {},
    }
    refused = [
        entry for split in shards.values() for shard in split for entry in shard.meta["refused"]
    ]
    write_lines(aside / "quarantine.jsonl", map(json.dumps, refused))
    for split, found in shards.items():
        index = np.concatenate([np.empty(0, INDEX), *(shard.index for shard in found)])
        _save(aside / split / "samples.npy", index)
        for number, shard in enumerate(found):
            lines = [f"v1.2 {len(shard.meta['lines'])}", *shard.meta["lines"]]
            write_lines(aside / split / f"shard-{number:05d}.idx", lines)
        meta["splits"][split] = {
            "samples": len(index),
            "class_counts": np.bincount(index["label"], minlength=len(source.classes)).tolist(),
            "index": described(aside, f"{split}/samples.npy"),
            "shards": [
                {"file": f"{split}/shard-{number:05d}.tar"}
                | {"size": shard.meta["size"], "sha256": shard.meta["sha256"]}
                for number, shard in enumerate(found)
            ],
        }
    mean_image, colours = colour_statistics(shards["train"])
    _save(aside / "mean.npy", mean_image)
    meta |= {"mean_image": described(aside, "mean.npy"), **colours}
    write_lines(aside / "dataset.json", [json.dumps(meta, indent=1)])


def colour_statistics(
    shards: Sequence[Shard],
) -> tuple[npt.NDArray[np.float32], dict[str, list[Any]]]:
    """Compute the mean image, mean RGB, and eigenvalues and eigenvectors of the covariance.

    Sums are over integers, and so exact in any order.

    Returns:
        The mean image, (h, w, 3) float32, and what dataset.json holds: row i of `eigenvectors`
        belongs to eigenvalue i, the largest first, and its largest component is positive.
    """
    whole = [shard for shard in shards if len(shard.index)]
    if not whole:
        raise DatasetError("none of the training images could be packed")
    images = sum(len(shard.index) for shard in whole)
    sums = np.zeros((1, 1, 3), np.int64)
    products = np.zeros((3, 3), np.int64)
    for shard in whole:
        own_sums, own_products = shard.colour_sums()
        sums, products = sums + own_sums, products + own_products
    pixels = images * sums.shape[0] * sums.shape[1]
    mean = sums.sum((0, 1)) / pixels
    covariance = products / pixels - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(min=0), vectors.T[::-1]
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1))
    return (sums / images).astype(np.float32), {
        "mean_rgb": mean.tolist(),
        "eigenvalues": values.tolist(),
        "eigenvectors": (vectors * signs).tolist(),
    }


def described(folder: Path, name: str) -> dict[str, Any]:
    """Return a file's entry in dataset.json."""
    path = folder / name
    return {"file": name, "size": path.stat().st_size, "sha256": sha256(path)}


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file durably."""
    write(path, "".join(f"{line}\n" for line in lines).encode())


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file durably."""
    with written_aside(path) as aside:
        np.save(aside, array)
