"""The network of 2012: two columns side by side, and the layers where they meet (paper, Fig. 2).

    first column     conv1 ─ conv2 ─┬─ conv3 ─ conv4 ─ conv5 ─┬─ fc6 ─┬─ fc7 ─┬─ fc8
    they meet                       ╳                         ╳       ╳       ╳
    second column    conv1 ─ conv2 ─┴─ conv3 ─ conv4 ─ conv5 ─┴─ fc6 ─┴─ fc7 ─┴─ fc8

In the paper each column is on a GPU of its own. Here an `AlexNet` holds the columns that are on
this device: both, or one of them. Where the columns meet, an `Exchange` concatenates their
outputs: with `torch.cat` where both are on one device, with a collective between ranks that hold
one each. Nothing else in this file knows which of the two it is, and it uses no torch.distributed.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.config.schema import ModelConfig
from alexnet_dist.errors import ConfigError
from alexnet_dist.network.concurrent import at_once
from alexnet_dist.network.dropout import Dropout
from alexnet_dist.network.exchange import Exchange, OneDevice
from alexnet_dist.network.layers import ACTIVATIONS, Conv, Layer, Linear
from alexnet_dist.network.lrn import constants_of, local_response_norm
from alexnet_dist.network.shapes import final_side
from alexnet_dist.network.summary import summary
from alexnet_dist.partition import share


class Column:
    """One of the network's columns: what it does with the outputs of a convolution.

    Args:
        index: this column's number, counted from 0.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        self.config, self.index = config, index

    def maps(self, layer: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Activate (§3.1), normalise (§3.3) and pool (§3.4) a convolution's outputs; changes x.

        Args:
            layer: the convolution's name: conv1, …
            x: (n, own maps, h, w).
            bias: the convolution's, where GPU kernels are to add it; None: x has it already.
        """
        config, activation = self.config, self.config.activation
        last = layer in config.activation_last
        # On a GPU: all of it in one kernel, or bias and activation in one.
        if bias is not None:
            from alexnet_dist.network.kernels.maps import maps

            if self._in_one_pass(layer):
                norm = constants_of(config.lrn, layer)
                window, stride = config.pool
                pool = (window, stride, config.round_up) if layer in config.pool_after else None
                return maps(x, bias, activation, norm, pool, last)
            x = maps(x, bias, None if last else activation, None, None)
        elif not last:
            x = ACTIVATIONS[activation](x)
        fused = bias is not None
        # What is left: normalisation, then pooling; CaffeNet pools first.
        if config.pool_before_lrn:
            x = self._normalised(layer, pooled(config, layer, x), fused)
        else:
            x = pooled(config, layer, self._normalised(layer, x, fused))
        return ACTIVATIONS[activation](x) if last else x

    def dropped(self, maps: Tensor, dropout: Dropout) -> Tensor:
        """Apply dropout to the values of this column's last maps, (n, own maps, h, w)."""
        values = maps.flatten(1)
        return dropout(values, self.index * values.shape[1]).view(maps.shape)

    def _in_one_pass(self, layer: str) -> bool:
        """Whether one GPU kernel does all that follows this convolution, in the paper's order."""
        config, normalises = self.config, layer in self.config.lrn.layers
        return not (
            layer in (*config.pool_average, *config.spatial_norm.layers)
            or (config.pool_before_lrn and normalises and layer in config.pool_after)
        )

    def _normalised(self, layer: str, x: Tensor, fused: bool) -> Tensor:
        spatial = self.config.spatial_norm
        if constants := constants_of(self.config.lrn, layer):
            if fused:
                from alexnet_dist.network.kernels.maps import maps

                x = maps(x, None, None, constants, None)
            else:
                x = local_response_norm(x, *constants)
        if layer in spatial.layers:
            wide = x.float() if x.dtype == torch.float16 else x  # in fp16, squares may be too large
            # Zeros lie beyond the edge, so the mean over size × size is the sum ÷ size².
            mean = F.avg_pool2d(wide * wide, spatial.size, 1, spatial.size // 2)
            x = (wide * (1 + spatial.alpha * mean).pow(-spatial.beta)).to(x.dtype)
        return x


def pooled(config: ModelConfig, layer: str, x: Tensor) -> Tensor:
    """Pool a layer's maps (n, maps, h, w), where the config says so (§3.4)."""
    if layer not in config.pool_after:
        return x
    window, stride = config.pool
    if layer in config.pool_average:
        return F.avg_pool2d(x, window, stride, ceil_mode=config.round_up, count_include_pad=False)
    return F.max_pool2d(x, window, stride, ceil_mode=config.round_up)


class AlexNet(nn.Module):
    """The columns of the network that are on this device.

    Args:
        config: the network's shape.
        seed: determines initial weights and dropout masks.
        columns_here: indices of the columns on this device: all of them, or one.
        exchange: joins the columns' outputs; by default `OneDevice`: all columns are here.
        dtype: of the parameters.
        fc_part: (part, parts): split the fully-connected layers' rows over ranks, and hold this
            part; None: hold the rows of the columns here.
        init_weights: whether to give the parameters their initial values.

    Raises:
        ConfigError: pooling leaves no map for the first fully-connected layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        columns_here: Sequence[int] | None = None,
        exchange: Exchange | None = None,
        dtype: torch.dtype = torch.float32,
        fc_part: tuple[int, int] | None = None,
        init_weights: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.exchange = exchange or OneDevice()
        here = range(config.columns) if columns_here is None else columns_here
        self.columns = [Column(config, index) for index in here]
        conv_parts = [(index, config.columns) for index in here]
        fc_parts = conv_parts if fc_part is None else [fc_part]

        def whole_shape(name: str, outputs: int, inputs: int, *kernel: int) -> tuple[int, ...]:
            """The weight's shape over all columns; without an exchange each sees its own inputs."""
            alone = name not in ("conv1", *config.exchange)
            return (outputs, inputs // config.columns if alone else inputs, *kernel)

        side = final_side(config)
        if side < 1:
            raise ConfigError(
                f"model.crop={config.crop}, model.pool={list(config.pool)}: nothing is left of "
                f"the maps for {config.fc_names[0]}: raise model.crop, or pool less"
            )
        # The convolutions: conv1 … conv5.
        maps = zip(config.conv_names, (3, *config.conv[:-1]), config.conv, strict=True)
        kernels = zip(config.kernel, config.stride, config.padding, strict=True)
        for (name, inputs, outputs), (kernel, stride, padding) in zip(maps, kernels, strict=True):
            shape = whole_shape(name, outputs, inputs, kernel, kernel)
            parts = [share(outputs, *part) for part in conv_parts]
            conv = Conv(name, shape, parts, dtype, stride, padding, config.round_up)
            self.add_module(name, conv)
        # The fully-connected layers: fc6 … fc8.
        sizes = (config.conv[-1] * side**2, *config.fc, config.classes)
        for name, inputs, outputs in zip(config.fc_names, sizes[:-1], sizes[1:], strict=True):
            parts = [share(outputs, *part) for part in fc_parts]
            self.add_module(name, Linear(name, whole_shape(name, outputs, inputs), parts, dtype))
        assert not [*self.buffers()], "only parameters are saved: see docs/extending.md"
        for index, layer in enumerate(self.layers() if init_weights else ()):
            layer.initialise(seed, *_initial(config, index, math.prod(layer.whole_shape[1:])))

    def layers(self) -> list[Layer]:
        """Return the layers in order: conv1 … fc8."""
        return [module for module in self.children() if isinstance(module, Layer)]

    def __repr__(self) -> str:
        return summary(self.config, self.layers())

    def forward(self, x: Tensor, slots: Tensor | None = None, step: int | Tensor = 0) -> Tensor:
        """Compute the logits of a batch of windows.

        Args:
            x: (n, 3, crop, crop), channels_last.
            slots: (n,) int64, the samples' places in the global batch; needed in training.
            step: the optimiser step, counted from 0.

        Returns:
            (n, classes): the logits of all columns, the same on every column.
        """
        convs = [layer for layer in self.layers() if isinstance(layer, Conv)]
        fcs = [layer for layer in self.layers() if isinstance(layer, Linear)]
        # `outputs` holds one tensor per column; shapes are those of one column of the paper's.
        outputs = [x]
        for conv in convs:  # (n, 48, 27, 27), (n, 128, 13, 13), (n, 192, 13, 13), …
            outputs = conv(outputs, self._exchange_before(conv))
            # Each column activates, normalises and pools its own maps.
            each = [functools.partial(column.maps, conv.name) for column in self.columns]
            outputs = at_once(each, list(zip(outputs, conv.biases(outputs), strict=True)))
        # Dropout before fc6 acts on the maps: those of this device's samples; fc6 may see others.
        own = None if slots is None else self.exchange.own_slots(slots)
        if dropout := self._dropout(fcs[0], own, step):
            of_columns = zip(self.columns, outputs, strict=True)
            outputs = [column.dropped(maps, dropout) for column, maps in of_columns]
        for fc, after in itertools.pairwise(fcs):  # (n, 2048); (n, 4096) of both, if they meet here
            dropout = self._dropout(after, slots, step)
            outputs = fc.units(outputs, self._exchange_before(fc), self.config.activation, dropout)
        return self.exchange.logits(fcs[-1].units(outputs, self._exchange_before(fcs[-1])))

    def _exchange_before(self, layer: Layer) -> Exchange | None:
        """Return the exchange before a layer; None: each column sees its own alone."""
        return self.exchange if layer.name in self.config.exchange else None

    def _dropout(self, before: Layer, slots: Tensor | None, step: int | Tensor) -> Dropout | None:
        """Return the dropout of the units that a layer sees, which are the outputs of the one
        below; None where there is none."""
        config = self.config
        if config.dropout == 0 or before.name not in config.dropout_before:
            return None
        at_test = config.dropout_scaling == "test"
        if not self.training and not at_test:
            return None
        below = int(before.name.removeprefix("fc")) - 1  # the layer that made the units
        if self.training:
            assert slots is not None, "dropout needs the samples' slots"
        kept = slots if self.training else None
        return Dropout(self.seed, step, below, kept, config.dropout, at_test)


def whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter (conv1.weight, …) over all columns; allocates nothing."""
    with torch.device("meta"):
        named = AlexNet(config, init_weights=False).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}


def _initial(config: ModelConfig, index: int, fan_in: int) -> tuple[float, float]:
    """Return the standard deviation of a layer's initial weights, and the value of its biases.

    Args:
        index: the layer's number, counted from 0.
        fan_in: the number of inputs of each of its outputs.
    """
    if config.init == "he":
        # He et al. (2015): the scale of the maps stays the same through the layers. conv1 starts
        # small, so that what it learns is visible.
        last = index == len(config.layer_names) - 1
        return (math.sqrt((1.0 if last else 2.0) / fan_in) if index else 0.01), 0.0

    def of(values: tuple[float, ...]) -> float:
        return values[index] if len(values) > 1 else values[0]

    return of(config.init_std), of(config.init_bias)
