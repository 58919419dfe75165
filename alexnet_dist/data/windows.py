"""From decoded bytes to what conv1 sees: cut, mirrored, the mean off, lit, scaled. On any device.

The same few lines serve every pipeline, so that equal bytes give equal windows.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_dist.config import Config
from alexnet_dist.data.dataset import Statistics
from alexnet_dist.errors import DatasetError


class Finish:
    """Makes windows of patches.

    Args:
        device: where patches lie.
        dtype: of the windows: what conv1 computes in.
    """

    def __init__(
        self, config: Config, statistics: Statistics, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.crop, self.dtype = config.model.crop, dtype
        # Sums in float64 where the network computes in it, else float32.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean = _mean(config, statistics).movedim(0, -1)  # (canvas or 1, canvas or 1, 3)
        self.mean = mean.contiguous().to(device, wide)
        colours = torch.tensor(config.data.divide_by, dtype=wide, device=device)
        self.divide_by = colours.repeat(self.crop)

    def __call__(self, patches: Tensor, corners: Tensor, flips: Tensor, lighting: Tensor) -> Tensor:
        """Windows (n · v, 3, crop, crop), channels_last.

        Args:
            patches: (n, side, side, 3) uint8: of one window the window, of several the canvas.
            corners: (n, v, 2) int64, in the canvas.
            flips: (n, v) bool.
            lighting: (n, 3), grey levels.
        """
        # A row of pixels at a time: red, green, blue, red, … Arithmetic along it is vectorised.
        rows = lighting.to(self.mean.dtype).repeat(1, self.crop)[:, None, None]  # (n, 1, 1, 3 crop)
        inside = torch.zeros_like(corners) if flips.shape[1] == 1 else corners  # in the patch
        make = self.by_slices if patches.device.type == "cpu" else self.by_gathers
        windows = make(patches, inside, corners, flips, rows)  # (n, v, crop, crop, 3)
        return windows.flatten(0, 1).movedim(-1, 1)

    def by_gathers(
        self, patches: Tensor, inside: Tensor, corners: Tensor, flips: Tensor, rows: Tensor
    ) -> Tensor:
        """For a GPU: a few kernels over the whole batch."""
        x = cut(patches, inside, flips, self.crop).to(self.mean.dtype)
        if self.mean.shape[0] == 1:
            x -= self.mean
        else:
            x -= cut(self.mean.expand(len(x), -1, -1, -1), corners, flips, self.crop)
        lit = (x.flatten(3) + rows) / self.divide_by
        windows: Tensor = lit.unflatten(3, (-1, 3)).to(self.dtype)
        return windows

    def by_slices(
        self, patches: Tensor, inside: Tensor, corners: Tensor, flips: Tensor, rows: Tensor
    ) -> Tensor:
        """For a CPU: a window at a time, which stays in the cache; the same sums."""
        side = self.crop
        windows = torch.empty((*flips.shape, side, side, 3), dtype=self.dtype)
        places = zip(inside.tolist(), corners.tolist(), flips.tolist(), strict=True)
        for n, views in enumerate(places):
            for v, ((top, left), (above, before), flip) in enumerate(zip(*views, strict=True)):
                x = patches[n, top : top + side, left : left + side].to(self.mean.dtype)
                if self.mean.shape[0] == 1:
                    x -= self.mean
                else:
                    x -= self.mean[above : above + side, before : before + side]
                x.flatten(1).add_(rows[n, 0]).div_(self.divide_by)
                windows[n, v] = x.flip(1) if flip else x
        return windows


def cut(images: Tensor, corners: Tensor, flips: Tensor, side: int) -> Tensor:
    """Windows (n, v, side, side, 3) of images (n, height, width, 3), mirrored where flips say."""
    along = torch.arange(side, device=images.device)
    rows = corners[..., :1] + along  # (n, v, side)
    columns = corners[..., 1:] + torch.where(flips[..., None], along.flip(0), along)
    n = torch.arange(len(images), device=images.device)[:, None, None, None]
    windows: Tensor = images[n, rows[..., :, None], columns[..., None, :]]
    return windows


def on_canvas(image: Tensor, side: int) -> Tensor:
    """Resize the shorter side to `side` and take the centre square, as the paper does (§2).

    Args:
        image: (colours, h, w), uint8 or floating.

    Returns:
        (colours, side, side), itself where it already has that size.
    """
    (height, width), (top, left) = canvas_in(image.shape[1], image.shape[2], side)
    if image.shape[1:] != (height, width):
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return image[:, top : top + side, left : left + side]


def canvas_in(height: int, width: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size that an image is resized to, and where its canvas begins in that: its centre."""
    scale = side / min(height, width)
    size = max(side, round(height * scale)), max(side, round(width * scale))
    return size, ((size[0] - side) // 2, (size[1] - side) // 2)


def _mean(config: Config, statistics: Statistics) -> Tensor:
    """(3, canvas or 1, canvas or 1)."""
    match config.data.subtract:
        case "mean_image":
            mean = statistics.mean_image
            if config.data.mean_from != "none":
                mean = _read_mean(Path(config.data.mean_from))
            return on_canvas(torch.from_numpy(mean).movedim(-1, 0), config.data.canvas)
        case "mean_rgb":
            return torch.from_numpy(statistics.mean_rgb)[:, None, None]
        case "nothing":
            return torch.zeros(3, 1, 1)


def _read_mean(path: Path) -> npt.NDArray[np.float32]:
    try:
        mean = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"data.mean_from={path}: cannot be read as .npy: {error}") from error
    if mean.dtype.kind != "f" or mean.ndim != 3 or mean.shape[2] != 3:
        raise DatasetError(
            f"data.mean_from={path}: {mean.dtype} of shape {mean.shape}, expected floats of "
            "(height, width, 3)"
        )
    found: npt.NDArray[np.float32] = mean.astype(np.float32)
    return found
