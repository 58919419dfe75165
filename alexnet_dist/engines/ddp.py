"""The engine for one process, columns, replicas (DDP), and columns × replicas."""

import contextlib
import functools
import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch, StepInput
from alexnet_dist.engines.base import (
    AT,
    WholeTensors,
    check_fit,
    loss_and_counts,
    not_zero,
    skip_flag,
    squared_norm,
    with_damaged,
)
from alexnet_dist.engines.graph import CapturedStep, captures, on_stream
from alexnet_dist.engines.optimizer import Optimizer
from alexnet_dist.network import kernels
from alexnet_dist.network.layers import Layer
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import DTYPES, GRADIENT_SCALE, parameter_dtype
from alexnet_dist.parallel.columns import ColumnExchange, merge
from alexnet_dist.parallel.replicas import sum_bucket, sum_bucket_in_bf16, summed
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE

_WARM_UP = 2  # steps before one is captured
_WARM_UP_DDP = 11  # with DDP, which times its first 10 steps, and synchronises to read the times


class TorchEngine:
    """Trains the whole network, or one of its columns, on this rank; replicas' gradients are summed
    by DDP.

    Other engines override these hooks: `build`, `replicate`, `gradient_sync`, `is_replicated`,
    `labels_and_slots`, `complete_stats`, `shard_group`, `sum_over_shards`, `part`, `merged`.
    """

    def __init__(self, config: Config, topology: Topology, init_weights: bool = True) -> None:
        self.config, self.topology = config, topology
        with topology.device:
            self.model = self.build(init_weights)
        # All ranks or none: one that captures its step makes collectives that the others do not.
        mine = kernels.fused(config.train.execution, topology.device)
        self.fused = all(fused for (fused,) in topology.gather(mine))
        narrow = self._fuse_layers() if self.fused else None
        parameters = self.model.named_parameters()
        scale = GRADIENT_SCALE.get(config.train.precision)
        self.optimizer = Optimizer(
            config.optimizer, parameters, self.sum_over_shards, narrow, scale
        )
        self.gradients: dict[str, Tensor] = {}
        self.graphs: dict[bool, CapturedStep] = {}
        graph = self.fused and captures(config.train.execution, topology.device)
        self.stream = torch.cuda.Stream() if graph else None  # None: nothing is captured
        self.network = self._wrapped()

    def train_step(
        self, batch: StepInput, step: int, rate: float, keep_gradients: bool = False
    ) -> Tensor:
        self.model.train()
        if self.stream is not None and keep_gradients not in self.graphs:
            with TIMELINE.span("step"):
                self._capture(batch, keep_gradients, self.stream)
        if self.stream is None:
            self.gradients = {}
            return self._step(batch, step, rate, keep_gradients)
        return self.graphs[keep_gradients](batch, step, rate)

    def _capture(self, batch: StepInput, keep_gradients: bool, stream: torch.cuda.Stream) -> None:
        """Capture a step as a CUDA graph; if a rank cannot, all go on without. Collective."""
        one = functools.partial(self._step, keep_gradients=keep_gradients)
        warm_up = _WARM_UP if self.network is self.model else _WARM_UP_DDP
        made = CapturedStep(one, self.optimizer.state_tensors(), batch, stream, warm_up)
        if all(captured for (captured,) in self.topology.gather(made.graph is not None)):
            self.graphs[keep_gradients] = made
            return
        self.stream, self.graphs = None, {}
        # DDP may have been interrupted in a backward: replace it, once its hooks are collected.
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        self.network = self.model
        gc.collect()
        self.network = self._wrapped()

    def _wrapped(self) -> nn.Module:
        """Return the network, wrapped to sum gradients if there are other replicas. Collective."""
        group = self.topology.replica_group
        if group is None:
            return self.model
        # Autograd accumulates gradients on the stream where DDP was made.
        with on_stream(self.stream):
            return self.replicate(group)

    def _step(
        self, given: StepInput, step: int | Tensor, rate: float | Tensor, keep_gradients: bool
    ) -> Tensor:
        """Compute gradients, micro-batch by micro-batch, and update the weights; return
        `StepStats`, as a tensor."""
        batch = given.batch()  # decoded bytes become windows: `Preprocess`
        parts, scale = self.config.train.micro_batches, self.optimizer.loss_scale(rate)
        counted: list[Tensor] = []
        for part, (windows, labels, slots) in enumerate(self._micro_batches(batch), start=1):
            with self.gradient_sync(part == parts):
                with TIMELINE.span("forward"):
                    logits = self.network(windows, slots, step)
                    loss, counts = loss_and_counts(logits, labels, self.fused)
                # The gradient of the mean over the global batch, times the learning rate where that
                # is inside the velocity (`Optimizer.loss_scale`).
                with TIMELINE.span("backward"):
                    loss.backward(_filled(loss, scale / self.config.train.batch))
            counted.append(counts)
        if keep_gradients:
            self.gradients = self._kept_gradients(scale)
        # The update, which also clears the gradients. It is skipped, on all ranks, where the loss
        # or the gradient is not finite.
        with TIMELINE.span("optimizer"):
            stats = with_damaged(functools.reduce(torch.add, counted), batch)
            self.complete_stats(stats)
            self.optimizer.step(rate, skip=skip_flag(stats, scale, self.fused))
        return stats

    def complete_stats(self, stats: Tensor) -> None:
        """Complete a step's statistics in place: sum them over replicas, and fill in the squared
        norm of the whole network's gradient, which the backward has already summed over them."""
        summed(stats, self.topology.replica_group)
        squares = squared_norm(self.model.parameters())
        stats[AT.norm] = summed(squares, self.topology.column_group)

    def _kept_gradients(self, scale: float | Tensor) -> dict[str, Tensor]:
        """Copy this rank's part of the gradients, divided by `scale`."""
        grads = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        wide = parameter_dtype(self.config.train.precision)
        divide_by = not_zero(scale)
        return {n: grad.to(wide) / divide_by for n, grad in grads.items() if grad is not None}

    def build(self, init_weights: bool) -> AlexNet:
        """Build this rank's part of the network.

        Args:
            init_weights: whether to give it its initial weights.
        """
        columns = self.topology.column_group
        return AlexNet(
            self.config.model,
            self.config.seed,
            columns_here=[self.topology.column] if columns else None,
            exchange=ColumnExchange(columns, self.config.model.classes) if columns else None,
            dtype=parameter_dtype(self.config.train.precision),
            init_weights=init_weights,
        )

    def _fuse_layers(self) -> dict[str, Tensor]:
        """Switch the layers to the GPU kernels, and return copies of their weights, by name, in the
        dtype that the network computes in; none if that is the weights' own dtype."""
        dtype, copies = DTYPES[self.config.train.precision], {}
        for layer in self.model.layers():
            layer.fused = True
            if layer.weight.dtype != dtype:
                copies[f"{layer.name}.weight"] = layer.narrow = layer.weight.detach().to(dtype)
                if self._takes_narrow_gradient(f"{layer.name}.weight"):
                    layer.weight.grad_dtype = dtype
        return copies

    def _takes_narrow_gradient(self, name: str) -> bool:
        """Whether the update can read a gradient in the narrow dtype that the backward produces.
        Gradients that are summed over micro-batches or replicas are summed in float32."""
        once = self.config.train.micro_batches == 1 and not self.is_replicated(name)
        return once and self.config.optimizer.kind == "sgd"

    def is_replicated(self, name: str) -> bool:
        """Whether a parameter's gradients are summed over replicas."""
        return self.topology.replicas > 1

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, per micro-batch, windows of this rank, and labels and slots of the samples that it
        scores."""
        n, parts = len(batch.labels), self.config.train.micro_batches
        labels, slots = self.labels_and_slots(batch)
        for part in range(parts):
            rows = slice(part * n // parts, (part + 1) * n // parts)
            yield batch.windows[rows], labels[:, rows].flatten(), slots[:, rows].flatten()

    def slots(self, n: int) -> Tensor:
        """Return the slots of the global batch, (replicas, n) int64, n per replica."""
        topology = self.topology
        return torch.arange(topology.replicas * n, device=topology.device).view(-1, n)

    def labels_and_slots(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return labels and slots, (k, n), of the k × n samples that the last layer here scores:
        this replica's own, k = 1, unless an engine overrides this."""
        return batch.labels[None], self.slots(len(batch.labels))[self.topology.replica, None]

    @torch.no_grad()
    def predict(self, windows: Tensor) -> Tensor:
        self.model.eval()
        logits: Tensor = self.model(windows)
        return logits if logits.dtype == torch.float64 else logits.float()

    def parameter(self, name: str) -> Tensor | None:
        return self.merged(name, self.optimizer.parameters[name])

    def gradient(self, name: str) -> Tensor | None:
        part = self.gradients.get(name)
        return None if part is None else self.merged(name, part)

    def whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self._whole(self.optimizer.parameters), self._whole(self.optimizer.tensors())

    def load(self, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
        check_fit(self.config, parameters, optimizer)
        with torch.no_grad():
            for name, parameter in self.optimizer.parameters.items():
                parameter.copy_(self.part(name, parameters))
        if optimizer is not None:
            self.optimizer.load({n: self.part(n, optimizer) for n in optimizer.shapes()})
        self.optimizer.narrow_all()

    def replicated(self) -> dict[str, Tensor]:
        return self.optimizer.parameters | self.optimizer.tensors()

    def _whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        merged = {name: self.merged(name, part) for name, part in parts.items()}
        return {name: tensor for name, tensor in merged.items() if tensor is not None}

    def part(self, name: str, tensors: WholeTensors) -> Tensor:
        """Read this rank's part of a whole parameter, or of its state (KIND/conv1.weight)."""
        return tensors.rows(name, self._layer(name).rows)

    def merged(self, name: str, part: Tensor) -> Tensor | None:
        """Return the whole tensor, on rank 0's CPU, given every rank's `part`; None elsewhere.
        Collective."""
        group = self.shard_group(name)
        holders = dist.get_process_group_ranks(group) if group else [self.topology.global_rank]
        if holders[0] != 0:  # another replica, whose copy is not needed
            return None
        whole = merge(part, self._layer(name).whole_shape[0], group)
        return None if whole is None else whole.contiguous()

    def shard_group(self, name: str) -> dist.ProcessGroup | None:
        """Return the ranks that each hold rows of a parameter; None if it is whole on this rank."""
        return self.topology.column_group

    def sum_over_shards(self, sums: Tensor) -> Tensor:
        """Add up `sums`, (2, weights), over the ranks that hold rows of the same tensors."""
        return summed(sums, self.topology.column_group)

    def replicate(self, group: dist.ProcessGroup) -> nn.Module:
        """Wrap the network in DDP, which sums gradients bucket by bucket during the backward.

        DDP orders its buckets after the first backward, and with three or more ranks sums may
        depend on that order. So a first backward is made here whose gradients are discarded: new
        and resumed runs then use the same order.
        """
        network = DistributedDataParallel(
            self.model, process_group=group, init_sync=False, gradient_as_bucket_view=True
        )
        network._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # each sample would synchronise
        in_bf16 = self.config.layout.compress_gradients
        network.register_comm_hook(group, sum_bucket_in_bf16 if in_bf16 else sum_bucket)
        side, device = self.config.model.crop, self.topology.device
        dtype = DTYPES[self.config.train.precision]
        windows = torch.zeros(1, 3, side, side, dtype=dtype, device=device)
        nothing = torch.zeros(1, dtype=torch.int64, device=device)
        _, slots = self.labels_and_slots(Batch(windows, nothing, nothing, windows, nothing.bool()))
        self.model.eval()  # no running statistic of a layer of your own must count these windows
        network(windows, slots.flatten()).sum().backward()
        self.model.train()
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        return network

    def gradient_sync(self, now: bool) -> AbstractContextManager[object]:
        """Return a context in which a backward sums gradients over replicas only if `now`: in the
        last micro-batch of a step."""
        if isinstance(self.network, DistributedDataParallel) and not now:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _layer(self, name: str) -> Layer:
        """Return the layer of a parameter (conv1.weight) or of its state (KIND/conv1.weight)."""
        layer = self.model.get_submodule(name.rpartition("/")[2].partition(".")[0])
        assert isinstance(layer, Layer)
        return layer


def _filled(like: Tensor, value: float | Tensor) -> Tensor:
    """Return `value` as a tensor of the shape and dtype of `like`."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return torch.full_like(like, value)
