"""How long this rank waits for others: the time inside collectives, on the device's own clock.

What is left of a step is its own work, and the rank that needs longest for that holds up the rest.
A collective's own transfer counts as waiting. DeepSpeed's collectives are not seen.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waits:
    """Adds up spans; nothing here waits for the device.

    On a GPU a span is a pair of events on its stream, read when what came after them is done.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._open: float | torch.cuda.Event | None = None

    @contextmanager
    def counted(self, cuda: bool) -> Iterator[None]:
        """What happens inside is waiting."""
        begin = _now(cuda)
        yield
        self._add(begin, _now(cuda))

    def begin(self, cuda: bool) -> None:
        """From now until `end`, this rank waits."""
        self._open = _now(cuda)

    def end(self) -> None:
        if self._open is not None:
            self._add(self._open, _now(not isinstance(self._open, float)))
            self._open = None

    def take(self) -> float:
        """Seconds since it was last called; everything counted is over by now."""
        seconds = float(self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1e3)
        self._seconds, self._events = 0.0, []
        return seconds

    def _add(self, begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> None:
        if isinstance(begin, float):
            assert isinstance(end, float)
            self._seconds += end - begin
        else:
            assert not isinstance(end, float)
            self._events.append((begin, end))


def _now(cuda: bool) -> float | torch.cuda.Event:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


WAITS = Waits()  # of this process
