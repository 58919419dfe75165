"""Writing one shard: its tar, its part of the index, its part of the colour statistics.

A shard is a function of its items alone. Its tar is synced before the part beside it is put in
place, so that a part says: this shard is whole. Whatever was killed is begun again from the parts.
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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_dist.data.dataset import INDEX
from alexnet_dist.data.prepare.containers import read_content
from alexnet_dist.data.prepare.convert import SIDE, RefusedImage, Stored, convert, pack_pixels
from alexnet_dist.data.prepare.sources import Item
from alexnet_dist.data.preprocess import on_canvas
from alexnet_dist.errors import filled_by
from alexnet_dist.files import MOST_ENCODED, opened, sha256, written_aside


class Task(NamedTuple):
    """One shard to write.

    Attributes:
        folder: of the split.
        number: of the shard in the split.
        first: key of its first item: the item's place in the split's listing.
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
    def part(self) -> Path:
        return self.folder / f".shard-{self.number:05d}.npz"


@dataclass
class Part:
    """What is known of a shard that is whole.

    Attributes:
        index: INDEX records of its samples.
        meta: the tar's size and sha256, lines of its index for other tools, what was refused, the
            stamp and contents of its items.
        path: the file that holds it, and its colour sums, which are read when they are wanted.
    """

    index: npt.NDArray[np.void]
    meta: dict[str, Any]
    path: Path

    def colour_sums(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each pixel of the canvas, (h, w, 3); of each two colours of a pixel, (3, 3)."""
        with opened(self.path) as file, np.load(file, allow_pickle=False) as found:
            return found["sums"].astype(np.int64), found["products"]


def write_shard(task: Task) -> Part:
    """Write a shard durably, replacing what a killed process left of it."""
    before = stamp(task.items)
    with written_aside(task.tar) as aside:
        part, sums, products = _write(task, aside)
        part.meta |= {"size": aside.stat().st_size, "sha256": sha256(aside), "stamp": before}
    with written_aside(task.part) as aside, aside.open("wb") as file:
        np.savez(file, index=part.index, sums=sums, products=products,
                 meta=np.array(json.dumps(part.meta)))  # fmt: skip
    return part


def read_part(task: Task) -> Part | None:
    """The part of a shard that is whole already, and of these bytes; None where it is not."""
    try:
        with opened(task.part) as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ("index", "meta", "sums", "products")}
        meta = json.loads(str(arrays["meta"]))
        if arrays["index"].dtype != INDEX or sha256(task.tar) != meta["sha256"]:
            return None
        same = stamp(task.items) == meta["stamp"] or contents(task.items) == meta["contents"]
        return Part(arrays["index"], meta, task.part) if same else None
    except Exception:  # one that is damaged can fail in any way, and is made again
        return None


def stamp(items: Sequence[Item]) -> str:
    """What tells, without reading them, that the files that items lie in are those they were: it
    changes with any of them, and where they are copied, though not where their folder is moved."""
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
    """The SHA-256 of all that is read of items, in their order."""
    digest = hashlib.sha256()
    for item in items:
        with filled_by(item.name):
            _add_to(digest, _read(item)[0])
    return digest.hexdigest()


def _add_to(digest: "hashlib._Hash", content: bytes) -> None:
    digest.update(len(content).to_bytes(8))
    digest.update(content)


def _write(task: Task, path: Path) -> tuple[Part, npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Write the tar; its part and colour sums (1,000 images of 255 fit in 32 bits)."""
    index, refused, lines = [], [], []
    sums = np.zeros((0, 0, 3), np.uint32)
    products = np.zeros((3, 3), np.int64)
    digest = hashlib.sha256()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, item in enumerate(task.items):
            try:
                with filled_by(item.name):
                    content, why = _read(item)
                    _add_to(digest, content)
                    stored = _stored(item, content, why, task)
                    canvas = _canvas(item, stored) if task.statistics else None
            except RefusedImage as error:
                refused.append({"name": item.name, "reason": str(error)[:300]})
                continue
            key, size = f"{task.first + place:08d}", len(stored.encoded)
            offset = _add(tar, f"{key}.{stored.kind}", stored.encoded)
            label = str(item.label).encode()
            label_offset = _add(tar, f"{key}.cls", label)
            crc32 = zlib.crc32(stored.encoded)
            index.append((task.number, offset, size, item.label, crc32, *stored.image.shape[1:]))
            # As DALI's wds2idx writes it.
            lines.append(
                f"{stored.kind} {offset} {size} {key}.{stored.kind} "
                f"cls {label_offset} {len(label)} {key}.cls"
            )
            if canvas is not None:
                sums = canvas.astype(np.uint32) if sums.size == 0 else sums + canvas
                pixels = canvas.reshape(-1, 3).astype(np.float64)
                products += (pixels.T @ pixels).astype(np.int64)  # exact: below 2**53
    meta = {"refused": refused, "lines": lines, "contents": digest.hexdigest()}
    return Part(np.array(index, INDEX), meta, task.part), sums, products


def _read(item: Item) -> tuple[bytes, str]:
    """An item's bytes, or why there are none."""
    if item.refused or item.pixels is not None:
        return b"" if item.pixels is None else item.pixels.tobytes(), item.refused
    try:
        return read_content(item, MOST_ENCODED), ""
    except OSError as error:
        return b"", f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return b"", f"{error}"


def _stored(item: Item, content: bytes, why: str, task: Task) -> Stored:
    if why:
        raise RefusedImage(why)
    if item.pixels is not None:
        return pack_pixels(item.pixels)
    return convert(content, task.keep, task.enlarge)


def _canvas(item: Item, stored: Stored) -> npt.NDArray[np.uint8]:
    """(h, w, 3): as a run sees the image, at its size or at 256 × 256."""
    image = stored.image if item.pixels is not None else on_canvas(stored.image, SIDE)
    canvas: npt.NDArray[np.uint8] = image.expand(3, -1, -1).movedim(0, -1).numpy()
    return canvas


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a member; the offset of its content in the archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return offset
