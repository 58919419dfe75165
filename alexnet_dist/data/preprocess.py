"""Turn decoded bytes into conv1's input: cut, mirror, subtract the mean, add lighting, scale.

A loop on the CPU and a kernel on a GPU compute the same sums, for every pipeline, so that equal
bytes give equal windows.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numba import prange
from torch import Tensor

from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Statistics
from alexnet_dist.data.split import Ints
from alexnet_dist.data.verified import read_array
from alexnet_dist.errors import DatasetError, cannot_be_read
from alexnet_dist.files import sha256
from alexnet_dist.network import kernels
from alexnet_dist.network.kernels.numba_loops import bits, parallel, rounding

# A side this many times longer than the other is cut to its centre before the image is resized.
_LONGEST = 64
_WIDTHS = 2**16  # more than any width in the index


class Preprocess:
    """Turns patches into windows.

    Args:
        device: where the patches are.
        dtype: dtype of the windows, in which conv1 computes.
    """

    def __init__(
        self, config: Config, statistics: Statistics, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.crop, self.dtype = config.model.crop, dtype
        # Computed in float64 where the network is, otherwise in float32.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        side = config.data.canvas
        mean = _mean(config, statistics).movedim(0, -1).expand(side, side, 3)
        self.mean = mean.to(device, wide).contiguous()
        self.divide_by = torch.tensor(config.data.divide_by, dtype=wide, device=device)

    def __call__(
        self, patches: Tensor, corners: Tensor, flips: Tensor, lighting: Tensor,
        places: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return windows (n · v, 3, crop, crop), channels_last.

        Args:
            patches: (n, side, side, 3) uint8: the window where v = 1, otherwise the canvas.
            corners: (n, v, 2) int64, top and left pixel of each window on the canvas.
            flips: (n, v) bool.
            lighting: (n, 3), grey levels.
            places: (n,) int64; if given, `patches` are the canvases of a whole split, (N, canvas,
                canvas, 3), and these are the samples' places in it.
        """
        # Top and left of each window in its patch; the mean image is cut at `corners`.
        inside = corners
        if places is None:
            places = torch.arange(len(patches), device=patches.device)
            inside = torch.zeros_like(corners) if flips.shape[1] == 1 else corners
        make = self.by_loop
        if patches.is_cuda:
            make = self.by_kernel if kernels.can_be_built() else self.by_operators
        light = lighting.to(self.mean.dtype)
        windows = make(patches, places, inside, corners, flips, light)  # (n, v, crop, crop, 3)
        return windows.flatten(0, 1).movedim(-1, 1)

    def by_kernel(
        self, patches: Tensor, places: Tensor, inside: Tensor, corners: Tensor, flips: Tensor,
        light: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute the windows on a GPU, by one kernel: (n, v, crop, crop, 3)."""
        from alexnet_dist.network.kernels.windows import windows

        given = (patches, places, inside, corners, flips, light, self.mean, self.divide_by)
        return windows(*given, self.crop, self.dtype)

    def by_operators(
        self, patches: Tensor, places: Tensor, inside: Tensor, corners: Tensor, flips: Tensor,
        light: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute the windows by torch's operators, on a GPU whose kernels cannot be built."""
        along = torch.arange(self.crop, device=patches.device)
        mirrored = torch.where(flips[..., None], self.crop - 1 - along, along)
        rows, columns = inside[..., :1] + along, inside[..., 1:] + mirrored  # (n, v, crop)
        pixels = patches[places[:, None, None, None], rows[..., None], columns[..., None, :]]
        rows, columns = corners[..., :1] + along, corners[..., 1:] + mirrored
        mean = self.mean[rows[..., None], columns[..., None, :]]
        lit = pixels.to(mean.dtype) - mean + light[:, None, None, None]
        return (lit / self.divide_by).to(self.dtype)

    def by_loop(
        self, patches: Tensor, places: Tensor, inside: Tensor, corners: Tensor, flips: Tensor,
        light: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute the windows on the CPU, in one pass over the batch: the same sums and bits."""
        dtype = self.mean.dtype if self.dtype == torch.float16 else self.dtype  # NumPy's is slow
        windows = torch.empty((*flips.shape, self.crop, self.crop, 3), dtype=dtype)
        given = (patches.flatten(2), places, inside, corners, flips, light.repeat(1, self.crop),
                 self.mean.flatten(1), self.divide_by.repeat(self.crop))  # fmt: skip
        # Contiguous, because Numba compiles anew for each combination of strides.
        _loop(dtype)(*(tensor.contiguous().numpy() for tensor in given), bits(windows.flatten(3)))
        return windows.to(self.dtype)


@functools.cache
def _loop(dtype: torch.dtype) -> Callable[..., None]:
    """Compile the loop of `Preprocess.by_loop`, over rows of pixels (red, green, blue, red, …)."""
    wide, word = (np.float64, np.uint64) if dtype == torch.float64 else (np.float32, np.uint32)
    shift, below, odd = rounding(dtype)

    @parallel
    def windows(
        patches: Any, places: Any, inside: Any, corners: Any, flips: Any, light: Any, mean: Any,
        divide_by: Any, out: Any,
    ) -> None:  # fmt: skip
        views, side, length = flips.shape[1], out.shape[2], out.shape[3]
        for window in prange(flips.size):
            n, v = window // views, window % views
            x = np.empty(length, wide)
            x_bits, lit = x.view(word), light[n]
            for row in range(side):
                first, off = 3 * inside[n, v, 1], 3 * corners[n, v, 1]
                pixels = patches[places[n], inside[n, v, 0] + row, first : first + length]
                mean_row = mean[corners[n, v, 0] + row, off : off + length]
                for i in range(length):
                    x[i] = (wide(pixels[i]) - mean_row[i] + lit[i]) / divide_by[i]
                result = out[n, v, row]
                if flips[n, v]:
                    for i in range(0, length, 3):
                        for colour in range(3):
                            b = x_bits[length - 3 - i + colour]
                            result[i + colour] = (b + below + ((b >> shift) & odd)) >> shift
                else:
                    for i in range(length):
                        b = x_bits[i]
                        result[i] = (b + below + ((b >> shift) & odd)) >> shift

    return windows


def on_canvas(image: Tensor, side: int) -> Tensor:
    """Resize an image's shorter side to `side` and take the centre square, as the paper does (§2).

    Args:
        image: (colours, h, w), uint8 or floating point.

    Returns:
        (colours, side, side); the image itself where it already has that size.
    """
    (top, left), (height, width) = centre_of(image.shape[1], image.shape[2])
    image = image[:, top : top + height, left : left + width]
    (height, width), (top, left) = canvas_in(height, width, side)
    if image.shape[1:] != (height, width):
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return image[:, top : top + side, left : left + side]


def rgb_last(image: Tensor) -> Tensor:
    """Return a grey or RGB image (1 or 3, h, w) as RGB (h, w, 3), without copying it."""
    return image.expand(3, -1, -1).movedim(0, -1)


def centre_of(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (top, left) and (height, width) of the part of an image that is resized.

    It is all of the image, unless one side is very long: a PNG of 271 bytes can be 65,535 × 1, and
    would take 12.9 GB with its shorter side at 256. The canvas is one square at the centre, far
    inside what is kept here.
    """
    most = _LONGEST * min(height, width)
    # Cut as many pixels from either end, so that the centre stays in place.
    kept = [size if size <= most else most + (size - most) % 2 for size in (height, width)]
    return ((height - kept[0]) // 2, (width - kept[1]) // 2), (kept[0], kept[1])


def canvas_in(height: int, width: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (height, width) to which an image is resized, and (top, left) of the canvas, the
    centre square of that."""
    scale = side / min(height, width)
    size = max(side, round(height * scale)), max(side, round(width * scale))
    return size, ((size[0] - side) // 2, (size[1] - side) // 2)


class Canvases:
    """`centre_of` and `canvas_in` for many images of a split at once.

    Args:
        index: the split's index.
        side: side of the canvas, pixels.

    Attributes:
        cuts: whether any image is cut to its centre before it is resized.
        resizes: whether any image is not stored at the canvas's size.
    """

    def __init__(self, index: npt.NDArray[np.void], side: int) -> None:
        self._index = index
        self._kinds = np.unique(_kinds(index))
        table = []
        for kind in self._kinds.tolist():
            corner, kept = centre_of(*divmod(kind, _WIDTHS))
            table.append((corner, kept, *canvas_in(*kept, side)))
        self._table = np.array(table, np.int64).reshape(-1, 4, 2)
        stored = np.stack(np.divmod(self._kinds, _WIDTHS), axis=1)  # (kinds, 2)
        self.cuts = bool((self._table[:, 1] != stored).any())
        self.resizes = bool((stored != side).any())

    def __call__(self, samples: Ints) -> Ints:
        """Return (n, 4, 2), pixels, for samples (n,): (top, left) and (height, width) of the part
        that is resized; (height, width) it is resized to; (top, left) of the canvas in that."""
        places: Ints = self._table[np.searchsorted(self._kinds, _kinds(self._index[samples]))]
        return places


def _kinds(rows: npt.NDArray[np.void]) -> npt.NDArray[np.uint32]:
    """Return the size of each image as one number, height · 2¹⁶ + width."""
    kinds: npt.NDArray[np.uint32] = rows["height"].astype(np.uint32) * _WIDTHS + rows["width"]
    return kinds


def _mean(config: Config, statistics: Statistics) -> Tensor:
    """Return what data.subtract names: (3, canvas, canvas), or (3, 1, 1) for one colour."""
    match config.data.subtract:
        case "mean_image":
            mean = statistics.mean_image
            if config.data.mean_from != "none":
                mean = _read_mean(Path(config.data.mean_from), config.data.mean_sha256)
            return on_canvas(torch.from_numpy(mean).movedim(-1, 0), config.data.canvas)
        case "mean_rgb":
            return torch.from_numpy(statistics.mean_rgb)[:, None, None]
        case "nothing":
            return torch.zeros(3, 1, 1)


def mean_sha256(config: Config) -> str:
    """Return the SHA-256 of the file that data.mean_from names; "any" where it names none."""
    path = config.data.mean_from
    if path == "none" or config.data.subtract != "mean_image":
        return "any"
    try:
        return sha256(Path(path))
    except OSError as error:
        raise DatasetError(f"data.mean_from={path}: {cannot_be_read(Path(path), error)}") from error


def _read_mean(path: Path, expected: str) -> npt.NDArray[np.float32]:
    """Read a mean image (height, width, 3), whose SHA-256 must be as expected."""
    try:
        mean, found = read_array(path), sha256(path)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"data.mean_from={path}: cannot be read as a .npy file: {error}"
        ) from error
    if expected not in ("any", found):
        raise DatasetError(
            f"data.mean_from={path}: its SHA-256 is {found}, not data.mean_sha256={expected}: "
            "name the mean image that the run began with"
        )
    if mean.dtype.kind != "f" or mean.ndim != 3 or mean.shape[2] != 3 or not mean.size:
        raise DatasetError(
            f"data.mean_from={path}: {mean.dtype} of shape {mean.shape}, but must be floats of "
            "(height, width, 3)"
        )
    floats: npt.NDArray[np.float32] = mean.astype(np.float32)
    if not np.isfinite(floats).all():
        raise DatasetError(f"data.mean_from={path}: holds NaN or infinity, but must be grey levels")
    return floats
