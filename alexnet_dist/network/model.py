"""The network of 2012: two columns side by side, and the layers where they meet (paper, Fig. 2).

    first column     conv1 ─ conv2 ─┬─ conv3 ─ conv4 ─ conv5 ─┬─ fc6 ─┬─ fc7 ─┬─ fc8
    they meet                       ╳                         ╳       ╳       ╳
    second column    conv1 ─ conv2 ─┴─ conv3 ─ conv4 ─ conv5 ─┴─ fc6 ─┴─ fc7 ─┴─ fc8

An `AlexNet` holds the columns that are on this device, both or one of them. Where they meet, an
exchange puts what both made side by side: by `torch.cat` where both are here, by a collective
between ranks that hold one each. Nothing else in this file knows which of the two it is, and it
knows no torch.distributed. A layer's weights lie together, those of one column below those of the
other, so that every parameter splits on dim 0.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.config.schema import ModelConfig
from alexnet_dist.errors import ConfigError
from alexnet_dist.network import philox
from alexnet_dist.network.lrn import alpha_of, local_response_norm
from alexnet_dist.partition import share


class Exchange(Protocol):
    """How the columns of one network meet. What a column here made is an element of a list."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """[(n, own channels, …)] to (n, all columns' channels, …); gradients are summed back."""

    def features(self, features: Tensor) -> Tensor:
        """(n, features), what fc6 sees, to that of all samples its like compute here."""

    def logits(self, parts: list[Tensor]) -> Tensor:
        """[(n, own classes)] to (n, all classes); each column takes its own slice of gradients."""


class OneDevice:
    """The exchange where every column is on this device."""

    def join(self, parts: list[Tensor]) -> Tensor:
        return side_by_side(parts)

    def features(self, features: Tensor) -> Tensor:
        return features

    def logits(self, parts: list[Tensor]) -> Tensor:
        return side_by_side(parts)


def side_by_side(parts: list[Tensor]) -> Tensor:
    """[(n, channels, …)] to (n, all channels, …); one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Column:
    """One of the network's columns: which rows of a layer are its own, and what it does with maps.

    Args:
        index: of this column, counted from 0.
        count: of the network's columns.
    """

    def __init__(self, config: ModelConfig, index: int, count: int) -> None:
        self.config, self.index, self.count = config, index, count

    def rows(self, outputs: int) -> slice:
        """Which of a layer's outputs, of all columns, are this one's."""
        return share(outputs, self.index, self.count)

    def maps(self, layer: str, x: Tensor) -> Tensor:
        """What a convolution made, (n, own maps, h, w), rectified (§3.1), normalised (§3.3) and
        pooled (§3.4); changes x."""
        activate = getattr(torch, f"{self.config.activation}_")
        last = layer in self.config.activation_last
        x = x if last else activate(x)
        if self.config.pool_before_lrn:  # CaffeNet
            x = self._normalised(layer, self._pooled(layer, x))
        else:
            x = self._pooled(layer, self._normalised(layer, x))
        return activate(x) if last else x

    def _normalised(self, layer: str, x: Tensor) -> Tensor:
        lrn, spatial = self.config.lrn, self.config.spatial_norm
        if layer in lrn.layers:
            x = local_response_norm(x, lrn.size, alpha_of(lrn, layer), lrn.beta, lrn.k)
        if layer in spatial.layers:
            # Beyond the edge there are zeros, so that the mean over n × n is the sum ÷ n².
            mean = F.avg_pool2d(x * x, spatial.size, 1, spatial.size // 2)
            x = x * (1 + spatial.alpha * mean).pow(-spatial.beta)
        return x

    def _pooled(self, layer: str, x: Tensor) -> Tensor:
        config = self.config
        if layer not in config.pool_after:
            return x
        kernel, stride = config.pool
        if layer in config.pool_average:
            return F.avg_pool2d(
                x, kernel, stride, ceil_mode=config.round_up, count_include_pad=False
            )
        return F.max_pool2d(x, kernel, stride, ceil_mode=config.round_up)


class Layer(nn.Module):
    """One layer of the columns here: their weights, one column's below the other's.

    `forward` takes what the columns here see: a tensor for each, or one that all of them see. It
    gives what each of them made of it.

    Attributes:
        whole: the weight's shape over all columns.
        rows: which rows (dim 0) of it are here.
        starts: where each column here begins among all columns' outputs.
    """

    def __init__(
        self, name: str, whole: tuple[int, ...], columns: Sequence[Column], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name, self.whole = name, whole
        parts = [column.rows(whole[0]) for column in columns]
        self.rows = slice(parts[0].start, parts[-1].stop)
        self.starts = [part.start for part in parts]
        self.sizes = [part.stop - part.start for part in parts]
        here = (sum(self.sizes), *whole[1:])
        self.weight = nn.Parameter(torch.empty(here, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(here[0], dtype=dtype))

    def by_column(self, seen: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What each column here sees, its weights and its biases."""
        if len(self.sizes) == 1:
            return iter([(seen[0], self.weight, self.bias)])
        each = seen if len(seen) > 1 else seen * len(self.sizes)
        return zip(each, self.weight.split(self.sizes), self.bias.split(self.sizes), strict=True)

    def initialise(self, seed: int, std: float, bias: float) -> None:
        """Weights of N(0, std), drawn by (seed, name), and biases of one value."""
        name = f"{self.name}.weight"
        values = philox.initial_weights(seed, name, self.whole, self.rows, std, self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(values)
            self.bias.fill_(bias)


class Conv(Layer):
    """A convolution: each column's is a product of its own, into a tensor of its own."""

    def __init__(
        self, name: str, whole: tuple[int, ...], columns: Sequence[Column], dtype: torch.dtype,
        stride: int, padding: int, round_up: bool,
    ) -> None:  # fmt: skip
        super().__init__(name, whole, columns, dtype)
        self.stride, self.padding, self.round_up = stride, padding, round_up
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, seen: list[Tensor]) -> list[Tensor]:
        if self.round_up:
            seen = [self._padded(x) for x in seen]
        return [
            F.conv2d(x, weight, bias, self.stride, self.padding)
            for x, weight, bias in self.by_column(seen)
        ]

    def _padded(self, x: Tensor) -> Tensor:
        """With zeros below and to the right, so that the last window begins inside (Caffe)."""
        kernel = self.whole[-1]
        below, right = (-(s + 2 * self.padding - kernel) % self.stride for s in x.shape[2:])
        return F.pad(x, (0, right, 0, below))


class Linear(Layer):
    """A fully-connected layer: where all columns see the same, one product, that is then cut."""

    def forward(self, seen: list[Tensor]) -> list[Tensor]:
        if len(seen) == 1:
            return list(F.linear(seen[0], self.weight, self.bias).split(self.sizes, dim=1))
        return [F.linear(x, weight, bias) for x, weight, bias in self.by_column(seen)]


class AlexNet(nn.Module):
    """The columns of the network that are on this device.

    Args:
        config: the network.
        seed: initial weights and dropout follow from it.
        columns_here: indices of the columns on this device: all of them, or one.
        exchange: joins what the columns made; `OneDevice` where all columns are here.
        dtype: of the parameters.
        fc_part: (part, parts) of the fully-connected layers' rows here, split over ranks instead of
            columns; None: those of the columns here.
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
        self.exchange = exchange or OneDevice()
        here = range(config.columns) if columns_here is None else columns_here
        self.columns = [Column(config, index, config.columns) for index in here]
        fc_columns = self.columns if fc_part is None else [Column(config, *fc_part)]

        def whole(name: str, outputs: int, inputs: int, *kernel: int) -> tuple[int, ...]:
            alone = name not in ("conv1", *config.exchange)  # sees its own column
            return (outputs, inputs // config.columns if alone else inputs, *kernel)

        side = final_side(config)
        if side < 1:
            raise ConfigError(
                f"model.crop={config.crop}, model.pool={list(config.pool)}: no map left for "
                f"{config.fc_names[0]}: raise model.crop or pool less"
            )
        maps = zip(config.conv_names, (3, *config.conv[:-1]), config.conv, strict=True)
        shapes = zip(config.kernel, config.stride, config.padding, strict=True)
        for (name, seen, made), (kernel, stride, padding) in zip(maps, shapes, strict=True):
            shape = whole(name, made, seen, kernel, kernel)
            conv = Conv(name, shape, self.columns, dtype, stride, padding, config.round_up)
            self.add_module(name, conv)
        sizes = (config.conv[-1] * side**2, *config.fc, config.classes)
        for name, seen, made in zip(config.fc_names, sizes[:-1], sizes[1:], strict=True):
            self.add_module(name, Linear(name, whole(name, made, seen), fc_columns, dtype))
        for place, layer in enumerate(self.layers() if drawn else ()):
            layer.initialise(seed, *_initial(config, place, math.prod(layer.whole[1:])))

    def layers(self) -> list[Layer]:
        """conv1 … fc8."""
        return [module for module in self.children() if isinstance(module, Layer)]

    def __repr__(self) -> str:
        return _described(self)

    def forward(self, x: Tensor, slots: Tensor | None = None, step: int | Tensor = 0) -> Tensor:
        """Logits of windows.

        Args:
            x: (n, 3, crop, crop), channels_last.
            slots: (n,) int64, the samples' places in the global batch; needed in training.
            step: the optimiser step, counted from 0.

        Returns:
            (n, classes): of all columns, on every column.
        """
        convs = [layer for layer in self.layers() if isinstance(layer, Conv)]
        fcs = [layer for layer in self.layers() if isinstance(layer, Linear)]
        # A list holds what each column made, or the one thing that all columns see. Shapes are the
        # paper's, of one column.
        made = [x]
        for conv in convs:  # (n, 48, 27, 27), (n, 128, 13, 13), (n, 192, 13, 13), …
            made = [
                column.maps(conv.name, maps)
                for column, maps in zip(self.columns, conv(self._see(conv, made)), strict=True)
            ]
        # [(n, 2 · 128 · 6 · 6)]: fc6 sees both columns
        seen = [self.exchange.features(maps.flatten(1)) for maps in self._see(fcs[0], made)]
        joined, width = fcs[0].name in self.config.exchange, seen[0].shape[1]
        starts = [0] if joined else [column.index * width for column in self.columns]
        seen = self._dropout(fcs[0], seen, starts, slots, step)
        activate: Callable[[Tensor], Tensor] = getattr(torch, self.config.activation)
        for fc, after in itertools.pairwise(fcs):
            made = [activate(units) for units in fc(seen)]  # (n, 2048)
            seen = self._see(after, self._dropout(after, made, fc.starts, slots, step))
        return self.exchange.logits(fcs[-1](seen))

    def _see(self, layer: Layer, made: list[Tensor]) -> list[Tensor]:
        """What the columns here see: each what it made itself, or all what both made."""
        return [self.exchange.join(made)] if layer.name in self.config.exchange else made

    def _dropout(
        self, before: Layer, made: list[Tensor], starts: list[int], slots: Tensor | None,
        step: int | Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """Units zeroed by masks that depend on (seed, step, layer, slot, unit) alone (§4.2).

        Args:
            before: the layer that would see them; they are the outputs of the one below.
            starts: where each begins among all columns' units.
        """
        drop, at_test = self.config.dropout, self.config.dropout_scaling == "test"
        if drop == 0 or before.name not in self.config.dropout_before:
            return made
        if not self.training:
            return [x * (1 - drop) for x in made] if at_test else made
        assert slots is not None, "dropout needs the samples' slots"
        below, kept = int(before.name[-1]) - 1, []
        for x, start in zip(made, starts, strict=True):
            stay = philox.dropout_mask(self.seed, step, below, slots, start, x.shape[1], drop)
            kept.append(x * stay if at_test else x * stay / (1 - drop))
        return kept


def whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter over all columns: conv1.weight, …; no memory is taken."""
    with torch.device("meta"):
        named = AlexNet(config, drawn=False).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}


def final_side(config: ModelConfig) -> int:
    """Side of the maps that the first fully-connected layer sees; the paper's 6."""
    *_, (_, side) = map_sides(config)
    return side


def map_sides(config: ModelConfig) -> list[tuple[int, int]]:
    """Side of each convolution's maps, as it makes them and as they are after pooling, up to the
    first below 1, which no network has."""

    def steps(room: int, stride: int) -> int:
        return (-(-room // stride) if config.round_up else room // stride) + 1

    side, sides = config.crop, []
    shapes = zip(config.kernel, config.stride, config.padding, strict=True)
    for name, (kernel, stride, padding) in zip(config.conv_names, shapes, strict=True):
        made = side = steps(side + 2 * padding - kernel, stride)
        if name in config.pool_after:
            window, apart = config.pool
            side = steps(made - window, apart)
            side -= config.round_up and (side - 1) * apart >= made  # torch lets none begin there
        sides.append((made, side))
        if side < 1:
            break
    return sides


def _described(model: "AlexNet") -> str:
    """What print(model) shows: a line a layer."""
    config, columns = model.config, len(model.columns)
    here = "" if columns == config.columns else f", {columns} of them here"
    makes = "makes" if config.columns == 1 else "makes, each column"
    rows = [("layer", "sees", makes, "then", "weights here", "parameters")]
    sees = f"3 × {config.crop} × {config.crop}"
    sides = dict(zip(config.conv_names, map_sides(config), strict=True))
    for layer in model.layers():
        shape, size = tuple(layer.weight.shape), layer.sizes[0]
        both = config.columns > 1 and layer.name in config.exchange
        seen = sees + (" of each column" if both else "")
        if layer.name in sides:
            made, side = sides[layer.name]
            makes, sees = f"{size} × {made} × {made}", f"{size} × {side} × {side}"
        else:
            makes = sees = f"{size}"
        # As `Column.maps` orders them.
        norm = ["LRN"] * (layer.name in config.lrn.layers)
        norm += ["spatial norm"] * (layer.name in config.spatial_norm.layers)
        pool = [f"pool {config.pool[0]}/{config.pool[1]}"] * (layer.name in config.pool_after)
        then = [*pool, *norm] if config.pool_before_lrn else [*norm, *pool]
        if layer.name != config.layer_names[-1]:
            place = len(then) if layer.name in config.activation_last else 0
            then.insert(place, config.activation)
        count = layer.weight.numel() + layer.bias.numel()
        rows.append((layer.name, seen, makes, ", ".join(then), f"{shape}", f"{count:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    whole = sum(parameter.numel() for parameter in model.parameters())
    kind = "1 column" if config.columns == 1 else f"{config.columns} columns{here}"
    head = f"AlexNet of {kind}, {config.classes} classes, {whole:,} parameters"
    return "\n".join(line.rstrip() for line in (head, *lines))


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
