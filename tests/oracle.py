"""The reference that every layout is compared with: the network in plain torch, with whole tensors
and columns by `groups`. It uses nothing of the forward in network/model.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_dist.config.schema import ModelConfig
from alexnet_dist.network import philox
from alexnet_dist.network.lrn import alpha_of
from alexnet_dist.network.model import AlexNet


class Grouped(AlexNet):
    """AlexNet with all columns here, by `grouped`."""

    def forward(self, x: Tensor, slots: Tensor | None = None, step: int | Tensor = 0) -> Tensor:
        return grouped(self, x, slots, step)


@contextmanager
def by_groups() -> Iterator[None]:
    """Engines made inside compute by `Grouped`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_dist.engines.ddp.AlexNet", Grouped)
        yield


def grouped(model: AlexNet, x: Tensor, slots: Tensor | None, step: int | Tensor) -> Tensor:
    """Logits (n, classes) of windows (n, 3, crop, crop)."""
    config, weights = model.config, dict(model.named_parameters())
    activate = {"relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[config.activation]

    def dropped(before: str, x: Tensor) -> Tensor:
        if before not in config.dropout_before:
            return x
        kept, at_test = 1 - config.dropout, config.dropout_scaling == "test"
        if not model.training:
            return x * kept if at_test else x
        assert slots is not None
        below, width = int(before[-1]) - 1, x.shape[1]
        stay = philox.dropout_mask(model.seed, step, below, slots, 0, width, config.dropout)
        return torch.where(stay, x if at_test else x / kept, 0)

    shapes = zip(config.conv_names, config.kernel, config.stride, config.padding, strict=True)
    for name, kernel, stride, padding in shapes:
        alone = name not in ("conv1", *config.exchange)
        if config.round_up:
            right = -(x.shape[-1] + 2 * padding - kernel) % stride
            x = F.pad(x, (0, right, 0, right))
        x = F.conv2d(
            x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding,
            groups=config.columns if alone else 1,
        )  # fmt: skip
        x = x if name in config.activation_last else activate(x)
        stages = [_normalised, _pooled]
        for stage in reversed(stages) if config.pool_before_lrn else stages:
            x = stage(config, name, x)
        x = activate(x) if name in config.activation_last else x
    x = x.flatten(1)
    for name in config.fc_names:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        parts = 1 if name in config.exchange else config.columns
        x = torch.cat(
            [F.linear(*part) for part in zip(dropped(name, x).chunk(parts, 1), weight.chunk(parts),
                                             bias.chunk(parts), strict=True)], 1,
        )  # fmt: skip
        x = x if name == config.fc_names[-1] else activate(x)
    return x


def _normalised(config: ModelConfig, name: str, x: Tensor) -> Tensor:
    lrn, spatial = config.lrn, config.spatial_norm
    if name in lrn.layers:
        alpha = alpha_of(lrn, name) * lrn.size  # torch divides by n
        columns = x.chunk(config.columns, dim=1)
        normalised = [F.local_response_norm(c, lrn.size, alpha, lrn.beta, lrn.k) for c in columns]
        x = torch.cat(normalised, dim=1)
    if name in spatial.layers:
        half = spatial.size // 2
        squares = F.pad(x * x, [half] * 4).unfold(2, spatial.size, 1).unfold(3, spatial.size, 1)
        x = x / (1 + spatial.alpha * squares.mean((-2, -1))) ** spatial.beta
    return x


def _pooled(config: ModelConfig, name: str, x: Tensor) -> Tensor:
    if name not in config.pool_after:
        return x
    if name in config.pool_average:
        return F.avg_pool2d(x, *config.pool, ceil_mode=config.round_up, count_include_pad=False)
    return F.max_pool2d(x, *config.pool, ceil_mode=config.round_up)
