"""The layers of a network that is split into columns: convolutions and fully-connected layers.

A layer holds the weights of all columns on this device in one tensor, one column's rows below the
other's, so that every parameter splits on dim 0.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.config.schema import Activation
from alexnet_dist.network import philox
from alexnet_dist.network.concurrent import at_once
from alexnet_dist.network.dropout import Dropout
from alexnet_dist.network.exchange import Exchange
from alexnet_dist.network.precision import product
from alexnet_dist.network.shapes import windows_along

# By `model.activation`. Each returns its result, computed in place where torch can.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, f"{name}_", None) or getattr(F, name) for name in get_args(Activation)
}


class Layer(nn.Module):
    """One layer of the columns on this device.

    `forward` takes one tensor per column here, or a single one that all columns see. It computes
    in the dtype of its input, whatever that of the weights is, and returns one tensor per column.

    Args:
        whole_shape: the weight's shape over all columns.
        parts: for each column here, which rows of the whole weight are its own.

    Attributes:
        rows: which rows (dim 0) of the whole weight are here.
        starts: index of each local column's first output among the outputs of all columns.
        sizes: number of outputs of each column here.
        narrow: a copy of the weight in the dtype that the network computes in, kept up to date by
            the optimiser's update; None: the weight is cast where it is used.
        fused: bias, activation and all that follows the product are done by GPU kernels
            (`kernels`).
    """

    narrow: Tensor | None = None
    fused = False

    def __init__(
        self, name: str, whole_shape: tuple[int, ...], parts: Sequence[slice], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name, self.whole_shape = name, whole_shape
        self.rows = slice(parts[0].start, parts[-1].stop)
        self.starts = [part.start for part in parts]
        self.sizes = [part.stop - part.start for part in parts]
        here = (sum(self.sizes), *whole_shape[1:])
        self.weight = nn.Parameter(torch.empty(here, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(here[0], dtype=dtype))

    def forward(self, inputs: list[Tensor], exchange: Exchange | None = None) -> list[Tensor]:
        """Return this layer's products, without the bias if `fused`.

        Args:
            inputs: the outputs of the columns here in the layer below.
            exchange: gives every column the outputs of all columns; None: each sees its own.
        """
        weight, bias = self.weights(inputs[0])
        if exchange is None:
            return self.products(inputs, weight, bias)
        return exchange.products(self.products, inputs, weight, bias)

    def products(self, inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Multiply inputs by weights, and add the bias unless it is None.

        `weight` and `bias` must be all that is learnt here: an exchange between ranks computes
        their gradients in a backward of its own.

        Args:
            inputs: one tensor per column here, or a single one that all of them see.
        """
        raise NotImplementedError

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in the dtype of the input `like`; no bias if `fused`."""
        weight: Tensor = self.weight
        if weight.dtype != like.dtype:
            narrow = self.narrow
            weight = weight.to(like.dtype) if narrow is None else _Narrow.apply(weight, narrow)
        return weight, None if self.fused else self.bias.to(like.dtype)

    def biases(self, products: list[Tensor]) -> list[Tensor | None]:
        """Return the bias that is still to be added to each of this layer's products."""
        if not self.fused:
            return [None] * len(products)
        return list(self.bias.split(self.sizes)) if len(products) > 1 else [self.bias]

    def by_column(
        self, inputs: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield input, weight and bias of each column here."""
        if len(self.sizes) == 1:
            return iter([(inputs[0], weight, bias)])
        each = inputs if len(inputs) > 1 else inputs * len(self.sizes)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        return zip(each, weight.split(self.sizes), biases, strict=True)

    def initialise(self, seed: int, std: float, bias: float) -> None:
        """Draw the weight from N(0, std), a function of (seed, name), and fill the bias."""
        name = f"{self.name}.weight"
        shape, dtype = self.whole_shape, self.weight.dtype
        values = philox.initial_weights(seed, name, shape, self.rows, std, dtype)
        with torch.no_grad():
            self.weight.copy_(values)
            self.bias.fill_(bias)


class _Narrow(torch.autograd.Function):
    """Use the narrow copy of a weight; its gradient goes to the weight itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, narrow: Tensor) -> Tensor:
        return narrow.view_as(narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Conv(Layer):
    """A convolution: one product per column, each into a tensor of its own."""

    def __init__(
        self, name: str, whole_shape: tuple[int, ...], parts: Sequence[slice], dtype: torch.dtype,
        stride: int, padding: int, round_up: bool,
    ) -> None:  # fmt: skip
        super().__init__(name, whole_shape, parts, dtype)
        self.stride, self.padding, self.round_up = stride, padding, round_up
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def products(self, inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Return (n, own maps, h, w) of each column."""
        stride, padding = self.stride, self.padding
        if self.fused and stride > 1 and not inputs[0].requires_grad:  # conv1
            inputs, weight = [self._folded(x) for x in inputs], _folded_kernel(weight, stride)
            stride, padding = 1, 0
        elif self.round_up:
            inputs = [self._padded(x) for x in inputs]
        columns = list(self.by_column(inputs, weight, bias))
        convolve = functools.partial(F.conv2d, stride=stride, padding=padding)
        return at_once([functools.partial(product, convolve)] * len(columns), columns)

    def _padded(self, x: Tensor) -> Tensor:
        """Add zeros below and to the right, so that the last window begins inside (Caffe)."""
        kernel = self.whole_shape[-1]
        below, right = (-(s + 2 * self.padding - kernel) % self.stride for s in x.shape[2:])
        return F.pad(x, (0, right, 0, below))

    def _folded(self, x: Tensor) -> Tensor:
        """Fold (n, colours, h, w) to (n, colours · stride², cells, cells): space to depth.

        Each square of stride² pixels becomes one pixel with stride² as many channels, so that a
        GPU's products are of 48 channels, not of 3.
        """
        from alexnet_dist.network.kernels.windows import fold

        kernel, stride = self.whole_shape[-1], self.stride
        sides = [side + 2 * self.padding for side in x.shape[2:]]
        windows = [windows_along(side, kernel, stride, self.round_up) for side in sides]
        cells = [count + -(-kernel // stride) - 1 for count in windows]
        folded: Tensor = fold(x, stride, self.padding, *cells)
        return folded


def _folded_kernel(weight: Tensor, stride: int) -> Tensor:
    """Fold kernels, (outputs, colours, k, k), as `Conv._folded` folds their input; zeros below and
    to the right fill k up to whole squares."""
    kernel = weight.shape[-1]
    cells = -(-kernel // stride)
    more = cells * stride - kernel
    split = F.pad(weight, (0, more, 0, more)).unflatten(3, (cells, stride))
    split = split.unflatten(2, (cells, stride))  # out, colour, row, dy, column, dx
    folded: Tensor = split.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)
    return folded


class Linear(Layer):
    """A fully-connected layer: one product for all columns here, where they see the same input."""

    def products(self, inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Return (n, own units) of each column; or, where all see the same input, one tensor,
        (n, units) of all columns here."""
        inputs = [x.flatten(1) for x in inputs]  # fc6: (n, 2 · 128 · 6 · 6)
        own = self.whole_shape[1]
        if inputs[0].shape[1] > own:  # one tensor of all columns here, each of which sees its own
            inputs = list(inputs[0].split(own, dim=1))
        if len(inputs) == 1:
            return [product(F.linear, inputs[0], weight, bias)]
        return [product(F.linear, *column) for column in self.by_column(inputs, weight, bias)]

    def units(
        self, inputs: list[Tensor], exchange: Exchange | None, activation: str | None = None,
        dropout: Dropout | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Apply `forward`, then the activation, then dropout."""
        products = self(inputs, exchange)
        # A single product of both columns begins at the first one's units: the zip ends there.
        parts = zip(products, self.biases(products), self.starts, strict=False)
        return [_units(x, bias, activation, dropout, start) for x, bias, start in parts]


def _units(
    x: Tensor, bias: Tensor | None, activation: str | None, dropout: Dropout | None, first: int
) -> Tensor:
    """Add the bias, activate and drop units, (n, count); may change x in place.

    Args:
        bias: None where the product has it already.
        first: index of the first unit among those of all columns.
    """
    if bias is None:
        x = ACTIVATIONS[activation](x) if activation else x
        return dropout(x, first) if dropout else x
    from alexnet_dist.network.kernels.units import units

    if dropout is None:
        return units(x, bias, activation)
    arguments = dropout.kernel_arguments(first)
    x = units(x, bias, activation, arguments)
    return x if arguments else dropout(x, first)
