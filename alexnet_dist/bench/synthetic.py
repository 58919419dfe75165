"""Batches of noise; they take as long to compute as images."""

import torch

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch
from alexnet_dist.network.precision import DTYPES


def made_batch(
    config: Config, device: torch.device, dtype: torch.dtype | None = None, samples: int = 0
) -> Batch:
    """Return a batch of the config's size, or of `samples`; the same noise in every process."""
    n, side = samples or config.train.batch, config.model.crop
    noise = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 50
    windows = noise.to(device, dtype or DTYPES[config.train.precision])
    windows = windows.contiguous(memory_format=torch.channels_last)
    ids, nothing = torch.arange(n, device=device), torch.zeros(n, 3, device=device)
    return Batch(windows, ids % config.model.classes, ids, nothing, nothing[:, 0].bool())
