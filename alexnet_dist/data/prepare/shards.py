"""Write one shard: its tar, and beside it a summary: its part of the index, its colour statistics.

A shard depends on its items alone. The tar is synced before the summary is put in place, so the
existence of a summary shows that the shard is complete. A command that was killed continues from
these.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from alexnet_dist.data.prepare.containers import read_content
from alexnet_dist.data.prepare.convert import SIDE, RefusedImage, Stored, convert, pack_pixels
from alexnet_dist.data.prepare.sources import Item
from alexnet_dist.data.preprocess import on_canvas, rgb_last
from alexnet_dist.data.split import INDEX
from alexnet_dist.errors import filled_by
from alexnet_dist.files import MOST_ENCODED, opened, sha256, written_aside


class Task(NamedTuple):
    """One shard to write.

    Attributes:
        folder: the split's folder.
        number: the shard's number in the split.
        first: key of its first item, which is the item's place in the split's listing.
        keep: images keep their own size.
        enlarge: smaller images are resized to 256 × 256 too.
        statistics: add up the colours of its images.
    """

    folder: Path
    number: int
    first: int
    items: Sequence[Item]
    keep: bool
    enlarge: bool
    statistics: bool

    @property
    def tar(self) -> Path:
        return self.folder / f"shard-{self.number:05d}.tar"

    @property
    def summary(self) -> Path:
        return self.folder / f".shard-{self.number:05d}.npz"


class Refused(TypedDict):
    """An image that was not packed, and why."""

    name: str
    reason: str


class ShardMeta(TypedDict):
    """What a summary holds besides arrays.

    Attributes:
        size: size of the tar, bytes.
        sha256: hash of the tar.
        lines: lines of the tar's index for other tools.
        stamp, contents: what `stamp` and `contents` returned for its items.
    """

    size: int
    sha256: str
    lines: list[str]
    refused: list[Refused]
    stamp: str
    contents: str


@dataclass(frozen=True)
class Shard:
    """A complete shard.

    Attributes:
        index: INDEX records of its samples.
        path: the summary, from which the colour sums are read when they are needed.
    """

    index: npt.NDArray[np.void]
    meta: ShardMeta
    path: Path

    def colour_sums(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return sums over the images: of each pixel of the canvas, (h, w, 3); of the product of
        each two colours over all pixels, (3, 3)."""
        with opened(self.path) as file, np.load(file, allow_pickle=False) as arrays:
            return arrays["sums"].astype(np.int64), arrays["products"]


def write_shard(task: Task) -> Shard:
    """Write a shard durably, replacing whatever a killed process left of it."""
    before = stamp(task.items)
    with written_aside(task.tar) as aside:
        arrays, lines, refused, contents = _write(task, aside)
        size, hashed = aside.stat().st_size, sha256(aside)
    meta = ShardMeta(
        size=size, sha256=hashed, lines=lines, refused=refused, stamp=before, contents=contents
    )
    with written_aside(task.summary) as aside, aside.open("wb") as file:
        np.savez(file, **arrays, meta=np.array(json.dumps(meta)))
    return Shard(arrays["index"], meta, task.summary)


def read_shard(task: Task) -> Shard | None:
    """Return a shard that was already written from these items' bytes, or None."""
    try:
        with opened(task.summary) as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ("index", "meta", "sums", "products")}
        meta: ShardMeta = json.loads(str(arrays["meta"]))
        if arrays["index"].dtype != INDEX or sha256(task.tar) != meta["sha256"]:
            return None
        same = stamp(task.items) == meta["stamp"] or contents(task.items) == meta["contents"]
        return Shard(arrays["index"], meta, task.summary) if same else None
    except Exception:  # a damaged summary can fail in any way; the shard is then written again
        return None


def stamp(items: Sequence[Item]) -> str:
    """Return a hash of the file-system metadata (inode, size, times) of the files that hold items.

    It changes when any of these files changes or is copied, but not when their folder is moved.
    """
    digest, known = hashlib.sha256(), {"": ""}
    for item in items:
        if item.path not in known:
            try:
                about = os.stat(item.path)
                times = about.st_mtime_ns, about.st_ctime_ns
                known[item.path] = f"{about.st_ino} {about.st_size} {times}"
            except OSError as error:
                known[item.path] = f"{error.errno}"
        digest.update(f"{item.name!a} {known[item.path]}\n".encode())
    return digest.hexdigest()


def contents(items: Sequence[Item]) -> str:
    """Return the SHA-256 of the bytes of items, in order."""
    digest = hashlib.sha256()
    for item in items:
        with filled_by(item.name):
            _add_to(digest, _read(item)[0])
    return digest.hexdigest()


def _add_to(digest: "hashlib._Hash", content: bytes) -> None:
    """Add an item's bytes to a hash, preceded by their length, so that items cannot be confused."""
    digest.update(len(content).to_bytes(8))
    digest.update(content)


def _write(task: Task, path: Path) -> tuple[dict[str, Any], list[str], list[Refused], str]:
    """Write the tar of a shard; return the summary's arrays, and `lines`, `refused` and `contents`
    of its `ShardMeta`."""
    index, refused, lines = [], list[Refused](), []
    sums = np.zeros((0, 0, 3), np.uint32)  # 1,000 images of 255 fit in 32 bits
    products = np.zeros((3, 3), np.int64)
    digest = hashlib.sha256()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, item in enumerate(task.items):
            # Read and convert the image, or note why it is refused.
            try:
                with filled_by(item.name):
                    content, why = _read(item)
                    _add_to(digest, content)
                    stored = _stored(item, content, why, task)
                    canvas = _canvas(item, stored) if task.statistics else None
            except RefusedImage as error:
                refused.append({"name": item.name, "reason": str(error)[:300]})
                continue
            # Add it and its label to the tar, and its place to both indexes.
            key, size = f"{task.first + place:08d}", len(stored.encoded)
            offset = _add(tar, f"{key}.{stored.kind}", stored.encoded)
            label = str(item.label).encode()
            label_offset = _add(tar, f"{key}.cls", label)
            crc32 = zlib.crc32(stored.encoded)
            index.append((task.number, offset, size, item.label, crc32, *stored.image.shape[1:]))
            # In the format of DALI's wds2idx.
            lines.append(
                f"{stored.kind} {offset} {size} {key}.{stored.kind} "
                f"cls {label_offset} {len(label)} {key}.cls"
            )
            # Add up its colours.
            if canvas is not None:
                sums = canvas.astype(np.uint32) if sums.size == 0 else sums + canvas
                pixels = canvas.reshape(-1, 3).astype(np.float64)
                products += (pixels.T @ pixels).astype(np.int64)  # exact: below 2**53
    arrays = {"index": np.array(index, INDEX), "sums": sums, "products": products}
    return arrays, lines, refused, digest.hexdigest()


def _read(item: Item) -> tuple[bytes, str]:
    """Return an item's bytes, and an empty string; or no bytes, and why it is refused."""
    if item.refused or item.pixels is not None:
        return b"" if item.pixels is None else item.pixels.tobytes(), item.refused
    try:
        return read_content(item, MOST_ENCODED), ""
    except OSError as error:
        return b"", f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return b"", f"{error}"


def _stored(item: Item, content: bytes, why: str, task: Task) -> Stored:
    """Convert what `_read` returned to an image as it is packed; raise RefusedImage."""
    if why:
        raise RefusedImage(why)
    if item.pixels is not None:
        return pack_pixels(item.pixels)
    return convert(content, task.keep, task.enlarge)


def _canvas(item: Item, stored: Stored) -> npt.NDArray[np.uint8]:
    """Return the image, (h, w, 3), as a run sees it: pixels at their size, others at 256 × 256."""
    image = stored.image if item.pixels is not None else on_canvas(stored.image, SIDE)
    canvas: npt.NDArray[np.uint8] = rgb_last(image).numpy()
    return canvas


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file to the archive; return the offset of its content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return offset
