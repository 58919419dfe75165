"""Dropout (paper, §4.2) whose masks are a function of (seed, step, layer, slot, unit) only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from alexnet_dist.network import philox


@dataclass(frozen=True, eq=False)  # torch 2.11's compiler hashes it before it has attributes
class Dropout:
    """Dropout of one layer's outputs at one step.

    Attributes:
        layer: number of the layer that made the units.
        slots: (n,) int64, the samples' places in the global batch; None: not in training, all
            units are kept and scaled by 1 − drop.
        drop: the probability that a unit is dropped.
        at_test: scale by 1 − drop outside training, as the paper does; if False, by 1/(1 − drop)
            in training.
    """

    seed: int
    step: int | Tensor
    layer: int
    slots: Tensor | None
    drop: float
    at_test: bool

    def kernel_arguments(
        self, first: int
    ) -> tuple[Tensor, Tensor, int, int, int, float, bool] | None:
        """Return the arguments with which a kernel draws the mask itself; None outside training."""
        if self.slots is None:
            return None
        step = self.step
        if not isinstance(step, Tensor):
            step = torch.full((), step, device=self.slots.device)
        return self.slots, step, self.layer, first, self.seed, self.drop, self.at_test

    def __call__(self, units: Tensor, first: int) -> Tensor:
        """Return the units with dropped ones set to zero.

        Args:
            units: (n, count).
            first: index of the first unit among the layer's units over all columns.
        """
        if self.slots is None:
            return units * (1 - self.drop)
        stay = philox.dropout_mask(
            self.seed, self.step, self.layer, self.slots, first, units.shape[1], self.drop
        )
        return units * stay if self.at_test else units * stay / (1 - self.drop)
