"""All communication between replicas: summed gradients, and fully-connected layers that are split
over ranks.

Gradients are summed, not averaged: the loss is already divided by the global batch size.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from alexnet_dist.errors import ReplicasDiffer
from alexnet_dist.network.exchange import Products, side_by_side
from alexnet_dist.parallel.columns import gathered, join_logits, product_of_all
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE


class ShardExchange:
    """The `Exchange` of Krizhevsky 2014, scheme (a): a rank's convolutions see its own samples, its
    part of fc6 … fc8 sees those of all ranks.

    Args:
        group: all ranks; each must have the same number of samples.
        classes: the number of classes over all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, classes: int) -> None:
        self.group, self.classes = group, classes

    def products(
        self, product: Products, inputs: list[Tensor], weight: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        """Apply a layer. All columns of the convolutions are here; fc6's and fc7's units are spread
        over all ranks."""
        if inputs[0].dim() == 2:
            return [product_of_all(product, inputs[0], weight, bias, self.group, dim=1)]
        maps = side_by_side(inputs)
        if weight.dim() == 4:
            return product([maps], weight, bias)
        return [product_of_all(product, maps.flatten(1), weight, bias, self.group, dim=0)]

    def own_slots(self, slots: Tensor) -> Tensor:
        mine: Tensor = slots.unflatten(0, (self.group.size(), -1))[self.group.rank()]
        return mine

    def logits(self, parts: list[Tensor]) -> Tensor:
        return join_logits(parts[0], self.group, self.classes)


def sum_bucket(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """Sum a bucket of gradients over replicas during the backward; a DDP communication hook."""
    sums = bucket.buffer()
    _waits_from(bucket)
    return _all_reduced(sums, group).then(lambda done: sums)


def sum_bucket_in_bf16(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """As `sum_bucket`, but sent in bf16: half the bytes of float32."""
    sums, narrow = bucket.buffer(), bucket.buffer().bfloat16()
    _waits_from(bucket)
    return _all_reduced(narrow, group).then(lambda done: sums.copy_(narrow))


def _waits_from(bucket: GradBucket) -> None:
    """Begin timing the all-reduce at the last bucket, when this rank's own backward is over."""
    if bucket.is_last():
        TIMELINE.enter("all_reduce")


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup) -> Future[Any]:
    """Start an all-reduce in place, and return its future."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    return work.get_future()


def summed(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor over a group's ranks in place, and return it; does not synchronise the host.

    Args:
        group: None: there is nothing to add.
    """
    if group is not None:
        with TIMELINE.span("all_reduce"):
            dist.all_reduce(tensor, group=group)
    return tensor


def check_replicas(tensors: Mapping[str, Tensor], topology: Topology, step: int) -> None:
    """Check that all replicas' copies of parameters and optimiser state are bit-identical.
    Collective.

    Compares checksums: a tensor's bits are summed as integers, so any flipped bit changes the sum.

    Args:
        tensors: by name; the same names on all ranks, equal among the ranks of one column.

    Raises:
        ReplicasDiffer: the copies differ; raised on all ranks.
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
            f"step {step}: replicas are no longer bitwise equal: {', '.join(found[:8])}. Memory "
            "or arithmetic failed there, or a layer or optimizer of your own draws other numbers "
            "on each rank; nothing was saved since: start again, on other hardware if it recurs"
        )


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Sum a tensor's bits as integers, () int64, modulo 2⁶⁴.

    Reads pairs of float32 as int64 where it can, which is 20 times as fast.
    """
    flat = tensor.detach().flatten()
    # DeepSpeed's parameters are views of one flat tensor, at any offset.
    paired = flat.numel() % 2 == 0 and flat.storage_offset() % 2 == 0
    wide = torch.int64 if paired or flat.element_size() == 8 else torch.int32
    return flat.view(wide).sum(dtype=torch.int64)
