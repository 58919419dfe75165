"""Every communication between the columns of a replica, and how parameters split and merge.

A column's maps are used differently by every column, so the gradients of an exchange are summed
over columns; the loss is computed alike on every column, so the gradients of the gathered logits
are not. Both directions move the type that the network computes in: what comes in goes out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from alexnet_dist.compat import all_gather_single
from alexnet_dist.network.model import Products
from alexnet_dist.partition import share
from alexnet_dist.timing import TIMELINE


class ColumnExchange:
    """`model.Exchange` between the ranks of a group, a column each.

    Args:
        group: the replica's column ranks, in the order of their columns.
        classes: in all columns.
    """

    def __init__(self, group: dist.ProcessGroup, classes: int) -> None:
        self.group, self.classes = group, classes

    def products(
        self, of: Products, made: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        maps = made[0].flatten(1) if weight.dim() == 2 else made[0]  # fc6 sees units
        return [product_of_all(of, maps, weight, bias, self.group, dim=1)]

    def own(self, slots: Tensor) -> Tensor:
        return slots

    def logits(self, parts: list[Tensor]) -> Tensor:
        return join_logits(parts[0], self.group, self.classes)


def product_of_all(
    of: Products, part: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup,
    dim: int,
) -> Tensor:  # fmt: skip
    """A layer's product of every rank's part, side by side as samples (`dim` 0) or channels (1);
    gradients are summed back."""
    if not torch.is_grad_enabled():
        return of([_side_by_side(part, group, dim)], weight, bias)[0]
    made: Tensor = _ProductOfAll.apply(of, part, weight, bias, group, dim)
    return made


def join_logits(logits: Tensor, group: dist.ProcessGroup, classes: int) -> Tensor:
    """(n, own classes) to (n, classes); each rank takes its own slice of the gradients."""
    return _JoinLogits.apply(logits, group, classes)  # type: ignore[no-any-return]


class _ProductOfAll(torch.autograd.Function):
    """Gradients of what others made travel to them while the weights' own are computed: only the
    first are waited for by the layers below."""

    @staticmethod
    def forward(
        ctx: Any, of: Products, part: Tensor, weight: Tensor, bias: Tensor | None,
        group: dist.ProcessGroup, dim: int,
    ) -> Tensor:  # fmt: skip
        ctx.group, ctx.dim = group, dim
        given: list[Any] = [_side_by_side(part, group, dim), weight, bias]
        given = [None if x is None else x.detach().requires_grad_() for x in given]
        with torch.enable_grad():
            (made,) = of(given[:1], *given[1:])
        ctx.given, ctx.made = given, get_gradient_edge(made)
        return made.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made, (seen, *weights) = ctx.made, [x for x in ctx.given if x is not None]
        del ctx.made, ctx.given
        (of_seen,) = torch.autograd.grad(made, seen, grads, retain_graph=True)
        summed = _begin_sum(of_seen, ctx.group, ctx.dim)
        of_weight, *of_bias = torch.autograd.grad(made, weights, grads)
        return None, summed(), of_weight, of_bias[0] if of_bias else None, None, None


class _JoinLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup, classes: int) -> Tensor:
        ctx.rows = share(classes, group.rank(), group.size())
        counts = [_count(share(classes, c, group.size())) for c in range(group.size())]
        return gather_rows(logits.t(), counts, group).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, ctx.rows], None, None


def _side_by_side(part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Every rank's part, in order, along a dimension: 0, or 1 in channels_last."""
    if dim == 0:
        return gathered(part, group).flatten(0, 1)
    parts = gathered(part.movedim(1, -1), group)  # (ranks, n, …, own channels)
    return parts.movedim(0, -2).flatten(-2).movedim(-1, 1)


def _begin_sum(whole: Tensor, group: dist.ProcessGroup, dim: int) -> Callable[[], Tensor]:
    """Begin to send each rank its part along a dimension. The call it gives waits, and sums this
    rank's part over ranks in their order: the same bits on every backend."""
    last = whole.movedim(dim, -dim)
    parts = last.unflatten(-dim, (group.size(), -1)).movedim(-2 * dim, 0).contiguous()
    mine = torch.empty_like(parts)  # (ranks, *shape)
    with TIMELINE.span("exchange"):
        work = dist.all_to_all_single(mine, parts, group=group, async_op=True)
    assert work is not None

    def summed() -> Tensor:
        with TIMELINE.span("exchange"):
            work.wait()
        return mine.sum(0).movedim(-dim, dim)

    return summed


def _count(rows: slice) -> int:
    return int(rows.stop - rows.start)


def gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows (dim 0) of every rank, in order, on every rank; `counts` may differ or be 0."""
    if len({*counts}) == 1:
        return gathered(rows, group).flatten(0, 1)
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = gathered(padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, *shape): every rank's tensor of one shape, in order."""
    parts = part.new_empty((group.size() * part.shape[0], *part.shape[1:]))
    with TIMELINE.span("exchange"):
        all_gather_single(parts, part.contiguous(), group)  # NCCL takes no other
    return parts.view(group.size(), *part.shape)


def merge(part: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor | None:
    """The whole of a tensor split by columns on dim 0, on the CPU of the group's first rank.

    Scalars are alike on all ranks. Other ranks get None. Collective.
    """
    if group is None or part.dim() == 0:
        return part.detach().to("cpu", copy=True)  # the next step changes the parameter itself
    counts = [_count(share(rows, column, group.size())) for column in range(group.size())]
    padded = part.new_zeros((max(counts), *part.shape[1:]))
    padded[: part.shape[0]] = part.detach()
    parts = [torch.empty_like(padded) for _ in counts] if group.rank() == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    if parts is None:
        return None
    return torch.cat([p[:count] for p, count in zip(parts, counts, strict=True)]).cpu()
