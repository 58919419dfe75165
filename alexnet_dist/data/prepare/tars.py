"""Tars of unknown origin: list them and read them in place, however hostile their headers."""

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from alexnet_dist.data.prepare.sources import Item
from alexnet_dist.errors import DatasetError
from alexnet_dist.files import opened

LARGEST_MEMBER = 64 * 2**20  # bytes of a file that is read whole; CIFAR-10's have 31 million
_MOST_UNPACKED = 2**28  # bytes of an unpacked .tar.gz; CIFAR-10's has 186 million
_MOST_HEADER = 16384  # bytes of a member's long name or pax header
_MOST_HEADERS = 8  # such headers before one member, which needs at most four
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_HEADERS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # types of such headers
_DIGITS = re.compile(rb"\d{257}")  # too long for a size, and for a file's name


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
        if count < 0 or (self.type in _HEADERS and count > _MOST_HEADER):
            raise DatasetError(f"{self.name!r}: its tar's header gives it {count} bytes")
        return super()._block(count)  # type: ignore[misc,no-any-return]

    def _proc_member(self, tar: _Tar) -> tarfile.TarInfo:
        """Read what follows a header, as tarfile does, after checking a pax header's content."""
        tar.headers = tar.headers + 1 if self.type in _HEADERS else 0
        tar.global_bytes += self.size if self.type == tarfile.XGLTYPE else 0
        digits = None
        if self.type in _PAX:
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


def members(tar: tarfile.TarFile, path: Path, start: int = 0) -> Iterator[Item]:
    """Yield the files of a tar that begins at byte `start` of the file at `path`."""
    whole = path.stat().st_size
    for item in entries(tar, start):
        past = "the archive ends in the middle of it" if item.offset + item.size > whole else ""
        yield item._replace(path=str(path), refused=item.refused or past)
    check_end(tar, path)


def entries(tar: tarfile.TarFile, start: int = 0) -> Iterator[Item]:
    """Yield the files of a tar, without their path; what is no regular file is refused."""
    for member in tar:
        name, refused = member.name, ""
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            refused = "a link, device or hole in the archive, not a file"
        elif leads_out(name):
            refused = "a name that leads out of its folder"
        yield Item(name, 0, "", start + member.offset_data, member.size, refused=refused)


def leads_out(name: str) -> bool:
    """Whether a path leads out of the folder that it is relative to."""
    return name.startswith("/") or ".." in name.split("/")


def check_end(tar: tarfile.TarFile, path: Path) -> None:
    """Raise DatasetError where a tar's listing ended at damage, which tarfile does not report."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DatasetError(f"{path}: the archive is damaged or cut short at byte {tar.offset}")
