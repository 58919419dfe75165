"""What the first bytes of a JPEG or PNG say, read before a decoder takes memory or time by it."""

import re
import struct

from alexnet_dist.files import MOST_SCANS, MOST_SEGMENTS

# Markers that no length follows: those that stand alone, and bytes of a scan.
_ALONE = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xD9)))
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]", re.DOTALL)
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_TWO, _TWO_BYTES = struct.Struct(">HH"), struct.Struct(">H")
_SCAN, _END = 0xDA, 0xD9


def size_of(encoded: bytes | bytearray) -> tuple[int, int]:
    """Height and width of a JPEG or PNG, pixels; raises ValueError for anything else.

    Raises ValueError too where a JPEG has more segments or scans than it may.
    """
    if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR" and len(encoded) >= 24:
        width, height = struct.unpack_from(">II", encoded, 16)
        return height, width
    size = jpeg_size(encoded) if encoded[:2] == b"\xff\xd8" else None
    if size is None:
        raise ValueError("neither a JPEG nor a PNG")
    return size


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
