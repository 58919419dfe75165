"""Where a process's time goes: named spans, on the clock of the device that computes.

Time counts for the innermost span that is open. On a CPU a mark is a reading of the clock; on a GPU
an event on its stream, read when the device has passed it, so that nothing waits for it. There a
span is what the stream did and waited for: `data` is how long the device stood still for the next
batch, `other` how long it stood still for Python.

| span | what |
|---|---|
| data | waiting for the pipeline |
| to_device | bytes on their way to the GPU |
| windows | windows made of them: mirrored, the mean off, lit, scaled |
| forward, backward, optimizer | the step's arithmetic |
| step | all of it, where a GPU is given it as one CUDA graph |
| exchange | between columns, or parts of fully-connected layers; the wait for the others too |
| all_reduce | sums over ranks, their wait too: what the backward does not hide |
| log, evaluate, checkpoint | beside training |
| other | between these |

DeepSpeed's collectives are not seen: they count as backward and optimizer.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SPANS = (
    "data", "to_device", "windows", "forward", "backward", "optimizer", "step", "exchange",
    "all_reduce", "log", "evaluate", "checkpoint", "other",
)  # fmt: skip
APART = ("log", "evaluate", "checkpoint")  # no part of a step
_CLOSED = (*APART, "step")  # spans inside count for these
_Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Took:
    """Times since they were last taken.

    Attributes:
        seconds: by span.
        steps: of each step, less what is apart from it, seconds.
    """

    seconds: Counter[str]
    steps: list[float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        return self.total - sum(self.seconds[name] for name in APART)

    @property
    def own(self) -> float:
        """Training less the time inside collectives: this rank's own work."""
        return self.training - self.seconds["exchange"] - self.seconds["all_reduce"]

    def shares(self) -> dict[str, float]:
        """Of all the time."""
        return {name: self.seconds[name] / max(self.total, 1e-9) for name in SPANS}


class Timeline:
    """Spans of this process; it costs nothing until it is started."""

    def __init__(self) -> None:
        self._reset([])

    def _reset(self, spans: list[str], cuda: bool = False) -> None:
        self._open, self._cuda = spans, cuda  # no span: not started
        self._marks: deque[tuple[_Mark, str, bool]] = deque()  # when, what begins, ends a step
        self._free: list[torch.cuda.Event] = []
        self._seconds: Counter[str] = Counter()
        self._steps: list[float] = []
        self._step_s = 0.0

    def start(self, cuda: bool) -> None:
        """Begin anew; `cuda`: by events on the current stream."""
        self._reset(["other"], cuda)
        self._mark()

    def stop(self) -> None:
        self._reset([])

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What happens inside, but for inner spans, counts for this one."""
        depth = len(self._open)
        self.enter(name)
        try:
            yield
        finally:
            if len(self._open) > depth > 0:
                del self._open[depth:]
                self._mark()

    def enter(self, name: str) -> None:
        """What happens from now to the end of the span around this counts for this one."""
        if self._open and self._open[-1] not in _CLOSED:
            self._open.append(name)
            self._mark()

    def step(self) -> None:
        """A step ends."""
        if self._open:
            self._mark(ends=True)
            self._read()

    def take(self) -> Took:
        """Times since it was last called. To be called where the host has just waited for the
        device anyway: so it waits for what little was marked since."""
        self._mark()
        last = self._marks[-1][0]
        if not isinstance(last, float):
            last.synchronize()
        self._read()
        took = Took(self._seconds, self._steps)
        self._seconds, self._steps = Counter(), []
        return took

    def _mark(self, ends: bool = False) -> None:
        now: _Mark = time.perf_counter()
        if self._cuda:
            now = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((now, self._open[-1], ends))

    def _read(self) -> None:
        """Add up to the newest mark that the device has passed."""
        while len(self._marks) > 1:
            (begin, name, _), (end, _, ends) = self._marks[0], self._marks[1]
            if isinstance(begin, float) or isinstance(end, float):
                seconds = float(end) - float(begin)  # type: ignore[arg-type]
            elif end.query():
                seconds = begin.elapsed_time(end) / 1e3
                self._free.append(begin)
            else:
                return
            self._marks.popleft()
            self._seconds[name] += seconds  # type: ignore[assignment]
            self._step_s += 0.0 if name in APART else seconds
            if ends:
                self._steps.append(self._step_s)
                self._step_s = 0.0


TIMELINE = Timeline()  # of this process
