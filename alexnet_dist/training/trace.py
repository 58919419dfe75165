"""`profile.steps`: some steps of a run under torch's profiler, for https://ui.perfetto.dev."""

import os
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from alexnet_dist.files import written_aside
from alexnet_dist.training.tolerance import WarnOnce


class Trace:
    """Profiles the steps `first` to `last` of this process, and writes what it saw.

    Args:
        steps: (first, last), both included; empty: nothing is profiled.
        folder: where trace-FIRST-LAST.json.gz is written.
        cuda: whether to profile the GPU too.
        report: called with the path and a table of the 30 costliest operations.
    """

    def __init__(
        self, steps: tuple[int, ...], folder: Path, cuda: bool, report: Callable[[Path, str], None]
    ) -> None:
        self._steps, self._folder, self._cuda, self._report = steps, folder, cuda, report
        self._profiler: profile | None = None

    def stepped(self, step: int) -> None:
        """Start or stop the profiler, if it is due after this step."""
        if not self._steps:
            return
        first, last = self._steps
        if step == first - 1:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints to the terminal
            self._profiler = profile(activities=kinds)
            self._profiler.start()
        if step == last:
            self.end()

    def end(self) -> None:
        """Stop the profiler if it runs, and write the trace; a failure is only a warning."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        first, last = self._steps
        path = self._folder / f"trace-{first}-{last}.json.gz"
        with WarnOnce(f"the trace {path}"):
            profiler.stop()
            with written_aside(path, durably=False) as aside:
                profiler.export_chrome_trace(str(aside))
            by = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
            self._report(path, profiler.key_averages().table(sort_by=by, row_limit=30))
