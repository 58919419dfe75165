"""What a run tells: a progress line, metrics.jsonl, TensorBoard, loggers. Written by rank 0 alone.

docs/tensorboard.md lists every tag. Those of train/ and eval/ repeat to the bit; times and memory
are told apart from them, in lines of their own (`"kind": "speed"`).
"""

import contextlib
import io
import json
import logging
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.engines.base import Engine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import printable
from alexnet_dist.evaluation.results import Score
from alexnet_dist.files import appended, is_count, json_object, opened, written_aside
from alexnet_dist.parallel.device import peak_flops
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.plotting import chroma
from alexnet_dist.timing import SPANS, TIMELINE, Took
from alexnet_dist.training import loggers
from alexnet_dist.training.bottleneck import STRAGGLES, verdict
from alexnet_dist.training.run_folder import RunFolder, Unharmed
from alexnet_dist.training.tensorboard import Board

log = logging.getLogger("alexnet_dist")
_TOLD = 64  # ranks; of more, each one's times are not written
# Of a point of each kind, the numbers that are read again.
_SCORES = ("epoch", "loss", "top1", "top5")
_KINDS = {"train": _SCORES, "eval": (*_SCORES, "correct1", "samples"), "speed": ("images_per_s",)}


def configure_logging(topology: Topology) -> None:
    """Rank 0 at INFO; others at WARNING, named by rank and column."""
    name = "" if topology.leads else f"[r{topology.global_rank} c{topology.column}] "
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable(f"{name}%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    log.setLevel(logging.INFO if topology.leads else logging.WARNING)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Appended(logging.FileHandler):
    """A log in a file that is a regular one."""

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(appended(self.baseFilename), "utf-8")


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"time": record.created, "reason": record.getMessage()})


class Telemetry:
    """The metrics of one run from a step on; silent on all ranks but 0.

    Each rank appends the samples that it found damaged to quarantine.jsonl.

    Args:
        step: where the run continues; later points of an earlier attempt are cut off.
        evaluated_step: the last step whose evaluation counts.
        flops: of training, an image.
    """

    def __init__(
        self, config: Config, folder: RunFolder, topology: Topology, dataset: Dataset,
        schedule: Schedule, step: int, evaluated_step: int, flops: int,
    ) -> None:  # fmt: skip
        self._config, self._folder, self._topology = config, folder, topology
        self._step, self._last_step, self._flops = step, schedule.last_step, flops
        stored = dataset.splits[config.data.train_split].uniform(config.data.canvas)
        self._facts = config, topology.cores, stored, self._cuda
        self._since_evaluation: Counter[str] = Counter()
        self._slowest = 1.0, 0
        self._mfu: float | None = None
        self._quarantine = _Appended(folder.path / "quarantine.jsonl", delay=True)
        self._quarantine.setFormatter(_JsonLine())
        logging.getLogger("alexnet_dist.data").addHandler(self._quarantine)
        self._board = Board(folder.path, config, schedule, topology, dataset, step)
        self._loggers: list[loggers.InThread] = []
        self._finished = False
        if topology.leads:
            path = folder.path / "metrics.jsonl"
            before = _cut(path, step, evaluated_step)
            self._loggers = loggers.start(config, _rows(before))
            self._metrics = appended(path)
            self._unwritten = b""
            self._terminal = sys.stderr is not None and sys.stderr.isatty()
            self._bar = tqdm(
                total=self._last_step, initial=step, disable=not self._terminal,
                bar_format="{desc} {bar:20}",
            )  # fmt: skip
        self._tracer: profile | None = None
        self._trace(step)
        TIMELINE.start(self._cuda)

    @property
    def _cuda(self) -> bool:
        return self._topology.device.type == "cuda"

    def histograms_due(self, step: int) -> bool:
        """Whether gradients of this step are to be kept."""
        every = self._config.log.histograms_every_steps
        return "tensorboard" in self._config.log.to and every > 0 and step % every == 0

    def stepped(self, step: int, engine: Engine) -> None:
        """A step has been made. Collective."""
        TIMELINE.step()
        with TIMELINE.span("log"):
            self._trace(step)
            if self.histograms_due(step):
                self._board.histograms(engine, step)

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """A point of training: `values` (tags of train/) repeat to the bit, the times do not.
        Collective."""
        took = TIMELINE.take()
        with TIMELINE.span("log"):
            self._train(step, epoch, values, took)

    def _train(self, step: int, epoch: float, values: Mapping[str, float], took: Took) -> None:
        steps, self._step = step - self._step, step
        each = self._topology.each(*_measured(took, self._cuda))
        if not self._topology.leads:
            return
        own, waited, p50, p95, host, device = map(list, zip(*each, strict=True))
        images_per_s = steps * self._config.train.batch / took.training
        speed = {"images_per_s": images_per_s, "data_wait": max(waited)}
        speed |= {"step_p50_s": max(p50), "step_p95_s": max(p95)}
        speed |= _straggler(own) | {"goodput": self._folder.goodput()}
        self._mfu = self._utilised(images_per_s)
        if self._mfu:
            speed["mfu"] = self._mfu
        memory = {"host_gb": max(host)} | ({"device_gb": max(device)} if self._cuda else {})
        shares = took.shares()
        self._since_evaluation += took.seconds
        self._slowest = speed["straggler"], int(speed["straggler_rank"])
        said = verdict(
            shares | {"data": speed["data_wait"]}, self._slowest, *self._facts, self._mfu
        )
        ranks = {"own_s": own[:_TOLD], "step_p50_s": p50[:_TOLD], "step_p95_s": p95[:_TOLD]}
        more = {"time": shares, "memory": memory, "ranks": ranks, "verdict": said}
        self._write(
            {"kind": "train", "step": step, "epoch": epoch, **values},
            {"kind": "speed", "step": step, **speed, **more},
        )
        left = time.gmtime((self._last_step - step) * took.training / max(1, steps))
        line = (
            f"epoch {epoch:.2f}  step {step}/{self._last_step}  loss {values['loss']:.4f}  "
            f"top-1 {values['top1']:.1%}  top-5 {values['top5']:.1%}  rate {values['rate']:.2e}  "
            f"{images_per_s:.0f} images/s  data wait {speed['data_wait']:.0%}  "
            + (f"MFU {self._mfu:.0%}  " if self._mfu else "")
            + (f"damaged {values['damaged']:.0f}  " if values["damaged"] else "")
            + _named(speed)
            + f"ETA {(left.tm_yday - 1) * 24 + left.tm_hour}{time.strftime(':%M:%S', left)}"
        )
        if self._terminal:
            with contextlib.suppress(OSError):  # it was closed
                self._bar.set_description_str(line, refresh=False)
                self._bar.update(steps)
        else:
            log.info(line)

    def evaluation(self, step: int, epoch: float, score: Score, engine: Engine) -> None:
        """A point of evaluation. Collective."""
        kernels, values = engine.parameter("conv1.weight"), score.tags()
        if kernels is not None:
            colours = enumerate(chroma(kernels, self._config.model.columns), start=1)
            values |= {f"chroma_{column}": value for column, value in colours}
            self._write({"kind": "eval", "step": step, "epoch": epoch, **values})
            self._say(
                f"epoch {epoch:.2f}  step {step}/{self._last_step}  evaluation: "
                f"top-1 {score.top1:.2%}  top-5 {score.top5:.2%}  "
                f"loss {score.loss:.4f}  ({score.correct1} of {score.samples} right)"
            )
            self._judge(step)

    def pictures(self, step: int, engine: Engine, confusion: Tensor | None) -> None:
        """What an evaluation is drawn by, when the network is saved. Collective."""
        if loggers.pictured(self._config):
            kernels = engine.parameter("conv1.weight")
            pictures = self._board.evaluation(engine, step, kernels, confusion)
            for logger in self._loggers:
                logger.pictures(step, pictures)
        if step == self._last_step:
            self._finished = True
            self._board.end(engine, step)

    def _judge(self, step: int) -> None:
        """Where the time went since the last evaluation, in words."""
        total, seconds = self._since_evaluation.total(), self._since_evaluation
        if total == 0:
            return
        shares = {name: seconds[name] / total for name in SPANS}
        most = sorted(SPANS, key=lambda name: -shares[name])[:4]
        said = verdict(shares, self._slowest, *self._facts, self._mfu)
        self._say(f"time: {', '.join(f'{n} {shares[n]:.0%}' for n in most)}; {said}")
        table = "\n".join(f"| {name} | {shares[name]:.1%} |" for name in SPANS)
        text = f"{said}\n\n| span | share of the time |\n|---|---|\n{table}"
        self._board.draw(lambda to: to.add_text("verdict", text, step))
        self._since_evaluation = Counter()

    def _say(self, line: str) -> None:
        with logging_redirect_tqdm():
            log.info(line)

    def flush(self) -> None:
        """Make durable what was written, before a checkpoint says that it was."""
        if self._topology.leads:
            self._append(None)
            with contextlib.suppress(OSError):  # said when it was written
                os.fsync(self._metrics.fileno())
            self._board.draw(lambda to: to.flush())

    def close(self) -> None:
        TIMELINE.stop()
        self._end_trace()
        logging.getLogger("alexnet_dist.data").removeHandler(self._quarantine)
        self._quarantine.close()
        self._board.close()
        loggers.close(self._loggers, self._finished)
        if self._topology.leads:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._metrics.close()

    def _utilised(self, images_per_s: float) -> float | None:
        """Of what the devices could at most compute, the share that the network's arithmetic is;
        None where that is not known."""
        if not self._cuda:
            return None
        peak = peak_flops(torch.cuda.get_device_name())
        return peak and self._flops * images_per_s / peak / self._topology.world_size

    def _trace(self, step: int) -> None:
        """Begin or end torch's profiler, of `profile.steps`, after this step."""
        if not self._config.profile.steps or not self._topology.leads:
            return
        first, last = self._config.profile.steps
        if step == first - 1:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints to the terminal
            self._tracer = profile(activities=kinds)
            self._tracer.start()
        if step == last:
            self._end_trace()

    def _end_trace(self) -> None:
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        tracer.stop()
        first, last = self._config.profile.steps
        path = self._folder.path / f"trace-{first}-{last}.json.gz"
        with Unharmed(f"the trace {path}"):
            with written_aside(path, durably=False) as aside:
                tracer.export_chrome_trace(str(aside))
            by = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
            text = tracer.key_averages().table(sort_by=by, row_limit=30)
            text = "    " + text.replace("\n", "\n    ")
            self._board.draw(lambda to: to.add_text("profile", text, last))
            self._say(f"traced steps {first} to {last}: open {path} in https://ui.perfetto.dev")

    def _write(self, *points: Mapping[str, Any]) -> None:
        """Points of one step, to everything that is written."""
        for point in points:
            self._append(point)
        for row in _rows(points):
            step, values = int(row.pop("step")), row
            self._board.scalars(step, values)
            for logger in self._loggers:
                logger.scalars(step, values)

    def _append(self, point: Mapping[str, Any] | None) -> None:
        """To metrics.jsonl; what a full disk refuses is kept, and tried again with the next."""
        self._unwritten += b"" if point is None else _line(point)
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            log.warning(f"NOT WRITTEN YET, the run goes on: {self._metrics.name}: {error}")


def _measured(took: Took, cuda: bool) -> tuple[float, ...]:
    """What a rank tells of an interval: seconds of its own work, share of the time it waited for
    data, median and 95th percentile of its steps in seconds, memory of host and device in GB."""
    p50, p95 = np.percentile(took.steps, [50, 95]).tolist()
    host = psutil.Process().memory_info().rss / 1e9
    device = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return took.own, took.shares()["data"], p50, p95, host, device


def _straggler(own: Sequence[float]) -> dict[str, float]:
    """The rank whose own work takes longest, and how many times the ranks' median.

    Args:
        own: each rank's seconds that it did not wait for others.
    """
    longest = max(own)
    middle = max(statistics.median_low(own), 1e-9)
    return {"straggler": longest / middle, "straggler_rank": float(own.index(longest))}


def _named(speed: Mapping[str, float]) -> str:
    """The straggler, where there is one to speak of."""
    if speed["straggler"] < STRAGGLES:
        return ""
    return f"rank {speed['straggler_rank']:.0f} takes {speed['straggler']:.1f} times the median  "


def _rows(points: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The numbers of points by their tags, as in train/loss; a step's times in the row of its
    training."""
    rows: list[dict[str, float]] = []
    for point in points:
        step, kind = point["step"], point["kind"]
        nested = {group: point[group] for group in ("time", "memory") if group in point}
        if kind != "speed" or not rows or rows[-1]["step"] != step:
            rows.append({"step": step})
        for group, values in {kind: point, **nested}.items():
            told = {key: value for key, value in values.items() if isinstance(value, float)}
            rows[-1] |= {f"{group}/{key}": value for key, value in told.items()}
    return rows


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The points of a run folder's metrics.jsonl, but for lines that are torn or are no points."""
    points = []
    with opened(folder / "metrics.jsonl") as file:
        lines = file.read().splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):
            point = json_object(line)
            found = {key: math.nan if value is None else value for key, value in point.items()}
            if _is_point(found):
                points.append(found)
    return points


def _is_point(found: Mapping[str, Any]) -> bool:
    kind, step = str(found.get("kind")), found.get("step")
    if kind not in _KINDS or type(step) is not int or not is_count(step):
        return False
    read = [found.get(name, "missing") for name in _KINDS[kind]]
    read += [value for name, value in found.items() if name.startswith("chroma_")]
    return all(type(v) is float or (type(v) is int and abs(v) < 2**63) for v in read)


def _line(point: Mapping[str, Any]) -> bytes:
    """A line of metrics.jsonl. JSON has no NaN, and no infinity: null stands for both."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: known(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return list(map(known, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(dict(point)), allow_nan=False).encode() + b"\n"


def _cut(path: Path, step: int, evaluated_step: int) -> list[dict[str, Any]]:
    """Drop the points that a resumed run will make again; those that are kept."""
    if not path.exists():
        return []
    until = dict.fromkeys(_KINDS, step) | {"eval": evaluated_step}
    kept = [p for p in read_metrics(path.parent) if p["step"] <= until[p["kind"]]]
    with written_aside(path) as aside, aside.open("wb") as file:
        file.writelines(map(_line, kept))
    return kept
