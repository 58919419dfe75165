"""Read headers of JPEG and PNG files before a decoder spends memory or time on what they say."""

import struct
import zlib

import numpy as np

_SIZE = struct.Struct(">I")
PNG = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 2**18  # in a PNG: of a kilobyte each, they are a file of MOST_ENCODED


def size_of(encoded: bytes | bytearray) -> tuple[int, int]:
    """Return the height and width of a JPEG or PNG, pixels.

    Raises ValueError for any other file, and for a JPEG with too many segments or scans.
    """
    from alexnet_dist.data import loops  # Numba is slow to load

    writable = np.frombuffer(bytearray(encoded), np.uint8)  # for bytes, Numba would compile anew
    problem, height, width = loops.image_size(writable)
    if problem:
        raise ValueError(loops.PROBLEMS[problem])
    return height, width


def check_png(encoded: bytes) -> None:
    """Raise ValueError where a PNG is truncated, or a chunk does not match its checksum: Pillow
    does not check those of pixel data."""
    at, content = len(PNG), memoryview(encoded)
    for _ in range(_MOST_CHUNKS):
        try:
            end = at + 8 + _SIZE.unpack_from(encoded, at)[0]
            (checksum,) = _SIZE.unpack_from(encoded, end)
        except struct.error:
            raise ValueError("the PNG is cut short: copy it again from its source") from None
        kind = encoded[at + 4 : at + 8]
        if zlib.crc32(content[at + 4 : end]) != checksum:
            name = ascii(kind.decode("latin-1"))[1:-1]
            raise ValueError(
                f"the PNG's chunk {name} at byte {at} does not match its checksum: copy it again "
                "from its source"
            )
        if kind == b"IEND":
            return
        at = end + 4
    raise ValueError(f"a PNG of more than {_MOST_CHUNKS:,} chunks")
