"""Every communication between the columns of a replica, and how parameters split and merge.

A column's maps are used differently by every column, so the gradients of an exchange are summed
over columns; the loss is computed alike on every column, so the gradients of the gathered logits
are not. Both directions move the type that the network computes in: what comes in goes out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.compat import all_gather_single
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

    def join(self, parts: list[Tensor]) -> Tensor:
        return join_maps(parts[0], self.group)

    def features(self, features: Tensor) -> Tensor:
        return features

    def logits(self, parts: list[Tensor]) -> Tensor:
        return join_logits(parts[0], self.group, self.classes)


def join_maps(maps: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(n, own channels, …) to (n, channels of all ranks, …); gradients are summed back."""
    return _JoinMaps.apply(maps, group)  # type: ignore[no-any-return]


def join_logits(logits: Tensor, group: dist.ProcessGroup, classes: int) -> Tensor:
    """(n, own classes) to (n, classes); each rank takes its own slice of the gradients."""
    return _JoinLogits.apply(logits, group, classes)  # type: ignore[no-any-return]


class _JoinMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        last = _channels_last(maps)  # (n, …, own channels)
        joined = gathered(last, group).movedim(0, -2)  # (n, …, columns, own channels)
        return joined.flatten(-2).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        last = _channels_last(grads[0])
        parts = last.unflatten(-1, (ctx.group.size(), -1)).movedim(-2, 0).contiguous()
        return summed_parts(parts, ctx.group).movedim(-1, 1), None


class _JoinLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup, classes: int) -> Tensor:
        ctx.rows = share(classes, group.rank(), group.size())
        counts = [_count(share(classes, c, group.size())) for c in range(group.size())]
        return gather_rows(logits.t(), counts, group).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, ctx.rows], None, None


def _channels_last(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).contiguous()


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


def summed_parts(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of (ranks, *shape), summed over ranks in their order: the same bits on
    every backend."""
    mine = torch.empty_like(parts)
    with TIMELINE.span("exchange"):
        dist.all_to_all_single(mine, parts, group=group)
    return mine.sum(0)


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
