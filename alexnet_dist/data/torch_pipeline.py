"""The torchvision pipeline: decode and cut in threads, normalise on the device."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from alexnet_dist.config import Config
from alexnet_dist.data.dataset import Split, Statistics
from alexnet_dist.data.pipeline import Batch, Samples


class TorchPipeline:
    """A `Pipeline` on torchvision's decoders, which release the GIL.

    Args:
        dtype: of the windows: what conv1 computes in.
        threads: that decode.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        statistics: Statistics,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        self.split, self.device, self.dtype = split, device, dtype
        self.canvas, self.crop = config.data.canvas, config.model.crop
        self.prefetch = config.data.prefetch
        self.threads = threads
        # Sums in float64 where the network computes in it, else float32.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.mean = _mean(config, statistics).to(device, wide)  # (3, canvas or 1, canvas or 1)
        self.divide_by = torch.tensor(config.data.divide_by, dtype=wide, device=device)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def batches(self, plan: Iterable[Samples]) -> Iterator[Batch]:
        ahead: deque[tuple[Samples, Tensor, list[Future[None]]]] = deque()
        plan = iter(plan)
        while True:
            while len(ahead) <= self.prefetch and (samples := next(plan, None)) is not None:
                ahead.append(self._begin(samples))
            if not ahead:
                return
            samples, windows, parts = ahead.popleft()
            for part in parts:
                part.result()
            yield self._finish(samples, windows)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.split.close()

    def _begin(self, samples: Samples) -> tuple[Samples, Tensor, list[Future[None]]]:
        """Start decoding; the windows will be whole when every future is done."""
        n, views = samples.flips.shape
        windows = torch.empty((n, views, self.crop, self.crop, 3), dtype=torch.uint8)
        if self.device.type == "cuda":
            windows = windows.pin_memory()
        parts = np.array_split(np.arange(n), self.threads)
        return samples, windows, [
            self._pool.submit(self._decode, samples, windows, part) for part in parts if len(part)
        ]  # fmt: skip

    def _decode(self, samples: Samples, windows: Tensor, part: npt.NDArray[np.int64]) -> None:
        for place in part:
            encoded = np.frombuffer(self.split.read(int(samples.ids[place])), np.uint8)
            image = decode_image(torch.from_numpy(encoded.copy()), ImageReadMode.UNCHANGED)
            canvas = on_canvas(image, self.canvas)  # (1 or 3, canvas, canvas)
            for view, (top, left) in enumerate(samples.corners[place]):
                window = canvas[:, top : top + self.crop, left : left + self.crop]
                if samples.flips[place, view]:
                    window = window.flip(2)
                windows[place, view] = window.movedim(0, -1)  # grey fills all three colours

    def _finish(self, samples: Samples, windows: Tensor) -> Batch:
        """To the device: the mean off, lit, scaled."""
        lighting = self._to_device(torch.from_numpy(samples.lighting))
        x = windows.to(self.device, non_blocking=True).movedim(-1, 2).to(self.mean.dtype)
        x -= self._mean_windows(samples)
        x += lighting[:, None, :, None, None]
        x /= self.divide_by[:, None, None]
        labels = torch.from_numpy(self.split.labels(samples.ids))
        return Batch(
            windows=x.flatten(0, 1).to(self.dtype),
            labels=self._to_device(labels),
            ids=self._to_device(torch.from_numpy(samples.ids)),
            lighting=lighting,
        )

    def _mean_windows(self, samples: Samples) -> Tensor:
        """The mean of each window's own crop, or one a colour: broadcasts to (n, v, 3, s, s)."""
        if self.mean.shape[-1] == 1:
            return self.mean
        corners = self._to_device(torch.tensor(samples.corners))
        flips = self._to_device(torch.tensor(samples.flips))
        along = torch.arange(self.crop, device=self.device)
        rows = corners[..., :1] + along  # (n, v, s)
        columns = corners[..., 1:] + torch.where(flips[..., None], along.flip(0), along)
        return self.mean[:, rows[..., :, None], columns[..., None, :]].movedim(0, 2)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def on_canvas(image: Tensor, side: int) -> Tensor:
    """Resize the shorter side to `side` and take the centre square, as the paper does (§2).

    Args:
        image: (colours, h, w), uint8 or floating.

    Returns:
        (colours, side, side), itself where it already has that size.
    """
    height, width = image.shape[1:]
    if (height, width) == (side, side):
        return image
    scale = side / min(height, width)
    size = [max(side, round(height * scale)), max(side, round(width * scale))]
    image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return image[:, top : top + side, left : left + side]


def _mean(config: Config, statistics: Statistics) -> Tensor:
    match config.data.subtract:
        case "mean_image":
            mean_image = torch.from_numpy(statistics.mean_image).movedim(-1, 0)
            return on_canvas(mean_image, config.data.canvas)
        case "mean_rgb":
            return torch.from_numpy(statistics.mean_rgb)[:, None, None]
        case "nothing":
            return torch.zeros(3, 1, 1)
