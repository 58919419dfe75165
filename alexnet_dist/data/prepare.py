"""Turn a source of images into a packed data set (`dataset.py` says how one looks)."""

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.io import encode_png

from alexnet_dist.data.dataset import INDEX, VERSION, open_dataset, sha256
from alexnet_dist.errors import DatasetError

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SAMPLES_PER_SHARD = 5000

Pixels = npt.NDArray[np.uint8]


def prepare_fashion_mnist(path: Path, out: Path) -> str:
    """Pack the four IDX files of Fashion-MNIST, gzipped or not, at their 28 × 28, as PNG.

    Does nothing where `out` was already made of the same files.

    Returns:
        One line about what was done.

    Raises:
        DatasetError: a file is missing or is not what its header says; nothing is left in `out`.
    """
    names = {
        split: (
            _either(path, f"{stem}-images-idx3-ubyte"),
            _either(path, f"{stem}-labels-idx1-ubyte"),
        )
        for split, stem in (("train", "train"), ("test", "t10k"))
    }
    files = [file for pair in names.values() for file in pair]
    source = {"kind": "fashion_mnist", "sha256": {file.name: sha256(file) for file in files}}
    if out.exists():
        made_of = open_dataset(out, verify_hashes=True).source
        if made_of != source:
            raise DatasetError(
                f"{out} holds a data set of other files: remove it, or name another folder"
            )
        return f"{out}: already prepared from these files, and whole"
    splits = {}
    for split, (images_file, labels_file) in names.items():
        images, labels = read_idx(images_file, dims=3), read_idx(labels_file, dims=1)
        if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_MNIST_CLASSES):
            raise DatasetError(
                f"{labels_file}: {len(labels)} labels up to {labels.max(initial=0)}, for "
                f"{len(images)} images of {len(FASHION_MNIST_CLASSES)} classes"
            )
        splits[split] = (images, labels)
    try:
        _pack(splits, FASHION_MNIST_CLASSES, source, out)
    except OSError as error:
        raise DatasetError(f"{out} cannot be written: {error}") from error
    counts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in splits.items())
    return f"{out}: packed {counts} images of {len(FASHION_MNIST_CLASSES)} classes"


def read_idx(path: Path, dims: int) -> Pixels:
    """An IDX file of bytes (LeCun's format), gzipped or not; raises DatasetError."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    header = 4 + 4 * dims
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dims]):
        raise DatasetError(f"{path}: not an IDX file of bytes in {dims} dimensions")
    shape = struct.unpack(f">{dims}I", raw[4:header])
    if len(raw) - header != np.prod(shape, dtype=object):
        raise DatasetError(f"{path}: {len(raw) - header} values, its header says {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _either(path: Path, name: str) -> Path:
    for candidate in (path / f"{name}.gz", path / name):
        if candidate.is_file():
            return candidate
    raise DatasetError(
        f"{path} has neither {name}.gz nor {name}: name the folder of Fashion-MNIST's four files "
        "(Debian: the package dataset-fashion-mnist, in /usr/share/datasets/fashion-mnist)"
    )


def _pack(
    splits: dict[str, tuple[Pixels, Pixels]],
    classes: Sequence[str],
    source: dict[str, Any],
    out: Path,
) -> None:
    """Write a packed data set aside, and put it in place when it is whole."""
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    meta: dict[str, Any] = {
        "version": VERSION,
        "source": source,
        "classes": list(classes),
        "splits": {},
    }
    for split, (images, labels) in splits.items():
        (aside / split).mkdir(parents=True)
        starts = range(0, len(images), _SAMPLES_PER_SHARD)
        parts = [
            _write_shard(aside / split, number, start, images, labels)
            for number, start in enumerate(starts)
        ]
        np.save(aside / split / "samples.npy", np.concatenate([np.empty(0, INDEX), *parts]))
        meta["splits"][split] = {
            "samples": len(labels),
            "class_counts": np.bincount(labels, minlength=len(classes)).tolist(),
            "index": _described(aside, f"{split}/samples.npy"),
            "shards": [_described(aside, f"{split}/shard-{n:05d}.tar") for n in range(len(starts))],
        }
    mean_image, colours = colour_statistics(splits["train"][0])
    np.save(aside / "mean.npy", mean_image)
    meta |= {"mean_image": _described(aside, "mean.npy"), **colours}
    with (aside / "dataset.json").open("w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(out)


def _write_shard(
    folder: Path, number: int, start: int, images: Pixels, labels: Pixels
) -> npt.NDArray[np.void]:
    """Write one shard; its part of the index. The same images give the same bytes."""
    stop = min(start + _SAMPLES_PER_SHARD, len(images))
    index = np.zeros(stop - start, INDEX)
    with tarfile.open(folder / f"shard-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in range(start, stop):
            encoded = encode_png(torch.tensor(images[sample])[None]).numpy().tobytes()
            offset = _add(tar, f"{sample:08d}.png", encoded)
            _add(tar, f"{sample:08d}.cls", str(labels[sample]).encode())
            index[sample - start] = (
                number, offset, len(encoded), labels[sample], zlib.crc32(encoded),
            )  # fmt: skip
    return index


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a member; the offset of its content in the archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return offset


def _described(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return {"file": name, "size": path.stat().st_size, "sha256": sha256(path)}


def colour_statistics(
    images: Pixels,
) -> tuple[npt.NDArray[np.float32], dict[str, list[Any]]]:
    """Mean image, mean RGB, and the covariance's eigenvalues and vectors, over all pixels.

    Sums are of integers, so that they are exact in any order.

    Args:
        images: (n, h, w) grey.

    Returns:
        (h, w, 3) float32, and what dataset.json keeps; row i of `eigenvectors` belongs to
        eigenvalue i, largest first, its largest component positive.
    """
    total = images.sum(axis=0, dtype=np.int64)
    mean_image = np.repeat((total / len(images)).astype(np.float32)[..., None], 3, axis=2)
    mean = total.sum() / images.size
    square = sum(int(np.square(part, dtype=np.int64).sum()) for part in images) / images.size
    covariance = np.full((3, 3), square - mean * mean)  # grey: three equal colours
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(min=0), vectors.T[::-1]
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1))
    return mean_image, {
        "mean_rgb": [mean] * 3,
        "eigenvalues": values.tolist(),
        "eigenvectors": (vectors * signs).tolist(),
    }
