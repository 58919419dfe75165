"""Where images come from: a listing of every image, its class, and where its bytes lie.

Nothing is extracted, so that no name in an archive is ever a path of ours. What can be seen to be
wrong by the listing alone (links, devices, names that leave their folder) is refused by name, and
counted with the damaged images.
"""

import hashlib
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_dist.errors import DatasetError

LARGEST_MEMBER = 64 * 2**20  # bytes of a file that is read whole; CIFAR-10's have 31 million
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


class _Member(tarfile.TarInfo):
    """A tar's member whose size leads forward, and whose long name fits in 16 KiB.

    A negative size would be read again for ever (CVE-2025-8194); a pax header takes tarfile time
    that grows with its square (CVE-2024-6232).
    """

    def _block(self, count: int) -> int:
        named = self.type in (b"x", b"g", b"X", b"L", b"K")
        if count < 0 or (named and count > 16384):
            raise DatasetError(f"{self.name!r}: a member of {count} bytes in its tar's header")
        return super()._block(count)  # type: ignore[misc,no-any-return]


def open_tar(source: Path | IO[bytes], mode: Literal["r:", "r:gz"]) -> tarfile.TarFile:
    """A tar from a stranger, to be listed and read in place."""
    if isinstance(source, Path):
        return tarfile.open(source, mode, tarinfo=_Member)
    return tarfile.open(fileobj=source, mode=mode, tarinfo=_Member)


def read_member(tar: tarfile.TarFile, name: str, path: Path) -> bytes:
    """A small file in the tar at `path`; raises DatasetError where there is none."""
    try:
        found = tar.getmember(name)
    except KeyError:
        raise DatasetError(f"{path}: no file {name} in it") from None
    if not found.isreg() or found.size > LARGEST_MEMBER:
        raise DatasetError(f"{path}: {name} is no file of at most {LARGEST_MEMBER:,} bytes")
    file = tar.extractfile(found)
    assert file is not None
    return file.read()


def needed(path: Path, which: str) -> Path:
    """The path of a file; raises DatasetError where it is not there."""
    if not path.is_file():
        raise DatasetError(f"{path} is missing: one {which}")
    return path
