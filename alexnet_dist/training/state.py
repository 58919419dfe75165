"""Where a run stands (`Progress`), and the steps that are not accounted for yet."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alexnet_dist.config.from_data import NO_SPLIT
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import StepInput
from alexnet_dist.data.dataset import check_damaged
from alexnet_dist.data.split import Split
from alexnet_dist.engines.base import StepStats, on_host
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import NotFinite
from alexnet_dist.evaluation.results import Score
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.training.logs import log
from alexnet_dist.training.run_folder import RunFolder


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides tensors.

    Attributes:
        step: optimiser steps done.
        evaluated_step: the last step after which the network was evaluated.
        score: result of that evaluation.
        best_step: step with the lowest validation error so far; of equal ones, the lowest loss.
        best_error: that error, 1 − top-1.
        best_loss: its loss; None before the first evaluation.
        interval: sums over samples since the last log point: loss, top-1 and top-5 counts, gradient
            norm, number of samples.
        damaged: damaged samples of this epoch, which other samples stood in for.
        skipped: updates skipped because the loss or the gradient was not finite.
    """

    step: int = 0
    evaluated_step: int = 0
    score: Score | None = None
    best_step: int | None = None
    best_error: float = 2.0  # above any error
    best_loss: float | None = None
    interval: list[float] = field(default_factory=lambda: [0.0] * 5)
    damaged: int = 0
    skipped: int = 0

    def take_interval(self, rate: float) -> dict[str, float]:
        """Return what train/ shows of the interval since the last log point, by tag: means over
        samples, and counts. Start a new interval."""
        loss, top1, top5, norm, images = self.interval
        self.interval = [0.0] * 5
        of = images or math.nan  # NaN: every update was skipped
        return {
            "loss": loss / of, "top1": top1 / of, "top5": top5 / of, "gradient_norm": norm / of,
            "rate": rate, "damaged": float(self.damaged), "skipped": float(self.skipped),
        }  # fmt: skip

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Progress":
        """Restore the progress that a checkpoint holds; raises KeyError, TypeError or ValueError if
        it is not one."""
        score = state["score"] and Score(**state["score"])
        known = {f.name: state[f.name] for f in dataclasses.fields(cls) if f.name in state}
        made = cls(**known | {"score": score})
        numbers = [made.best_error, made.best_loss or 0.0, *made.interval]
        numbers += vars(score).values() if score else ()
        counts = [made.step, made.evaluated_step, made.damaged, made.skipped, made.best_step or 0]
        if len(made.interval) != 5 or not all(type(n) in (int, float) for n in numbers):
            raise ValueError("some of its numbers are not numbers")
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("some of its counts are not counts")
        return made

    def evaluation_due(self, config: Config, schedule: Schedule) -> bool:
        """Return whether an evaluation follows the step just made: every `evaluate.every_epochs`,
        and after the last step. One that would come shortly before the last is left out, unless the
        learning rate depends on it."""
        if config.data.eval_split == NO_SPLIT or self.evaluated_step == self.step:
            return False
        every = config.evaluate.every_epochs * schedule.steps_per_epoch
        left_out = schedule.last_step - self.step < every / 10 and config.schedule.kind != "plateau"
        at_end = self.step == schedule.last_step
        return at_end or (self._at_interval(config, schedule) and not left_out)

    def _at_interval(self, config: Config, schedule: Schedule) -> bool:
        """Return whether the step just made completes an interval of evaluate.every_epochs."""
        every = config.evaluate.every_epochs * schedule.steps_per_epoch
        return self.step // every > (self.step - 1) // every

    def finished(self, config: Config, schedule: Schedule) -> bool:
        """Return whether all steps are done, and the evaluation after them."""
        done = self.step == schedule.last_step
        return done and not self.evaluation_due(config, schedule)

    def observe(self, score: Score, config: Config, schedule: Schedule) -> None:
        """Take in an evaluation, which may be the best so far. The schedule sees its error, unless
        it was made only because the run ends: a longer run would not make it.

        Raises NotFinite if its loss is not.
        """
        if not math.isfinite(score.loss):
            raise NotFinite(
                f"the evaluation after step {self.step} gave a loss of {score.loss}: "
                "nothing has been saved since the last checkpoint. Lower schedule.rate, or warm "
                "up longer"
            )
        self.evaluated_step, self.score = self.step, score
        if self._at_interval(config, schedule):
            schedule.observe(1 - score.top1)
        error, loss = 1 - score.top1, score.loss
        tie = error == self.best_error and self.best_loss is not None and loss < self.best_loss
        if error < self.best_error or tie:
            self.best_step, self.best_error, self.best_loss = self.step, error, loss


class PendingSteps:
    """Steps that were launched, whose statistics are still on their way from the device.

    Args:
        progress: where the statistics are accounted for.
        split: the training split.
    """

    def __init__(
        self, progress: Progress, split: Split, folder: RunFolder, topology: Topology
    ) -> None:
        self._progress, self._config, self._split = progress, folder.config, split
        self._folder, self._topology = folder, topology
        self._steps: deque[tuple[int, StepInput, Callable[[], StepStats[float]]]] = deque()

    def add(self, step: int, batch: StepInput, stats: Tensor) -> None:
        """Start to copy a step's statistics (`StepStats`) to the host. Steps count from 1."""
        self._steps.append((step, batch, on_host(stats)))

    def read(self, all_but: int = 0) -> None:
        """Wait for the statistics of all steps but the newest `all_but`, and account for them.

        Raises:
            DatasetError: more samples of this epoch were damaged than the config allows.
            NotFinite: more than train.max_skipped updates were skipped.
        """
        while len(self._steps) > all_but:
            step, batch, stats = self._steps.popleft()
            self._account(step, batch, stats())

    def _account(self, step: int, batch: StepInput, stats: StepStats[float]) -> None:
        """Count a step's damaged samples, and add its statistics to the interval or, if its loss or
        gradient was not finite, keep its batch in the run folder."""
        progress, train = self._progress, self._config.train
        size = train.batch
        if (step - 1) * size % len(self._split) < size:  # the first step that begins in its epoch
            progress.damaged = 0
        progress.damaged += int(stats.damaged)
        check_damaged(self._config, self._split, progress.damaged)
        if not stats.failed:
            sums = stats.loss, stats.top1, stats.top5, stats.norm * size, size
            progress.interval = [a + b for a, b in zip(progress.interval, sums, strict=True)]
            return
        kept = self._folder.keep_batch(batch.batch(), step, self._topology.global_rank)
        what = (
            f"step {step}: the loss is {stats.loss / size:.4g} and the gradient norm "
            f"{stats.norm:.4g}: this update was skipped, and its batch is kept in "
            f"{kept.parent}"
        )
        if progress.skipped >= train.max_skipped:
            raise NotFinite(
                f"{what}; {progress.skipped} skipped before, "
                f"train.max_skipped={train.max_skipped}. Lower schedule.rate, warm up "
                "longer, or look at the data"
            )
        progress.skipped += 1
        log.warning(f"{what}; skipped {progress.skipped} of train.max_skipped={train.max_skipped}")
