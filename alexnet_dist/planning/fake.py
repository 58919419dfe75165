"""A training step without memory or other ranks: engines on fake tensors (shapes without values),
torch's fake process group, and a count of the bytes that a step reads and writes."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers collectives for fake tensors
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Decoded, Metadata
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.optimizer import Optimizer
from alexnet_dist.engines.sharded_fc import ShardedFcEngine
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel import layouts
from alexnet_dist.parallel.replicas import summed
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.planning.plan import Passes


def size_of(tensors: list[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class CountsPasses(TorchDispatchMode):
    """Counts the bytes that a step reads and writes, other than in convolutions, matrix products
    and views; and how many kernels it launches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maps = self.parameters = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # of ten calls, six or seven
            return args[0].fake_device
        space, _, own = func._schema.name.partition("::")
        # Of a fused update, which returns nothing, torch has no version for fake tensors, but would
        # compute it with real zeros.
        made = None if own in _FUSED_UPDATES else func(*args, **(kwargs or {}))
        if (
            space in ("aten", "alexnet_dist") and isinstance(func, OpOverload)
            and not func.is_view and "empty" not in own
        ):  # fmt: skip
            seen = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            given = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
            if own in _PRODUCTS:
                self.kernels += len(given)  # a backward makes two: for inputs and for weights
            elif seen or given:
                self.kernels += 1
                changed = given or [
                    t for t, of in zip(args, func._schema.arguments, strict=False)
                    if isinstance(t, Tensor) and of.alias_info and of.alias_info.is_write
                ]  # fmt: skip
                if own in _OF_PARAMETERS:
                    self.parameters += size_of(seen) + size_of(changed)
                else:
                    self.maps += size_of(seen) + size_of(changed)
        return made

    def found(self) -> Passes:
        """Return the counts."""
        return Passes(self.maps, self.parameters, self.kernels)


_PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm")
_FUSED_UPDATES = ("_fused_sgd_", "_fused_adam_")
_OF_PARAMETERS = ("sgd_update", "_foreach_norm", *_FUSED_UPDATES)


class PlannedEngine(TorchEngine):
    """An engine for fake tensors, which DDP does not support: each gradient has a bucket of its own
    and is all-reduced as soon as it is complete. Bytes and memory are the same as DDP's."""

    buckets: tuple[Tensor, ...] = ()
    memory: MemTracker | None = None

    def fuse(self, narrows: bool) -> None:
        """Use a GPU's fused kernels, as the engine does if there is a GPU."""
        self.fused = True
        copies: dict[str, Tensor] | None = self._fuse_layers()
        if not narrows:  # ZeRO's engine keeps no copies in the computing dtype
            copies = None
            for layer in self.model.layers():
                layer.narrow = None
        named = self.model.named_parameters()
        self.optimizer = Optimizer(self.config.optimizer, named, self.sum_over_shards, copies)

    def replicate(self, group: dist.ProcessGroup) -> nn.Module:
        compress = self.config.layout.compress_gradients

        def sum_up(parameter: Tensor) -> None:
            if self._last and parameter.grad is not None:
                summed(parameter.grad.bfloat16() if compress else parameter.grad, group)

        for name, parameter in self.model.named_parameters():
            if self.shard_group(name) is not group:
                parameter.grad = torch.zeros_like(parameter)
                self.buckets += (parameter.grad,)
                parameter.register_post_accumulate_grad_hook(sum_up)
        return self.model

    def gradient_sync(self, now: bool) -> AbstractContextManager[object]:
        self._last = now
        if self.memory:  # its module statistics cover one forward pass at a time
            self.memory.reset_mod_stats()
        return contextlib.nullcontext()


class PlannedShards(PlannedEngine, ShardedFcEngine):
    """The same with sharded fully-connected layers."""


@contextlib.contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Pretend that this process is the first of so many ranks; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_topology(config: Config, ranks: int) -> Topology:
    """Return the topology of rank 0, with fake process groups."""
    columns = layouts.columns_of(config)

    def group(members: range) -> Any:
        return dist.new_group(list(members), backend="fake") if len(members) > 1 else None

    return Topology(
        world_size=ranks,
        columns=columns,
        column_group=group(range(columns)),
        replica_group=group(range(0, ranks, columns)),
    )


def fake_decoded(config: Config, topology: Topology) -> tuple[Decoded, list[int]]:
    """Return what rank 0 decodes in a step, and the number of samples that each column rank
    decodes."""
    counts = [len(slots) for slots in topology.shares(range(config.train.batch))]
    side, dtype = config.model.crop, DTYPES[config.train.precision]

    def preprocess(patches: Tensor, corners: Tensor, *drawn: Tensor | None) -> Tensor:
        windows = torch.empty(len(corners), 3, side, side, dtype=dtype)
        return windows.contiguous(memory_format=torch.channels_last)

    patches = torch.empty(counts[0], side, side, 3, dtype=torch.uint8)
    metadata = torch.empty(counts[0], Metadata.width(windows=1), dtype=torch.float64)
    return Decoded(patches, metadata, preprocess), counts
