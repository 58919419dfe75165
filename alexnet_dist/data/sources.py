"""Where images come from: a listing of every image, its class, and where its bytes lie.

Nothing is extracted, so that no name in an archive is ever a path of ours. What can be seen to be
wrong by the listing alone (links, devices, names that leave their folder) is refused by name, and
counted with the damaged images.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_dist.errors import DatasetError

Pixels = npt.NDArray[np.uint8]


class Item(NamedTuple):
    """One image of a source: in a file, or its pixels, or a reason why it is refused."""

    name: str
    label: int
    path: str = ""
    offset: int = 0
    size: int = 0
    pixels: Pixels | None = None  # (h, w) or (h, w, 3)
    refused: str = ""


@dataclass(frozen=True)
class Source:
    """Every image of a source by split, in an order that depends on the source alone."""

    kind: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Item]]

    def identity(self) -> dict[str, str]:
        """What tells this source from another: names, classes, places, sizes; pixels themselves."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for split, items in self.splits.items():
            for item in items:
                place = (split, item.name, item.label, item.offset, item.size, item.refused)
                digest.update(repr(place).encode("utf-8", "backslashreplace"))
                if item.pixels is not None:
                    digest.update(item.pixels.tobytes())
        return {"kind": self.kind, "sha256": digest.hexdigest()}


def needed(path: Path, which: str) -> Path:
    if not path.is_file():
        raise DatasetError(f"{path} is missing: one {which}")
    return path
