"""Draw pictures of a network as arrays: kernels (Fig. 3), predictions (Fig. 4), confusion."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from alexnet_dist.errors import printable
from alexnet_dist.files import written_aside

Picture = npt.NDArray[np.uint8]  # (height, width, 3)
MOST_CLASSES = 2000  # most classes of a confusion matrix, which has their square of cells
_FONT = ImageFont.truetype(  # matplotlib's, found without loading it; Pillow's own knows no ä or é
    Path(str(getattr(find_spec("matplotlib"), "origin", ""))).parent
    / "mpl-data/fonts/ttf/DejaVuSans.ttf",
    11,
)
_ACROSS, _DOWN = 4, 6  # grid of maps shown of each layer of a column
_HUES = ("#0969da", "#bc4c00")  # the columns' colours, as in docs/images/columns.svg
_NAMED = 50  # most classes whose names are drawn beside a confusion matrix
_CELL, _LONGEST = 24, 150  # side of a cell, width of a name, pixels
_RIGHT, _WRONG = (240, 160, 150), (170, 200, 230)  # colours of right and wrong answers


def chroma(kernels: Tensor, columns: int) -> list[float]:
    """Return, for each column, how much of its conv1 kernels' energy is colour: 0 for grey kernels,
    2/3 for random ones. It is what distinguishes Fig. 3's columns, one "largely color-agnostic",
    the other "largely color-specific".

    Args:
        kernels: (maps, 3, k, k).
    """
    colour = kernels - kernels.mean(1, keepdim=True)
    shares = colour.square().sum((1, 2, 3)) / kernels.square().sum((1, 2, 3)).clamp_min(1e-30)
    return [float(column.mean()) for column in shares.chunk(columns)]


def kernel_picture(kernels: Tensor, columns: int) -> Picture:
    """Draw conv1's kernels as in Fig. 3: three rows of kernels for each column, the first on top.

    Args:
        kernels: (maps, 3, k, k).

    Returns:
        (height, width, 3); each kernel is stretched to the full range, and enlarged three times, or
        more where it is smaller than the paper's 11 × 11.
    """
    zoom = max(3, round(33 / kernels.shape[-1]))
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    unit = ((kernels - low) / (high - low).clamp_min(1e-12)).movedim(1, -1).numpy()
    pixels = np.rint(unit * 255).astype(np.uint8).repeat(zoom, axis=1).repeat(zoom, axis=2)
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
    """Draw test images, each with its label and most probable classes below (Fig. 4, left).

    Args:
        images: square pictures.
        answers: for each image, class names and probabilities, the most probable first.
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
    """Draw a confusion matrix: a row per class, a column per prediction, darker for a larger share
    of the row. Up to 50 classes are named, with the percentage of right answers on the diagonal.

    Args:
        confusion: (classes, classes) counts; rows without samples stay white.
    """
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)
    grey = np.rint(255 * (1 - shares.numpy())).astype(np.uint8)
    zoom = _CELL if len(classes) <= _NAMED else max(1, 600 // len(classes))
    cells = Image.fromarray(grey.repeat(zoom, axis=0).repeat(zoom, axis=1))
    if len(classes) > _NAMED:
        return np.asarray(cells.convert("RGB"))
    names = [_fitted(name, _LONGEST) for name in distinct(classes)]
    margin = 8 + round(max(map(_FONT.getlength, names)))
    whole = Image.new("RGB", (margin + cells.width, cells.height + margin), "white")
    whole.paste(cells, (margin, 0))
    draw = ImageDraw.Draw(whole)
    below = Image.new("RGB", (margin, cells.width), "white")  # rotated and pasted below the columns
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


def columns_picture(
    path: Path, title: str, image: Picture, seen: float, answers: Sequence[tuple[str, float]],
    maps: Mapping[str, Sequence[npt.NDArray[Any]]],
) -> None:  # fmt: skip
    """Write a PNG of 1920 × 1080: an image, its prediction, and each column's maps of it.

    Args:
        path: the PNG to write.
        image: (h, w, 3) uint8; the network's window is outlined in it.
        seen: side of that window ÷ the image's shorter side.
        answers: class names and probabilities, the most probable first.
        maps: by layer, each column's maps (maps, h, w), of which the strongest are shown; twice as
            many where there is one column.
    """
    from matplotlib.patches import Rectangle

    plain = {"parse_math": False}  # names may contain a $
    ratios = [1.25, *[1] * len(maps)]
    with figure(path, 2, len(ratios), (16, 9), width_ratios=ratios) as axes:
        for panel in axes.flat:
            panel.axis("off")
        picture, bars = axes[:, 0]
        height, width = image.shape[:2]
        shown = Image.fromarray(image)
        shown.thumbnail((800, 800))
        picture.imshow(shown, extent=(0, width, height, 0))
        side = seen * min(height, width)
        corner = ((width - side) / 2, (height - side) / 2)
        for colour, style in (("black", "-"), ("white", "--")):  # visible on any image
            picture.add_patch(
                Rectangle(corner, side, side, fill=False, ec=colour, lw=2, linestyle=style)
            )
        picture.set_title(title if len(title) < 26 else f"…{title[-22:]}", fontsize=16, **plain)

        bars.set(xlim=(0, 1), ylim=(len(answers) - 0.3, -0.7))
        bars.barh(range(len(answers)), [share for _, share in answers], color="0.8", height=0.75)
        for place, (name, share) in enumerate(answers):
            text = f"{_short(name)}  {share:.1%}"
            size = min(16, 16 * 24 / len(text))
            bars.text(0.02, place, text, va="center", fontsize=size, **plain)

        _show_maps(axes[:, 1:], maps)
        picture.figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        picture.figure.supxlabel(
            f"For each layer, the {_ACROSS * _DOWN} maps with the largest sums, each scaled to "
            "its own largest value (darkest). Dashed: what the network sees.",
            fontsize=14, color="0.3",
        )  # fmt: skip


def _show_maps(axes: Any, maps: Mapping[str, Sequence[npt.NDArray[Any]]]) -> None:
    """Draw the strongest maps of each layer into axes (2, layers), a row for each column; for one
    column, its strongest maps above and the next below."""
    from matplotlib.colors import LinearSegmentedColormap

    alone = len(next(iter(maps.values()))) == 1
    words = ("strongest maps", "the next") if alone else ("column 1", "column 2")
    colours = (_HUES[0], _HUES[0]) if alone else _HUES
    most = _ACROSS * _DOWN
    for place, (layer, parts) in enumerate(maps.items()):
        tiles = [_strongest(own) for own in parts]
        blocks = [tiles[0][:most], tiles[0][most:]] if alone else tiles
        for row, block in enumerate(blocks):
            panel, colour = axes[row, place], colours[row]
            ends = LinearSegmentedColormap.from_list("", ["white", colour, "black"])
            shades = ends.with_extremes(bad="0.8")  # between maps
            if len(block):
                panel.imshow(_tiled(block[:most]), cmap=shades, vmin=0, vmax=1.4)
            count, tall, wide = parts[0].shape
            about = f"{layer}\n{count} maps of {tall} × {wide}" if row == 0 else layer
            panel.set_title(about, fontsize=min(15, 80 // len(maps)), color=colour)
        if place == 0:
            for row, word in enumerate(words):
                axes[row, 0].text(
                    -0.06, 0.5, word, rotation=90, va="center", ha="right", fontsize=20,
                    color=colours[row], transform=axes[row, 0].transAxes,
                )  # fmt: skip


def _strongest(maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sort maps (n, h, w) by their sums, largest first, and divide each by its largest value."""
    order = np.argsort(-maps.sum((1, 2)), kind="stable")
    ordered = maps[order].astype(np.float64)
    most = np.abs(ordered).max((1, 2), keepdims=True)
    unit: npt.NDArray[Any] = ordered / np.where(most > 0, most, 1)
    return unit


def _tiled(maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Tile maps (n, h, w) row by row, with lines of NaN between and around them."""
    zoom = -(-64 // maps.shape[1])  # enlarge small maps, so that the lines are thin beside them
    maps = maps.repeat(zoom, axis=1).repeat(zoom, axis=2)
    gap = max(1, maps.shape[1] // 16)
    filled = np.pad(maps, ((0, _ACROSS * _DOWN - len(maps)), (0, 0), (0, 0)))
    padded = np.pad(filled, ((0, 0), (gap, 0), (gap, 0)), constant_values=np.nan)
    rows = padded.reshape(_DOWN, _ACROSS, *padded.shape[1:]).swapaxes(1, 2)
    whole = rows.reshape(_DOWN * padded.shape[1], -1)
    return np.pad(whole, ((0, gap), (0, gap)), constant_values=np.nan)


def _short(name: str) -> str:
    short = drawable(name.split(",")[0])
    return short if len(short) <= 24 else f"{short[:23]}…"


def png(picture: Picture) -> bytes:
    """Encode a picture as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def distinct(names: Sequence[str]) -> list[str]:
    """Cut names at their first comma, except where two would become the same."""
    short = [name.split(",")[0] for name in names]
    count = Counter(short)
    return [cut if count[cut] == 1 else name for cut, name in zip(short, names, strict=True)]


def drawable(name: str) -> str:
    """Return a name in one line, with control characters escaped."""
    return " ".join(printable(name).split())


def as_label(name: str) -> str:
    """Return a name for matplotlib, which would draw what is between two $ as a formula, and leave
    a name that begins with _ out of a legend."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _fitted(name: str, width: int) -> str:
    """Return a name that can be drawn, cut to a width in pixels."""
    name = drawable(name)
    if _FONT.getlength(name) <= width:
        return name
    while name and _FONT.getlength(f"{name}…") > width:
        name = name[:-1]
    return f"{name}…"


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float],
    width_ratios: Sequence[float] | None = None, software: str = "alexnet-dist",
) -> Iterator[Any]:  # fmt: skip
    """Give (rows, columns) axes of a matplotlib figure, which is written to `path` at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=120, layout="constrained")
    yield figure.subplots(rows, columns, width_ratios=width_ratios, squeeze=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the font lacks
        with written_aside(path) as aside:
            FigureCanvasAgg(figure).print_png(aside, metadata={"Software": software})
