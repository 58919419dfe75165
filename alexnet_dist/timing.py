"""Measure where a process's time goes: its start in stages, by the clock, and then its steps in
named spans, by the clock of the device that computes.

Time counts towards the innermost open span. On a CPU a mark is a reading of the clock. On a GPU it
is an event on the stream, read once the device has passed it, so that nothing waits for it. There a
span is what the stream did and waited for: `data` is how long the device was idle for lack of the
next batch, `other` how long it was idle because of Python.

| span | what |
|---|---|
| data | waiting for the pipeline |
| to_device | copying bytes to the GPU |
| windows | preprocessing: mirroring, subtracting the mean, lighting, scaling |
| forward, backward, optimizer | the step's arithmetic |
| step | all of that, where a GPU runs it as one CUDA graph; with several ranks, without exchanges |
| exchange | exchanges between columns, or of sharded fully-connected layers, including waiting |
| all_reduce | sums over ranks, including waiting, as far as the backward does not hide them |
| log, evaluate, checkpoint | besides training |
| other | anything else |

Inside a CUDA graph, spans are marked by events that the graph records again at every replay. Only
the last replay before `take` can be read without waiting for each one; the others are assumed to
have taken the same.

Of an exchange of gradients, only what the computation of weight gradients does not hide counts.
DeepSpeed's collectives are not visible: they count as backward and optimizer.
"""

import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SPANS = (
    "data", "to_device", "windows", "forward", "backward", "optimizer", "step", "exchange",
    "all_reduce", "log", "evaluate", "checkpoint", "other",
)  # fmt: skip
APART = ("log", "evaluate", "checkpoint")  # not part of a step
_CLOSED = (*APART, "step")  # inner spans count towards these
_Mark = float | torch.cuda.Event
GraphMarks = list[tuple[torch.cuda.Event, str]]  # a time, and the span that begins


def now() -> float:
    """Return seconds since this machine was booted: a clock that its processes share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_began() -> float:
    """Return when this process was started, as `now` counts."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


class Start:
    """How long a run takes to start, in stages.

    Attributes:
        began: when the run was asked for, as `now` counts.
        stages: seconds by name, in order.
    """

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, at: float) -> None:
        """Note that a run was asked for, as `now` counts."""
        self.began = self._last = at
        self.stages: dict[str, float] = {}

    def reached(self, stage: str, at: float | None = None) -> None:
        """Note that a stage ends, now or when `at` says."""
        at = now() if at is None else at
        self.stages[stage], self._last = at - self._last, at


START = Start()  # of this process


@dataclass(frozen=True)
class Took:
    """Times since they were last taken.

    Attributes:
        seconds: time of each span.
        steps: time of each step, without the spans in APART, seconds.
    """

    seconds: Counter[str]
    steps: list[float]

    @property
    def total(self) -> float:
        """All time, seconds."""
        return sum(self.seconds.values())

    @property
    def training(self) -> float:
        """Time of training steps, seconds."""
        return self.total - sum(self.seconds[name] for name in APART)

    @property
    def own(self) -> float:
        """This rank's own work: time of training steps outside collectives, seconds."""
        return self.training - self.seconds["exchange"] - self.seconds["all_reduce"]

    def shares(self) -> dict[str, float]:
        """Return each span's share of all time."""
        return {name: self.seconds[name] / max(self.total, 1e-9) for name in SPANS}


class Timeline:
    """The spans of this process. It costs nothing until it is started."""

    def __init__(self) -> None:
        self._reset([])

    def _reset(self, spans: list[str], cuda: bool = False) -> None:
        self._open, self._cuda = spans, cuda  # open spans, innermost last; none: not started
        self._graph: GraphMarks | None = None  # marks of the graph that is being captured
        self._replayed: GraphMarks = []  # marks of the last graph that was replayed
        # A time, the span that begins, and whether a step ends.
        self._marks: deque[tuple[_Mark, str, bool]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._seconds: Counter[str] = Counter()
        self._steps: list[float] = []
        self._step_s = 0.0

    def start(self, cuda: bool) -> None:
        """Start from zero.

        Args:
            cuda: measure by events on the current stream.
        """
        self._reset(["other"], cuda)
        self._mark()

    def stop(self) -> None:
        """Stop, and forget all times."""
        self._reset([])

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside, except that of inner spans, towards this span."""
        depth = len(self._open)
        self.enter(name)
        try:
            yield
        finally:
            if len(self._open) > depth > 0:
                del self._open[depth:]
                self._mark()

    def enter(self, name: str) -> None:
        """Count the time from now to the end of the surrounding span towards this span."""
        if self._open and self._open[-1] not in _CLOSED:
            self._open.append(name)
            self._mark()

    @contextmanager
    def captured(self, wanted: bool) -> Iterator[GraphMarks]:
        """Mark the spans of a CUDA graph that is captured inside.

        Args:
            wanted: whether to mark them.

        Yields:
            The marks, to be passed to `replayed` at each replay.
        """
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
        """Note that a graph with these marks has been launched."""
        self._replayed = marks

    def step(self) -> None:
        """Mark the end of a step."""
        if self._open:
            self._mark(ends=True)
            self._read()

    def take(self) -> Took:
        """Return the times since the last call. It waits for the device, and so belongs where the
        host has just waited for it anyway."""
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
        """Divide the time of steps that were graphs among spans, as the last replay's was."""
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
        """Mark that the innermost span begins now, and maybe that a step ends."""
        if self._graph is not None:
            event = torch.cuda.Event(enable_timing=True, external=True)
            event.record()
            self._graph.append((event, self._open[-1]))
            return
        at: _Mark = time.perf_counter()
        if self._cuda:
            at = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
            at.record()
        self._marks.append((at, self._open[-1], ends))

    def _read(self) -> None:
        """Add up times up to the newest mark that the device has passed."""
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


TIMELINE = Timeline()  # the process's only one
