"""What rank 0 shows while a run trains: a line for each log point, in place on a terminal."""

import contextlib
import sys
from collections.abc import Mapping

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from alexnet_dist.errors import in_hours
from alexnet_dist.evaluation.results import Score
from alexnet_dist.training.bottleneck import STRAGGLES
from alexnet_dist.training.logs import log
from alexnet_dist.training.metrics_file import accuracies


class ProgressBar:
    """The lines of a run, from `step` on.

    Args:
        every_steps: steps from one log point to the next.
        classes: number of classes, of which accuracies depend on the first five.
    """

    def __init__(self, step: int, last_step: int, every_steps: int, classes: int) -> None:
        self._last_step, self._classes = last_step, classes
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=last_step, initial=step, disable=not self._terminal,
            desc=f"step {step}/{last_step}: numbers every {every_steps} steps",
            bar_format="{desc} {bar:20}",
        )  # fmt: skip

    def trained(
        self, step: int, epoch: float, values: Mapping[str, float], speed: Mapping[str, float],
        left_s: float,
    ) -> None:  # fmt: skip
        """Show a log point.

        Args:
            values: by their tags under train/.
            speed: by their tags under speed/; empty if it is not known yet.
            left_s: seconds of training left, if the speed is known.
        """
        parts = [f"epoch {epoch:.2f}", f"step {step}/{self._last_step}"]
        if speed:  # early, since narrow terminals cut the line off
            parts += [f"ETA {in_hours(left_s)}"]
        parts += [f"loss {values['loss']:.4f}", *self._accuracies(values, 1)]
        parts += [f"rate {values['rate']:.2e}"]
        if speed:
            digits = 0 if speed["images_per_s"] >= 10 else 1
            parts += [f"{speed['images_per_s']:.{digits}f} images/s"]
            parts += [f"data wait {speed['data_wait']:.0%}"]
            parts += [f"MFU {speed['mfu']:.0%}"] if "mfu" in speed else []
        if values["damaged"]:
            parts += [f"damaged {values['damaged']:.0f}"]
        if speed and speed["straggler"] >= STRAGGLES:
            rank, times = speed["straggler_rank"], speed["straggler"]
            parts += [f"rank {rank:.0f} takes {times:.1f} times the median"]
        line = "  ".join(parts)
        if self._terminal:
            with contextlib.suppress(OSError):  # it was closed
                self._bar.set_description_str(line, refresh=False)
                self._bar.update(step - self._bar.n)
        else:
            log.info(line)

    def evaluated(self, step: int, epoch: float, score: Score) -> None:
        """Show an evaluation."""
        say(
            f"epoch {epoch:.2f}  step {step}/{self._last_step}  evaluation: "
            f"{'  '.join(self._accuracies(score.tags(), 2))}  loss {score.loss:.4f}  "
            f"({score.correct1} of {score.samples} right)"
        )

    def _accuracies(self, values: Mapping[str, float], digits: int) -> list[str]:
        named = accuracies(self._classes).items()
        return [f"{name} {values[top]:.{digits}%}" for top, name in named]

    def close(self) -> None:
        """Leave the last line where it is."""
        with contextlib.suppress(OSError):
            self._bar.close()


def say(line: str) -> None:
    """Log a line; a progress bar is drawn again below it."""
    with logging_redirect_tqdm():
        log.info(line)
