"""Writing one shard: its tar, its part of the index, its part of the colour statistics.

A shard is a function of its items alone. Its tar is synced before the part beside it is put in
place, so that a part says: this shard is whole. Whatever was killed is begun again from the parts.
"""

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
from alexnet_dist.files import MOST_ENCODED, sha256, sync


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
        meta: the tar's size and sha256, lines of its index for other tools, what was refused.
        path: the file that holds it, and its colour sums, which are read when they are wanted.
    """

    index: npt.NDArray[np.void]
    meta: dict[str, Any]
    path: Path

    def colour_sums(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each pixel of the canvas, (h, w, 3); of each two colours of a pixel, (3, 3)."""
        with np.load(self.path, allow_pickle=False) as found:
            return found["sums"].astype(np.int64), found["products"]


def write_shard(task: Task) -> Part:
    """Write a shard durably, replacing what a killed process left of it."""
    aside = task.tar.with_suffix(f".{os.getpid()}.writing")
    try:
        part, sums, products = _write(task, aside)
        sync(aside)
        part.meta |= {"size": aside.stat().st_size, "sha256": sha256(aside)}
        aside.replace(task.tar)
        with aside.open("wb") as file:
            np.savez(file, index=part.index, sums=sums, products=products,
                     meta=np.array(json.dumps(part.meta)))  # fmt: skip
            file.flush()
            os.fsync(file.fileno())
        aside.replace(task.part)
    finally:
        aside.unlink(missing_ok=True)
    return part


def read_part(task: Task) -> Part | None:
    """The part of a shard that is whole already; None where it is not."""
    try:
        with np.load(task.part, allow_pickle=False) as found:
            meta = json.loads(str(found["meta"]))
            if task.tar.stat().st_size != meta["size"]:
                return None
            return Part(found["index"], meta, task.part)
    except (OSError, ValueError, KeyError, EOFError, zlib.error):
        return None


def _write(task: Task, path: Path) -> tuple[Part, npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Write the tar; its part and colour sums (1,000 images of 255 fit in 32 bits)."""
    index, refused, lines = [], [], []
    sums = np.zeros((0, 0, 3), np.uint32)
    products = np.zeros((3, 3), np.int64)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, item in enumerate(task.items):
            try:
                with filled_by(item.name):
                    stored = _stored(item, task.keep, task.enlarge)
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
    meta = {"refused": refused, "lines": lines}
    return Part(np.array(index, INDEX), meta, task.part), sums, products


def _stored(item: Item, keep: bool, enlarge: bool) -> Stored:
    if item.refused:
        raise RefusedImage(item.refused)
    if item.pixels is not None:
        return pack_pixels(item.pixels)
    try:
        content = read_content(item, MOST_ENCODED)
    except OSError as error:
        raise RefusedImage(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RefusedImage(f"{error}") from error
    return convert(content, keep, enlarge)


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
