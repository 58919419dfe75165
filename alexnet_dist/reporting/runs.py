"""A run folder as it is read to be shown: its config, its curves, its scores."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_dist.config.load import configs_folder, load_config
from alexnet_dist.config.schema import Config, fingerprint, flat
from alexnet_dist.errors import AlexNetDistError
from alexnet_dist.evaluation.results import Score
from alexnet_dist.evaluation.scores import kept
from alexnet_dist.files import json_object, read_bytes, read_run
from alexnet_dist.training.metrics import read_metrics

_NAMING = ("name", "output_dir")


@dataclass(frozen=True)
class Scored:
    """One evaluation of one network.

    Attributes:
        which: checkpoint, "best", "last" or "".
        where: date, machine and versions, as they are shown.
        kept: what `evaluate` wrote; None of an evaluation while it trained.
    """

    which: str
    step: int
    split: str
    data: str
    views: int
    score: Score
    where: str
    changed: Mapping[str, Any]
    kept: Mapping[str, Any] | None

    @property
    def told(self) -> str:
        """Where, and what was otherwise than in training."""
        changed = ", ".join(f"{key}={value}" for key, value in self.changed.items())
        return f"{self.where}; with {changed}" if changed else self.where


@dataclass(frozen=True)
class RunRead:
    """A run folder: its points of metrics.jsonl and its scores, those of training first.

    Attributes:
        averages: what `evaluate` kept of this network together with others.
    """

    folder: Path
    config: Config
    points: Sequence[Mapping[str, Any]]
    scores: Sequence[Scored]
    averages: Sequence[Mapping[str, Any]]
    state: str

    @property
    def views(self) -> Mapping[int, Score]:
        """Of each number of views that the best network was scored with on its own data, the
        newest score."""
        return {one.views: one.score for one in self.scores
                if one.which.startswith("best") and not one.changed}  # fmt: skip

    @property
    def detailed(self) -> Scored | None:
        """Of the kept scores, that of the best network with most views, the newest of equals."""
        own = [one for one in self.scores if one.kept is not None and not one.changed]
        return max(
            own, key=lambda one: (one.which.startswith("best"), one.step, one.views), default=None
        )


def read_run_folder(folder: Path) -> RunRead | None:
    """A run folder's content; None where it holds no config, or one that cannot be read."""
    try:
        config = load_config([json_object(read_bytes(folder / "config.json"))])
        points = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        found = read_run(folder)
        evaluated = [(p, _score(p)) for p in points if p["kind"] == "eval"]
    except (OSError, ValueError, KeyError, TypeError, AlexNetDistError):
        return None
    every = [(step, score) for point, score in evaluated if (step := point["step"])]
    best = max(every, key=lambda one: (one[1].top1, -one[0]), default=None)
    last = every[-1] if every else None
    names = {last[0]: "last"} if last else {}
    names |= {best[0]: "best" if best[0] not in names else "best and last"} if best else {}
    where = f"{_date(found.get('updated'))}, in training on {found.get('host', '?')}"
    keys = config.data.eval_split, config.data.path, int(config.evaluate.views)
    scores = [
        Scored(name, step, *keys, dict(every)[step], where, {}, None)
        for step, name in sorted(names.items())
    ]
    for path in sorted(folder.glob("evaluation-views-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            scores.append(_of_a_file(path, *keys[:2]))
    several = []
    for one in kept(folder):
        if len(one["of"]) > 1:
            several.append(one)
        else:
            scores.append(_scored(one, names.get(one["step"], "")))
    return RunRead(folder, config, points, scores, several, str(found.get("state", "")))


def _of_a_file(path: Path, split: str, data: str) -> Scored:
    """Of the best network, as `evaluate --json` printed it before scores were kept."""
    found = json.loads(read_bytes(path))
    views = int(path.stem.rpartition("-")[2])
    where = f"{_date(path.stat().st_mtime)}, in {path.name}"
    step = int(Path(found["of"][0]).name.removeprefix("step-"))
    return Scored("best", step, split, data, views, _score(found), where, {}, None)


def _score(found: Mapping[str, Any]) -> Score:
    """Raises KeyError, TypeError, ValueError."""
    samples, right, among = (int(found[key]) for key in ("samples", "correct1", "correct5"))
    if samples < 1:
        raise ValueError("no samples")
    return Score(samples, right, among, float(found["loss"]))


def _scored(one: Mapping[str, Any], which: str) -> Scored:
    machine = one["machine"]
    device = machine.get("gpu") or f"{machine.get('cores')} × {machine.get('cpu')}"
    where = (
        f"{one['date'][:10]}, {one.get('host')}: {device}, torch {machine.get('torch')}, "
        f"alexnet-dist {one.get('version')}"
    )
    keys = str(one.get("split")), str(one.get("data")), int(one["views"])
    return Scored(which, int(one["step"]), *keys, _score(one), where, one["changed"], one)


def _date(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds)) if type(seconds) is float else "?"


def confusion_of(kept: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
    """(classes, classes) int64 counts of a kept score, and the names of classes."""
    names = [str(row.get("name")) for row in kept["classes"]]
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    for row, column, count in kept["confusion"]:
        counts[row, column] = count
    return counts, names


def differing(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Of keys whose values differ, each config's value; the run's name is none."""
    each = [flat(config) for config in configs]
    return {
        key: [values[key] for values in each]
        for key in each[0]
        if key not in _NAMING and any(values[key] != each[0][key] for values in each)
    }


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    """What defines a run in each config that is shipped, by name."""
    found = {}
    for path in sorted(configs_folder().rglob("*.yaml")):
        if path.parent.name != "cluster":  # launch's
            name = path.relative_to(configs_folder()).with_suffix("").as_posix()
            found[name] = _defining(load_config([path]))
    return found


def _defining(config: Config) -> dict[str, Any]:
    return fingerprint(config) | {"train.epochs": config.train.epochs}


def nearest_preset(config: Config) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The shipped config that this one differs least from, by keys that define a run; its name,
    and of each key that differs (this one's value, the shipped one's)."""
    own, each = _defining(config), {}
    for name, values in _shipped().items():
        keys = sorted({*own, *values})
        differ = {k: (own.get(k), values.get(k)) for k in keys if own.get(k) != values.get(k)}
        each[name] = differ
    name = min(each, key=lambda name: (len(each[name]), name))
    return name, each[name]
