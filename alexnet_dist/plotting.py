"""Pictures of a network, as arrays: kernels (Fig. 3), answers (Fig. 4), confusion."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from alexnet_dist.errors import printable

Picture = npt.NDArray[np.uint8]  # (height, width, 3)
MOST_CLASSES = 2000  # of a confusion: a matrix of their square
_FONT = ImageFont.load_default(12)
_NAMED, _CELL, _LONGEST = 50, 24, 150  # classes that are named; of a class, of a name, pixels
_RIGHT, _WRONG = (240, 160, 150), (170, 200, 230)


def chroma(kernels: Tensor, columns: int) -> list[float]:
    """Of each column, how much of its conv1 kernels' energy is colour: 0 of grey kernels, 2/3 of
    random ones. Fig. 3's columns, one "largely color-agnostic", the other "largely
    color-specific", differ in it.

    Args:
        kernels: (maps, 3, k, k).
    """
    colour = kernels - kernels.mean(1, keepdim=True)
    shares = colour.square().sum((1, 2, 3)) / kernels.square().sum((1, 2, 3)).clamp_min(1e-30)
    return [float(column.mean()) for column in shares.chunk(columns)]


def kernel_picture(kernels: Tensor, columns: int) -> Picture:
    """conv1's kernels as in Fig. 3: three rows of kernels for each column, the first on top.

    Args:
        kernels: (maps, 3, k, k).

    Returns:
        (height, width, 3), each kernel stretched to the full range, three pixels for one.
    """
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    unit = ((kernels - low) / (high - low).clamp_min(1e-12)).movedim(1, -1).numpy()
    pixels = np.rint(unit * 255).astype(np.uint8).repeat(3, axis=1).repeat(3, axis=2)
    tiles = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    blocks = []
    for block in np.array_split(tiles, columns):
        rows = np.array_split(block, 3)
        wide = max(len(row) for row in rows)
        padded = [np.pad(r, ((0, wide - len(r)), *[(0, 0)] * 3), constant_values=255) for r in rows]
        blocks += [np.concatenate(list(row), axis=1) for row in padded]
        blocks.append(np.full((6, blocks[0].shape[1], 3), 255, np.uint8))
    return np.concatenate(blocks[:-1])


def answer_picture(
    images: Sequence[Picture], labels: Sequence[str], answers: Sequence[Sequence[tuple[str, float]]]
) -> Picture:
    """Test images, under each its label and the likeliest answers (Fig. 4, left).

    Args:
        images: squares.
        answers: of each image, names and probabilities, the likeliest first.
    """
    side, line, across = 160, 17, min(4, len(images))
    height = side + line * (1 + max(map(len, answers))) + 8
    whole = Image.new("RGB", (across * (side + 8), -(-len(images) // across) * height), "white")
    draw = ImageDraw.Draw(whole)
    for place, (image, label, likeliest) in enumerate(zip(images, labels, answers, strict=True)):
        left, top = place % across * (side + 8) + 4, place // across * height + 4
        whole.paste(Image.fromarray(image).resize((side, side)), (left, top))
        draw.text((left + side // 2, top + side), _fitted(label, side), "black", _FONT, "ma")
        for row, (name, probability) in enumerate(likeliest, start=1):
            y = top + side + row * line
            colour = _RIGHT if name == label else _WRONG
            draw.rectangle((left, y + 1, left + round(probability * side), y + line - 2), colour)
            draw.text((left + 3, y + 1), _fitted(name, side - 6), "black", _FONT)
    return np.asarray(whole)


def confusion_picture(confusion: Tensor, classes: Sequence[str]) -> Picture:
    """A row a class, a column an answer, the darker the larger the share of the row; up to 50
    classes are named, and the share of right answers stands on the diagonal, %.

    Args:
        confusion: (classes, classes) counts; rows without samples stay white.
    """
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)
    grey = np.rint(255 * (1 - shares.numpy())).astype(np.uint8)
    if len(classes) > _NAMED:
        zoom = max(1, 600 // len(classes))
        cells = Image.fromarray(grey.repeat(zoom, axis=0).repeat(zoom, axis=1))
        return np.asarray(cells.convert("RGB"))
    cells = Image.fromarray(grey.repeat(_CELL, axis=0).repeat(_CELL, axis=1))
    names = [_fitted(name, _LONGEST) for name in distinct(classes)]
    margin = 8 + round(max(map(_FONT.getlength, names)))
    whole = Image.new("RGB", (margin + cells.width, cells.height + margin), "white")
    whole.paste(cells, (margin, 0))
    draw = ImageDraw.Draw(whole)
    below = Image.new("RGB", (margin, cells.width), "white")  # turned, it lies under the columns
    columns = ImageDraw.Draw(below)
    for place, name in enumerate(names):
        middle = place * _CELL + _CELL // 2
        draw.text((margin - 4, middle), name, "black", _FONT, "rm")
        columns.text((margin - 4, middle), name, "black", _FONT, "rm")
        share = float(shares[place, place])
        colour = "white" if share > 0.5 else "black"
        draw.text((margin + middle, middle), f"{100 * share:.0f}", colour, _FONT, "mm")
    whole.paste(below.transpose(Image.Transpose.ROTATE_90), (margin, cells.height))
    return np.asarray(whole)


def png(picture: Picture) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def distinct(names: Sequence[str]) -> list[str]:
    """Names up to their first comma, or whole where that is another's too."""
    short = [name.split(",")[0] for name in names]
    often = Counter(short)
    return [few if often[few] == 1 else name for few, name in zip(short, names, strict=True)]


def drawable(name: str) -> str:
    """A name in one line of letters that any file can hold."""
    return " ".join(printable(name).split())


def _fitted(name: str, width: int) -> str:
    """A name that can be drawn, cut to so many pixels."""
    name = drawable(name)
    if _FONT.getlength(name) <= width:
        return name
    while name and _FONT.getlength(f"{name}…") > width:
        name = name[:-1]
    return f"{name}…"


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """(rows, columns) axes; written to the path in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
