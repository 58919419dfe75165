"""Scores kept in run folders: `RUN/evaluations/*.json`, one file per score of `evaluate`."""

import contextlib
import hashlib
import json
import logging
import re
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from alexnet_dist import files
from alexnet_dist.evaluation.results import Evaluation
from alexnet_dist.parallel.device import machine

log = logging.getLogger(__name__)
_LONGEST = 2**26  # bytes read of a file
_NUMBERS = ("samples", "correct1", "correct5", "loss", "top1", "top5", "step", "views")


def save_score(found: Evaluation) -> Path | None:
    """Write a score to the run folder of its (first) checkpoint, in place of any under the same
    conditions. The run may be in progress: none of the files that it writes is touched.

    Returns:
        The file's path; None where the checkpoint is in no run folder, or cannot be written to.
    """
    first = found.checkpoints[0]
    if first.path.parent.name != "checkpoints":
        return None
    out = first.path.parent.parent / "evaluations"
    how = found.conditions
    split = re.sub(r"[^\w.-]", "_", how["split"])
    name = f"step-{first.step:08d}-{split}-views-{how['views']}"
    # Conditions that differ from the run's own get a hash in the file's name.
    special = [how["changed"], how["data_sha256"], [str(c.path) for c in found.checkpoints[1:]]]
    if special != [{}, first.manifest["dataset"], []]:
        name += f"-{hashlib.sha256(json.dumps(special).encode()).hexdigest()[:8]}"
    confusion = found.confusion
    rows, columns = confusion.nonzero(as_tuple=True)
    counts = confusion[rows, columns]
    content = {
        **found.report(),
        "step": first.step,
        "checkpoint_sha256": [checkpoint.manifest["sha256"] for checkpoint in found.checkpoints],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "machine": machine(),
        "version": import_module("alexnet_dist").__version__,
        "confusion": list(zip(rows.tolist(), columns.tolist(), counts.tolist(), strict=True)),
    }
    path = out / f"{name}.json"
    try:
        out.mkdir(exist_ok=True)
        files.write(path, json.dumps(content).encode() + b"\n")
        files.sync(out)
    except OSError as error:
        log.warning(f"this score is printed, but could not be saved: {path}: {error}")
        return None
    return path


def saved_scores(run: Path) -> list[Mapping[str, Any]]:
    """Return the scores that `save_score` wrote to a run folder, oldest first; skip other files."""
    found = []
    for path in (run / "evaluations").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            score = files.json_object(files.read_bytes(path, _LONGEST))
            if _is_score(score):
                found.append(score)
    return sorted(found, key=lambda score: str(score["date"]))


def _is_score(found: Mapping[str, Any]) -> bool:
    """Whether a file has the numbers that readers calculate with; the rest is text to show."""
    classes, confusion = found.get("classes"), found.get("confusion")
    return (
        all(files.is_count(found.get(key)) for key in _NUMBERS)
        and max(found["top1"], found["top5"]) <= 1
        and found["correct1"] <= found["samples"]
        and 0 < found["samples"] < 2**53
        and isinstance(found.get("date"), str)
        and isinstance(found.get("split"), str)
        and isinstance(found.get("of"), list)
        and isinstance(found.get("changed"), dict)
        and isinstance(found.get("machine"), dict)
        and isinstance(classes, list)
        and all(
            isinstance(row, dict)
            and type(row.get("samples")) is type(row.get("right")) is int
            and 0 <= row["right"] <= row["samples"]
            for row in classes
        )
        and isinstance(confusion, list)
        and all(
            isinstance(cell, list)
            and [type(value) for value in cell] == [int] * 3
            and min(cell) >= 0
            and max(cell[:2]) < len(classes)
            for cell in confusion
        )
    )
