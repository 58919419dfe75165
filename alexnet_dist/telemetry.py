"""What a run tells: a progress line, metrics.jsonl, TensorBoard. Written by rank 0 alone.

| tag | unit |
|---|---|
| train/loss | nats a sample, mean since the last point |
| train/top1, train/top5 | share of labels ranked first, among the first five, in training |
| train/rate | learning rate ε |
| train/damaged | samples of this epoch that were damaged, so that others stood in for them |
| train/epoch, eval/epoch | passes over the training split so far |
| eval/loss, eval/top1, eval/top5 | the same on the evaluation split |
| eval/correct1, eval/correct5, eval/samples | the counts behind them, in metrics.jsonl alone |
| speed/images_per_s | training images, all ranks together |
| speed/data_wait | share of the time spent waiting for the pipeline |
| speed/straggler, speed/straggler_rank | longest own work of a rank ÷ the median's, and whose |
| train/gradient_norm | of the whole network's gradient, mean since the last point |
| train/skipped | updates left out so far, their loss or gradient not finite |
| eval/chroma_1, eval/chroma_2 | colour in the kernels of conv1, by column: see `chroma` |
| kernels/conv1 | the first layer's kernels, a row block a column |
"""

import contextlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from alexnet_dist.errors import printable
from alexnet_dist.topology import Topology
from alexnet_dist.untrusted import json_object
from alexnet_dist.waits import WAITS

log = logging.getLogger("alexnet_dist")
_STRAGGLES = 1.3  # times the median; said in the progress line


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


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"time": record.created, "reason": record.getMessage()})


class Telemetry:
    """The metrics of one run from a step on; silent on all ranks but 0.

    Each rank appends the samples that it found damaged to quarantine.jsonl.

    Args:
        folder: the run folder.
        step: where the run continues; later points of an earlier attempt are cut off.
        evaluated_step: the last step whose evaluation counts.
        last_step: where the run ends.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], step: int, evaluated_step: int,
        last_step: int, leads: bool,
    ) -> None:  # fmt: skip
        self._step, self._last_step, self._leads = step, last_step, leads
        self._quarantine = logging.FileHandler(folder / "quarantine.jsonl", delay=True)
        self._quarantine.setFormatter(_JsonLine())
        logging.getLogger("alexnet_dist.data").addHandler(self._quarantine)
        self._since = time.perf_counter()
        self._waited = 0.0
        WAITS.take()
        if not leads:
            return
        self._columns, self._batch = config["model"]["columns"], config["train"]["batch"]
        path = folder / "metrics.jsonl"
        _cut(path, step, evaluated_step)
        self._metrics = path.open("ab", buffering=0)
        self._unwritten = b""
        self._board: SummaryWriter | None = SummaryWriter(str(folder), purge_step=step + 1)
        if step == 0:
            text = yaml.safe_dump(dict(config), sort_keys=False)
            self._board.add_text("config", "    " + text.replace("\n", "\n    "))
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=last_step, initial=step, disable=not self._terminal, bar_format="{desc} {bar:20}"
        )

    def train(
        self, step: int, epoch: float, values: Mapping[str, float], wait_s: float,
        topology: Topology,
    ) -> None:  # fmt: skip
        """A point of training: `values` (tags of train/) repeat to the bit, the times do not.
        Collective."""
        now = time.perf_counter()
        seconds, steps = now - self._since, step - self._step
        self._since, self._step = now, step
        own = topology.each(seconds - self._waited - WAITS.take())
        self._waited = 0.0
        if not self._leads:
            return
        speed = {"images_per_s": steps * self._batch / seconds, "data_wait": wait_s / seconds}
        speed |= _straggler(own)
        self._write("train", step, {"epoch": epoch, **values}, speed)
        left = time.gmtime((self._last_step - step) * seconds / max(1, steps))
        line = (
            f"epoch {epoch:.2f}  step {step}/{self._last_step}  loss {values['loss']:.4f}  "
            f"top-1 {values['top1']:.1%}  top-5 {values['top5']:.1%}  rate {values['rate']:.2e}  "
            f"{speed['images_per_s']:.0f} images/s  data wait {speed['data_wait']:.0%}  "
            + (f"damaged {values['damaged']:.0f}  " if values["damaged"] else "")
            + _named(speed)
            + f"ETA {(left.tm_yday - 1) * 24 + left.tm_hour}{time.strftime(':%M:%S', left)}"
        )
        if self._terminal:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(steps)
        else:
            log.info(line)

    def evaluation(
        self, step: int, epoch: float, values: Mapping[str, float], kernels: Tensor | None
    ) -> None:
        """A point of evaluation; `kernels` is conv1.weight."""
        if not self._leads:
            return
        colour = {} if kernels is None else {
            f"chroma_{column}": value
            for column, value in enumerate(chroma(kernels, self._columns), start=1)
        }  # fmt: skip
        self._write("eval", step, {"epoch": epoch, **values, **colour}, {})
        if kernels is not None:
            picture = kernel_picture(kernels, self._columns)
            self._draw(lambda to: to.add_image("kernels/conv1", picture, step, dataformats="HWC"))
        with logging_redirect_tqdm():
            log.info(
                f"epoch {epoch:.2f}  step {step}/{self._last_step}  evaluation: "
                f"top-1 {values['top1']:.2%}  top-5 {values['top5']:.2%}  "
                f"loss {values['loss']:.4f}  ({values['correct1']} of {values['samples']} right)"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the training speed."""
        begin = time.perf_counter()
        self._waited += WAITS.take()
        yield
        WAITS.take()
        self._since += time.perf_counter() - begin

    def flush(self) -> None:
        """Make durable what was written, before a checkpoint says that it was."""
        if self._leads:
            self._append("")
            with contextlib.suppress(OSError):  # said when it was written
                os.fsync(self._metrics.fileno())
            self._draw(lambda board: board.flush())

    def close(self) -> None:
        logging.getLogger("alexnet_dist.data").removeHandler(self._quarantine)
        self._quarantine.close()
        if self._leads:
            self._bar.close()
            self._draw(lambda board: board.close())
            self._metrics.close()

    def _write(
        self, kind: str, step: int, values: Mapping[str, float], speed: Mapping[str, float]
    ) -> None:
        self._append(json.dumps({"kind": kind, "step": step, **values, **speed}) + "\n")
        for group, scalars in ((kind, values), ("speed", speed)):
            for name, value in scalars.items():
                if isinstance(value, float):
                    add = partial(SummaryWriter.add_scalar, tag=f"{group}/{name}")
                    self._draw(partial(add, scalar_value=value, global_step=step))

    def _append(self, line: str) -> None:
        """To metrics.jsonl; what a full disk refuses is kept, and tried again with the next."""
        self._unwritten += line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            log.warning(f"NOT WRITTEN YET, the run goes on: {self._metrics.name}: {error}")

    def _draw(self, draw: Callable[[SummaryWriter], None]) -> None:
        """In TensorBoard, whose writer never comes back from a full disk: then without it."""
        try:
            if self._board is not None:
                draw(self._board)
        except OSError as error:
            self._board = None
            log.warning(f"TensorBoard's file is given up, the run goes on: {error}")


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
    if speed["straggler"] < _STRAGGLES:
        return ""
    return f"rank {speed['straggler_rank']:.0f} takes {speed['straggler']:.1f} times the median  "


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The points of a run folder's metrics.jsonl, up to a torn line or one that is no point."""
    points = []
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        try:
            point = json_object(line)
        except ValueError:
            break
        if type(point.get("step")) is not int or point.get("kind") not in ("train", "eval"):
            break
        points.append(point)
    return points


def _cut(path: Path, step: int, evaluated_step: int) -> None:
    """Drop the points that a resumed run will make again."""
    if not path.exists():
        return
    until = {"train": step, "eval": evaluated_step}
    kept = [p for p in read_metrics(path.parent) if p["step"] <= until[p["kind"]]]
    aside = path.with_name(".metrics.jsonl.writing")
    with aside.open("w") as file:
        file.writelines(json.dumps(point) + "\n" for point in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def chroma(kernels: Tensor, columns: int) -> list[float]:
    """Of each column, how much of its conv1 kernels' energy is colour: 0 of grey kernels, 2/3 of
    random ones. Fig. 3's columns, one "largely color-agnostic", the other "largely
    color-specific", differ in it.

    Args:
        kernels: (maps, 3, k, k).
    """
    colour = kernels - kernels.mean(1, keepdim=True)
    shares = colour.square().sum((1, 2, 3)) / kernels.square().sum((1, 2, 3)).clamp_min(1e-30)
    return [float(column.mean()) for column in shares.chunk(columns)]


def kernel_picture(kernels: Tensor, columns: int, zoom: int = 3) -> npt.NDArray[np.uint8]:
    """conv1's kernels as in Fig. 3: three rows of kernels for each column, the first on top.

    Args:
        kernels: (maps, 3, k, k).

    Returns:
        (height, width, 3), each kernel stretched to the full range.
    """
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    unit = ((kernels - low) / (high - low).clamp_min(1e-12)).movedim(1, -1).numpy()
    pixels = np.rint(unit * 255).astype(np.uint8).repeat(zoom, axis=1).repeat(zoom, axis=2)
    tiles = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    blocks = []
    for block in np.array_split(tiles, columns):
        rows = np.array_split(block, 3)
        wide = max(len(row) for row in rows)
        padded = [np.pad(r, ((0, wide - len(r)), *[(0, 0)] * 3), constant_values=255) for r in rows]
        blocks += [np.concatenate(list(row), axis=1) for row in padded]
        blocks.append(np.full((6, blocks[0].shape[1], 3), 255, np.uint8))
    return np.concatenate(blocks[:-1])
