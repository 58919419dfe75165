"""How the columns of one network meet: the `Exchange` protocol, and its form on one device.

Between ranks an exchange is a collective: `parallel.columns.ColumnExchange` where each rank holds a
column, `parallel.replicas.ShardExchange` where ranks share the fully-connected layers.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Maps (inputs, weight, bias) to a layer's products: `Layer.products`.
Products = Callable[[list[Tensor], Tensor, Tensor | None], list[Tensor]]


class Exchange(Protocol):
    """Joins the columns of one network. Each list holds one tensor per column on this device."""

    def products(
        self, product: Products, inputs: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        """Apply a layer to the outputs of all columns in the layer below.

        These outputs, each (n, own channels, …), are concatenated to (n, all columns'
        channels, …); the backward sums their gradients over columns.
        """

    def own_slots(self, slots: Tensor) -> Tensor:
        """Select, from the slots of all samples that fc6 sees, those of the samples whose maps are
        on this device."""

    def logits(self, parts: list[Tensor]) -> Tensor:
        """Concatenate [(n, own classes)] to (n, all classes); in the backward each column takes its
        own slice of the gradients."""


class OneDevice:
    """The exchange where all columns are on this device."""

    def products(
        self, product: Products, inputs: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        return product([side_by_side(inputs)], weight, bias)

    def own_slots(self, slots: Tensor) -> Tensor:
        return slots

    def logits(self, parts: list[Tensor]) -> Tensor:
        return side_by_side(parts)


def side_by_side(parts: list[Tensor]) -> Tensor:
    """Concatenate [(n, channels, …)] to (n, all channels, …); a single tensor is returned as is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
