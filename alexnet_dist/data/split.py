"""One split of a packed data set: its index, and its samples read from tar shards.

A sample is read by one `pread`, and its checksum is compared before it is decoded: JPEG decoders
accept flipped bytes silently.
"""

import contextlib
import errno
import itertools
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from alexnet_dist.data.header import size_of
from alexnet_dist.data.verified import check_hash, load_array, path_of
from alexnet_dist.errors import DatasetError, one_line
from alexnet_dist.files import MOST_PIXELS, opened

# One record per sample: its shard, the offset and size of its encoded image there (bytes), its
# class, the CRC-32 of the encoded image, and the image's height and width (pixels).
INDEX = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4"), ("crc32", "<u4"),
     ("height", "<u2"), ("width", "<u2")]
)  # fmt: skip
Encoded = npt.NDArray[np.uint8]  # (bytes,), a JPEG or PNG
Ints = npt.NDArray[np.int64]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The samples of one split; several threads may read it at once.

    Attributes:
        index: (n,) records of INDEX, one per sample.
        sha256s: hash of each shard.
    """

    name: str
    shards: tuple[Path, ...]
    index: npt.NDArray[np.void]
    sha256s: tuple[str, ...] = ()
    # Open shards, and the file descriptor of each shard (−1 where it is not open). A copy of a
    # split opens files of its own.
    _files: dict[int, BinaryIO] = field(default_factory=dict, init=False, repr=False)
    _descriptors: npt.NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_descriptors", np.full(len(self.shards), -1, np.int32))

    def __len__(self) -> int:
        return len(self.index)

    def labels(self, ids: Ints) -> Ints:
        """Return the classes of samples, both (n,)."""
        return self.index["label"][ids].astype(np.int64)

    def uniform(self, side: int) -> bool:
        """Whether every image is a square of this side, pixels."""
        return bool((self.index["height"] == side).all() and (self.index["width"] == side).all())

    def within(self, side: int) -> bool:
        """Whether no image's shorter side exceeds this, pixels: so `prepare` stores them, unless
        told to --keep their size."""
        return bool((np.minimum(self.index["height"], self.index["width"]) <= side).all())

    def check_shard(self, number: int) -> None:
        """Raise DatasetError where a shard has changed since it was packed."""
        check_hash(self.shards[number], self.sha256s[number])

    def read(self, sample: int) -> bytearray:
        """Return a sample's encoded image: a JPEG or PNG.

        Raises DatasetError where its checksum differs from the index, or its header's size does: so
        no decoder is given an image that takes more memory or time than what was packed.
        """
        shard, offset, size, _, crc32, *pixels = self.index[sample].tolist()
        encoded = bytearray(size)
        try:
            os.preadv(self._file(shard), [encoded], offset)
        except OSError as error:
            if error.errno == errno.EMFILE:  # no fault of the sample's
                raise
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
        """Raise DatasetError where an image's header does not give the size in the index."""
        try:
            found = size_of(encoded)
            if found != (height, width) or height * width > MOST_PIXELS:
                raise ValueError(
                    f"its header says {found[1]} × {found[0]} pixels, the index {width} × "
                    f"{height}; at most {MOST_PIXELS:,} are allowed"
                )
        except ValueError as error:
            raise undecodable(self, [sample], error) from None

    def read_batch(self, samples: Ints) -> tuple[Ints, list[Encoded]]:
        """Do what `read_with_warnings` does, and log the warnings."""
        read, encoded, warnings = self.read_with_warnings(samples)
        for warning in warnings.values():
            log.warning(warning)
        return read, encoded

    def read_with_warnings(self, samples: Ints) -> tuple[Ints, list[Encoded], dict[int, str]]:
        """Read samples' encoded images, in one call that does not hold the GIL.

        A damaged sample is replaced by the next one that is not.

        Args:
            samples: (n,) places in the index.

        Returns:
            The samples read (n,), their encoded images, and a warning for each damaged sample, by
            its position in `samples`.

        Raises DatasetError where every sample is damaged.
        """
        from alexnet_dist.data import loops

        rows = self.index[samples]
        ends = rows["size"].cumsum(dtype=np.int64)
        starts = np.concatenate([[0], ends])
        buffer, sound = np.empty(starts[-1], np.uint8), np.zeros(len(rows), np.bool_)
        if loops.can_read():
            loops.read(rows, self._descriptors_of(rows["shard"]), starts, buffer, sound)
        encoded = [buffer[a:b] for a, b in itertools.pairwise(starts.tolist())]
        read, warnings = samples.copy(), dict[int, str]()
        for place in np.flatnonzero(~sound).tolist():
            read[place], image, warning = self._read_or_next(int(samples[place]))
            encoded[place] = np.frombuffer(image, np.uint8)
            if warning:
                warnings[place] = warning
        return read, encoded, warnings

    def _read_or_next(self, sample: int) -> tuple[int, bytearray, str]:
        """Read a sample; where it is damaged, the next one that is not, with a warning.

        Returns the sample read, its encoded image, and the warning (empty if none).
        """
        try:
            return sample, self.read(sample), ""
        except DatasetError as error:
            for ahead in range(1, len(self)):
                other = (sample + ahead) % len(self)
                with contextlib.suppress(DatasetError):
                    encoded = self.read(other)
                    return other, encoded, f"{error}: sample {other} is read instead"
            raise DatasetError(f"{error}; no other sample is undamaged either") from error

    def _descriptors_of(self, shards: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
        """Open these shards where that is possible; return the file descriptors of all shards."""
        for shard in np.unique(shards[self._descriptors[shards] < 0]).tolist():
            with contextlib.suppress(OSError):  # `read` reports it
                self._file(shard)
        return self._descriptors

    def _file(self, shard: int) -> int:
        """Return the file descriptor of a shard, opened if need be."""
        if shard not in self._files:
            new = opened(self.shards[shard])
            if self._files.setdefault(shard, new) is not new:
                new.close()  # another thread was first
            self._descriptors[shard] = self._files[shard].fileno()
        return self._files[shard].fileno()

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        self._descriptors[:] = -1
        while self._files:
            self._files.popitem()[1].close()


def undecodable(split: Split, ids: Sequence[int], error: Exception) -> DatasetError:
    """Return the error for samples that match their checksums and still cannot be decoded."""
    which = f"sample {ids[0]}" if len(ids) == 1 else f"a sample among {', '.join(map(str, ids))}"
    return DatasetError(
        f"{split.shards[0].parent}: {which} cannot be decoded, although its bytes are as they "
        f"were packed ({one_line(error)}): see `alexnet-dist inspect`"
    )


def open_split(folder: Path, name: str, meta: Mapping[str, Any], classes: int) -> Split:
    """Open a split and check its index against its shards; raise DatasetError where it is wrong.

    Args:
        folder: the data set's.
        meta: the split's entry in dataset.json.
        classes: number of classes of the data set.
    """
    index = load_array(folder, meta["index"], INDEX, dims=1)
    sizes = [int(shard["size"]) for shard in meta["shards"]]
    shards = tuple(path_of(folder, shard) for shard in meta["shards"])
    where = f"{folder / str(meta['index']['file'])}"
    if len(index) != meta["samples"]:
        raise DatasetError(
            f"{where}: {len(index)} samples, but dataset.json says {meta['samples']}"
        )
    wrong = index["label"] >= classes
    if wrong.any():
        bad = int(np.argmax(wrong))
        raise DatasetError(
            f"{where}: sample {bad} has class {index['label'][bad]}, out of range for "
            f"{classes} classes: prepare the data set again"
        )
    # The size of each sample's shard; 0 where there is no such shard.
    limits = np.array([*sizes, 0], "<u8")[np.minimum(index["shard"], len(sizes))]
    inside = (index["offset"] <= limits) & (index["size"] <= limits - index["offset"])
    if not inside.all():
        raise DatasetError(
            f"{where}: sample {int(np.argmin(inside))} lies outside its shard: "
            "prepare the data set again"
        )
    if not (index["height"].all() and index["width"].all()):
        raise DatasetError(f"{where}: an image has no pixels: prepare the data set again")
    return Split(name, shards, index, tuple(str(shard["sha256"]) for shard in meta["shards"]))


def doubtful(indexes: Mapping[str, npt.NDArray[np.void]]) -> Iterator[str]:
    """Yield a line for each split that has more images than train, or some of train's: those of
    the same size and CRC-32.

    Args:
        indexes: (n,) records of INDEX, by split, train among them.
    """
    train = _fingerprints(indexes["train"])
    for name in sorted(indexes.keys() - {"train"}):
        images = _fingerprints(indexes[name])
        if len(images) > len(train):
            yield f"more images in {name} than in train: are they swapped?"
        if same := np.count_nonzero(np.isin(images, train)):
            yield f"{same} of the images in {name} are in train too"


def _fingerprints(index: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Return a number for each image: its CRC-32 and its size in bytes."""
    crcs, sizes = index["crc32"].astype(np.uint64), index["size"]
    numbers: npt.NDArray[np.uint64] = crcs << np.uint64(32) | sizes
    return numbers
