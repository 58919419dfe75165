"""Sources that hold pixels: CIFAR-10's pickles and Fashion-MNIST's IDX files."""

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_dist.config.load import configs_folder
from alexnet_dist.data.prepare.sources import Item, Pixels, Source, needed
from alexnet_dist.data.prepare.tars import LARGEST_MEMBER, open_tar, read_member
from alexnet_dist.errors import DatasetError, one_line
from alexnet_dist.files import LONGEST_SIDE, MOST_PIXELS, check_opcodes, opened, read_bytes

_MOST = 2**28  # values in an IDX file; Fashion-MNIST has 47 million
_MOST_IMAGES = 2**20  # images in an IDX file; Fashion-MNIST has 60,000
_MOST_OPCODES = 2**18  # opcodes in a batch of CIFAR-10, which has 50,000
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package installs it
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip


def cifar10(path: Path, validation: float = 0) -> Source:
    """List CIFAR-10's python version: `cifar-10-batches-py`, or the folder that holds it or its
    tar.gz.

    Args:
        validation: share of its test images that becomes `val`.
    """
    read = _reader(path)

    def batch(name: str) -> list[Item]:
        values = read_pickle(read(name), name)
        pixels, labels = values.get(b"data"), values.get(b"labels")
        if (
            not (isinstance(pixels, np.ndarray) and pixels.shape[1:] == (3072,))
            or not isinstance(labels, list)
            or len(labels) != len(pixels)
        ):
            raise DatasetError(f"{path}: {name} is not a batch of CIFAR-10")
        if not all(isinstance(label, int) and 0 <= label < len(classes) for label in labels):
            raise DatasetError(f"{path}: {name} has a label outside its {len(classes)} classes")
        return _items(name, labels, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))

    names = read_pickle(read("batches.meta"), "batches.meta").get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DatasetError(f"{path}: batches.meta names no classes")
    classes = tuple(name.decode("utf-8", "replace") for name in names)
    train = [item for number in range(1, 6) for item in batch(f"data_batch_{number}")]
    source = Source("cifar10", classes, {"train": train, "test": batch("test_batch")})
    return _with_validation(source, validation) if validation else source


def _items(file: str, labels: Iterable[int], images: Pixels) -> list[Item]:
    """List the images of a file, named by their number in it.

    Args:
        images: (n, h, w) or (n, h, w, 3).
    """
    return [
        Item(f"{file}/{number:05d}", int(label), pixels=image)
        for number, (label, image) in enumerate(zip(labels, images, strict=True))
    ]


def _with_validation(source: Source, share: float) -> Source:
    """Move a share of the test split, the same of each class, to `val`: scikit-learn's
    stratified split with random state 0. Raises DatasetError where that is impossible."""
    from sklearn.model_selection import train_test_split

    items = source.splits["test"]
    places, labels = range(len(items)), [item.label for item in items]
    try:
        test, val = train_test_split(places, test_size=share, random_state=0, stratify=labels)
    except ValueError as error:
        raise DatasetError(f"--validation {share:g}: {error}") from error
    cut = {"test": [items[i] for i in test], "val": [items[i] for i in val]}
    return replace(source, splits={**source.splits, **cut})


def _reader(path: Path) -> Callable[[str], bytes]:
    """Return a function that reads a file of CIFAR-10 by its name."""
    packed, inside = path / "cifar-10-python.tar.gz", path / "cifar-10-batches-py"
    root = inside if inside.is_dir() else path
    if (root / "batches.meta").is_file() or not packed.is_file():
        which = "of CIFAR-10's python version"
        return lambda name: read_bytes(needed(root / name, which), LARGEST_MEMBER)
    tar = open_tar(packed)

    def read(name: str) -> bytes:
        return read_member(tar, f"cifar-10-batches-py/{name}", packed)

    return read


class _Bytes:
    """Replaces NumPy's array while CIFAR-10 is unpickled: keeps its state and runs nothing."""

    state: tuple[Any, ...] = ()

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _OnlyArrays(pickle.Unpickler):
    """Unpickles dictionaries, lists, numbers, bytes, and arrays as `_Bytes`; refuses the rest."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        # Bytes that may still be made from text: a pickle can use one text any number of times.
        self.left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if module.removeprefix("numpy.").split(".")[-1] == "multiarray" and name == "_reconstruct":
            return lambda *_: _Bytes()
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return _Bytes
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return self._as_bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def _as_bytes(self, text: str, _: object) -> bytes:
        self.left -= len(text)
        if self.left < 0:
            raise pickle.UnpicklingError("more bytes than its own length")
        return text.encode("latin1")


def read_pickle(content: bytes, name: str) -> dict[bytes, Any]:
    """Read a pickled dictionary of CIFAR-10, running none of the code that a pickle may hold.

    Raises DatasetError for any other pickle; arrays must be of bytes, in two dimensions.
    """
    try:
        check_opcodes(io.BytesIO(content), _MOST_OPCODES)
        values = _OnlyArrays(content).load()
        if not isinstance(values, dict):
            raise pickle.UnpicklingError("it is not a dictionary")
        return {
            key: _array(value) if isinstance(value, _Bytes) else value
            for key, value in values.items()
        }
    except Exception as error:  # a pickle can fail in any way
        raise DatasetError(f"{name} is not a pickle of CIFAR-10: {one_line(error)}") from error


def _array(pickled: _Bytes) -> Pixels:
    _, shape, _, fortran, content = pickled.state
    rows, width = shape
    if fortran or not isinstance(content, bytes):
        raise pickle.UnpicklingError("an array of another kind")
    return np.frombuffer(content, np.uint8).reshape(rows, width)


def fashion_mnist(path: Path) -> Source:
    """List the images in the four IDX files of Fashion-MNIST, gzipped or not."""
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(_gzipped_or_plain(path, f"{stem}-images-idx3-ubyte"), dims=3)
        labels_file = _gzipped_or_plain(path, f"{stem}-labels-idx1-ubyte")
        labels = read_idx(labels_file, dims=1)
        if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_MNIST_CLASSES):
            raise DatasetError(
                f"{labels_file}: {len(labels)} labels up to {labels.max(initial=0)}, but there "
                f"are {len(images)} images of {len(FASHION_MNIST_CLASSES)} classes"
            )
        splits[split] = _items(stem, labels, images)
    return Source("fashion_mnist", FASHION_MNIST_CLASSES, splits)


def read_idx(path: Path, dims: int) -> Pixels:
    """Read an IDX file of bytes (LeCun's format), gzipped or not; raise DatasetError."""
    try:
        with opened(path) as plain, gzip.open(plain) if path.suffix == ".gz" else plain as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
                raise DatasetError(f"{path}: not an IDX file of bytes in {dims} dimensions")
            shape = struct.unpack(f">{dims}I", header[4:])
            _check_shape(path, shape)
            raw = file.read(math.prod(shape) + 1)  # no more, however much a gzip unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if len(raw) != math.prod(shape):
        more = " or more" if len(raw) > math.prod(shape) else ""
        raise DatasetError(f"{path}: {len(raw)} values{more}, but its header says {shape}")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Raise DatasetError where an IDX header names too many images, or impossible sizes."""
    images, *pixels = shape
    if math.prod(max(1, size) for size in shape) > _MOST or images > _MOST_IMAGES:
        raise DatasetError(
            f"{path}: its header says {shape}: more than {_MOST:,} values or {_MOST_IMAGES:,} "
            "images"
        )
    if 0 in pixels or max(pixels, default=1) > LONGEST_SIDE or math.prod(pixels) > MOST_PIXELS:
        raise DatasetError(
            f"{path}: its header says {shape}: images have 1 to {LONGEST_SIDE:,} rows and columns, "
            f"and at most {MOST_PIXELS:,} pixels"
        )


def _gzipped_or_plain(path: Path, name: str) -> Path:
    """Return the path of a file that may be gzipped; raise DatasetError where it is missing."""
    for candidate in (path / f"{name}.gz", path / name):
        if candidate.is_file():
            return candidate
    raise DatasetError(
        f"{path} has neither {name}.gz nor {name}: name the folder of Fashion-MNIST's four files "
        f"(Debian: the package dataset-fashion-mnist, in {FASHION_MNIST}; a sample: "
        f"{configs_folder()}/fashion-mnist-sample)"
    )
