"""A source of images: a listing of every image, with its class and where its bytes are.

Archives are read in place, not extracted, so that no name in an archive is ever used as a path.
Entries that are wrong by the listing alone (links, devices, names that leave their folder) are
refused by name, and counted with the damaged images.
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
_MOST_UNPACKED = 2**28  # bytes of an unpacked .tar.gz; CIFAR-10's has 186 million
_MOST_HEADER = 16384  # bytes of a member's long name or pax header
_MOST_HEADERS = 8  # such headers before one member, which needs at most four
_DIGITS = re.compile(rb"\d{257}")  # too long for a size, and for a file's name
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


class _Tar(tarfile.TarFile):
    """A tar that counts the extra headers of the current member, and bytes of global headers."""

    headers, global_bytes = 0, 0


class _Member(tarfile.TarInfo):
    """A member of a tar whose size is not negative and whose extra headers are short.

    A negative size would make tarfile read the same bytes for ever (CVE-2025-8194); a pax header
    takes it time that grows with the square of its digits (CVE-2024-6232); and it copies global
    headers to each member.
    """

    def _block(self, count: int) -> int:
        """Round a size up to blocks, as tarfile does; raise DatasetError where it is hostile."""
        named = self.type in (b"x", b"g", b"X", b"L", b"K")
        if count < 0 or (named and count > _MOST_HEADER):
            raise DatasetError(f"{self.name!r}: its tar's header gives it {count} bytes")
        return super()._block(count)  # type: ignore[misc,no-any-return]

    def _proc_member(self, tar: _Tar) -> tarfile.TarInfo:
        """Read what follows a header, as tarfile does, after checking a pax header's content."""
        tar.headers = tar.headers + 1 if self.type in (b"x", b"g", b"X", b"L", b"K") else 0
        tar.global_bytes += self.size if self.type == b"g" else 0
        digits = None
        if self.type in (b"x", b"g", b"X"):
            assert tar.fileobj is not None
            here = tar.fileobj.tell()
            digits = _DIGITS.search(tar.fileobj.read(self._block(self.size)))
            tar.fileobj.seek(here)
        if digits or tar.headers > _MOST_HEADERS or tar.global_bytes > _MOST_HEADER:
            raise DatasetError(f"{self.name!r}: unusual pax headers in its tar")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]

    def _apply_pax_info(self, *args: Any) -> None:
        super()._apply_pax_info(*args)  # type: ignore[misc]
        self.pax_headers = {}  # tarfile's copy of all of them for each member is not needed


def open_tar(source: Path | IO[bytes]) -> tarfile.TarFile:
    """Open a tar of unknown origin, to be listed and read in place; a .gz is unpacked to memory."""
    if not isinstance(source, Path):
        return _Tar.open(fileobj=source, mode="r:", tarinfo=_Member)
    if source.suffix != ".gz":
        opened(source).close()  # refuse a pipe, which tarfile would wait for
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
    """Return a small file's content from the tar at `path`; raise DatasetError if it is missing."""
    try:
        found = tar.getmember(name)
    except KeyError:
        raise DatasetError(f"{path}: has no file {name}") from None
    if not found.isreg() or found.size > most:
        raise DatasetError(f"{path}: {name} is not a file of at most {most:,} bytes")
    file = tar.extractfile(found)
    assert file is not None
    return file.read()


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
