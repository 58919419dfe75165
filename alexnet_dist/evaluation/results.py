"""The score of one network or of several averaged, and the predictions it was computed from; and
the scores kept in run folders, `RUN/evaluations/*.json`, one file per score of `evaluate`."""

import contextlib
import hashlib
import json
import logging
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from alexnet_dist import files
from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.parallel.device import machine

log = logging.getLogger(__name__)
_LONGEST = 2**26  # bytes read of a file
_NUMBERS = ("samples", "correct1", "correct5", "loss", "top1", "top5", "step", "views")
_OTHERS = {"date": str, "split": str, "of": list, "changed": dict, "machine": dict,
           "classes": list, "confusion": list}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Exact counts over a split, and the mean loss of the averaged softmax outputs.

    Attributes:
        samples: number of samples scored; damaged ones are not.
        correct1: samples whose label ranked first.
        correct5: samples whose label ranked among the first five.
        loss: mean cross-entropy, nats.
    """

    samples: int
    correct1: int
    correct5: int
    loss: float

    @property
    def top1(self) -> float:
        return self.correct1 / self.samples

    @property
    def top5(self) -> float:
        return self.correct5 / self.samples

    @property
    def top1_interval(self) -> tuple[float, float]:
        """Bounds of the 95 % bootstrap interval of top1."""
        return self.interval(self.correct1)

    @property
    def top5_interval(self) -> tuple[float, float]:
        """Bounds of the 95 % bootstrap interval of top5."""
        return self.interval(self.correct5)

    def interval(self, correct: int) -> tuple[float, float]:
        """Return the bounds of the middle 95 % of accuracies over bootstrap resamples.

        A resample of samples that are each right or wrong is a draw from a binomial. The draws
        depend on the counts alone, so that the same counts give the same interval.
        """
        generator = np.random.Generator(np.random.Philox(key=[self.samples, correct]))
        resampled = generator.binomial(self.samples, correct / self.samples, 10_000) / self.samples
        low, high = np.percentile(resampled, [2.5, 97.5])
        return float(low), float(high)

    def tags(self) -> dict[str, float]:
        """Return the counts, loss, top1 and top5 by name, for metrics."""
        return {**vars(self), "top1": self.top1, "top5": self.top5}


class Conditions(TypedDict, total=False):
    """What a score depends on besides the checkpoints.

    Attributes:
        split, views: as configured.
        data, data_sha256: the data set's folder and digest.
        changed: keys that define a run and differ from those the network was trained with; and
            data.path, where that is other data.
    """

    split: str
    views: int
    data: str
    data_sha256: str
    changed: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The score of one network, or of several averaged, on every sample of a split.

    Attributes:
        checkpoints: the networks' checkpoints.
        classes: class names.
        confusion: (classes, classes) int64: samples of the row's class predicted as the column's.
        probabilities: (n, classes) float32 or wider, softmax outputs averaged over views and
            networks, in the split's order; n includes damaged samples. None where not kept.
        labels: (n,) int64; −1 for a damaged sample. None where not kept.
    """

    score: Score
    checkpoints: tuple[Checkpoint, ...]
    classes: tuple[str, ...]
    confusion: Tensor
    probabilities: Tensor | None = None
    labels: Tensor | None = None
    conditions: Conditions = field(default_factory=Conditions)

    def report(self) -> dict[str, Any]:
        """Return counts, 95 % intervals, each class's counts, and the most frequent mistakes, as
        JSON has them."""
        score, confusion = self.score, self.confusion
        wrong = confusion.clone().fill_diagonal_(0)
        worst = wrong.flatten().topk(min(10, wrong.numel()))
        pairs = [divmod(index, len(self.classes)) for index in worst.indices.tolist()]
        return {
            **score.tags(),
            "top1_interval": score.top1_interval,
            "top5_interval": score.top5_interval,
            "of": [str(checkpoint.path) for checkpoint in self.checkpoints],
            **self.conditions,
            "classes": [
                {"name": name, "samples": int(row.sum()), "right": int(row[index])}
                for index, (name, row) in enumerate(zip(self.classes, confusion, strict=True))
            ],
            "mistakes": [
                {"of": self.classes[a], "taken_for": self.classes[b], "samples": count}
                for (a, b), count in zip(pairs, worst.values.tolist(), strict=True)
                if count
            ],
        }

    def write(self, path: Path) -> None:
        """Write every prediction as .npz: probabilities, labels, predicted, confusion, classes."""
        assert self.probabilities is not None, "evaluate_checkpoints(…, keep=True) keeps them"
        assert self.labels is not None
        with files.written_aside(path) as aside, aside.open("wb") as file:
            np.savez(
                file,
                probabilities=self.probabilities.numpy(),
                labels=self.labels.numpy(),
                predicted=self.probabilities.argmax(1).numpy(),
                confusion=self.confusion.numpy(),
                classes=np.array(self.classes, dtype=np.str_),
            )


def add_confusion(counts: Tensor, probabilities: Tensor, labels: Tensor) -> None:
    """Add samples to a confusion matrix in place; those with a negative label are left out.

    Args:
        counts: (classes, classes) int64: samples of the row's class predicted as the column's.
        probabilities: (n, classes).
        labels: (n,) int64.
    """
    sound = labels >= 0
    labels, predicted = labels[sound], probabilities[sound].argmax(1)
    counts.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)


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
    for path in (run / "evaluations").glob("[!.]*.json"):
        with contextlib.suppress(OSError, ValueError):
            score = files.json_object(files.read_bytes(path, _LONGEST))
            if _is_score(score):
                found.append(score)
    return sorted(found, key=lambda score: str(score["date"]))


def _is_score(found: Mapping[str, Any]) -> bool:
    """Whether a file has the numbers that readers calculate with; the rest is text to show."""

    def is_class(row: Any) -> bool:
        if not isinstance(row, dict):
            return False
        right, samples = row.get("right"), row.get("samples")
        return type(right) is int and type(samples) is int and 0 <= right <= samples

    def is_cell(cell: Any) -> bool:
        if not (isinstance(cell, list) and len(cell) == 3):
            return False
        counts = all(type(number) is int and number >= 0 for number in cell)
        return counts and max(cell[:2]) < len(found["classes"])

    return (
        all(files.is_count(found.get(key)) for key in _NUMBERS)
        and all(isinstance(found.get(key), kind) for key, kind in _OTHERS.items())
        and max(found["top1"], found["top5"]) <= 1
        and max(found["correct1"], found["correct5"]) <= found["samples"]
        and 0 < found["samples"] < 2**53
        and all(map(is_class, found["classes"]))
        and all(map(is_cell, found["confusion"]))
    )
