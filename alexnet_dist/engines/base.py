"""The `Engine` interface that the training loop uses, and what engines share: losses, gradient
norms, the check for non-finite values, and checks of checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch, StepInput, to_host
from alexnet_dist.engines.optimizer import state_shapes
from alexnet_dist.errors import CheckpointError
from alexnet_dist.network.model import AlexNet, whole_shapes
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.tensor_files import Shape, misfit

T = TypeVar("T")


class StepStats(NamedTuple, Generic[T]):
    """The statistics of a step, over all replicas.

    On the device they are a vector in this order, of which `AT` holds the indices: stats[AT.loss].

    Attributes:
        loss: cross-entropy, summed over the samples.
        top1: number of samples whose label had the highest score.
        top5: number of samples whose label was among the five highest.
        failed: 0 if loss and gradient were finite, and the update was made; else 1.
        damaged: number of damaged samples, replaced by others.
        norm: norm of the whole network's gradient.
    """

    loss: T
    top1: T
    top5: T
    failed: T
    damaged: T
    norm: T


AT: StepStats[int] = StepStats(*range(6))


class WholeTensors(Protocol):
    """Whole tensors by name, of which any rows can be read; for example a checkpoint's. Errors name
    them by str(), which says where they are stored."""

    def shapes(self) -> Mapping[str, Shape]: ...

    def rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows (dim 0) of a tensor; a scalar is read whole."""


class Engine(Protocol):
    """Trains and predicts on one layout; each rank has one."""

    model: AlexNet  # this rank's part of the network
    topology: Topology  # this rank's place

    def train_step(
        self, batch: StepInput, step: int, rate: float, keep_gradients: bool = False
    ) -> Tensor:
        """Make one update from this replica's samples of a step.

        Args:
            rate: the learning rate.
            keep_gradients: keep them for `gradient`, until the next step.

        Returns:
            `StepStats`, (6,) float64 on the device, equal on all ranks. Reading it now would wait
            for the device; a step later it costs nothing.
        """

    def predict(self, windows: Tensor) -> Tensor:
        """Return the logits of windows, (n, 3, crop, crop) to (n, classes), float32 or float64,
        without dropout."""

    def parameter(self, name: str) -> Tensor | None:
        """Return a whole parameter (conv1.weight) on rank 0's CPU; None elsewhere. Collective."""

    def gradient(self, name: str) -> Tensor | None:
        """Return a parameter's whole gradient of the last step, which must have kept them, on rank
        0's CPU; None on other ranks, with ZeRO, and if it has none (requires_grad=False).
        Collective."""

    def whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return whole parameters and whole optimiser tensors, by name, on rank 0's CPU; fewer or
        none on other ranks. Collective."""

    def load(self, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
        """Load this rank's parts of whole tensors. Raises CheckpointError if they do not fit
        (`check_fit`), before anything is loaded."""

    def replicated(self) -> dict[str, Tensor]:
        """Return the tensors whose copies must be bit-identical on every replica."""


def loss_and_counts(logits: Tensor, labels: Tensor, fused: bool = False) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy, (), and loss, top1 and top5 of `StepStats`, (3,) float64;
    does not synchronise the host.

    Args:
        logits: (n, classes).
        labels: (n,) int64.
        fused: use the GPU kernels.
    """
    if fused:
        from alexnet_dist.network.kernels import scores

        return scores.loss_and_counts(logits, labels)
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    rank = label_ranks(logits.detach(), labels)
    counts = [loss.detach(), (rank < 1).sum(), (rank < 5).sum()]
    return loss, torch.stack([count.double() for count in counts])


def with_damaged(counts: Tensor, batch: Batch) -> Tensor:
    """Make `StepStats` of what `loss_and_counts` counted, and of the batch's damaged samples;
    `failed` and `norm` are 0."""
    stats = F.pad(counts, (0, len(AT) - len(counts)))
    stats[AT.damaged] = batch.damaged.sum()
    return stats


def squared_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the squared norm of all parameters' gradients together, () float64; bf16 and fp16 are
    summed in float32."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        of_dtype = [gradient for gradient in gradients if gradient.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        norms += torch._foreach_norm(of_dtype, dtype=wide)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms)).double() ** 2
    return total


def not_zero(scale: float | Tensor) -> float | Tensor:
    """Return the divisor that undoes a multiplication by `scale`; 1 if the scale is 0."""
    return scale.where(scale != 0, 1.0) if isinstance(scale, Tensor) else scale or 1.0


def skip_flag(stats: Tensor, scale: float | Tensor, fused: bool = False) -> Tensor:
    """Check that a step's loss and gradient are finite, and complete its statistics in place.

    Args:
        stats: `StepStats`, with the squared norm of gradients that are `scale` times too large.
        fused: use the GPU kernel.

    Returns:
        () float32: not 0 if the update must be skipped.
    """
    if fused:
        from alexnet_dist.network.kernels import scores

        if not isinstance(scale, Tensor):
            scale = stats.new_full((), scale)
        skip: Tensor = scores.skip_flag(stats, scale)
        return skip
    stats[AT.norm] = stats[AT.norm].sqrt() / not_zero(scale)
    stats[AT.failed] = (~(stats[AT.loss] + stats[AT.norm]).isfinite()).to(stats.dtype)
    return stats[AT.failed].float()


def check_fit(config: Config, parameters: WholeTensors, optimizer: WholeTensors | None) -> None:
    """Raise CheckpointError unless these tensors have the names and whole shapes that this network
    and its optimiser have. (A rank reads some rows of each, which a tensor of another shape may
    have too.)"""
    shapes = whole_shapes(config.model)
    if wrong := misfit(parameters.shapes(), shapes):
        last = config.model.layer_names[-1]
        raise CheckpointError(
            f"{parameters} is of another network: {wrong}. Leave model.* as it was trained, or "
            "fine-tune it as this network with train.init_from=CHECKPOINT "
            f"'train.init_new=[{last}]'"
        )
    if optimizer is None:
        return
    if wrong := misfit(optimizer.shapes(), state_shapes(config.optimizer, shapes)):
        raise CheckpointError(
            f"{optimizer} is of another optimiser or network: {wrong}. Leave optimizer.kind and "
            "model.* as it was trained, or give this run another name="
        )


def check_values(parameters: WholeTensors, optimizer: WholeTensors) -> None:
    """Raise CheckpointError if a tensor holds values that no run writes, with which training would
    silently go wrong. Reads all tensors."""
    dtypes: dict[str, torch.dtype] = {}
    for file in (parameters, optimizer):
        for name in file.shapes():
            values = file.rows(name, slice(None))
            kind, _, of = name.rpartition("/")
            dtypes[name] = values.dtype
            wanted = torch.float32 if kind == "step" else dtypes.get(of, values.dtype)
            if values.dtype != wanted:
                wrong = f"is {values.dtype}, but a run writes {wanted}"
            elif not values.isfinite().all():
                wrong = "is not finite"
            elif kind in ("step", "exp_avg_sq") and (values < 0).any():
                wrong = "is negative"
            elif kind == "step" and (values != values.floor()).any():
                wrong = "is not a whole number"
            else:
                continue
            raise CheckpointError(
                f"{file}: {name} {wrong}: restore this checkpoint, or move it out of the run "
                "folder to resume from the one before"
            )


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes are ranked before each label, (n,) int64; of equal scores the lower
    index comes first, and NaN comes last.

    Args:
        scores: (n, classes).
        labels: (n,) int64.
    """
    own = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    before = ~(scores <= own) | ((scores == own) & (index < labels[:, None]))
    return before.sum(1)


def on_host(stats: Tensor) -> Callable[[], StepStats[float]]:
    """Start a copy of a step's statistics to the host; the function returned waits for it."""
    read = to_host(stats)
    return lambda: StepStats(*read().tolist())
