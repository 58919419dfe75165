"""The paper's SGD, Adam and LARS, and learning-rate schedules.

A learning rate is a number, or a () float64 tensor on the GPU, so that a step captured as a CUDA
graph can be replayed at another rate.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_dist.config.schema import Config, OptimizerConfig, ScheduleConfig

# The state tensors that each `optimizer.kind` keeps of a parameter: of its shape, but `step` is a
# number.
STATE = {
    "sgd": ("momentum_buffer",),
    "lars": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
}
# The kinds that `momentum_form` applies to, and whose update on a GPU is our own kernel. Any other
# is given the learning rate in its groups, and updates by its `step`.
WITH_MOMENTUM = ("sgd", "lars")


def _uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimisers without its wrappers, which import torch's compiler to
    exempt the method from it: a second of every start."""
    bare: Callable[..., Any] = torch.no_grad()(inspect.unwrap(method))
    return bare


class _SGD(torch.optim.SGD):
    add_param_group = _uncompiled(torch.optim.SGD.add_param_group)
    step = _uncompiled(torch.optim.SGD.step)
    zero_grad = _uncompiled(torch.optim.SGD.zero_grad)


class Optimizer:
    """A fused optimiser that is given the learning rate of every step: torch's, or for SGD and LARS
    our own kernel, which also updates the narrow copies of the weights in the same pass.

    The paper's update (§5) is v ← 0.9·v − 0.0005·ε·w − ε·g; w ← w + v. With ε inside the
    velocity, torch's SGD at a learning rate of 1 computes exactly this, v being minus its momentum
    buffer, if the gradients are multiplied by ε. So the loss is scaled by ε (`loss_scale`), which
    costs nothing. Buffers need no rescaling when ε changes, and ε = 0 lets the velocity decay.

    Args:
        parameters: (name, parameter); all whose names do not end in .bias count as weights.
        sum_over_shards: turns sums over this rank's rows, (2, weights), into sums over whole
            tensors; for LARS.
        narrow: by parameter name, copies in the dtype that the network computes in, to be kept up
            to date; None: torch makes the update.
        fixed_scale: what the loss is scaled by instead of ε, which may be too small for fp16
            (`GRADIENT_SCALE`); the update divides the gradients by it. None: ε is not too small.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Iterable[tuple[str, nn.Parameter]],
        sum_over_shards: Callable[[Tensor], Tensor] = lambda sums: sums,
        narrow: Mapping[str, Tensor] | None = None,
        fixed_scale: float | None = None,
    ) -> None:
        self.config, self.sum_over_shards, self.narrow = config, sum_over_shards, narrow
        self.fixed_scale = fixed_scale
        named = list(parameters)
        groups = [
            {"params": [p for name, p in named if name.endswith(".bias") == biases]}
            for biases in (False, True)
        ]
        self.optimizer: torch.optim.Optimizer
        match config.kind:
            case "sgd" | "lars":
                self.optimizer = _SGD(groups, momentum=config.momentum, fused=True)
            case "adam":
                betas = (config.betas[0], config.betas[1])
                self.optimizer = torch.optim.Adam(
                    groups, betas=betas, eps=config.eps, fused=True, capturable=narrow is not None
                )
                # torch would warn of uncaptured steps; those before the capture are meant to be.
                self.optimizer._warned_capturable_if_run_uncaptured = True
        self.parameters = dict(named)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = initial_state(config, parameter)
        first = named[0][1]
        self.dtype, self.device = first.dtype, first.device
        self.fixed_rates, self.scaled_rates = self._rates()

    @property
    def velocity(self) -> bool:
        """Whether the learning rate is inside the momentum."""
        return self.config.kind in WITH_MOMENTUM and self.config.momentum_form == "velocity"

    def loss_scale(self, rate: float | Tensor) -> float | Tensor:
        """Return the factor by which the loss must be multiplied before its backward."""
        return self.fixed_scale or (rate if self.rate_in_loss else 1.0)

    @property
    def rate_in_loss(self) -> bool:
        """Whether gradients enter the velocity multiplied by the learning rate."""
        return self.velocity and self.config.kind == "sgd"

    def step(self, rate: float | Tensor, skip: Tensor) -> None:
        """Update the parameters, unless `skip` (() float32, on the device) is not 0."""
        if self.narrow is None or self.config.kind not in WITH_MOMENTUM:
            self.prepare(rate, skip)
            self.optimizer.step()
            self.narrow_all()
        else:
            self._update(rate, skip)
        self.optimizer.zero_grad(set_to_none=True)

    def prepare(self, rate: float | Tensor, skip: Tensor) -> None:
        """Do everything of a step but the update itself: set rates, decay and the skip flag."""
        if self.narrow is not None:
            rate = self._for_torch(rate)
        for group, biases in zip(self.optimizer.param_groups, (False, True), strict=True):
            decay = self.config.weight_decay * (self.config.bias_decay or not biases)
            bias_rate = self.config.bias_rate if biases else 1.0
            group["lr"] = bias_rate * (1.0 if self.velocity else rate)
            group["weight_decay"] = decay * (rate if self.velocity else 1.0)
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        if self.config.kind == "lars":
            self._scale_layers(rate)
        elif self.fixed_scale:  # torch divides gradients by it
            scale = skip.new_full((), self.fixed_scale) / (rate if self.rate_in_loss else 1.0)
            self.optimizer.grad_scale = scale  # type: ignore[attr-defined]

    def _for_torch(self, rate: float | Tensor) -> float | Tensor:
        """Return the learning rate as torch's update takes it where steps may be captured: on a GPU
        always a float32 tensor, so that captured and uncaptured steps are bit-identical."""
        if self.device.type == "cpu":
            return rate
        if isinstance(rate, Tensor):
            return rate.float()
        return torch.full((), rate, device=self.device)

    def narrow_all(self) -> None:
        """Copy the weights to their narrow copies."""
        with torch.no_grad():
            for name, copy in (self.narrow or {}).items():
                copy.copy_(self.parameters[name])

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Return the coefficients of `sgd_update` in two parts, each (2, 4) float64: rows weights
        and biases, columns learning rate, decay, momentum and the gradient's factor. The first part
        is fixed, the second is to be multiplied by the schedule's learning rate."""
        config, device = self.config, self.device
        # LARS has added the decay of weights to the gradient.
        weight_decay = 0.0 if config.kind == "lars" else config.weight_decay
        groups = ((1.0, weight_decay), (config.bias_rate, config.weight_decay * config.bias_decay))
        factor = 1.0 if config.kind == "lars" else 1 / (self.fixed_scale or 1.0)
        at_rate = factor if self.fixed_scale and self.rate_in_loss else 0.0
        if self.velocity:
            fixed = [[rate, 0.0, config.momentum, factor - at_rate] for rate, _ in groups]
            scaled = [[0.0, decay, 0.0, at_rate] for _, decay in groups]
        else:
            fixed = [[0.0, decay, config.momentum, factor] for _, decay in groups]
            scaled = [[rate, 0.0, 0.0, 0.0] for rate, _ in groups]
        wide = torch.float64
        return (
            torch.tensor(fixed, dtype=wide, device=device),
            torch.tensor(scaled, dtype=wide, device=device),
        )

    @torch.no_grad()
    def _update(self, rate: float | Tensor, skip: Tensor) -> None:
        """Make v ← momentum · v + (factor · g + decay · w), w ← w − rate · v, in one pass per
        parameter."""
        from alexnet_dist.network.kernels.update import sgd_update

        assert self.narrow is not None
        if self.config.kind == "lars":
            self._scale_layers(rate)
        weight_rates, bias_rates = (self.fixed_rates + self.scaled_rates * rate).to(self.dtype)
        for name, parameter in self.parameters.items():
            if parameter.grad is None:  # requires_grad=False
                continue
            velocity = self.optimizer.state[parameter]["momentum_buffer"]
            rates = bias_rates if name.endswith(".bias") else weight_rates
            sgd_update(parameter, velocity, parameter.grad, self.narrow.get(name), rates, skip)

    @torch.no_grad()
    def _scale_layers(self, rate: float | Tensor) -> None:
        """Apply LARS (You et al. 2017) to the gradients: those of weights become
        scale × λ × (g + decay × w), with a λ for each layer; those of biases scale × g."""
        scale = rate if self.velocity else 1.0
        weights, biases = (group["params"] for group in self.optimizer.param_groups)
        if self.fixed_scale:
            torch._foreach_div_([p.grad for p in (*weights, *biases)], self.fixed_scale)
        grads, decay = [w.grad for w in weights], self.config.weight_decay
        norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, grads)]
        w, g = self.sum_over_shards(torch.stack(norms).square()).sqrt()
        trust = torch.where((w > 0) & (g > 0), self.config.trust * w / (g + decay * w), 1.0)
        torch._foreach_add_(grads, weights, alpha=decay)
        torch._foreach_mul_(grads, list((scale * trust).unbind()))
        torch._foreach_mul_([b.grad for b in biases], scale)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0  # already in the gradient

    def tensors(self) -> dict[str, Tensor]:
        """Return the state tensors by `KIND/PARAMETER`: momentum_buffer/conv1.weight, …"""
        return {
            f"{kind}/{name}": value
            for name, parameter in self.parameters.items()
            for kind, value in self.optimizer.state[parameter].items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy in what `tensors` returned, of this rank's parts of the parameters; in place, where
        captured steps read it."""
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            self.optimizer.state[self.parameters[name]][kind].copy_(value)

    def state_tensors(self) -> list[Tensor]:
        """Return all tensors that a step changes: weights, narrow copies, optimiser state."""
        return [*self.parameters.values(), *(self.narrow or {}).values(), *self.tensors().values()]


def initial_state(config: OptimizerConfig, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's state before the first step. (torch would make it in that step, and not
    at all if it is skipped; but a checkpoint of step 0 must hold it.)"""
    return {
        kind: parameter.new_zeros((), dtype=torch.float32)
        if kind == "step"
        else torch.zeros_like(parameter)
        for kind in STATE[config.kind]
    }


def state_shapes(
    config: OptimizerConfig, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the optimiser's state tensors for parameters of these shapes, by
    `KIND/PARAMETER`."""
    return {
        f"{kind}/{name}": () if kind == "step" else shape
        for kind in STATE[config.kind]
        for name, shape in parameters.items()
    }


@dataclass
class Schedule:
    """The learning-rate schedule; its state is saved in checkpoints.

    Attributes:
        steps_per_epoch: may be fractional.
        last_step: number of steps in the whole training.
        best_error: plateau: lowest validation error so far.
        stalled: plateau: number of evaluations since then.
        drops: plateau: how often the learning rate has been lowered.
    """

    config: ScheduleConfig
    steps_per_epoch: float
    last_step: int
    best_error: float = 1.0
    stalled: int = 0
    drops: int = 0

    @classmethod
    def of(cls, config: Config, samples: int) -> "Schedule":
        per_epoch = samples / config.train.batch
        last_step = max(1, round(config.train.epochs * per_epoch))
        return cls(config.schedule, per_epoch, last_step)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config, epoch = self.config, step / self.steps_per_epoch
        warm = 1.0
        if epoch < config.warmup_epochs:
            warm = (step + 1) / (config.warmup_epochs * self.steps_per_epoch)
        match config.kind:
            case "steps":
                falls = sum(epoch >= at for at in config.at_epochs)
                shape = config.factor**falls
            case "plateau":
                shape = config.factor**self.drops
            case "polynomial":
                shape = (1 - step / self.last_step) ** config.power
        return float(config.rate * min(1.0, warm) * shape)

    def observe(self, error: float) -> None:
        """Record a validation error; plateau lowers the rate when it stops improving (paper §5)."""
        if error < self.best_error:
            self.best_error, self.stalled = error, 0
            return
        self.stalled += 1
        if self.stalled >= self.config.patience and self.drops < self.config.max_drops:
            self.stalled, self.drops = 0, self.drops + 1

    def state(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("best_error", "stalled", "drops")}

    def load(self, state: dict[str, Any]) -> None:
        self.best_error, self.stalled, self.drops = (
            float(state["best_error"]), int(state["stalled"]), int(state["drops"]),
        )  # fmt: skip
