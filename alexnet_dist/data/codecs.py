"""torchvision's decoder and encoder of images, without its Python, which imports all of its models
and torch's compiler: more than a second, at every start."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNCHANGED, RGB = 0, 3  # modes of decoding: the channels of the file, or three


@functools.cache
def operators() -> Any:
    """Load and return torch.ops.image; raise ModuleNotFoundError if torchvision is missing,
    OSError if it does not fit torch."""
    spec = importlib.util.find_spec("torchvision")
    libraries = [*Path(spec.origin).parent.glob("image*.so")] if spec and spec.origin else []
    if not libraries:
        raise ModuleNotFoundError("torchvision is missing, or without codecs", name="torchvision")
    for library in libraries:
        torch.ops.load_library(library)
    return torch.ops.image


def decode_image(encoded: Tensor, mode: int = UNCHANGED) -> Tensor:
    """Decode a JPEG or PNG, (bytes,) uint8, to (channels, h, w) uint8; raise RuntimeError where it
    cannot be decoded."""
    image: Tensor = operators().decode_image(encoded, mode)
    return image


def encode_png(image: Tensor) -> Tensor:
    """Encode (1 or 3, h, w) uint8 as PNG, (bytes,) uint8."""
    compression = 6  # zlib's level
    encoded: Tensor = operators().encode_png(image, compression)
    return encoded
