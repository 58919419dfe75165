"""What the first bytes of a JPEG or PNG say, read before a decoder takes memory or time by it."""

import struct
import zlib

import numpy as np

_SIZE = struct.Struct(">I")
PNG = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 2**18  # of a PNG; those of a kilobyte each are a file of MOST_ENCODED


def size_of(encoded: bytes | bytearray) -> tuple[int, int]:
    """Height and width of a JPEG or PNG, pixels; raises ValueError for anything else.

    Raises ValueError too where a JPEG has more segments or scans than it may.
    """
    from alexnet_dist.data import loops  # Numba takes a while to load

    problem, height, width = loops.image_size(np.frombuffer(encoded, np.uint8))
    if problem:
        raise ValueError(loops.PROBLEMS[problem])
    return height, width


def check_png(encoded: bytes) -> None:
    """Raises ValueError where a PNG is cut short, or a chunk does not match its checksum: Pillow
    does not compare those of pixels."""
    at, content = len(PNG), memoryview(encoded)
    for _ in range(_MOST_CHUNKS):
        if len(encoded) < at + 12:
            raise ValueError("the PNG is cut short: copy it again from where it came")
        end = at + 8 + _SIZE.unpack_from(encoded, at)[0]
        kind = encoded[at + 4 : at + 8]
        if len(encoded) < end + 4:
            raise ValueError("the PNG is cut short: copy it again from where it came")
        if zlib.crc32(content[at + 4 : end]) != _SIZE.unpack_from(encoded, end)[0]:
            name = ascii(kind.decode("latin-1"))[1:-1]
            raise ValueError(
                f"the PNG's chunk {name} at byte {at} does not match its checksum: copy it again "
                "from where it came"
            )
        if kind == b"IEND":
            return
        at = end + 4
    raise ValueError(f"a PNG of more than {_MOST_CHUNKS:,} chunks")
