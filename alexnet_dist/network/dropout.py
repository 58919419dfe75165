"""Dropout whose masks depend on (seed, step, layer, slot, unit) alone (paper, §4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from alexnet_dist.network import philox


@dataclass(frozen=True)
class Dropout:
    """What drops the units that one layer made, at one step.

    Attributes:
        layer: the number of the layer that made them.
        slots: (n,) int64, the samples' places in the global batch; None: not in training, where
            all units stay, scaled.
        drop: the share that is dropped.
        at_test: scale by 1 − drop outside training, as the paper does; else by its inverse in it.
    """

    seed: int
    step: int | Tensor
    layer: int
    slots: Tensor | None
    drop: float
    at_test: bool

    def drawn(self, first: int) -> tuple[Tensor, Tensor, int, int, int, float, bool] | None:
        """What a kernel draws the mask of by itself; None where nothing is drawn."""
        if self.slots is None:
            return None
        step = self.step
        if not isinstance(step, Tensor):
            step = torch.full((), step, device=self.slots.device)
        return self.slots, step, self.layer, first, self.seed, self.drop, self.at_test

    def __call__(self, units: Tensor, first: int) -> Tensor:
        """Units, of which some are zero.

        Args:
            units: (n, count).
            first: the first one's place among the layer's units over all columns.
        """
        if self.slots is None:
            return units * (1 - self.drop)
        stay = philox.dropout_mask(
            self.seed, self.step, self.layer, self.slots, first, units.shape[1], self.drop
        )
        return units * stay if self.at_test else units * stay / (1 - self.drop)
