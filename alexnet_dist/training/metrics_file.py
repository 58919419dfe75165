"""metrics.jsonl, a run's points one a line: how lines are written, read, and cut on resuming.

Readers of a run folder (`report`, `plan`, `launch`) import only this, which needs no torch.
"""

import contextlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_dist.files import appended, as_json, is_count, json_object, opened, written_aside

log = logging.getLogger(__name__)

# For each kind of point, the numbers that are read again: a line without them is not a point.
_SCORES = ("epoch", "loss", "top1", "top5")
_KINDS = {"train": _SCORES, "eval": (*_SCORES, "correct1", "samples"), "speed": ("images_per_s",),
          "start": ("total_s",)}  # fmt: skip
TIMES = ("speed", "start")  # kinds that are not the same when a run is repeated


def accuracies(classes: int) -> dict[str, str]:
    """Return the metrics worth showing of "top1" and "top5", with their names for people. Among
    five classes or fewer, every label is one of the five likeliest, and top-5 says nothing."""
    return {"top1": "top-1", "top5": "top-5"} if classes > 5 else {"top1": "top-1"}


def rows(points: Sequence[Mapping[str, Any]], classes: int) -> list[dict[str, float]]:
    """Return the numbers of some points by tag, as in {"step": 20, "train/loss": 2.3}: a row for
    each point, but a "speed" point shares the row of the training point of its step, and a "start"
    has none. Of accuracies, only those worth showing of so many classes."""
    made, untold = list[dict[str, float]](), {"top1", "top5"} - accuracies(classes).keys()
    for point in points:
        step, kind = point["step"], point["kind"]
        if kind == "start":
            continue
        nested = {group: point[group] for group in ("time", "memory") if group in point}
        if kind != "speed" or not made or made[-1]["step"] != step:
            made.append({"step": step})
        for group, values in {kind: point, **nested}.items():
            numbers = {key: value for key, value in values.items() if isinstance(value, float)}
            made[-1] |= {f"{group}/{key}": numbers[key] for key in numbers if key not in untold}
    return made


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the points in a run folder's metrics.jsonl, none where there is no such file; torn
    lines and lines that are not points are skipped. null reads as NaN."""
    points: list[dict[str, Any]] = []
    try:
        with opened(folder / "metrics.jsonl") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return points
    for line in lines:
        with contextlib.suppress(ValueError):
            point = json_object(line)
            values = {key: math.nan if value is None else value for key, value in point.items()}
            if _is_point(values):
                points.append(values)
    return points


def _is_point(values: Mapping[str, Any]) -> bool:
    """Return whether a line is a point: a known kind, a step, and the numbers that readers use."""
    kind, step = str(values.get("kind")), values.get("step")
    if kind not in _KINDS or type(step) is not int or not is_count(step):
        return False
    used = [values.get(name, "missing") for name in _KINDS[kind]]
    used += [value for name, value in values.items() if name.startswith("chroma_")]
    return all(type(v) is float or (type(v) is int and abs(v) < 2**63) for v in used)


def line(point: Mapping[str, Any]) -> bytes:
    """Return a point as a line of metrics.jsonl, as `as_json` writes it."""
    return as_json(point).encode() + b"\n"


class Writer:
    """Appends points to metrics.jsonl. What a full disk refuses is kept in memory, and tried again
    with the next point."""

    def __init__(self, path: Path) -> None:
        self._file = appended(path)
        self._unwritten = b""

    def append(self, point: Mapping[str, Any]) -> None:
        self._unwritten += line(point)
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            log.warning(f"NOT WRITTEN YET, but the run continues: {self._file.name}: {error}")

    def flush(self) -> None:
        """Wait until the points are on the disk, as far as it has room for them."""
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # a network file system may say only now that it is full
            log.warning(f"NOT WRITTEN, but the run continues: {self._file.name}: {error}")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # as `flush` has said
            self._file.close()


def cut(path: Path, step: int, evaluated_step: int) -> list[dict[str, Any]]:
    """Remove the points after `step` (of evaluations: after `evaluated_step`), which a resumed run
    will write again; return those that are kept."""
    until = dict.fromkeys(_KINDS, step) | {"eval": evaluated_step}
    kept = [p for p in read_metrics(path.parent) if p["step"] <= until[p["kind"]]]
    with written_aside(path) as aside, aside.open("wb") as file:
        file.writelines(map(line, kept))
    return kept
