"""The network of 2012, each layer written once: one or two columns, all of them here or one.

With all columns here the layers that see their own column are grouped, and nothing is exchanged:
this is the oracle every layout is held against. With one column here the same layers are plain,
and `exchange` joins the columns' maps where the network does. Every parameter splits on dim 0.
No torch.distributed in this file.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist import draws
from alexnet_dist.config import ModelConfig
from alexnet_dist.errors import ConfigError
from alexnet_dist.lrn import local_response_norm
from alexnet_dist.shares import share

# Kernel, stride and padding of conv1 … conv5 (paper §3.5).
_CONVOLUTIONS = ((11, 4, 0), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))


class Exchange(Protocol):
    """How the columns of one network meet."""

    def maps(self, maps: Tensor) -> Tensor:
        """(n, own channels, …) to (n, all columns' channels, …); gradients are summed back."""

    def features(self, features: Tensor) -> Tensor:
        """(n, features), what fc6 sees, to that of all samples fc6 … fc8 compute here."""

    def logits(self, logits: Tensor) -> Tensor:
        """(n, own classes) to (n, all classes); each column takes its own slice of gradients."""


class AllHere:
    """The exchange where every column is on this device: nothing to do."""

    def maps(self, maps: Tensor) -> Tensor:
        return maps

    def features(self, features: Tensor) -> Tensor:
        return features

    def logits(self, logits: Tensor) -> Tensor:
        return logits


class Layer(nn.Module):
    """Weights and biases of the columns here.

    Attributes:
        whole: the weight's shape over all columns.
        rows: which rows (dim 0) of it are here.
        groups: parts of the outputs that see only their own part of the inputs.
    """

    def __init__(
        self, name: str, whole: tuple[int, ...], rows: slice, groups: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name, self.whole, self.rows, self.groups = name, whole, rows, groups
        here = (rows.stop - rows.start, *whole[1:])
        self.weight = nn.Parameter(torch.empty(here, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(here[0], dtype=dtype))

    def initialise(self, seed: int, preset: str) -> None:
        # Paper §5. The released code (layers-145.cfg) has 0.03 on conv3–5. He et al. (2015) keep
        # the scale of the maps through the layers; conv1 stays small, so that what it learns shows.
        fan_in = math.prod(self.whole[1:])
        std = 0.01
        if preset == "released" and self.name in ("conv3", "conv4", "conv5"):
            std = 0.03
        elif preset == "he" and self.name != "conv1":
            std = math.sqrt((1.0 if self.name == "fc8" else 2.0) / fan_in)
        ones = preset != "he" and self.name in ("conv2", "conv4", "conv5", "fc6", "fc7")
        name = f"{self.name}.weight"
        values = draws.initial_weights(seed, name, self.whole, self.rows, std, self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(values)
            self.bias.fill_(1.0 if ones else 0.0)


class _Conv(Layer):
    def __init__(self, *args: object, stride: int, padding: int) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.stride, self.padding = stride, padding
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class _Linear(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return F.linear(x, self.weight, self.bias)
        weights, biases = self.weight.chunk(self.groups), self.bias.chunk(self.groups)
        parts = zip(x.chunk(self.groups, dim=1), weights, biases, strict=True)
        return torch.cat([F.linear(part, w, b) for part, w, b in parts], dim=1)


class AlexNet(nn.Module):
    """AlexNet, or one column of it.

    Args:
        config: the network.
        seed: initial weights and dropout follow from it.
        columns_here: indices of the columns on this device: all of them, or one.
        exchange: joins this column's maps with the others'; `AllHere` for all columns.
        dtype: of the parameters.
        fc_part: (part, parts) of the rows of fc6 … fc8 here; None: those of the columns here.
        drawn: give the parameters their initial values.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        columns_here: Sequence[int] | None = None,
        exchange: Exchange | None = None,
        dtype: torch.dtype = torch.float32,
        fc_part: tuple[int, int] | None = None,
        drawn: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.columns_here = tuple(columns_here or range(config.columns))
        self.exchange = exchange or AllHere()
        self.activation: Callable[[Tensor], Tensor] = {
            "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
        }[config.activation]  # fmt: skip

        all_here = len(self.columns_here) == config.columns
        conv_part = (0, 1) if all_here else (self.columns_here[0], config.columns)

        def layer(name: str, outputs: int, inputs: int, *kernel: int) -> tuple[object, ...]:
            alone = name not in ("conv1", *config.exchange)
            whole = (outputs, inputs // config.columns if alone else inputs, *kernel)
            part = conv_part if kernel else fc_part or conv_part
            groups = len(self.columns_here) if alone else 1
            return name, whole, share(outputs, *part), groups, dtype

        def conv(number: int) -> _Conv:
            kernel, stride, padding = _CONVOLUTIONS[number - 1]
            inputs = 3 if number == 1 else config.conv[number - 2]
            named = layer(f"conv{number}", config.conv[number - 1], inputs, kernel, kernel)
            return _Conv(*named, stride=stride, padding=padding)

        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = map(conv, range(1, 6))
        side = final_side(config)
        if side < 1:
            raise ConfigError(
                f"model.crop={config.crop}, model.pool={list(config.pool)}: no map left for fc6: "
                "raise model.crop or pool less"
            )
        flat = config.conv[4] * side**2
        self.fc6 = _Linear(*layer("fc6", config.fc[0], flat))  # type: ignore[arg-type]
        self.fc7 = _Linear(*layer("fc7", config.fc[1], config.fc[0]))  # type: ignore[arg-type]
        self.fc8 = _Linear(*layer("fc8", config.classes, config.fc[1]))  # type: ignore[arg-type]
        for module in self.layers() if drawn else ():
            module.initialise(seed, config.init)

    def layers(self) -> list[Layer]:
        """conv1 … fc8."""
        return [module for module in self.children() if isinstance(module, Layer)]

    def forward(self, x: Tensor, slots: Tensor | None = None, step: int = 0) -> Tensor:
        """Logits of windows.

        Args:
            x: (n, 3, crop, crop), channels_last.
            slots: (n,) int64, the samples' places in the global batch; needed in training.
            step: the optimiser step, counted from 0.

        Returns:
            (n, classes): of all columns, on every column. Shapes below: the paper's, per column.
        """
        x = self._conv(self.conv1, x)  # (n, 48, 27, 27)
        x = self._conv(self.conv2, x)  # (n, 128, 13, 13)
        x = self._conv(self.conv3, x)  # (n, 192, 13, 13)
        x = self._conv(self.conv4, x)  # (n, 192, 13, 13)
        x = self._conv(self.conv5, x)  # (n, 128, 6, 6)
        x = self._see(self.fc6, x).flatten(1)  # (n, 2 × 128 · 6 · 6): fc6 sees both columns
        x = self.exchange.features(x)
        x = self._dropout(self.fc6, self.activation(self.fc6(x)), slots, step)  # (n, 2048)
        x = self._see(self.fc7, x)
        x = self._dropout(self.fc7, self.activation(self.fc7(x)), slots, step)  # (n, 2048)
        return self.exchange.logits(self.fc8(self._see(self.fc8, x)))

    def _see(self, layer: Layer, x: Tensor) -> Tensor:
        """What a layer sees: its own column, or both."""
        return self.exchange.maps(x) if layer.name in self.config.exchange else x

    def _conv(self, layer: _Conv, x: Tensor) -> Tensor:
        config, lrn = self.config, self.config.lrn
        x = self.activation(layer(self._see(layer, x)))
        if layer.name in lrn.layers:
            alpha = lrn.alpha / lrn.size if lrn.alpha_over_size else lrn.alpha
            constants = (len(self.columns_here), lrn.size, alpha, lrn.beta, lrn.k)
            if config.pool_before_lrn:  # CaffeNet
                return local_response_norm(self._pool(x), *constants)
            x = local_response_norm(x, *constants)
        return self._pool(x) if layer.name in ("conv1", "conv2", "conv5") else x

    def _pool(self, x: Tensor) -> Tensor:
        kernel, stride = self.config.pool
        return F.max_pool2d(x, kernel, stride)

    def _dropout(self, layer: _Linear, x: Tensor, slots: Tensor | None, step: int) -> Tensor:
        """Units zeroed by a mask that depends on (seed, step, layer, slot, unit) alone."""
        drop, at_test = self.config.dropout, self.config.dropout_scaling == "test"
        if drop == 0:
            return x
        if not self.training:
            return x * (1 - drop) if at_test else x
        assert slots is not None, "dropout needs the samples' slots"
        number = int(layer.name[-1])
        first, count = layer.rows.start, x.shape[1]
        stay = draws.dropout_mask(self.seed, step, number, slots, first, count, drop)
        x = x * stay
        return x if at_test else x / (1 - drop)


def final_side(config: ModelConfig) -> int:
    """Side of the maps that fc6 sees; the paper's 6."""
    side = config.crop
    for number, (kernel, stride, padding) in enumerate(_CONVOLUTIONS, start=1):
        side = (side + 2 * padding - kernel) // stride + 1
        if number in (1, 2, 5):
            side = (side - config.pool[0]) // config.pool[1] + 1
    return side
