"""Loops over a batch, compiled by Numba, that run without holding the GIL."""

import ctypes
import functools
import zlib
from typing import Any

import llvmlite.binding as llvm
from numba import types

from alexnet_dist.files import MOST_PIXELS, MOST_SCANS, MOST_SEGMENTS
from alexnet_dist.network.kernels.numba_loops import compiled

# Messages for the problems that `image_size` returns.
PROBLEMS = (
    "",
    "neither a JPEG nor a PNG, or damaged or cut short at its beginning",
    f"a JPEG of more than {MOST_SCANS} scans",
    f"a JPEG of more than {MOST_SEGMENTS} segments",
)
_NEITHER, _SCANS, _SEGMENTS = 1, 2, 3
_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)
_CRC32 = "alexnet_dist_crc32"  # our name for zlib's crc32, which `can_read` looks up
_crc32: Any = types.ExternalFunction(_CRC32, types.uintp(types.uintp, types.uintp, types.uint32))


# Decorator of a function of arrays: compiled at its first call, and run without holding the GIL.
without_gil = functools.partial(compiled, nogil=True)


@functools.cache
def can_read() -> bool:
    """Whether `read` can be called: it needs zlib's crc32, which is found where Python is linked
    with zlib's library."""
    try:
        function = ctypes.CDLL(getattr(zlib, "__file__", None)).crc32
    except (OSError, AttributeError):
        return False
    function.restype = ctypes.c_ulong
    if function(ctypes.c_ulong(0), b"123456789", ctypes.c_uint(9)) != 0xCBF43926:
        return False  # another function of the same name
    llvm.add_symbol(_CRC32, ctypes.cast(function, ctypes.c_void_p).value)
    return True


@without_gil
def image_size(encoded: Any) -> Any:
    """Return (place in PROBLEMS, height, width) of a JPEG or PNG, (n,) uint8.

    A JPEG is walked from segment to segment, as libjpeg does.
    """
    length = len(encoded)
    if length >= 24 and _png(encoded):
        return 0, _number(encoded, 20, 4), _number(encoded, 16, 4)
    if length < 2 or encoded[0] != 0xFF or encoded[1] != 0xD8:
        return _NEITHER, 0, 0
    at, scans, height, width, components = 2, 0, -1, -1, 0
    progressive = False
    for _ in range(MOST_SEGMENTS):
        # After a scan, or at damage, skip to the next marker.
        while length >= at + 10 and (encoded[at] != 0xFF or _alone(encoded[at + 1])):
            at += 1
        if length < at + 10 or encoded[at + 1] == 0xD9:  # end of image
            break
        kind = encoded[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame
            height, width = _number(encoded, at + 5, 2), _number(encoded, at + 7, 2)
            components, progressive = encoded[at + 9], kind in (0xC2, 0xC6, 0xCA, 0xCE)
        elif kind == 0xDA:  # a scan
            scans += 1
            if scans > MOST_SCANS:
                return _SCANS, 0, 0
            if not progressive and encoded[at + 4] == components:
                break  # this scan holds all components: decoders read no other
        at += 2 + max(2, _number(encoded, at + 2, 2))
    else:
        return _SEGMENTS, 0, 0
    return (0 if height >= 0 else _NEITHER), height, width


@without_gil
def _png(encoded: Any) -> Any:
    """Whether a file begins as a PNG does."""
    begins = _number(encoded, 0, 4) == 0x89504E47 and _number(encoded, 4, 4) == 0x0D0A1A0A
    return begins and _number(encoded, 12, 4) == 0x49484452  # IHDR


@without_gil
def _number(encoded: Any, at: Any, size: Any) -> Any:
    """Return a big-endian number of `size` bytes."""
    value = 0
    for n in range(size):
        value = value << 8 | encoded[at + n]
    return value


@without_gil
def _alone(marker: Any) -> Any:
    """Whether a marker has no length after it: it stands alone, or is a byte of a scan."""
    return marker <= 1 or marker == 0xFF or 0xD0 <= marker <= 0xD8


@without_gil
def read(rows: Any, files: Any, starts: Any, out: Any, sound: Any) -> None:
    """Read samples one after another, and check them against the index.

    Args:
        rows: (n,) records of split.INDEX.
        files: file descriptor of each shard.
        starts: (n + 1,), where each sample begins in `out`, and where the last ends.
        out: uint8, receives the encoded images.
        sound: (n,) bool, receives whether the sample was read, matches its checksum, and has the
            size in its header.
    """
    for n in range(len(rows)):
        row, encoded = rows[n], out[starts[n] : starts[n + 1]]
        at, size = encoded.ctypes.data, row.size
        sound[n] = False
        if _pread(files[row.shard], at, size, row.offset) != size:
            continue
        if _crc32(0, at, size) != row.crc32:
            continue
        problem, height, width = image_size(encoded)
        within = height * width <= MOST_PIXELS
        sound[n] = problem == 0 and height == row.height and width == row.width and within


@without_gil
def cut(images: Any, samples: Any, corners: Any, out: Any) -> None:
    """Copy a square from each of n images.

    Args:
        images: (N, side, 3 · side) uint8, rows of pixels.
        samples: (n,), places of the images.
        corners: (n, 2), top and left pixel of each square.
        out: (n, s, 3 · s) uint8, receives the squares.
    """
    length = out.shape[2]
    for n in range(len(out)):
        image, top, left = images[samples[n]], corners[n, 0], 3 * corners[n, 1]
        for row in range(out.shape[1]):
            out[n, row] = image[top + row, left : left + length]
