"""Convert an image of a source to one that is packed: RGB or grey, 8 bits, upright, decodable.

What decoders interpret differently (EXIF rotation, CMYK, 16 bits, alpha, palettes) is settled here,
once, so that every pipeline sees the same pixels.
"""

import io
import mmap
import warnings
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageChops, TiffImagePlugin, UnidentifiedImageError

from alexnet_dist.data.codecs import decode_image, encode_png
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.header import PNG, check_png, size_of
from alexnet_dist.data.prepare import MODULES
from alexnet_dist.data.prepare.sources import Pixels
from alexnet_dist.errors import is_full, one_line
from alexnet_dist.files import LONGEST_SIDE, MOST_MEMORY, MOST_PIXELS, within_memory

SIDE = 256  # side of stored images, pixels (paper §2)
_LARGE = 2**24  # pixels above which a PNG is compressed fast: noise takes 0.5 s per million pixels
BAND = 2**22  # pixels converted at a time, since a conversion makes several copies
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # none that starts another program
# The transposition that makes an image of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class RefusedImage(ValueError):
    """Why an image cannot be packed."""


@dataclass(frozen=True)
class Stored:
    """An image as it is packed.

    Attributes:
        kind: the file's extension: jpg or png.
        image: (1 or 3, h, w) uint8, as every decoder decodes `encoded`.
    """

    kind: str
    encoded: bytes
    image: torch.Tensor


def convert(content: bytes, keep: bool, enlarge: bool = False) -> Stored:
    """Convert an encoded image of any kind to a JPEG of 256 × 256: shorter side to 256, the centre.

    Args:
        keep: keep its own size; a plain JPEG keeps its bytes too. Images with a side below 256 are
            always kept so, unless `enlarge`.
        enlarge: resize them as well.

    Raises RefusedImage where it cannot be packed, MemoryError where this machine's memory is full.
    """
    if not content:
        raise RefusedImage("the file is empty")
    try:
        if content.startswith(b"\xff\xd8"):
            size_of(content)
        elif content.startswith(PNG):
            check_png(content)
    except ValueError as error:
        raise RefusedImage(f"{error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken EXIF
        try:
            with within_memory(MOST_MEMORY):  # headers do not bound what TIFF and WebP readers take
                return _stored(*_convert(content, keep, enlarge))
        except RefusedImage:
            raise
        except UnidentifiedImageError as error:
            made = "a HEIC or AVIF file, " if content[4:8] == b"ftyp" else ""
            remedy = ": convert it to JPEG" if made else ""
            raise RefusedImage(f"{made}not one of {', '.join(_FORMATS)}{remedy}") from error
        except MemoryError as error:
            if _memory_is_full():
                raise
            raise RefusedImage(f"it takes more than {MOST_MEMORY:,} bytes to read") from error
        except Exception as error:  # a hostile image can fail in any way; the reason is reported
            raise RefusedImage(_in_words(error)) from error


def _memory_is_full() -> bool:
    """Whether this process cannot have the memory that one image may take, as under a limit
    (ulimit -v): then the image is not at fault."""
    try:
        mmap.mmap(-1, MOST_MEMORY).close()
    except OSError:
        return True
    return False


def _in_words(error: Exception) -> str:
    """Return what is wrong with an image, given what a decoder raised."""
    if isinstance(error, Image.DecompressionBombError):
        return f"its header says too many pixels: {one_line(error)}"
    if "truncated" in f"{error}".lower():
        return "the file is cut short: copy it again from its source"
    return (
        f"damaged, or of a kind that Pillow cannot decode ({one_line(error)}): copy it again from "
        "its source, or save it as JPEG or PNG"
    )


class ConvertOptions(NamedTuple):
    """`convert`'s options."""

    keep: bool
    enlarge: bool


def options_of(dataset: Dataset) -> ConvertOptions:
    """Return the options with which `convert` converts an image as those of a data set were."""
    pixels = MODULES.get(dataset.source["kind"]) == "arrays"  # stored as they are
    at_side = all(split.uniform(SIDE) for split in dataset.splits.values())
    return ConvertOptions(keep=bool(dataset.source.get("keep")) or pixels, enlarge=at_side)


def _convert(content: bytes, keep: bool, enlarge: bool) -> tuple[str, bytes]:
    """Return an image as it is stored: jpg or png, and the encoded image. Raises anything."""
    opened = Image.open(io.BytesIO(content), formats=_FORMATS)
    width, height = opened.size
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        raise RefusedImage(f"its header says {width} × {height} pixels: too many")
    keep = keep or (min(width, height) < SIDE and not enlarge)
    jpeg = opened.format in ("JPEG", "MPO")
    if jpeg:
        _check_complete(content)
    elif opened.format == "TIFF":
        _check_tiff(opened, content)
    kind = "jpg" if not keep or jpeg else "png"
    if not keep:
        opened.draft(None, (2 * SIDE, 2 * SIDE))  # decodes a huge JPEG at ½, ¼ or ⅛
    opened.load()
    turn = _orientation(opened)  # after loading, when Pillow has turned a TIFF itself
    # Pillow inverts the inks of any CMYK JPEG, but only Adobe's are inverted.
    image = _eight_bits(opened, negative=jpeg and "adobe" not in opened.info)
    if keep and opened.format == "JPEG" and opened.mode in ("RGB", "L") and turn == 1:
        return kind, content
    del opened  # frees its memory
    if turn in _UPRIGHT:
        image = image.transpose(_UPRIGHT[turn])
    return kind, _encoded(image if keep else _square(image), {"jpg": "JPEG", "png": "PNG"}[kind])


def pack_pixels(pixels: Pixels) -> Stored:
    """Encode pixels (h, w) or (h, w, 3) as PNG, without loss."""
    image = torch.tensor(pixels).reshape(*pixels.shape[:2], -1).movedim(-1, 0)
    return Stored("png", encode_png(image).numpy().tobytes(), image)


def _stored(kind: str, encoded: bytes) -> Stored:
    """Decode an image again: one that fails would stop a run later, and colour statistics are those
    of the pixels that runs see."""
    try:
        buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return Stored(kind, encoded, decode_image(buffer))
    except RuntimeError as error:
        if is_full(error):
            raise MemoryError(f"{error}") from error
        raise RefusedImage(
            f"decoded by Pillow but not by torchvision: {one_line(error)}"
        ) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF does not make the image unusable
        return 1


def _check_complete(jpeg: bytes) -> None:
    """Raise RefusedImage where a JPEG is truncated. Pillow and torchvision fill what is missing
    with grey and ignore libjpeg's warning; here it is decoded at an eighth of each side.
    """
    try:
        simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, min_factor=1)
    except ValueError as error:  # other warnings and errors are left to the decoder
        if "premature end" in f"{error}".lower():
            raise RefusedImage("the JPEG is cut short: copy it again from its source") from error


def _check_tiff(opened: Image.Image, content: bytes) -> None:
    """Raise RefusedImage where a TIFF's pixels would be misread, or its zlib checksum is wrong,
    which libtiff does not check."""
    assert isinstance(opened, TiffImagePlugin.TiffImageFile)
    tag, tags = TiffImagePlugin, opened.tag_v2
    bits = tags.get(tag.BITSPERSAMPLE, (1,))
    unsigned = {*tags.get(tag.SAMPLEFORMAT, (1,))} <= {1, 4}  # 4: undefined
    white = tags.get(tag.PHOTOMETRIC_INTERPRETATION)  # 0: at 0; 1: at the largest value
    deep = opened.mode[0] in "IF" and (bits != (16,) or white != 1)
    if deep or not unsigned:
        raise RefusedImage(
            f"a TIFF of {bits[0]} bits a sample, {'unsigned' if unsigned else 'signed or floating'}"
            f"{', white at 0' if deep and white == 0 else ''}: which value is white is not "
            "sure: save it with 8 bits, or 16 unsigned, black at 0"
        )
    if tags.get(tag.COMPRESSION) in (8, 32946):  # deflate
        offsets = tags.get(tag.STRIPOFFSETS) or tags.get(tag.TILEOFFSETS, ())
        sizes = tags.get(tag.STRIPBYTECOUNTS) or tags.get(tag.TILEBYTECOUNTS, ())
        left = MOST_MEMORY
        for offset, size in zip(offsets, sizes, strict=False):
            left = _inflated(content[offset : offset + size], left)


def _inflated(packed: bytes, left: int) -> int:
    """Unpack zlib data to check it; return how many of the `left` bytes may still be unpacked."""
    unpack = zlib.decompressobj()
    while packed and not unpack.eof:
        try:
            left -= len(unpack.decompress(packed, 2**20))
        except zlib.error as error:
            raise RefusedImage(
                f"the TIFF is damaged ({error}): copy it again from its source"
            ) from error
        if left < 0:
            raise RefusedImage(f"it unpacks to more than {MOST_MEMORY:,} bytes")
        packed = unpack.unconsumed_tail
    return left


def _eight_bits(image: Image.Image, negative: bool) -> Image.Image:
    """Convert to grey or RGB of 8 bits, with alpha on white.

    Args:
        negative: a CMYK image is a negative.
    """
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    rows = max(1, BAND // image.width)
    made: Image.Image | None = None
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        part = image.crop(box)
        part = _band_of_eight_bits(
            ImageChops.invert(part) if negative and image.mode == "CMYK" else part
        )
        made = made or Image.new(part.mode, image.size)
        made.paste(part, box)
    assert made is not None
    return made


def _band_of_eight_bits(image: Image.Image) -> Image.Image:
    """Convert some rows of an image; raise RefusedImage for other modes."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        opaque = np.where(grey == image.info.get("transparency", -1), 65_535, grey)
        return Image.fromarray(np.rint(opaque / 257).astype(np.uint8))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        return _on_white(image)
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "CMYK", "YCbCr"):
        return image.convert("RGB")
    raise RefusedImage(f"pixels of Pillow's mode {image.mode}")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _square(image: Image.Image) -> Image.Image:
    """Resize the centre square to 256 × 256, antialiased: as if all were resized, then cut."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)


def _encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    fast = {"compress_level": 1} if image.width * image.height > _LARGE else {}
    image.save(out, kind, quality=95, exif=b"", icc_profile=None, **fast)
    return out.getvalue()
