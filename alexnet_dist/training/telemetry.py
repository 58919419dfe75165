"""What a run reports: a progress line, metrics.jsonl, TensorBoard, loggers. Only rank 0 writes.

docs/tensorboard.md lists every tag. Values of train/ and eval/ repeat to the bit when a run is
repeated; times and memory do not, and are in lines of their own (`"kind": "speed"`, `"start"`).
"""

import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from alexnet_dist.data.dataset import Dataset
from alexnet_dist.engines.base import Engine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.evaluation.results import Score
from alexnet_dist.network.flops import training_flops
from alexnet_dist.parallel.device import machine, peak_flops
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.plotting import MOST_CLASSES, chroma
from alexnet_dist.timing import SPANS, START, TIMELINE, Took, now
from alexnet_dist.training import loggers, metrics_file
from alexnet_dist.training.bottleneck import verdict
from alexnet_dist.training.logs import quarantine
from alexnet_dist.training.progress_bar import ProgressBar, say
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Progress
from alexnet_dist.training.tensorboard import Board
from alexnet_dist.training.trace import Trace

_MOST_RANKS = 64  # whose own times are written
_SHORT_S = 0.1  # a stage of the start that takes less is not worth a word


class Telemetry:
    """Collects and writes the metrics of one run; silent on all ranks but 0.

    Each rank appends the samples that it found damaged to quarantine.jsonl.

    Args:
        progress: where the run continues; later points of an earlier attempt are removed.
    """

    def __init__(
        self, folder: RunFolder, topology: Topology, dataset: Dataset, schedule: Schedule,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._config = config = folder.config
        self._folder, self._topology = folder, topology
        self._schedule = schedule
        self._step = step = progress.step  # of the last log point
        self._flops = training_flops(config)  # per image
        train_split = dataset.splits[config.data.train_split]
        self._within_canvas = train_split.within(config.data.canvas)
        self._since_evaluation: Counter[str] = Counter()
        self._slowest = 1.0, 0  # ratio to the median rank's own work, rank
        self._mfu: float | None = None
        self._on = {
            "device": machine()["gpu" if self._cuda else "cpu"],
            "ranks": topology.world_size,
            "cores": topology.world_size * topology.cores,
        }
        self._board = Board(config, schedule, topology, dataset, step)
        self._loggers: list[loggers.LoggerThread] = []
        classes, wanted = config.model.classes, config.log.pictures and loggers.pictured(config)
        self._draws_confusion = wanted and classes <= MOST_CLASSES
        self._undrawn: tuple[int, Tensor | None] | None = None  # step, and confusion
        if topology.is_rank_0:
            path = folder.path / "metrics.jsonl"
            before = metrics_file.cut(path, step, progress.evaluated_step)
            self._metrics = metrics_file.Writer(path)
            self._loggers = loggers.start(config, metrics_file.rows(before, classes))
            self._bar = ProgressBar(step, schedule.last_step, config.log.every_steps, classes)
        profiled = tuple(config.profile.steps) if topology.is_rank_0 else ()
        self._trace = Trace(profiled, folder.path, self._cuda, self._traced)
        self._trace.stepped(step)
        self._starting = True  # until the first step is done
        START.reached("logs")
        TIMELINE.start(self._cuda)
        # Last, so that where one of the above fails no handler is left in this process.
        self._quarantine = quarantine(folder.path / "quarantine.jsonl")

    @property
    def _cuda(self) -> bool:
        return self._topology.device.type == "cuda"

    def histograms_due(self, step: int) -> bool:
        """Return whether this step's gradients are to be kept for histograms."""
        every = self._config.log.histograms_every_steps
        return "tensorboard" in self._config.log.to and every > 0 and step % every == 0

    def stepped(self, step: int, engine: Engine) -> None:
        """Note that a step has been made; draw histograms where they are due. Collective."""
        TIMELINE.step()
        if self._starting:
            self._started(step)
        with TIMELINE.span("log"):
            self._trace.stepped(step)
            if self.histograms_due(step):
                self._board.histograms(engine, step)

    def _started(self, step: int) -> None:
        """Write how long the start took, at the end of the first step. That step counts for the
        start, not for the speed: it builds kernels, and waits until images are decoded."""
        took = TIMELINE.take()
        self._step, self._starting = step, False
        at = now() - took.total
        for stage, span in {"evaluation": "evaluate", "first batch": "data"}.items():
            if seconds := took.seconds[span]:  # evaluation: one that a signal had interrupted
                START.reached(stage, at := at + seconds)
        START.reached("first step")
        if not self._topology.is_rank_0:
            return
        stages, total_s = START.stages, sum(START.stages.values())
        self._metrics.append(
            {"kind": "start", "step": step, "total_s": total_s, "stages_s": stages}
        )
        words = [f"{stage} {stages[stage]:.1f}" for stage in stages if stages[stage] >= _SHORT_S]
        of_which = f": {', '.join(words)}" if words else ""
        say(f"first step after {total_s:.1f} s{of_which}")

    def _epoch(self, step: int) -> float:
        return step / self._schedule.steps_per_epoch

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Write a training point: `values` by their tags under train/, and the times, speeds and
        memory of the interval since the last one, or since the first step. Collective."""
        took = TIMELINE.take()
        with TIMELINE.span("log"):
            self._train(step, self._epoch(step), values, took)

    def _train(self, step: int, epoch: float, values: Mapping[str, float], took: Took) -> None:
        steps, self._step = step - self._step, step
        point = {"kind": "train", "step": step, "epoch": epoch, **values}
        if not steps:  # the first step, whose time was that of the start
            if self._topology.is_rank_0:
                self._write(point)
                self._bar.trained(step, epoch, values, {}, 0.0)
            return
        measured = self._topology.gather(*_measured(took, self._cuda))
        if not self._topology.is_rank_0:
            return
        own, waited, p50, p95, host, device = map(list, zip(*measured, strict=True))

        # A step is as slow as the slowest rank, so each number is the largest of all ranks'.
        images_per_s = steps * self._config.train.batch / took.training
        speed = {"images_per_s": images_per_s, "data_wait": max(waited)}
        speed |= {"step_p50_s": max(p50), "step_p95_s": max(p95)}
        speed |= _straggler(own) | {"goodput": self._folder.goodput()}
        self._mfu = self._model_flops_utilisation(images_per_s)
        if self._mfu:
            speed["mfu"] = self._mfu
        memory = {"host_gb": max(host)} | ({"device_gb": max(device)} if self._cuda else {})

        # What holds the run up, in words.
        shares = took.shares()
        self._since_evaluation += took.seconds
        self._slowest = speed["straggler"], int(speed["straggler_rank"])
        words = self._verdict(shares | {"data": speed["data_wait"]})
        times = {"own_s": own, "step_p50_s": p50, "step_p95_s": p95}
        ranks = {name: values[:_MOST_RANKS] for name, values in times.items()}
        self._write(
            point,
            {"kind": "speed", "step": step, **speed, "time": shares, "memory": memory,
             "ranks": ranks, "on": self._on, "verdict": words},
        )  # fmt: skip
        left_s = (self._schedule.last_step - step) * took.training / steps
        self._bar.trained(step, epoch, values, speed, left_s)

    def new_confusion(self) -> Tensor | None:
        """Return (classes, classes) int64 counts of 0 for an evaluation; None if none are drawn."""
        n = self._config.model.classes
        return torch.zeros(n, n, dtype=torch.int64) if self._draws_confusion else None

    def evaluation(self, step: int, score: Score, engine: Engine, confusion: Tensor | None) -> None:
        """Write an evaluation point, and say where the time went since the last. Collective."""
        self._undrawn = step, confusion
        kernels, values, epoch = engine.parameter("conv1.weight"), score.tags(), self._epoch(step)
        if kernels is not None:
            colours = enumerate(chroma(kernels, self._config.model.columns), start=1)
            values |= {f"chroma_{column}": value for column, value in colours}
            self._write({"kind": "eval", "step": step, "epoch": epoch, **values})
            self._bar.evaluated(step, epoch, score)
            self._say_where_time_went(step)

    def pictures(self, engine: Engine) -> None:
        """Draw the pictures of the last evaluation, unless that is done. Collective."""
        if self._undrawn is None:
            return
        (step, confusion), self._undrawn = self._undrawn, None
        with TIMELINE.span("evaluate"):
            if loggers.pictured(self._config):
                kernels = engine.parameter("conv1.weight")
                pictures = self._board.evaluation(engine, step, kernels, confusion)
                for logger in self._loggers:
                    logger.pictures(step, pictures)
            if step == self._schedule.last_step:
                self._board.embedding(engine, step)

    def _verdict(self, shares: Mapping[str, float]) -> str:
        """Return what limits the speed, given each span's share of the time."""
        return verdict(
            shares, self._slowest, self._config, self._topology.cores, self._within_canvas,
            self._cuda, self._mfu,
        )  # fmt: skip

    def _say_where_time_went(self, step: int) -> None:
        """Log how the time since the last evaluation divides among spans, and what helps."""
        total, seconds = self._since_evaluation.total(), self._since_evaluation
        if total == 0:
            return
        shares = {name: seconds[name] / total for name in SPANS}
        most = sorted(SPANS, key=lambda name: -shares[name])[:4]
        words = self._verdict(shares)
        say(f"time: {', '.join(f'{n} {shares[n]:.0%}' for n in most)}; {words}")
        table = "\n".join(f"| {name} | {shares[name]:.1%} |" for name in SPANS)
        text = f"{words}\n\n| span | share of the time |\n|---|---|\n{table}"
        self._board.draw(lambda to: to.add_text("verdict", text, step))
        self._since_evaluation = Counter()

    def flush(self) -> None:
        """Wait until the points so far are on the disk, before a checkpoint says that they are."""
        if self._topology.is_rank_0:
            self._metrics.flush()
            self._board.draw(lambda to: to.flush())

    def close(self, finished: bool) -> None:
        """Close everything; TensorBoard and loggers are told whether the run has finished."""
        TIMELINE.stop()
        self._trace.end()
        logging.getLogger("alexnet_dist.data").removeHandler(self._quarantine)
        self._board.close(finished)
        loggers.close(self._loggers, finished)
        if self._topology.is_rank_0:
            self._bar.close()
            self._metrics.close()

    def _model_flops_utilisation(self, images_per_s: float) -> float | None:
        """Return the network's arithmetic as a share of the devices' peak (MFU); None on a CPU or
        on a GPU whose peak is not known."""
        if not self._cuda:
            return None
        peak = peak_flops(torch.cuda.get_device_name())
        return peak and self._flops * images_per_s / peak / self._topology.world_size

    def _traced(self, path: Path, table: str) -> None:
        """Say where the profiler's trace is, and give TensorBoard its table."""
        first, last = self._config.profile.steps
        text = "    " + table.replace("\n", "\n    ")
        self._board.draw(lambda to: to.add_text("profile", text, last))
        say(f"traced steps {first} to {last}: open {path} in https://ui.perfetto.dev")

    def _write(self, *points: Mapping[str, Any]) -> None:
        """Write the points of one step to metrics.jsonl, TensorBoard and the loggers."""
        for point in points:
            self._metrics.append(point)
        for row in metrics_file.rows(points, self._config.model.classes):
            step, values = int(row.pop("step")), row
            self._board.scalars(step, values)
            for logger in self._loggers:
                logger.scalars(step, values)


def _measured(took: Took, cuda: bool) -> tuple[float, ...]:
    """Return what a rank reports of an interval: seconds of its own work, share of the time it
    waited for data, median and 95th percentile of its step times in seconds, memory of host and
    device in GB."""
    p50, p95 = np.percentile(took.steps, [50, 95]).tolist()
    host = psutil.Process().memory_info().rss / 1e9
    device = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return took.own, took.shares()["data"], p50, p95, host, device


def _straggler(own: Sequence[float]) -> dict[str, float]:
    """Return the rank whose own work takes longest, and its ratio to the median rank's.

    Args:
        own: for each rank, seconds of work outside collectives.
    """
    longest = max(own)
    middle = max(statistics.median_low(own), 1e-9)
    return {"straggler": longest / middle, "straggler_rank": float(own.index(longest))}
