"""All communication between the columns of a replica, and how split parameters are merged.

Every column uses another's maps differently, so the gradients of an exchange are summed over
columns. Every column computes the same loss, so the gradients of the gathered logits are not.
Forward and backward both send the dtype that the network computes in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from alexnet_dist.compat import all_gather_single
from alexnet_dist.network.exchange import Products
from alexnet_dist.partition import share
from alexnet_dist.timing import TIMELINE


class ColumnExchange:
    """The `Exchange` between ranks that hold one column each.

    Args:
        group: the replica's column ranks, in the order of their columns.
        classes: the number of classes over all columns.
    """

    def __init__(self, group: dist.ProcessGroup, classes: int) -> None:
        self.group, self.classes = group, classes

    def products(
        self, product: Products, inputs: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        maps = inputs[0].flatten(1) if weight.dim() == 2 else inputs[0]  # fc6 sees units
        return [product_of_all(product, maps, weight, bias, self.group, dim=1)]

    def own_slots(self, slots: Tensor) -> Tensor:
        return slots

    def logits(self, parts: list[Tensor]) -> Tensor:
        return join_logits(parts[0], self.group, self.classes)


def product_of_all(
    product: Products, part: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup,
    dim: int,
) -> Tensor:  # fmt: skip
    """Gather every rank's part, and apply a layer's product to the whole; differentiable.

    The backward sums the parts' gradients over ranks, and sends each rank its own.

    Args:
        product: the layer's product; it returns one tensor.
        part: this rank's input, of the same shape on every rank.
        dim: how the parts are concatenated: 0 as samples, 1 as channels.
    """
    if not torch.is_grad_enabled():
        return product([_side_by_side(part, group, dim)], weight, bias)[0]
    return _ProductOfAll.apply(product, part, weight, bias, group, dim)  # type: ignore[no-any-return]


def join_logits(logits: Tensor, group: dist.ProcessGroup, classes: int) -> Tensor:
    """Gather (n, own classes) to (n, classes); in the backward each rank takes its own slice."""
    return _JoinLogits.apply(logits, group, classes)  # type: ignore[no-any-return]


class _ProductOfAll(torch.autograd.Function):
    """`product_of_all`. In the backward the input gradients travel to their ranks while the weight
    gradients are computed: the layers below wait for the former only."""

    @staticmethod
    def forward(
        ctx: Any, product: Products, part: Tensor, weight: Tensor, bias: Tensor | None,
        group: dist.ProcessGroup, dim: int,
    ) -> Tensor:  # fmt: skip
        ctx.group, ctx.dim = group, dim
        # Record a graph of this product alone, so that the backward can run it in two parts.
        leaves: list[Any] = [_side_by_side(part, group, dim), weight, bias]
        leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
        with torch.enable_grad():
            (output,) = product(leaves[:1], *leaves[1:])
        ctx.leaves, ctx.output = leaves, get_gradient_edge(output)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        output, (whole, *weights) = ctx.output, [x for x in ctx.leaves if x is not None]
        del ctx.output, ctx.leaves
        # First the input's gradient, which the other ranks wait for; then the weights'.
        (whole_grad,) = torch.autograd.grad(output, whole, grads, retain_graph=True)
        summed = _begin_sum(whole_grad, ctx.group, ctx.dim)
        weight_grad, *bias_grad = torch.autograd.grad(output, weights, grads)
        return None, summed(), weight_grad, bias_grad[0] if bias_grad else None, None, None


class _JoinLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup, classes: int) -> Tensor:
        ctx.rows = share(classes, group.rank(), group.size())
        return gather_rows(logits.t(), _counts(classes, group), group).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, ctx.rows], None, None


def _side_by_side(part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Gather every rank's part and concatenate them along dim 0, or dim 1 in channels_last."""
    if dim == 0:
        return gathered(part, group).flatten(0, 1)
    parts = gathered(part.movedim(1, -1), group)  # (ranks, n, …, own channels)
    return parts.movedim(0, -2).flatten(-2).movedim(-1, 1)


def _begin_sum(whole: Tensor, group: dist.ProcessGroup, dim: int) -> Callable[[], Tensor]:
    """Start sending each rank its part of `whole` along `dim`, asynchronously.

    Returns:
        A function that waits, and returns this rank's part summed over ranks. It sums in rank
        order, so the bits are the same on every backend.
    """
    if dim == 0:
        parts = whole.unflatten(0, (group.size(), -1))
    else:  # (ranks, n, …, own channels): channels are last in memory, and stay so
        parts = whole.movedim(1, -1).unflatten(-1, (group.size(), -1)).movedim(-2, 0)
    parts = parts.contiguous()
    mine = torch.empty_like(parts)
    with TIMELINE.span("exchange"):
        work = dist.all_to_all_single(mine, parts, group=group, async_op=True)
    assert work is not None

    def summed() -> Tensor:
        with TIMELINE.span("exchange"):
            work.wait()
        total = mine.sum(0)
        return total if dim == 0 else total.movedim(-1, 1)

    return summed


def _counts(rows: int, group: dist.ProcessGroup) -> list[int]:
    """Return how many of these rows each rank of a group has."""
    size = group.size()
    return [len(range(rows)[share(rows, rank, size)]) for rank in range(size)]


def gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Gather the rows (dim 0) of all ranks, in rank order, on every rank.

    Args:
        counts: the number of rows of each rank; they may differ, or be 0.
    """
    if len({*counts}) == 1:
        return gathered(rows, group).flatten(0, 1)
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = gathered(padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather tensors of one shape from all ranks, in rank order: (ranks, *shape)."""
    parts = part.new_empty((group.size() * part.shape[0], *part.shape[1:]))
    with TIMELINE.span("exchange"):
        all_gather_single(parts, part.contiguous(), group)  # NCCL takes no other
    return parts.view(group.size(), *part.shape)


def merge(part: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor | None:
    """Merge a tensor that is split on dim 0, on the CPU of the group's first rank. Collective.

    Scalars are equal on all ranks, and are copied. Other ranks get None.

    Args:
        rows: the number of rows of the whole tensor.
        group: the ranks that hold its parts; None: `part` is whole.
    """
    if group is None or part.dim() == 0:
        return part.detach().to("cpu", copy=True)  # the next step changes the parameter itself
    counts = _counts(rows, group)
    padded = part.new_zeros((max(counts), *part.shape[1:]))
    padded[: part.shape[0]] = part.detach()
    parts = [torch.empty_like(padded) for _ in counts] if group.rank() == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    if parts is None:
        return None
    return torch.cat([p[:count] for p, count in zip(parts, counts, strict=True)]).cpu()
