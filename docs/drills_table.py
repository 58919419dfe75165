"""A row of the table that docs/drills.py prints."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
from small_runs import SAVE, Started, wait_until_gone


@dataclass
class Row:
    """What a drill measured.

    Attributes:
        lost: steps, per trial.
        gone_s: seconds until every process of a broken run was gone, per trial.
        left: processes that were not gone.
        identical: whether the final state is that of an undisturbed run; None: not compared.
        holds: whether what only this drill checks is as it should be.
    """

    drill: str
    layout: str = ""
    trials: int = 0
    recovered: int = 0
    lost: list[int] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)
    left: int = 0
    identical: bool | None = None
    holds: bool = True
    note: str = ""

    def wait_until_gone(self, run: Started, processes: Sequence[psutil.Process]) -> None:
        """Wait until every process of a broken run is gone; count those that are not."""
        seconds, left = wait_until_gone(run, processes)
        self.gone_s.append(seconds)
        self.left += left

    def line(self) -> str:
        """Return the row as it is printed."""
        lost = f"{max(self.lost)}" if self.lost else "-"
        gone = f"{max(self.gone_s):.1f}" if self.gone_s else "-"
        same = {None: "-", True: "yes", False: "NO"}[self.identical]
        return (
            f"{self.drill:22}{self.layout:20}{self.trials:7}{self.recovered:10}{lost:>10}{gone:>12}"
            f"{self.left:6}{same:>11}{'yes' if self.sound else 'NO':>7}  {self.note}"
        )

    @property
    def sound(self) -> bool:
        """Whether everything is as it should be."""
        within = max(self.lost, default=0) <= 2 * SAVE and max(self.gone_s, default=0) <= 10
        whole = self.recovered == self.trials > 0 and self.left == 0
        return self.holds and within and whole and self.identical is not False


HEADING = (
    f"{'drill':22}{'layout':20}{'trials':>7}{'recovered':>10}{'most lost':>10}{'gone in, s':>12}"
    f"{'left':>6}{'identical':>11}{'holds':>7}"
)
