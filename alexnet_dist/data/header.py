"""What the first bytes of a JPEG or PNG say, read before a decoder takes memory or time by it."""

import re
import struct
import zlib

from alexnet_dist.files import MOST_SCANS, MOST_SEGMENTS

# Markers that no length follows: those that stand alone, and bytes of a scan.
_ALONE = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xD9)))
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]", re.DOTALL)
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_TWO, _TWO_BYTES, _SIZE = struct.Struct(">HH"), struct.Struct(">H"), struct.Struct(">I")
_SCAN, _END = 0xDA, 0xD9
PNG = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 2**18  # of a PNG; those of a kilobyte each are a file of MOST_ENCODED


def size_of(encoded: bytes | bytearray) -> tuple[int, int]:
    """Height and width of a JPEG or PNG, pixels; raises ValueError for anything else.

    Raises ValueError too where a JPEG has more segments or scans than it may.
    """
    if encoded[:8] == PNG and encoded[12:16] == b"IHDR" and len(encoded) >= 24:
        width, height = struct.unpack_from(">II", encoded, 16)
        return height, width
    size = jpeg_size(encoded) if encoded[:2] == b"\xff\xd8" else None
    if size is None:
        raise ValueError("neither a JPEG nor a PNG")
    return size


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


def jpeg_size(encoded: bytes | bytearray) -> tuple[int, int] | None:
    """Height and width of a JPEG, None where they are not to be found.

    Raises ValueError where it has more segments or scans than it may. It walks as libjpeg does.
    """
    at, scans, size, components, progressive = 2, 0, None, 0, False
    for _ in range(MOST_SEGMENTS):
        if len(encoded) < at + 10:
            return size
        if encoded[at] != 0xFF or encoded[at + 1] in _ALONE:  # after a scan, or where it is damaged
            marker = _MARKER.search(encoded, at, len(encoded) - 8)
            if marker is None:
                return size
            at = marker.start()
        kind = encoded[at + 1]
        if kind == _END:
            return size
        if kind in _FRAMES:
            size = _TWO.unpack_from(encoded, at + 5)
            components, progressive = encoded[at + 9], kind in _PROGRESSIVE
        elif kind == _SCAN:
            scans += 1
            if scans > MOST_SCANS:
                raise ValueError(f"a JPEG of more than {MOST_SCANS} scans")
            if not progressive and encoded[at + 4] == components:
                return size  # all of it is in this one: decoders read no other
        at += 2 + max(2, _TWO_BYTES.unpack_from(encoded, at + 2)[0])
    raise ValueError(f"a JPEG of more than {MOST_SEGMENTS} segments")
