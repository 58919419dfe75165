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
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.config.schema import ModelConfig
from alexnet_dist.errors import ConfigError
from alexnet_dist.network import philox
from alexnet_dist.network.dropout import Dropout
from alexnet_dist.network.lrn import constants_of, local_response_norm
from alexnet_dist.partition import share

# Of what columns see, weights and biases: `Layer.products`.
Products = Callable[[list[Tensor], Tensor, Tensor | None], list[Tensor]]


class Exchange(Protocol):
    """How the columns of one network meet. What a column here made is an element of a list."""

    def products(
        self, of: Products, made: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        """A layer's products of what all columns made: of [(n, own channels, …)] put side by side,
        (n, all columns' channels, …); gradients are summed back."""

    def own(self, slots: Tensor) -> Tensor:
        """Of the slots of all samples that fc6 sees, those of the samples whose maps are here."""

    def logits(self, parts: list[Tensor]) -> Tensor:
        """[(n, own classes)] to (n, all classes); each column takes its own slice of gradients."""


class OneDevice:
    """The exchange where every column is on this device."""

    def products(
        self, of: Products, made: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        return of([side_by_side(made)], weight, bias)

    def own(self, slots: Tensor) -> Tensor:
        return slots

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

    def maps(self, layer: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What a convolution made, (n, own maps, h, w), rectified (§3.1), normalised (§3.3) and
        pooled (§3.4); changes x.

        Args:
            bias: given to a GPU's kernels, which add it too; on a CPU the convolution has done so.
        """
        config, activation = self.config, self.config.activation
        last = layer in config.activation_last
        if bias is not None:
            from alexnet_dist.network.kernels.maps import maps

            if self._in_one_pass(layer):
                norm = constants_of(config.lrn, layer)
                window, stride = config.pool
                pooled = layer in config.pool_after
                pool = (window, stride, config.round_up) if pooled else None
                return maps(x, bias, activation, norm, pool, last)
            x = maps(x, bias, None if last else activation, None, None)
        elif not last:
            x = activated(x, activation)
        fused = bias is not None
        if config.pool_before_lrn:  # CaffeNet
            x = self._normalised(layer, self._pooled(layer, x), fused)
        else:
            x = self._pooled(layer, self._normalised(layer, x, fused))
        return activated(x, activation) if last else x

    def dropped(self, maps: Tensor, dropout: Dropout) -> Tensor:
        """Its last maps, (n, own maps, h, w), of whose values some are dropped."""
        values = maps.flatten(1)
        return dropout(values, self.index * values.shape[1]).view(maps.shape)

    def _in_one_pass(self, layer: str) -> bool:
        """Whether a GPU does all of it in the paper's order by one kernel."""
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

    `forward` takes what the columns here made, a tensor for each or one of them all, and computes
    in its type, whatever that of the weights is. It gives what each column made of it.

    Attributes:
        whole: the weight's shape over all columns.
        rows: which rows (dim 0) of it are here.
        starts: where each column here begins among all columns' outputs.
        narrow: a copy of the weights in the type that the network computes in, which the
            optimiser's update keeps; None: they are narrowed where they are used.
        fused: a GPU's kernels do what follows the product (`kernels`).
    """

    narrow: Tensor | None = None
    fused = False

    def __init__(
        self, name: str, whole: tuple[int, ...], columns: Sequence[Column], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name, self.whole, self.columns = name, whole, columns
        parts = [column.rows(whole[0]) for column in columns]
        self.rows = slice(parts[0].start, parts[-1].stop)
        self.starts = [part.start for part in parts]
        self.sizes = [part.stop - part.start for part in parts]
        here = (sum(self.sizes), *whole[1:])
        self.weight = nn.Parameter(torch.empty(here, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(here[0], dtype=dtype))

    def forward(self, made: list[Tensor], exchange: Exchange | None = None) -> list[Tensor]:
        """What `products` gives.

        Args:
            exchange: by which each column sees what all of them made; None: it sees its own alone.
        """
        weight, bias = self.weights(made[0])
        if exchange is None:
            return self.products(made, weight, bias)
        return exchange.products(self.products, made, weight, bias)

    def products(self, seen: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Of what each column here sees, or of the one thing that all of them see; with biases
        unless `fused`. What is learnt comes in by weights and biases alone: between ranks they have
        a backward of their own."""
        raise NotImplementedError

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights and biases for a product with what this layer sees."""
        weight: Tensor = self.weight
        if weight.dtype != like.dtype:
            narrow = self.narrow
            weight = weight.to(like.dtype) if narrow is None else _Narrow.apply(weight, narrow)
        return weight, None if self.fused else self.bias.to(like.dtype)

    def biases(self, products: list[Tensor]) -> list[Tensor | None]:
        """What is still to be added to products that this layer gave."""
        if not self.fused:
            return [None] * len(products)
        return list(self.bias.split(self.sizes)) if len(products) > 1 else [self.bias]

    def by_column(
        self, seen: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What each column here sees, its weights and its biases."""
        if len(self.sizes) == 1:
            return iter([(seen[0], weight, bias)])
        each = seen if len(seen) > 1 else seen * len(self.sizes)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        return zip(each, weight.split(self.sizes), biases, strict=True)

    def initialise(self, seed: int, std: float, bias: float) -> None:
        """Weights of N(0, std), drawn by (seed, name), and biases of one value."""
        name = f"{self.name}.weight"
        values = philox.initial_weights(seed, name, self.whole, self.rows, std, self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(values)
            self.bias.fill_(bias)


class _Narrow(torch.autograd.Function):
    """A narrow copy in the place of weights, which take its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, narrow: Tensor) -> Tensor:
        return narrow.view_as(narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Conv(Layer):
    """A convolution: each column's is a product of its own, into a tensor of its own."""

    def __init__(
        self, name: str, whole: tuple[int, ...], columns: Sequence[Column], dtype: torch.dtype,
        stride: int, padding: int, round_up: bool,
    ) -> None:  # fmt: skip
        super().__init__(name, whole, columns, dtype)
        self.stride, self.padding, self.round_up = stride, padding, round_up
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def products(self, seen: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """(n, own maps, h, w) of each column."""
        stride, padding = self.stride, self.padding
        if self.fused and stride > 1 and not seen[0].requires_grad:  # conv1
            seen, weight = [self._folded(x) for x in seen], _folded_kernel(weight, stride)
            stride, padding = 1, 0
        elif self.round_up:
            seen = [self._padded(x) for x in seen]
        parts = self.by_column(seen, weight, bias)
        return [F.conv2d(x, w, b, stride, padding) for x, w, b in parts]

    def _padded(self, x: Tensor) -> Tensor:
        """With zeros below and to the right, so that the last window begins inside (Caffe)."""
        kernel = self.whole[-1]
        below, right = (-(s + 2 * self.padding - kernel) % self.stride for s in x.shape[2:])
        return F.pad(x, (0, right, 0, below))

    def _folded(self, x: Tensor) -> Tensor:
        """(n, colours, h, w) to (n, colours · stride², cells, cells): each square of stride² pixels
        a pixel of as many more maps, so that a GPU's products are of 48 maps, not of 3."""
        from alexnet_dist.network.kernels.windows import fold

        kernel, stride = self.whole[-1], self.stride
        room = [side + 2 * self.padding - kernel for side in x.shape[2:]]
        made = [(-(-r // stride) if self.round_up else r // stride) + 1 for r in room]
        cells = [side + -(-kernel // stride) - 1 for side in made]
        folded: Tensor = fold(x, stride, self.padding, *cells)
        return folded


def _folded_kernel(weight: Tensor, stride: int) -> Tensor:
    """(outputs, colours, k, k) as `Conv._folded` arranges what it is for: zeros below and to the
    right fill k up to whole squares."""
    kernel = weight.shape[-1]
    cells = -(-kernel // stride)
    more = cells * stride - kernel
    split = F.pad(weight, (0, more, 0, more)).unflatten(3, (cells, stride))
    split = split.unflatten(2, (cells, stride))  # out, colour, row, dy, column, dx
    folded: Tensor = split.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)
    return folded


class Linear(Layer):
    """A fully-connected layer: where all columns see the same, one product of all of them."""

    def products(self, seen: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """(n, own units) of each column, or, where all see the same, (n, units) of all columns
        here."""
        seen = [x.flatten(1) for x in seen]  # fc6: (n, 2 · 128 · 6 · 6)
        inputs = self.whole[1]
        if seen[0].shape[1] > inputs:  # of all columns here, each of which sees its own
            seen = list(seen[0].split(inputs, dim=1))
        if len(seen) == 1:
            return [F.linear(seen[0], weight, bias)]
        return [F.linear(x, w, b) for x, w, b in self.by_column(seen, weight, bias)]

    def units(
        self, made: list[Tensor], exchange: Exchange | None, activation: str | None = None,
        dropout: Dropout | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """What `forward` gives, activated, and some of it dropped."""
        products = self(made, exchange)
        parts = zip(products, self.biases(products), self.starts, strict=False)
        return [_units(x, bias, activation, dropout, start) for x, bias, start in parts]


def activated(x: Tensor, activation: str) -> Tensor:
    """x, changed: rectified, say."""
    made: Tensor = getattr(torch, f"{activation}_")(x)
    return made


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
        # A list holds what each column made. Shapes are the paper's, of one column.
        made = [x]
        for conv in convs:  # (n, 48, 27, 27), (n, 128, 13, 13), (n, 192, 13, 13), …
            made = conv(made, self._exchange_before(conv))
            parts = zip(self.columns, made, conv.biases(made), strict=True)
            made = [column.maps(conv.name, maps, bias) for column, maps, bias in parts]
        own = None if slots is None else self.exchange.own(slots)
        if dropout := self._dropout(fcs[0], own, step):
            of_columns = zip(self.columns, made, strict=True)
            made = [column.dropped(maps, dropout) for column, maps in of_columns]
        for fc, after in itertools.pairwise(fcs):  # (n, 2048); or of all columns here, (n, 4096)
            dropout = self._dropout(after, slots, step)
            made = fc.units(made, self._exchange_before(fc), self.config.activation, dropout)
        return self.exchange.logits(fcs[-1].units(made, self._exchange_before(fcs[-1])))

    def _exchange_before(self, layer: Layer) -> Exchange | None:
        """By which a layer's columns see what all of them made; None: each sees its own."""
        return self.exchange if layer.name in self.config.exchange else None

    def _dropout(self, before: Layer, slots: Tensor | None, step: int | Tensor) -> Dropout | None:
        """What drops units before a layer sees them; they are the outputs of the one below."""
        config = self.config
        if config.dropout == 0 or before.name not in config.dropout_before:
            return None
        at_test = config.dropout_scaling == "test"
        if not self.training and not at_test:
            return None
        below = int(before.name[-1]) - 1
        if self.training:
            assert slots is not None, "dropout needs the samples' slots"
        kept = slots if self.training else None
        return Dropout(self.seed, step, below, kept, config.dropout, at_test)


def _units(
    x: Tensor, bias: Tensor | None, activation: str | None, dropout: Dropout | None, first: int
) -> Tensor:
    """Units (n, count) of their product, the first of them in its place among all columns';
    changes x."""
    if bias is None:
        x = activated(x, activation) if activation else x
        return dropout(x, first) if dropout else x
    from alexnet_dist.network.kernels.units import units

    if dropout is None:
        return units(x, bias, activation)
    drawn = dropout.drawn(first)
    made = units(x, bias, activation, drawn)
    return made if drawn else dropout(made, first)


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
