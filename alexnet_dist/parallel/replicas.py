"""Every communication between replicas: sums of gradients, and fully-connected layers split over
ranks.

Gradients are added, not averaged: the loss is already divided by the global batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from alexnet_dist.errors import ReplicasDiffer
from alexnet_dist.network.model import Products, side_by_side
from alexnet_dist.parallel.columns import (
    gathered,
    join_logits,
    product_of_all,
)
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE


class ShardExchange:
    """`model.Exchange` of Krizhevsky 2014, scheme (a): each rank's convolutions see its samples,
    its part of fc6 … fc8 sees those of all ranks.

    Args:
        group: all ranks; each has as many samples.
        classes: of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, classes: int) -> None:
        self.group, self.classes = group, classes

    def products(
        self, of: Products, made: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        """The convolutions' columns are all here; fc6's and fc7's units lie on all ranks."""
        if made[0].dim() == 2:
            return [product_of_all(of, made[0], weight, bias, self.group, dim=1)]
        maps = side_by_side(made)
        if weight.dim() == 4:
            return of([maps], weight, bias)
        return [product_of_all(of, maps.flatten(1), weight, bias, self.group, dim=0)]

    def own(self, slots: Tensor) -> Tensor:
        mine: Tensor = slots.unflatten(0, (self.group.size(), -1))[self.group.rank()]
        return mine

    def logits(self, parts: list[Tensor]) -> Tensor:
        return join_logits(parts[0], self.group, self.classes)


def sum_bucket(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """DDP's hook: a bucket of gradients summed over replicas while the backward goes on."""
    sums = bucket.buffer()
    _waits_from(bucket)
    return _all_reduced(sums, group).then(lambda done: sums)


def sum_bucket_in_bf16(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """The same in bf16: half the bytes of float32."""
    sums, narrow = bucket.buffer(), bucket.buffer().bfloat16()
    _waits_from(bucket)
    return _all_reduced(narrow, group).then(lambda done: sums.copy_(narrow))


def _waits_from(bucket: GradBucket) -> None:
    """With the last bucket this rank's own backward is over."""
    if bucket.is_last():
        TIMELINE.enter("all_reduce")


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup) -> Future[Any]:
    """A future of the sum over ranks, in place."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    return work.get_future()


def summed(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Summed over a group's ranks, in place; the host does not wait for a GPU."""
    if group is not None:
        with TIMELINE.span("all_reduce"):
            dist.all_reduce(tensor, group=group)
    return tensor


def check_replicas(tensors: Mapping[str, Tensor], topology: Topology, step: int) -> None:
    """Hold what every replica keeps a copy of against the others' copies. Collective.

    A tensor's bits are added as integers: one that flips changes the sum.

    Args:
        tensors: by name, as many on all ranks; those of one column are equal.

    Raises:
        ReplicasDiffer: they are not; on all ranks.
    """
    if topology.replicas == 1 or not tensors:
        return
    assert topology.control is not None
    mine = torch.stack([sum_of_bits(tensor) for tensor in tensors.values()]).cpu()
    sums = gathered(mine, topology.control).view(topology.replicas, topology.columns, len(tensors))
    usual = sums.mode(dim=0).values
    found = []
    for replica, column, index in (sums != usual).nonzero().tolist():
        alone = (sums[:, column, index] == usual[column, index]).sum() > 1
        odd = [replica] if alone else range(topology.replicas)  # of two, either may be wrong
        ranks = " and ".join(str(r * topology.columns + column) for r in odd)
        found.append(f"{list(tensors)[index]} of rank {ranks}")
    if found:
        raise ReplicasDiffer(
            f"step {step}: replicas are no longer equal to the bit: {', '.join(found[:8])}. Memory "
            "or arithmetic failed there; nothing was saved since: start again, elsewhere if it "
            "comes back"
        )


def sum_of_bits(tensor: Tensor) -> Tensor:
    """int64, modulo 2⁶⁴; of pairs of float32 where there are, which is 20 times as fast."""
    flat = tensor.detach().flatten()
    # DeepSpeed's are views of one long tensor, from any place in it on.
    paired = flat.numel() % 2 == 0 and flat.storage_offset() % 2 == 0
    wide = torch.int64 if paired or flat.element_size() == 8 else torch.int32
    return flat.view(wide).sum(dtype=torch.int64)


def largest(count: int, group: dist.ProcessGroup) -> int:
    """The largest of the ranks' numbers. `group` is of CPUs: the host has to know it."""
    most = torch.tensor(count)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most)
