"""Every layout but ZeRO, by torch and DDP."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch
from alexnet_dist.engines.base import WholeTensors, check_fit, judged, scored, with_damaged
from alexnet_dist.engines.optimizer import Optimizer
from alexnet_dist.network.model import AlexNet, Exchange, Layer
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.columns import ColumnExchange, gathered, merge
from alexnet_dist.parallel.replicas import (
    ShardExchange,
    largest,
    sum_bucket,
    sum_bucket_in_bf16,
    summed,
)
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE


class TorchEngine:
    """Every layout but ZeRO: columns here or on ranks, replicas by DDP, fully-connected layers
    whole or split over all ranks."""

    def __init__(self, config: Config, topology: Topology, drawn: bool = True) -> None:
        self.config, self.topology = config, topology
        replicas = topology.replica_group
        self.shards = replicas if config.layout.kind == "sharded_fc" else None
        with topology.device:
            self.model = AlexNet(
                config.model,
                config.seed,
                columns_here=[topology.column] if topology.column_group else None,
                exchange=self._exchange(),
                dtype=torch.float64 if config.train.precision == "fp64" else torch.float32,
                fc_part=(topology.replica, topology.replicas) if self.shards else None,
                drawn=drawn,
            )
        self.optimizer = Optimizer(
            config.optimizer, self.model.named_parameters(), self._whole_sums
        )
        self.network: nn.Module = self._replicated(replicas) if replicas else self.model
        self.compiles = config.train.compile != "none"
        self.trained = self._compiled() if self.compiles else self.network

    def train_step(
        self, batch: Batch, step: int, rate: float, keep_gradients: bool = False
    ) -> Tensor:
        self.model.train()
        parts, scale = self.config.train.micro_batches, self.optimizer.loss_scale(rate)
        # As a number it would be part of what is compiled.
        now = torch.full((), step, device=self.topology.device) if self.compiles else step
        stats = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for part, (windows, labels, slots) in enumerate(self._micro_batches(batch), start=1):
            with self._summing(part == parts):
                with TIMELINE.span("forward"):
                    with self._autocast():
                        logits = self.trained(windows, slots, now)
                    loss, counts = scored(logits, labels)
                with TIMELINE.span("backward"):
                    (loss * (scale / self.config.train.batch)).backward()
            stats = stats + counts
        self.gradients = self._copied(scale) if keep_gradients else {}
        with TIMELINE.span("optimizer"):
            return self._updated(with_damaged(stats, batch), rate, scale)

    def _updated(self, stats: Tensor, rate: float, scale: float) -> Tensor:
        """A step's numbers, complete, and the update unless they forbid it."""
        squares = self._squares()
        if self.shards:  # every rank has scored all samples, and decoded its own
            stats[5] = squares
            summed(stats[4:], self.shards)
        else:
            summed(stats, self.topology.replica_group)
            stats[5] = summed(squares, self.topology.column_group)
        self.optimizer.step(rate, skip=judged(stats, scale))
        return stats

    def _copied(self, scale: float) -> dict[str, Tensor]:
        """This rank's part of the gradients, which are `scale` times too large."""
        grads = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return {name: grad / (scale or 1.0) for name, grad in grads.items() if grad is not None}

    def _squares(self) -> Tensor:
        """float64; summed over the ranks that share a network, the gradient's squared norm."""
        split: list[Tensor] = []
        whole: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            (split if self._split_over(name) else whole).append(parameter.grad)
        holders = self.shards.size() if self.shards else 1
        of_split, of_whole = (get_total_norm(grads).double() ** 2 for grads in (split, whole))
        return of_split + of_whole / holders

    def _exchange(self) -> Exchange | None:
        classes = self.config.model.classes
        if self.shards:
            return ShardExchange(self.shards, classes)
        columns = self.topology.column_group
        return ColumnExchange(columns, classes) if columns else None

    def _compiled(self) -> Callable[..., Tensor]:
        """The network compiled."""
        return torch.compile(self.network, backend=self.config.train.compile, dynamic=False)

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Windows, labels and slots of each; with shards, labels and slots of all ranks."""
        size, topology = self.config.train.batch, self.topology
        n, parts = len(batch.labels), self.config.train.micro_batches
        slots = torch.arange(size, device=topology.device).view(topology.replicas, n)
        labels = gathered(batch.labels, self.shards) if self.shards else batch.labels[None]
        if not self.shards:
            slots = slots[topology.replica, None]
        for part in range(parts):
            rows = slice(part * n // parts, (part + 1) * n // parts)
            yield batch.windows[rows], labels[:, rows].flatten(), slots[:, rows].flatten()

    @torch.no_grad()
    def predict(self, windows: Tensor) -> Tensor:
        self.model.eval()
        n = len(windows)
        if self.shards:  # all ranks need as many
            assert self.topology.control is not None
            most = largest(n, self.topology.control)
            windows = torch.cat([windows, windows.new_zeros(most - n, *windows.shape[1:])])
        with self._autocast():
            logits: Tensor = self.model(windows)
        if self.shards:
            logits = logits.unflatten(0, (-1, most))[self.topology.replica, :n]
        return logits if logits.dtype == torch.float64 else logits.float()

    def parameter(self, name: str) -> Tensor | None:
        return self._merged(name, self.model.get_parameter(name))

    def gradient(self, name: str) -> Tensor | None:
        return self._merged(name, self.gradients[name])

    def whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters = dict(self.model.named_parameters())
        return self._whole(parameters), self._whole(self.optimizer.tensors())

    def load(self, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
        check_fit(self.config, parameters, optimizer)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(parameters.rows(name, self._rows(name)))
        if optimizer is not None:
            names = optimizer.shapes()
            self.optimizer.load({name: optimizer.rows(name, self._rows(name)) for name in names})

    def replicated(self) -> dict[str, Tensor]:
        tensors = dict(self.model.named_parameters()) | self.optimizer.tensors()
        return {n: t for n, t in tensors.items() if not self.shards or not self._split_over(n)}

    def _whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        merged = {name: self._merged(name, part) for name, part in parts.items()}
        return {name: tensor for name, tensor in merged.items() if tensor is not None}

    def _merged(self, name: str, part: Tensor) -> Tensor | None:
        group = self._split_over(name)
        holders = dist.get_process_group_ranks(group) if group else [self.topology.global_rank]
        if holders[0] != 0:  # another replica's
            return None
        whole = merge(part, self._layer(name).whole[0], group)
        return None if whole is None else whole.contiguous()

    def _split_over(self, name: str) -> dist.ProcessGroup | None:
        """The ranks that hold rows of a parameter; None where it is whole here."""
        fully_connected = self._layer(name).name.startswith("fc")
        return self.shards if self.shards and fully_connected else self.topology.column_group

    def _whole_sums(self, sums: Tensor) -> Tensor:
        """(2, weights) sums over rows here, to sums over whole tensors."""
        group = self.shards or self.topology.column_group
        if group is None:
            return sums
        names = (name for name, _ in self.model.named_parameters() if name.endswith(".weight"))
        counted = [self._split_over(name) is not None or group.rank() == 0 for name in names]
        return summed(sums * torch.tensor(counted, device=sums.device), group)

    def _replicated(self, group: dist.ProcessGroup) -> nn.Module:
        """DDP, which sums gradients bucket by bucket during the backward.

        It orders its buckets after the first backward, and sums may depend on that order at three
        ranks or more. A backward that counts for nothing makes every run begin as any resumed one.
        """
        if self.shards:
            split = [name for name, _ in self.model.named_parameters() if self._split_over(name)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, split)
        network = DistributedDataParallel(
            self.model, process_group=group, init_sync=False, gradient_as_bucket_view=True
        )
        in_bf16 = self.config.layout.compress_gradients
        network.register_comm_hook(group, sum_bucket_in_bf16 if in_bf16 else sum_bucket)
        side, device = self.config.model.crop, self.topology.device
        dtype = DTYPES[self.config.train.precision]
        windows = torch.zeros(1, 3, side, side, dtype=dtype, device=device)
        slots = torch.zeros(group.size() if self.shards else 1, dtype=torch.int64, device=device)
        with self._autocast():
            network(windows, slots).sum().backward()
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        return network

    def _summing(self, now: bool) -> AbstractContextManager[object]:
        """Whether a backward ends with sums over replicas; the last of a step does."""
        if isinstance(self.network, DistributedDataParallel) and not now:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _layer(self, name: str) -> Layer:
        """The layer that a parameter (conv1.weight) or its state (KIND/conv1.weight) belongs to."""
        layer = self.model.get_submodule(name.rpartition("/")[2].partition(".")[0])
        assert isinstance(layer, Layer)
        return layer

    def _rows(self, name: str) -> slice:
        return self._layer(name).rows

    def _autocast(self) -> AbstractContextManager[object]:
        enabled = self.config.train.precision == "bf16"
        return torch.autocast(self.topology.device.type, torch.bfloat16, enabled=enabled)
