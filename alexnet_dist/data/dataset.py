"""The packed data set: tar shards that WebDataset's tools read, with an index of our own.

    OUT/dataset.json            classes, counts, colour statistics, size and SHA-256 of every file
    OUT/mean.npy                the training split's mean image, (h, w, 3) float32, grey levels
    OUT/SPLIT/samples.npy       one record a sample: INDEX below
    OUT/SPLIT/shard-00000.tar   00000000.png, 00000000.cls, 00000001.png, …

A sample is read by one `pread`, and its checksum compared before it is decoded: every JPEG
decoder takes a flipped byte in silence. Nothing here is a pickle.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from alexnet_dist.config.from_data import HELD_OUT, NO_SPLIT
from alexnet_dist.config.load import configs_folder
from alexnet_dist.config.schema import Config
from alexnet_dist.data.header import size_of
from alexnet_dist.errors import ConfigError, DatasetError, looked_in
from alexnet_dist.files import MOST_PIXELS, json_object, opened, read_bytes, sha256

if TYPE_CHECKING:  # what is wrong with a data set is said before torch is loaded
    from alexnet_dist.parallel.topology import Topology

VERSION = 2
# Of each sample: the shard, where its encoded image begins in it and how long that is (bytes), its
# class, the checksum of the encoded image, and the image's height and width (pixels).
INDEX = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4"), ("crc32", "<u4"),
     ("height", "<u2"), ("width", "<u2")]
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
# Names of folders of a split's images, in any case.
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_LOOKED_AT = 10_000  # names, to tell a folder of images from others
Encoded = npt.NDArray[np.uint8]  # (bytes,), a JPEG or PNG
IdArray = npt.NDArray[np.int64]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Over all pixels of the training split, grey levels of 0–255.

    Attributes:
        mean_image: (h, w, 3) float32.
        mean_rgb: (3,).
        eigenvalues: (3,), of the covariance of red, green and blue, largest first.
        eigenvectors: (3, 3), row i belongs to eigenvalue i.
    """

    mean_image: npt.NDArray[np.float32]
    mean_rgb: npt.NDArray[np.float64]
    eigenvalues: npt.NDArray[np.float64]
    eigenvectors: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Samples of one split; safe to read from several threads."""

    name: str
    shards: tuple[Path, ...]
    index: npt.NDArray[np.void]
    sha256s: tuple[str, ...] = ()  # of the shards
    # Shards that are open, and their descriptors, −1 of the others: a copy has files of its own.
    _files: dict[int, BinaryIO] = field(default_factory=dict, init=False, repr=False)
    _descriptors: npt.NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_descriptors", np.full(len(self.shards), -1, np.int32))

    def __len__(self) -> int:
        return len(self.index)

    def labels(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,): the classes of (n,) samples."""
        return self.index["label"][ids].astype(np.int64)

    def uniform(self, side: int) -> bool:
        """Whether every image is a square of this side."""
        return bool((self.index["height"] == side).all() and (self.index["width"] == side).all())

    def check_shard(self, number: int) -> None:
        """Raises DatasetError where a shard's bytes are not those that were packed."""
        path = self.shards[number]
        _compare_hash(path, sha256(path), self.sha256s[number])

    def read(self, sample: int) -> bytearray:
        """A sample's encoded image, a JPEG or PNG of the size that the index says.

        Raises DatasetError where it is not, or its checksum does not match: by the header alone, so
        that no decoder takes memory or time for more than was packed.
        """
        shard, offset, size, _, crc32, *pixels = self.index[sample].tolist()
        encoded = bytearray(size)
        try:
            os.preadv(self._file(shard), [encoded], offset)
        except OSError as error:
            raise DatasetError(
                f"{self.shards[shard]}: sample {sample} of split {self.name!r} cannot be read "
                f"({error.strerror})"
            ) from error
        if zlib.crc32(encoded) != crc32:
            raise DatasetError(
                f"{self.shards[shard]}: sample {sample} of split {self.name!r} (offset {offset}, "
                f"{size} bytes) does not match its checksum"
            )
        self._check_header(sample, encoded, *pixels)
        return encoded

    def _check_header(self, sample: int, encoded: bytearray, height: int, width: int) -> None:
        try:
            found = size_of(encoded)
            if found != (height, width) or height * width > MOST_PIXELS:
                raise ValueError(
                    f"its header says {found[1]} × {found[0]} pixels, the index {width} × {height},"
                    f" of at most {MOST_PIXELS:,}"
                )
        except ValueError as error:
            raise undecodable(self, [sample], error) from None

    def read_whole(self, samples: IdArray) -> tuple[IdArray, list[Encoded]]:
        """As `whole`; it says so where others stand in."""
        found, encoded, why = self.whole(samples)
        for words in why.values():
            log.warning(words)
        return found, encoded

    def whole(self, samples: IdArray) -> tuple[IdArray, list[Encoded], dict[int, str]]:
        """Samples and their encoded images, read in one call that does not hold Python's lock.

        Where one is damaged, the next one that is whole stands in for it; what is to be said of
        that comes by its place.

        Raises DatasetError where every sample is damaged.
        """
        from alexnet_dist.data import loops

        rows = self.index[samples]
        ends = rows["size"].cumsum(dtype=np.int64)
        starts = np.concatenate([[0], ends])
        buffer, sound = np.empty(starts[-1], np.uint8), np.zeros(len(rows), np.bool_)
        if loops.can_read():
            loops.read(rows, self._opened(rows["shard"]), starts, buffer, sound)
        encoded = [buffer[a:b] for a, b in itertools.pairwise(starts.tolist())]
        found, why = samples.copy(), dict[int, str]()
        for place in np.flatnonzero(~sound).tolist():
            found[place], stand_in, words = self._next_whole(int(samples[place]))
            encoded[place] = np.frombuffer(stand_in, np.uint8)
            if words:
                why[place] = words
        return found, encoded, why

    def _next_whole(self, sample: int) -> tuple[int, bytearray, str]:
        """A sample by `read`; the next whole one, and why, where it is damaged."""
        try:
            return sample, self.read(sample), ""
        except DatasetError as error:
            for ahead in range(1, len(self)):
                other = (sample + ahead) % len(self)
                with contextlib.suppress(DatasetError):
                    encoded = self.read(other)
                    return other, encoded, f"{error}: sample {other} stands in for it"
            raise DatasetError(f"{error}; nor is any other sample whole") from error

    def _opened(self, shards: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
        """Descriptors by shard, of which these are open, but for those that cannot be."""
        for shard in np.unique(shards[self._descriptors[shards] < 0]).tolist():
            with contextlib.suppress(OSError):  # `read` says so
                self._file(shard)
        return self._descriptors

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            new = opened(self.shards[shard])
            if self._files.setdefault(shard, new) is not new:
                new.close()  # another thread was first
            self._descriptors[shard] = self._files[shard].fileno()
        return self._files[shard].fileno()

    def close(self) -> None:
        self._descriptors[:] = -1
        while self._files:
            self._files.popitem()[1].close()


def undecodable(split: Split, ids: Sequence[int], error: Exception) -> DatasetError:
    """What to say of samples whose checksums are right and whose images are not."""
    which = f"sample {ids[0]}" if len(ids) == 1 else f"a sample among {', '.join(map(str, ids))}"
    return DatasetError(
        f"{split.shards[0].parent}: {which} cannot be decoded, though as it was packed "
        f"({' '.join(str(error).split())[:200]}): see `alexnet-dist inspect`"
    )


@dataclass(frozen=True)
class Dataset:
    """An opened packed data set.

    Attributes:
        digest: SHA-256 of dataset.json, which holds those of all other files.
        source: what it was made of.
        resident: what `data.pipeline=resident` keeps of it, as long as it is open.
    """

    folder: Path
    digest: str
    source: Mapping[str, Any]
    classes: tuple[str, ...]
    statistics: Statistics
    splits: Mapping[str, Split]
    resident: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


def open_dataset(folder: Path, verify_hashes: bool = False) -> Dataset:
    """Open a packed data set; raises DatasetError unless every file is what dataset.json says.

    Sizes of all files, and hashes of all but the shards, are always compared.

    Args:
        verify_hashes: hash the shards too (about a second for a gigabyte in memory).
    """
    path = folder / "dataset.json"
    try:
        text = read_bytes(path)
        meta = json_object(text)
    except FileNotFoundError:
        raise _missing(folder) from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    try:
        if meta["version"] != VERSION:
            raise DatasetError(
                f"{path}: version {meta['version']!r}, and this program reads {VERSION}: "
                "prepare the data set again"
            )
        made_of = dict(meta["source"])
        names = str(made_of["kind"]), *meta["splits"]
        if not all(re.fullmatch(r"[A-Za-z0-9_-]{1,99}", name) for name in names):
            raise ValueError(f"names {names}")
        classes = tuple(str(name) for name in meta["classes"])
        statistics = Statistics(
            _load(folder, meta["mean_image"], np.dtype("<f4"), dims=3),
            *(np.array(meta[k], float) for k in ("mean_rgb", "eigenvalues", "eigenvectors")),
        )
        splits = {
            str(name): _open_split(folder, str(name), split, len(classes))
            for name, split in meta["splits"].items()
        }
        for split in splits.values():
            for number in range(len(split.shards) if verify_hashes else 0):
                split.check_shard(number)
    except DatasetError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}): prepare the data set again") from error
    colours = statistics.mean_rgb, statistics.eigenvalues, statistics.eigenvectors
    sound = [a.shape for a in colours] == [(3,), (3,), (3, 3)] and all(map(_finite, colours))
    if not sound or statistics.mean_image.shape[2] != 3 or not _finite(statistics.mean_image):
        raise DatasetError(f"{path}: colour statistics are not numbers: prepare it again")
    digest = hashlib.sha256(text).hexdigest()
    return Dataset(folder, digest, made_of, classes, statistics, splits)


def _missing(folder: Path) -> DatasetError:
    """What to say of a folder that is no packed data set. It may be a user's own: nothing of it is
    ever to be removed."""
    path = folder / "dataset.json"
    if images := _images_in(folder):
        above = (folder, *folder.parents)
        root = next((p.parent for p in above if _split_of(p) == "train"), folder)
        root = root if root.name else root.resolve()
        line = ["alexnet-dist", "prepare", "folder", f"{root}", f"{root}-packed"]
        if not {"val", "test"} & {_split_of(p) for p in root.iterdir()}:
            line += ["--validation", "0.1"]
        return DatasetError(
            f"{folder}{looked_in(folder)}: these are images ({images}), not a packed data set: "
            f"pack them with `{shlex.join(line)}`, where each class has its own folder, and set "
            f"data.path={root}-packed"
        )
    demo = f"fashion_mnist {configs_folder()}/fashion-mnist-sample"
    source = demo if folder == Path("data/demo") else "SOURCE PATH"
    out = "OUT` and set data.path=OUT" if folder.exists() else f"{folder}`"
    return DatasetError(
        f"{path} is missing{looked_in(path)}: make the data set with `alexnet-dist prepare "
        f"{source} {out}, or set data.path to where it lies"
    )


def _split_of(path: Path) -> str | None:
    return SPLIT_FOLDERS.get(path.name.lower())


def _images_in(folder: Path) -> str:
    """The first image that a short look finds below a folder, as its path there; else nothing."""
    left = _LOOKED_AT
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names)[:left]:
            drawn = name == "contact-sheet.png"  # by `inspect`
            if name.lower().endswith(IMAGE_SUFFIXES) and not drawn:
                return f"{Path(root, name).relative_to(folder)}"
        left -= len(folders) + len(names)
        if left <= 0:
            break
    return ""


def _finite(array: npt.NDArray[np.floating]) -> bool:
    return bool(np.isfinite(array).all())


def verify_shards(dataset: Dataset, topology: "Topology") -> None:
    """Hash every shard, each rank its share. Collective: ranks meet after each shard, so that many
    on a slow disk outlast no timeout.

    Raises DatasetError, on every rank, of the first that is not what was packed.
    """
    every = [(split, n) for split in dataset.splits.values() for n in range(len(split.shards))]
    shards = [*{split.shards[n]: (split, n) for split, n in every}.values()]  # each once
    for first in range(0, len(shards), topology.world_size):
        wrong = ""
        own = first + topology.global_rank
        try:
            for split, number in shards[own : own + 1]:
                split.check_shard(number)
        except DatasetError as error:
            wrong = str(error)
        agree(wrong, topology)


def agree(wrong: str, topology: "Topology") -> None:
    """Raises DatasetError on every rank where one has found something wrong. Collective."""
    if said := topology.first_said(wrong):
        error = DatasetError(said)
        error.on_every_rank = True
        raise error


def open_for(config: Config, trained: Path | None = None) -> Dataset:
    """The data set a config names; raises DatasetError, or ConfigError where they do not agree.

    Args:
        trained: the checkpoint of the network that is to see it; None: one that is to be trained.
    """
    dataset = open_dataset(Path(config.data.path))
    if config.data.hold_out and config.data.train_split in dataset.splits:
        whole = dataset.splits[config.data.train_split]
        parts = {part.name: part for part in _held_out(whole, config.data.hold_out)}
        dataset = dataclasses.replace(dataset, splits={**dataset.splits, **parts})
    for key, name in (
        ("data.train_split", config.data.train_split),
        ("data.eval_split", config.data.eval_split),
    ):
        if key == "data.eval_split" and name == NO_SPLIT:
            continue
        if name not in dataset.splits:
            raise ConfigError(
                f"{key}={name!r}: {dataset.folder} has the splits {', '.join(dataset.splits)}"
            )
        if len(dataset.splits[name]) == 0:
            raise DatasetError(f"{key}={name!r}: the split is empty")
    ours, theirs = config.model.classes, len(dataset.classes)
    if ours != theirs:
        again, last = f"model.classes={theirs}", config.model.layer_names[-1]
        raise ConfigError(
            f"model.classes={ours}: {dataset.folder} has {theirs} classes: "
            + (
                f"train a new network on it with {again}, or set data.path= to other data"
                if trained is None
                else f"set data.path= to data of the classes that {trained} was trained on, or "
                f"fine-tune it: train {again} train.init_from={trained} 'train.init_new=[{last}]'"
            )
        )
    return dataset


def _held_out(split: Split, share: float) -> tuple[Split, Split]:
    """What is left of a split, and the share of it that is held out: the same images in any order
    and among any others, and images that are equal together."""
    held = split.index["crc32"] < share * 2**32
    return (
        dataclasses.replace(split, index=split.index[~held]),
        dataclasses.replace(split, index=split.index[held], name=HELD_OUT),
    )


def open_trained_on(config: Config, digest: str, trained: Path) -> Dataset:
    """The data set that a network was trained on, where the config says.

    Args:
        digest: of that data set.
        trained: the network's checkpoint.

    Raises DatasetError where it is not there, or is another: of other names or another mean.
    """
    folder = Path(config.data.path)
    if not (folder / "dataset.json").exists() or open_dataset(folder).digest != digest:
        raise DatasetError(
            f"data.path={str(folder)!r}: the data set that {trained} was trained on is not there: "
            "say where it lies, --data FOLDER; from Python load_checkpoint(path, data=FOLDER)"
        )
    return open_for(config, trained)


def evaluation_split(config: Config, dataset: Dataset) -> Split:
    """The split a network is scored on; raises ConfigError where the config names none."""
    if config.data.eval_split == NO_SPLIT:
        raise ConfigError(
            f"data.eval_split={NO_SPLIT}: there is nothing to score on: name one of "
            f"{dataset.folder}'s splits, {', '.join(dataset.splits)}, or another data.path= with "
            "data.eval_split=auto"
        )
    return dataset.splits[config.data.eval_split]


def check_damaged(config: Config, split: Split, damaged: int) -> None:
    """Raises DatasetError where more samples of a split are damaged than a run may bear."""
    bound = config.data.max_damaged * len(split)
    if damaged > bound:
        raise DatasetError(
            f"data.max_damaged={config.data.max_damaged:g}: {damaged} of the {len(split)} samples "
            f"of split {split.name!r} in {split.shards[0].parent.parent} are damaged: prepare the "
            "data set again, or raise data.max_damaged"
        )


def _open_split(folder: Path, name: str, meta: Mapping[str, Any], classes: int) -> Split:
    index = _load(folder, meta["index"], INDEX, dims=1)
    sizes = [int(shard["size"]) for shard in meta["shards"]]
    shards = tuple(_sized(folder, shard) for shard in meta["shards"])
    where = f"{folder / str(meta['index']['file'])}"
    if len(index) != meta["samples"]:
        raise DatasetError(f"{where}: {len(index)} samples, dataset.json says {meta['samples']}")
    if len(index) and index["label"].max() >= classes:
        bad = int(np.argmax(index["label"] >= classes))
        raise DatasetError(
            f"{where}: sample {bad} has class {index['label'][bad]}, out of range for "
            f"{classes} classes: prepare the data set again"
        )
    if len(index):
        limits = np.array([*sizes, 0], "<u8")[np.minimum(index["shard"], len(sizes))]
        inside = index["offset"] <= limits
        inside &= index["size"] <= limits - index["offset"]
        if not inside.all():
            raise DatasetError(
                f"{where}: sample {int(np.argmin(inside))} lies outside its shard: "
                "prepare the data set again"
            )
        if not (index["height"].all() and index["width"].all()):
            raise DatasetError(f"{where}: an image without pixels: prepare the data set again")
    return Split(name, shards, index, tuple(str(shard["sha256"]) for shard in meta["shards"]))


def _sized(folder: Path, meta: Mapping[str, Any]) -> Path:
    """The path of a file that dataset.json names, of the right size and inside the folder."""
    name = str(meta["file"])
    if not re.fullmatch(r"([A-Za-z0-9_-]+/)?[A-Za-z0-9_-]+\.(tar|npy)", name):
        raise DatasetError(f"{folder / 'dataset.json'}: refused the file name {name!r}")
    path = folder / name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}): prepare the data set again"
        ) from error
    if size != meta["size"]:
        raise DatasetError(
            f"{path}: {size} bytes, dataset.json says {meta['size']}: prepare the data set again"
        )
    return path


def _load(folder: Path, meta: Mapping[str, Any], dtype: np.dtype[Any], dims: int) -> Any:
    """A small .npy file, whole and hashed (a truncated memory map would be a SIGBUS)."""
    path = _sized(folder, meta)
    _compare_hash(path, sha256(path), meta["sha256"])
    try:
        found = read_array(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} is not an array: {error}") from error
    if found.dtype == dtype and found.ndim == dims:
        return found
    raise DatasetError(f"{path}: {found.dtype} in {found.ndim} dimensions, expected {dtype}")


def read_array(path: Path) -> npt.NDArray[Any]:
    """What np.save wrote; raises ValueError for anything else, OSError as ever.

    np.load takes what memory the header asks for, and runs pickles where it is let.
    """
    try:
        with opened(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not version 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                raise ValueError(f"{dtype} in {len(shape)} dimensions")
            values = np.fromfile(file, dtype)
            return values.reshape(shape, order="F" if fortran else "C")
    except OSError:
        raise
    except Exception as error:  # a hostile header can fail in any way
        raise ValueError(repr(error)) from error


def _compare_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DatasetError(
            f"{path}: SHA-256 {found[:12]}…, dataset.json says {str(expected)[:12]}…: "
            "it was changed or damaged; prepare the data set again"
        )
