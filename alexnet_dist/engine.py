"""Engines: how one step is computed on a layout. `train.py` knows the protocol only."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_dist.columns import ColumnExchange, merge
from alexnet_dist.config import Config
from alexnet_dist.data.pipeline import Batch
from alexnet_dist.model import AlexNet, Layer
from alexnet_dist.optim import Optimizer
from alexnet_dist.shares import share
from alexnet_dist.topology import Topology

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class WholeTensors(Protocol):
    """Whole tensors by name, any rows of which can be read: what a checkpoint offers."""

    def keys(self) -> list[str]: ...

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows (dim 0); a scalar whole."""


class Engine(Protocol):
    """One layout's way to train and to predict."""

    def train_step(self, batch: Batch, step: int, rate: float) -> Tensor:
        """One update from this replica's samples of a step.

        Returns:
            (5,) float64 on the device, over all replicas: sum of losses, count of labels ranked
            first, count among the first five, 0 if the loss was finite, so that the update was
            made, else not 0, and count of damaged samples. Reading it waits for the device; a step
            later it is free.
        """

    def predict(self, windows: Tensor) -> Tensor:
        """(n, 3, crop, crop) to logits (n, classes), float32 or wider, without dropout."""

    def parameter(self, name: str) -> Tensor | None:
        """A whole parameter (conv1.weight, …) on rank 0's CPU; None elsewhere. Collective."""

    def whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and optimiser tensors, whole, on rank 0's CPU; less elsewhere. Collective."""

    def load(self, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
        """Take this rank's parts of whole tensors."""


def make_engine(config: Config, topology: Topology) -> Engine:
    return ColumnEngine(config, topology)


class ColumnEngine:
    """All columns here, or one column on each rank of a replica; one replica."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config, self.topology = config, topology
        group = topology.column_group
        self.model = AlexNet(
            config.model,
            config.seed,
            columns_here=[topology.column] if group else None,
            exchange=ColumnExchange(group, config.model.classes) if group else None,
            dtype=torch.float64 if config.train.precision == "fp64" else torch.float32,
        ).to(topology.device)
        self.optimizer = Optimizer(config.optimizer, self.model.named_parameters())

    def train_step(self, batch: Batch, step: int, rate: float) -> Tensor:
        self.model.train()
        size, parts = self.config.train.batch, self.config.train.micro_batches
        n = len(batch.labels)
        mine = share(size, self.topology.replica, self.topology.replicas)
        slots = torch.arange(mine.start, mine.stop, device=self.topology.device)
        scale = self.optimizer.loss_scale(rate) / size
        stats = torch.zeros(5, dtype=torch.float64, device=self.topology.device)
        for part in range(parts):
            rows = slice(part * n // parts, (part + 1) * n // parts)
            with self._autocast():
                logits = self.model(batch.windows[rows], slots[rows], step)
            loss, counts = scored(logits, batch.labels[rows])
            (loss * scale).backward()
            stats[:3] += counts
        stats[3] = (~stats[0].isfinite()).to(stats.dtype)
        stats[4] = batch.damaged.sum()
        self.optimizer.step(rate, skip=stats[3].float())
        return stats

    @torch.no_grad()
    def predict(self, windows: Tensor) -> Tensor:
        self.model.eval()
        with self._autocast():
            logits: Tensor = self.model(windows)
        return logits if logits.dtype == torch.float64 else logits.float()

    def parameter(self, name: str) -> Tensor | None:
        return self._merged(name, self.model.get_parameter(name))

    def whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters = dict(self.model.named_parameters())
        return self._whole(parameters), self._whole(self.optimizer.tensors())

    def load(self, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(parameters.rows(name, self._rows(name)))
        if optimizer is not None:
            names = optimizer.keys()
            self.optimizer.load({name: optimizer.rows(name, self._rows(name)) for name in names})

    def _whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        merged = {name: self._merged(name, part) for name, part in parts.items()}
        return {name: tensor for name, tensor in merged.items() if tensor is not None}

    def _merged(self, name: str, part: Tensor) -> Tensor | None:
        whole = merge(part, self._layer(name).whole[0], self.topology.column_group)
        return None if whole is None else whole.contiguous()

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


def scored(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and (3,) float64: it, top-1 and top-5 counts; no host sync.

    Args:
        logits: (n, classes).
        labels: (n,) int64.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    rank = label_ranks(logits.detach(), labels)
    counts = [loss.detach(), (rank < 1).sum(), (rank < 5).sum()]
    return loss, torch.stack([count.double() for count in counts])


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """(n,) how many classes are ranked before each label: ties to the lower index, NaN last.

    Args:
        scores: (n, classes).
        labels: (n,) int64.
    """
    own = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    before = ~(scores <= own) | ((scores == own) & (index < labels[:, None]))
    return before.sum(1)


def on_host(stats: Tensor) -> Callable[[], list[float]]:
    """Begin a copy to the host; the call it gives waits for that copy alone, not for later work."""
    if stats.device.type == "cpu":
        return stats.tolist
    host = torch.empty_like(stats, device="cpu", pin_memory=True)
    host.copy_(stats, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read
