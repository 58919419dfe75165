"""What the loop knows of an engine, and what engines share: how a step is scored and judged."""

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch
from alexnet_dist.engines.optimizer import state_shapes
from alexnet_dist.errors import CheckpointError
from alexnet_dist.network.model import AlexNet, whole_shapes
from alexnet_dist.tensor_files import Shape, misfit

T = TypeVar("T")


class StepStats(NamedTuple, Generic[T]):
    """What a step tells, over all replicas. On a device it is a vector in this order, of which
    `AT.loss` is the first place.

    Attributes:
        loss: sum over the samples.
        top1: count of labels ranked first.
        top5: count of labels among the first five.
        failed: 0 if loss and gradient were finite, so that the update was made, else 1.
        damaged: samples that others stood in for.
        norm: of the whole network's gradient.
    """

    loss: T
    top1: T
    top5: T
    failed: T
    damaged: T
    norm: T


AT: StepStats[int] = StepStats(*range(6))


class WholeTensors(Protocol):
    """Whole tensors by name, any rows of which can be read: what a checkpoint offers. str() says
    where they are."""

    def shapes(self) -> Mapping[str, Shape]: ...

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows (dim 0); a scalar whole."""


class Engine(Protocol):
    """One layout's way to train and to predict."""

    model: AlexNet  # this rank's part of the network

    def train_step(
        self, batch: Batch, step: int, rate: float, keep_gradients: bool = False
    ) -> Tensor:
        """One update from this replica's samples of a step.

        Args:
            keep_gradients: for `gradient`, until the next step.

        Returns:
            `StepStats`, (6,) float64 on the device, alike on all ranks. Reading it waits for the
            device; a step later it is free.
        """

    def predict(self, windows: Tensor) -> Tensor:
        """(n, 3, crop, crop) to logits (n, classes), float32 or wider, without dropout."""

    def parameter(self, name: str) -> Tensor | None:
        """A whole parameter (conv1.weight, …) on rank 0's CPU; None elsewhere. Collective."""

    def gradient(self, name: str) -> Tensor | None:
        """A parameter's whole gradient of the last step, were they kept, on rank 0's CPU; None
        elsewhere, and where each rank has a part of all (ZeRO). Collective."""

    def whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and optimiser tensors, whole, on rank 0's CPU; less elsewhere. Collective."""

    def load(self, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
        """Take this rank's parts of whole tensors; raises CheckpointError, and takes nothing, where
        `check_fit` does."""

    def replicated(self) -> dict[str, Tensor]:
        """The tensors of which every replica has a copy that must be equal to the bit."""


def scored(logits: Tensor, labels: Tensor, fused: bool = False) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and the first three of `StepStats`; no host sync.

    Args:
        logits: (n, classes).
        labels: (n,) int64.
        fused: by a GPU's kernels.
    """
    if fused:
        from alexnet_dist.network.kernels import scores

        return scores.scored(logits, labels)
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    rank = label_ranks(logits.detach(), labels)
    counts = [loss.detach(), (rank < 1).sum(), (rank < 5).sum()]
    return loss, torch.stack([count.double() for count in counts])


def with_damaged(counts: Tensor, batch: Batch) -> Tensor:
    """`StepStats` of what `scored` counted and the damaged samples of the batch; the rest 0."""
    stats = F.pad(counts, (0, len(AT) - len(counts)))
    stats[AT.damaged] = batch.damaged.sum()
    return stats


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """() float64: of all of them together; of narrow ones the sums are float32's."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        of_dtype = [gradient for gradient in gradients if gradient.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        norms += torch._foreach_norm(of_dtype, dtype=wide)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms)).double() ** 2
    return total


def not_zero(scale: float | Tensor) -> float | Tensor:
    """What to divide by what was multiplied by a scale; 1 of a scale of 0."""
    return scale.where(scale != 0, 1.0) if isinstance(scale, Tensor) else scale or 1.0


def judged(stats: Tensor, scale: float | Tensor, fused: bool = False) -> Tensor:
    """Complete a step's numbers, in place; float32, not 0 where its update must not be made.

    Args:
        stats: `StepStats`, the norm still squared, and of gradients `scale` times too large.
        fused: by a GPU's kernel.
    """
    if fused:
        from alexnet_dist.network.kernels import scores

        if not isinstance(scale, Tensor):
            scale = stats.new_full((), scale)
        skip: Tensor = scores.judged(stats, scale)
        return skip
    stats[AT.norm] = stats[AT.norm].sqrt() / not_zero(scale)
    stats[AT.failed] = (~(stats[AT.loss] + stats[AT.norm]).isfinite()).to(stats.dtype)
    return stats[AT.failed].float()


def check_fit(config: Config, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
    """Raises CheckpointError unless these are the tensors of this network and its optimiser, by
    name and by whole shape: a rank reads rows of them, and would find rows in those of another."""
    shapes = whole_shapes(config.model)
    if wrong := misfit(parameters.shapes(), shapes):
        last = config.model.layer_names[-1]
        raise CheckpointError(
            f"{parameters} is of another network: {wrong}. Leave model.* as it was trained; to "
            f"fine-tune it as this one, train.init_from=CHECKPOINT 'train.init_new=[{last}]'"
        )
    if optimizer is None:
        return
    if wrong := misfit(optimizer.shapes(), state_shapes(config.optimizer, shapes)):
        raise CheckpointError(
            f"{optimizer} is of another optimiser or network: {wrong}. Leave optimizer.kind and "
            "model.* as it was trained, or give this run another name="
        )


def check_values(parameters: WholeTensors, optimizer: WholeTensors) -> None:
    """Raises CheckpointError where a tensor holds what no run writes, so that training on would go
    wrong in silence: all of them are read."""
    dtypes: dict[str, torch.dtype] = {}
    for file in (parameters, optimizer):
        for name in file.shapes():
            values = file.rows(name, slice(None))
            kind, _, of = name.rpartition("/")
            dtypes[name] = values.dtype
            wanted = torch.float32 if kind == "step" else dtypes.get(of, values.dtype)
            if values.dtype != wanted:
                wrong = f"is {values.dtype}, and a run writes {wanted}"
            elif not values.isfinite().all():
                wrong = "is not finite"
            elif kind in ("step", "exp_avg_sq") and (values < 0).any():
                wrong = "is negative"
            elif kind == "step" and (values != values.floor()).any():
                wrong = "is no whole number"
            else:
                continue
            raise CheckpointError(
                f"{file}: {name} {wrong}: restore this checkpoint, or move it out of the run "
                "folder to go on from the one before"
            )


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


def on_host(stats: Tensor) -> Callable[[], StepStats[float]]:
    """Begin a copy to the host; the call it gives waits for that copy alone, not for later work."""
    if stats.device.type == "cpu":
        return lambda: StepStats(*stats.tolist())
    host = torch.empty_like(stats, device="cpu", pin_memory=True)
    host.copy_(stats, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> StepStats[float]:
        copied.synchronize()
        return StepStats(*host.tolist())

    return read
