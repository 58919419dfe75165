"""Where images come from: a listing of every image, its class, and where its bytes lie.

Nothing is extracted, so that no name in an archive is ever a path of ours. What can be seen to be
wrong by the listing alone (links, devices, names that leave their folder) is refused by name, and
counted with the damaged images.
"""

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_dist.errors import DatasetError
from alexnet_dist.files import opened

LARGEST_MEMBER = 64 * 2**20  # bytes of a file that is read whole; CIFAR-10's have 31 million
_MOST_UNPACKED = 2**28  # bytes of a packed tar; CIFAR-10's has 186 million
_MOST_HEADER = 16384  # bytes of a member's long name or pax header
_MOST_HEADERS = 8  # of these before one member, which has use for four
_DIGITS = re.compile(rb"\d{257}")  # no length, and in no name that a file system takes
Pixels = npt.NDArray[np.uint8]


class Item(NamedTuple):
    """One image of a source: in a file, or its pixels, or a reason why it is refused.

    Attributes:
        offset: where it begins, bytes: in the file at `path`, or unpacked ("gzip"), or where its
            own header does ("zip").
        packed: of a zip, its size there, bytes.
        crc32: of a zip, its checksum there.
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
        enlarge: make 256 × 256 of smaller images too.
        notes: lines on what is no image of it.
    """

    kind: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Item]]
    enlarge: bool = False
    notes: tuple[str, ...] = ()

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


class _Tar(tarfile.TarFile):
    """A tar that counts what its members' own headers are: those of one member, global bytes."""

    headers, global_bytes = 0, 0


class _Member(tarfile.TarInfo):
    """A tar's member whose size leads forward, and whose long name and pax headers are short.

    A negative size would be read again for ever (CVE-2025-8194); a pax header takes tarfile time
    that grows with the square of its digits (CVE-2024-6232); global ones are copied to each member.
    """

    def _block(self, count: int) -> int:
        named = self.type in (b"x", b"g", b"X", b"L", b"K")
        if count < 0 or (named and count > _MOST_HEADER):
            raise DatasetError(f"{self.name!r}: a member of {count} bytes in its tar's header")
        return super()._block(count)  # type: ignore[misc,no-any-return]

    def _proc_member(self, tar: _Tar) -> tarfile.TarInfo:
        """Read what follows a header; a pax header or long name is looked at first."""
        tar.headers = tar.headers + 1 if self.type in (b"x", b"g", b"X", b"L", b"K") else 0
        tar.global_bytes += self.size if self.type == b"g" else 0
        digits = None
        if self.type in (b"x", b"g", b"X"):
            assert tar.fileobj is not None
            here = tar.fileobj.tell()
            digits = _DIGITS.search(tar.fileobj.read(self._block(self.size)))
            tar.fileobj.seek(here)
        if digits or tar.headers > _MOST_HEADERS or tar.global_bytes > _MOST_HEADER:
            raise DatasetError(f"{self.name!r}: pax headers that no file needs in its tar's header")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]

    def _apply_pax_info(self, *given: Any) -> None:
        super()._apply_pax_info(*given)  # type: ignore[misc]
        self.pax_headers = {}  # a copy of all for each member, and nobody asks for it


def open_tar(source: Path | IO[bytes]) -> tarfile.TarFile:
    """A tar from a stranger, to be listed and read in place; packed with gzip, in memory."""
    if not isinstance(source, Path):
        return _Tar.open(fileobj=source, mode="r:", tarinfo=_Member)
    if source.suffix != ".gz":
        opened(source).close()  # a pipe would be waited for
        return _Tar.open(source, "r:", tarinfo=_Member)
    unpacked = io.BytesIO()
    with opened(source) as file, gzip.open(file) as packed:
        while part := packed.read(2**20):
            unpacked.write(part)
            if unpacked.tell() > _MOST_UNPACKED:
                raise DatasetError(f"{source}: it unpacks to more than {_MOST_UNPACKED:,} bytes")
    unpacked.seek(0)
    return _Tar.open(fileobj=unpacked, mode="r:", tarinfo=_Member)


def read_member(tar: tarfile.TarFile, name: str, path: Path, most: int = LARGEST_MEMBER) -> bytes:
    """A small file in the tar at `path`; raises DatasetError where there is none."""
    try:
        found = tar.getmember(name)
    except KeyError:
        raise DatasetError(f"{path}: no file {name} in it") from None
    if not found.isreg() or found.size > most:
        raise DatasetError(f"{path}: {name} is no file of at most {most:,} bytes")
    file = tar.extractfile(found)
    assert file is not None
    return file.read()


def needed(path: Path, which: str) -> Path:
    """The path of a file; raises DatasetError where it is not there."""
    if not path.is_file():
        raise DatasetError(f"{path} is missing: one {which}")
    return path
