"""A source of images: a listing of every image, with its class and where its bytes are.

Archives are read in place, not extracted, so that no name in an archive is ever used as a path.
Entries that are wrong by the listing alone (links, devices, names that leave their folder) are
refused by name, and counted with the damaged images.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_dist.errors import DatasetError

Pixels = npt.NDArray[np.uint8]


class Item(NamedTuple):
    """One image of a source: bytes in a file, or pixels, or the reason why it is refused.

    Attributes:
        label: place of its class in `Source.classes`.
        path: the file that holds it.
        offset: where it begins, bytes: in that file, in the unpacked file ("gzip"), or where its
            local header begins ("zip").
        size: unpacked, bytes.
        refused: why it cannot be packed; empty where nothing is known against it.
        packed: size in a zip, bytes.
        crc32: checksum in a zip.
    """

    name: str
    label: int
    path: str = ""
    offset: int = 0
    size: int = 0
    pixels: Pixels | None = None  # (h, w) or (h, w, 3)
    refused: str = ""
    packing: Literal["", "gzip", "zip"] = ""
    packed: int = 0
    crc32: int | None = None


@dataclass(frozen=True)
class Source:
    """Every image of a source by split, in an order that depends on the source alone.

    Attributes:
        enlarge: resize smaller images to 256 × 256 too.
        notes: lines for the user, about files that were left out.
    """

    kind: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Item]]
    enlarge: bool = False
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, str]:
        """Return the kind and a hash of what distinguishes this source from others: names, classes,
        places, sizes, and pixels where it has them."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for split, items in self.splits.items():
            for item in items:
                place = (split, item.name, item.label, item.offset, item.size, item.refused)
                digest.update(repr(place).encode("utf-8", "backslashreplace"))
                if item.pixels is not None:
                    digest.update(item.pixels.tobytes())
        return {"kind": self.kind, "sha256": digest.hexdigest()}


def needed(path: Path, which: str) -> Path:
    """Return the path of a file that must be there; raise DatasetError where it is not.

    Args:
        which: what the file is one of, for the error.
    """
    if not path.is_file():
        raise DatasetError(f"{path} is missing: it is one {which}")
    return path


def some(names: Sequence[str]) -> str:
    """Return the first three names, for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
