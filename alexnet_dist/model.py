"""The network of 2012, each layer written once: one or two columns, all of them here or one.

With all columns here the layers that see their own column are grouped, and nothing is exchanged:
this is the oracle every layout is held against. With one column here the same layers are plain,
and `exchange` joins the columns' maps where the network does. Every parameter splits on dim 0.
No torch.distributed in this file.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist import draws
from alexnet_dist.config import ModelConfig
from alexnet_dist.errors import ConfigError
from alexnet_dist.lrn import alpha_of, local_response_norm
from alexnet_dist.shares import share


class Exchange(Protocol):
    """How the columns of one network meet."""

    def maps(self, maps: Tensor) -> Tensor:
        """(n, own channels, …) to (n, all columns' channels, …); gradients are summed back."""

    def features(self, features: Tensor) -> Tensor:
        """(n, features), what fc6 sees, to that of all samples its like compute here."""

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

    def by_groups(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """What a function of inputs, weights and biases gives of each group, side by side."""
        if self.groups == 1:
            return function(x, self.weight, self.bias)
        weights, biases = self.weight.chunk(self.groups), self.bias.chunk(self.groups)
        parts = zip(x.chunk(self.groups, dim=1), weights, biases, strict=True)
        return torch.cat([function(*part) for part in parts], dim=1)

    def initialise(self, seed: int, std: float, bias: float) -> None:
        """Weights of N(0, std), drawn by (seed, name), and biases of one value."""
        name = f"{self.name}.weight"
        values = draws.initial_weights(seed, name, self.whole, self.rows, std, self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(values)
            self.bias.fill_(bias)


class _Conv(Layer):
    def __init__(self, *args: object, stride: int, padding: int, round_up: bool) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.stride, self.padding, self.round_up = stride, padding, round_up
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if self.round_up:
            kernel = self.whole[-1]
            below, right = (-(s + 2 * self.padding - kernel) % self.stride for s in x.shape[2:])
            x = F.pad(x, (0, right, 0, below))
        convolved = functools.partial(F.conv2d, stride=self.stride, padding=self.padding)
        if x.is_cuda:  # cuDNN's grouped kernels took longer than one group after another
            x = self.by_groups(convolved, x)
        else:
            x = convolved(x, self.weight, self.bias, groups=self.groups)
        return x


class _Linear(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.by_groups(F.linear, x)


class AlexNet(nn.Module):
    """AlexNet, or one column of it.

    Args:
        config: the network.
        seed: initial weights and dropout follow from it.
        columns_here: indices of the columns on this device: all of them, or one.
        exchange: joins this column's maps with the others'; `AllHere` for all columns.
        dtype: of the parameters.
        fc_part: (part, parts) of the fully-connected layers' rows here; None: those of the columns
            here.
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
        self.activation: Callable[[Tensor], Tensor] = {  # in place: no layer's backward sees before
            "relu": torch.relu_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_,
        }[config.activation]  # fmt: skip

        all_here = len(self.columns_here) == config.columns
        conv_part = (0, 1) if all_here else (self.columns_here[0], config.columns)

        def layer(name: str, outputs: int, inputs: int, *kernel: int) -> tuple[object, ...]:
            alone = name not in ("conv1", *config.exchange)
            whole = (outputs, inputs // config.columns if alone else inputs, *kernel)
            part = conv_part if kernel else fc_part or conv_part
            groups = len(self.columns_here) if alone else 1
            return name, whole, share(outputs, *part), groups, dtype

        side = final_side(config)
        if side < 1:
            raise ConfigError(
                f"model.crop={config.crop}, model.pool={list(config.pool)}: no map left for "
                f"{config.fc_names[0]}: raise model.crop or pool less"
            )
        maps = zip(config.conv_names, (3, *config.conv[:-1]), config.conv, strict=True)
        shapes = zip(config.kernel, config.stride, config.padding, strict=True)
        for (name, seen, made), (kernel, stride, padding) in zip(maps, shapes, strict=True):
            named = layer(name, made, seen, kernel, kernel)
            conv = _Conv(*named, stride=stride, padding=padding, round_up=config.round_up)
            self.add_module(name, conv)
        sizes = (config.conv[-1] * side**2, *config.fc, config.classes)
        for name, seen, made in zip(config.fc_names, sizes[:-1], sizes[1:], strict=True):
            self.add_module(name, _Linear(*layer(name, made, seen)))  # type: ignore[arg-type]
        for place, module in enumerate(self.layers() if drawn else ()):
            module.initialise(seed, *_initial(config, place, math.prod(module.whole[1:])))

    def layers(self) -> list[Layer]:
        """conv1 … fc8."""
        return [module for module in self.children() if isinstance(module, Layer)]

    def forward(self, x: Tensor, slots: Tensor | None = None, step: int | Tensor = 0) -> Tensor:
        """Logits of windows.

        Args:
            x: (n, 3, crop, crop), channels_last.
            slots: (n,) int64, the samples' places in the global batch; needed in training.
            step: the optimiser step, counted from 0.

        Returns:
            (n, classes): of all columns, on every column. Shapes below: the paper's, per column.
        """
        convs, (first, *others) = self._convolutions(), self._fully_connected()
        for conv in convs:
            x = self._conv(conv, x)  # (n, 48, 27, 27), (n, 128, 13, 13), …, (n, 128, 6, 6)
        x = self._see(first, x).flatten(1)  # (n, 2 × 128 · 6 · 6): fc6 sees both columns
        x = self.exchange.features(x)
        start = 0 if first.name in self.config.exchange else x.shape[1] * self.columns_here[0]
        x = self._dropout(first, x, start, slots, step)
        for layer, after in itertools.pairwise((first, *others)):
            x = self.activation(layer(x))  # (n, 2048)
            x = self._see(after, self._dropout(after, x, layer.rows.start, slots, step))
        return self.exchange.logits((first, *others)[-1](x))

    def _convolutions(self) -> list["_Conv"]:
        return [layer for layer in self.children() if isinstance(layer, _Conv)]

    def _fully_connected(self) -> list["_Linear"]:
        return [layer for layer in self.children() if isinstance(layer, _Linear)]

    def _see(self, layer: Layer, x: Tensor) -> Tensor:
        """What a layer sees: its own column, or both."""
        return self.exchange.maps(x) if layer.name in self.config.exchange else x

    def _conv(self, layer: _Conv, x: Tensor) -> Tensor:
        config, last = self.config, layer.name in self.config.activation_last
        x = layer(self._see(layer, x))
        x = x if last else self.activation(x)
        if config.pool_before_lrn:  # CaffeNet
            x = self._normalised(layer, self._pool(layer, x))
        else:
            x = self._pool(layer, self._normalised(layer, x))
        return self.activation(x) if last else x

    def _normalised(self, layer: _Conv, x: Tensor) -> Tensor:
        lrn, spatial = self.config.lrn, self.config.spatial_norm
        if layer.name in lrn.layers:
            alpha = alpha_of(lrn, layer.name)
            columns = len(self.columns_here)
            x = local_response_norm(x, columns, lrn.size, alpha, lrn.beta, lrn.k)
        if layer.name in spatial.layers:
            # Beyond the edge there are zeros, so that the mean over n × n is the sum ÷ n².
            mean = F.avg_pool2d(x * x, spatial.size, 1, spatial.size // 2)
            x = x * (1 + spatial.alpha * mean).pow(-spatial.beta)
        return x

    def _pool(self, layer: _Conv, x: Tensor) -> Tensor:
        config = self.config
        if layer.name not in config.pool_after:
            return x
        kernel, stride = config.pool
        if layer.name in config.pool_average:
            return F.avg_pool2d(
                x, kernel, stride, ceil_mode=config.round_up, count_include_pad=False
            )
        return F.max_pool2d(x, kernel, stride, ceil_mode=config.round_up)

    def _dropout(
        self, before: Layer, x: Tensor, first: int, slots: Tensor | None, step: int | Tensor
    ) -> Tensor:
        """Units zeroed by a mask that depends on (seed, step, layer, slot, unit) alone.

        Args:
            before: the layer that would see them; they are the outputs of the one below.
            first: the first unit here, of all columns' units.
        """
        drop, at_test = self.config.dropout, self.config.dropout_scaling == "test"
        if drop == 0 or before.name not in self.config.dropout_before:
            return x
        if not self.training:
            return x * (1 - drop) if at_test else x
        assert slots is not None, "dropout needs the samples' slots"
        below = int(before.name[-1]) - 1
        stay = draws.dropout_mask(self.seed, step, below, slots, first, x.shape[1], drop)
        x = x * stay
        return x if at_test else x / (1 - drop)


def whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter over all columns: conv1.weight, …; no memory is taken."""
    with torch.device("meta"):
        named = AlexNet(config, drawn=False).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}


def final_side(config: ModelConfig) -> int:
    """Side of the maps that the first fully-connected layer sees; the paper's 6."""

    def steps(room: int, stride: int) -> int:
        return (-(-room // stride) if config.round_up else room // stride) + 1

    side = config.crop
    shapes = zip(config.kernel, config.stride, config.padding, strict=True)
    for name, (kernel, stride, padding) in zip(config.conv_names, shapes, strict=True):
        side = steps(side + 2 * padding - kernel, stride)
        if name in config.pool_after:
            edge, (window, apart) = side, config.pool
            side = steps(edge - window, apart)
            side -= config.round_up and (side - 1) * apart >= edge  # torch lets none begin there
        if side < 1:
            return side
    return side


def _initial(config: ModelConfig, place: int, fan_in: int) -> tuple[float, float]:
    """Standard deviation of the weights and value of the biases of a layer, counted from 0."""
    if config.init == "he":
        # He et al. (2015) keep the scale of the maps through the layers; conv1 stays small, so
        # that what it learns shows.
        last = place == len(config.layer_names) - 1
        return (math.sqrt((1.0 if last else 2.0) / fan_in) if place else 0.01), 0.0

    def of(values: tuple[float, ...]) -> float:
        return values[place] if len(values) > 1 else values[0]

    return of(config.init_std), of(config.init_bias)
