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
| step | all of it, where a GPU is given it as one CUDA graph; of ranks, what is no exchange |
| exchange | between columns, or parts of fully-connected layers; the wait for the others too |
| all_reduce | sums over ranks, their wait too: what the backward does not hide |
| log, evaluate, checkpoint | beside training |
| other | between these |

Inside a graph a span is marked by events that the graph records again at every replay. Only the
last replay before `take` can be read without waiting for each: others are taken to be like it.

Of gradients that are exchanged counts what the gradients of weights, computed beside, do not hide.
DeepSpeed's collectives are not seen: they count as backward and optimizer.
"""

import itertools
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
GraphMarks = list[tuple[torch.cuda.Event, str]]  # when, and what begins


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
        self._graph: GraphMarks | None = None  # that of a capture now
        self._replayed: GraphMarks = []  # the last graph's
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

    @contextmanager
    def captured(self, wanted: bool) -> Iterator[GraphMarks]:
        """Spans inside are a CUDA graph's, marked where they are wanted; what this gives is to be
        told at each replay."""
        marks: GraphMarks = []
        if not wanted or not self._open:
            yield marks
            return
        before, self._open, self._graph = self._open, ["other"], marks
        try:
            self._mark()
            yield marks
            self._mark()
        finally:
            self._open, self._graph = before, None

    def replayed(self, marks: GraphMarks) -> None:
        """A graph of these marks has been launched."""
        self._replayed = marks

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
        self._divide_step()
        took = Took(self._seconds, self._steps)
        self._seconds, self._steps = Counter(), []
        return took

    def _divide_step(self) -> None:
        """Share out the time of steps that were graphs as the last one's was."""
        marks, self._replayed = self._replayed, []
        if not marks:
            return
        last: Counter[str] = Counter()
        for (begin, name), (end, _) in itertools.pairwise(marks):
            last["step" if name == "other" else name] += begin.elapsed_time(end)
        whole = self._seconds.pop("step", 0.0)
        for name, ms in last.items():
            self._seconds[name] += whole * ms / last.total()  # type: ignore[assignment]

    def _mark(self, ends: bool = False) -> None:
        if self._graph is not None:
            event = torch.cuda.Event(enable_timing=True, external=True)
            event.record()
            self._graph.append((event, self._open[-1]))
            return
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
