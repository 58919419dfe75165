"""List the files in folders, tars and zips alike, and read each where it is.

Nothing is extracted, so that a name in an archive is never used as a path.
"""

import functools
import gzip
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from alexnet_dist.data.prepare.sources import Item
from alexnet_dist.data.prepare.tars import LARGEST_MEMBER, entries, leads_out, members, open_tar
from alexnet_dist.errors import DatasetError
from alexnet_dist.files import opened

_FOLLOWED = 2  # levels at which links to folders are followed: splits and classes
_MOST_UNPACKED = 2**36  # bytes of a gzipped tar, which each process reads from its start
_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # of a zip's member: signature, method, two lengths
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@dataclass(frozen=True)
class Listing:
    """The contents of a folder, tar or zip. Names are paths relative to it, with `/`.

    Attributes:
        files: files, without classes; sorted by name, but those of a gzipped tar in its order.
        folders: folders without files of their own, and hidden ones, which are not searched.
    """

    files: list[Item]
    folders: list[str]

    def below(self, start: str) -> "Listing":
        """Return the contents of one of its folders, `NAME/`; of all with an empty string."""
        files = [
            item._replace(name=item.name.removeprefix(start))
            for item in self.files
            if item.name.startswith(start)
        ]
        return Listing(files, [f.removeprefix(start) for f in self.folders if f.startswith(start)])

    def tops(self) -> list[str]:
        """Return the names of the folders at the top level."""
        inner = {item.name.partition("/")[0] for item in self.files if "/" in item.name}
        return sorted(inner | {name.partition("/")[0] for name in self.folders})


def hidden(name: str) -> bool:
    """Whether a path is or goes through a hidden file or folder: dot files, `__MACOSX`."""
    own = (part for part in name.split("/") if part not in (".", ".."))
    return any(part.startswith(".") or part == "__MACOSX" for part in own)


def list_files(path: Path) -> Listing:
    """List a folder, a tar, gzipped or not, or a zip.

    Raises DatasetError where it is none of these, or the archive is damaged.
    """
    if path.is_dir():
        found = [*_walk(path, "", 0)]
        folders = [one for one in found if isinstance(one, str)]
        return Listing([one for one in found if not isinstance(one, str)], folders)
    with opened(path) as file:
        begins = file.read(2)
    if begins == b"PK" and zipfile.is_zipfile(path):  # which alone would find one in a tar
        return Listing(sorted(_zipped(path), key=_by_parts), [])
    if begins == b"\x1f\x8b":
        return Listing(list(_gzipped(path)), [])
    try:
        with open_tar(path) as tar:
            return Listing(sorted(_without_dot(members(tar, path)), key=_by_parts), [])
    except tarfile.ReadError:
        raise DatasetError(
            f"{path} is neither a folder nor a .tar, .tar.gz, .tgz or .zip: name the folder that "
            "holds the images, unpacked first if this is another archive"
        ) from None


def _by_parts(item: Item) -> list[str]:
    """Sort key, in the order in which a folder is walked: an archive of it is the same data set."""
    return item.name.split("/")


def _walk(folder: Path, prefix: str, level: int) -> Iterator[Item | str]:
    """Yield the files below a folder, and names of folders without own files or that are hidden."""
    bare = True
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = f"{prefix}{entry.name}"
        try:
            status = entry.stat()
        except OSError as error:
            yield Item(name, 0, refused=f"cannot be read: {error.strerror}")
            continue
        if not stat.S_ISDIR(status.st_mode):
            regular = stat.S_ISREG(status.st_mode)
            bare = False
            refused = "" if regular else "a device or pipe, not a file"
            yield Item(name, 0, entry.path, 0, status.st_size, refused=refused)
        elif hidden(entry.name):
            yield name
        elif entry.is_symlink() and level >= _FOLLOWED:
            yield Item(name, 0, refused="a link to a folder, not a file")
        else:
            yield from _walk(Path(entry.path), f"{name}/", level + 1)
    if bare and prefix:
        yield prefix.rstrip("/")


def _without_dot(items: Iterator[Item]) -> Iterator[Item]:
    """Strip the `./` that `tar c .` puts before every name."""
    return (item._replace(name=item.name.removeprefix("./")) for item in items)


def _gzipped(path: Path) -> Iterator[Item]:
    """Yield the files of a gzipped tar, in one pass to its end, where gzip checks its checksum."""
    with gzip.open(path) as unpacked:
        stream = cast("IO[bytes]", unpacked)
        with open_tar(stream) as tar:
            for item in _without_dot(entries(tar)):
                if item.offset + item.size > _MOST_UNPACKED:
                    raise DatasetError(
                        f"{path}: it unpacks to more than {_MOST_UNPACKED:,} bytes: unpack it "
                        "yourself, and name the folder"
                    )
                yield item._replace(path=str(path), packing="gzip")
            while rest := stream.read(2**20):
                if rest.strip(b"\0") or stream.tell() > _MOST_UNPACKED:
                    raise DatasetError(f"{path}: the archive is damaged at byte {tar.offset}")


def _zipped(path: Path) -> Iterator[Item]:
    """Yield the files of a zip; what cannot be read in place is refused."""
    with _open_zip(path) as archive:
        for one in archive.infolist():
            refused = ""
            if one.is_dir():
                continue
            if stat.S_IFMT(one.external_attr >> 16) not in (0, stat.S_IFREG):
                refused = "a link or device in the archive, not a file"
            elif leads_out(one.filename):
                refused = "a name that leads out of its folder"
            elif one.flag_bits & 1 or one.compress_type not in (_STORED, _DEFLATED):
                refused = "encrypted, or compressed by another method than deflate"
            yield Item(one.filename, 0, str(path), one.header_offset, one.file_size,
                       refused=refused, packing="zip", packed=one.compress_size,
                       crc32=one.CRC)  # fmt: skip


def _open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip. Its names are taken for UTF-8 where they can be, since macOS writes that without
    saying so; else for code page 437, as the format has it."""
    try:
        return zipfile.ZipFile(path, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(path)


def read_content(item: Item, most: int = LARGEST_MEMBER) -> bytes:
    """Return the bytes of a listed file.

    Raises ValueError where they are not as listed or more than `most`, OSError as usual.
    """
    if max(item.size, item.packed) > most:
        raise ValueError(f"{max(item.size, item.packed):,} bytes, more than {most:,}")
    try:
        content = _read(item)
    except (EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"cannot be unpacked: {error}") from error
    if len(content) != item.size:
        raise ValueError(f"{len(content)} bytes, but {item.size} were listed")
    if item.crc32 not in (None, zlib.crc32(content)):
        raise ValueError("does not match its checksum in the archive: copy the archive again")
    return content


def _read(item: Item) -> bytes:
    """Return an item's unpacked bytes, unchecked."""
    if item.packing == "gzip":
        stream = _unpacked(item.path)
        stream.seek(item.offset)  # forward, except from one shard to another
        return stream.read(item.size)
    with opened(item.path) as file:
        if not item.packing:
            return os.pread(file.fileno(), item.size, item.offset)
        header = os.pread(file.fileno(), _LOCAL_HEADER.size, item.offset)
        sign, method, *lengths = _LOCAL_HEADER.unpack(header)
        if sign != b"PK\3\4":
            raise ValueError("the archive has no file there")
        offset = item.offset + _LOCAL_HEADER.size + sum(lengths)
        packed = os.pread(file.fileno(), item.packed, offset)
    if method == _STORED:
        return packed
    return zlib.decompressobj(-15).decompress(packed, item.size + 1)  # −15: without zlib's header


@functools.lru_cache(maxsize=1)
def _unpacked(path: str) -> gzip.GzipFile:
    """Open a gzipped file and keep it open: seeking back in it starts again from its beginning."""
    return gzip.open(path)
