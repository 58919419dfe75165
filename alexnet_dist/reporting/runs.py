"""A run folder, read in order to be shown: its config, its curves, its scores."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import configs_folder, load_config, shipped
from alexnet_dist.config.schema import Config, fingerprint, flat
from alexnet_dist.errors import AlexNetDistError, ConfigError, RunFolderError, in_words, printable
from alexnet_dist.evaluation.results import Score, saved_scores
from alexnet_dist.files import as_json, is_there, json_object, opened, read_bytes, read_run
from alexnet_dist.training.metrics_file import read_metrics

log = logging.getLogger(__name__)

_NAMING = ("name", "output_dir")
_SEEDED = ("seed", "train.init_sha256")  # weights to start from have a seed of their own


@dataclass(frozen=True)
class Scored:
    """One evaluation of one network.

    Attributes:
        which: checkpoint: "best", "last", both, or "" for any other.
        where: date, machine and versions, as shown.
        changed: keys that differed from training, with their values.
        kept: the full result that `evaluate` saved; None for an evaluation during training.
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
    def circumstances(self) -> str:
        """Where and when, and what differed from training, in words."""
        changed = ", ".join(f"{key}={value}" for key, value in self.changed.items())
        return f"{self.where}; with {changed}" if changed else self.where


@dataclass(frozen=True)
class RunResults:
    """The content of a run folder: points of metrics.jsonl, and scores, those of training first.

    Attributes:
        averages: results that `evaluate` saved of this network averaged with others.
    """

    folder: Path
    config: Config
    points: Sequence[Mapping[str, Any]]
    scores: Sequence[Scored]
    averages: Sequence[Mapping[str, Any]]
    state: str

    @property
    def views(self) -> Mapping[int, Score]:
        """The newest score of the best network on its own data, for each number of views."""
        return {one.views: one.score for one in self.scores
                if one.which.startswith("best") and not one.changed
                and one.split == self.config.data.eval_split}  # fmt: skip

    @property
    def detailed(self) -> Scored | None:
        """The saved score of the best network, on its own split, with the most views; the newest of
        equals."""
        own = [one for one in reversed(self.scores) if one.kept is not None and not one.changed]
        split = self.config.data.eval_split
        return max(
            own, default=None,
            key=lambda one: (one.which.startswith("best"), one.step, one.split == split, one.views),
        )  # fmt: skip


Average = tuple[str, Mapping[str, Any]]  # its name, and what `evaluate` saved or printed


def read_evaluated(folders: Sequence[Path]) -> tuple[list[RunResults], list[Average], list[str]]:
    """Return the runs that were evaluated, sorted by name; the averages that `read_average` finds;
    and the names of all other folders. Logs why a run cannot be read."""
    runs, averages, others = list[RunResults](), list[Average](), list[str]()
    for folder in folders:
        run, average = None, read_average(folder)
        try:
            run = None if average else read_run_folder(folder)
        except RunFolderError as error:
            log.warning(printable(f"{error}"))
        if average:
            averages.append(average)
        elif run and run.scores:
            runs.append(run)
        else:
            others.append(printable(folder.name))
    return sorted(runs, key=lambda run: run.folder.name), averages, others


def read_run_folder(folder: Path) -> RunResults | None:
    """Read a run folder, or what `import` made; None if it is neither.

    Raises RunFolderError, which says why, if it cannot be read.
    """
    try:
        if (saved := folder / "config.json").is_file():
            config = load_config([json_object(read_bytes(saved))])
        elif is_there(folder / "checkpoints"):  # imported: it was not trained here
            config = checkpoints.at(folder).config
        else:
            return None
        points = read_metrics(folder)
        run = read_run(folder)
        evaluated = [(p, _score(p)) for p in points if p["kind"] == "eval"]
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AlexNetDistError) as error:
        why = in_words(error) or repr(error)
        raise RunFolderError(f"{folder} cannot be read: {why}") from error
    by_step = {point["step"]: score for point, score in evaluated if point["step"]}
    names = _best_and_last(by_step)
    where = f"{_date(run.get('updated'))}, in training on {run.get('host', '?')}"
    keys = config.data.eval_split, config.data.path, int(config.evaluate.views)
    scores = [
        Scored(name, step, *keys, by_step[step], where, {}, None)
        for step, name in sorted(names.items())
    ]
    for path in sorted(folder.glob("evaluation-views-*.json")):
        with contextlib.suppress(
            OSError, ValueError, OverflowError, KeyError, TypeError, IndexError
        ):
            scores.append(_of_a_file(path, *keys[:2]))
    several = []
    for one in saved_scores(folder):
        if len(one["of"]) > 1:
            several.append(one)
        else:
            scores.append(_scored(one, names.get(one["step"], "")))
    return RunResults(folder, config, points, scores, several, str(run.get("state", "")))


def read_average(path: Path) -> Average | None:
    """Return the name and content of a file that `evaluate --json` wrote for several networks."""
    try:
        average = json_object(read_bytes(path))
        several = len([Path(one) for one in average["of"]]) > 1
        several &= 0 <= average["top1"] <= 1 and 0 <= average["top5"] <= 1
        several &= type(average.get("views", 1)) is int
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (path.stem, average) if several else None


def _best_and_last(by_step: Mapping[int, Score]) -> dict[int, str]:
    """Return what the best scored step, chosen as a run chooses it, and the last are called."""
    if not by_step:
        return {}
    best = max(by_step, key=lambda step: (by_step[step].top1, -by_step[step].loss, -step))
    *_, last = by_step
    return {last: "last"} | {best: "best and last" if best == last else "best"}


def _of_a_file(path: Path, split: str, data: str) -> Scored:
    """Read what `evaluate --json` printed of the best network, before `evaluate` saved scores."""
    printed = json_object(read_bytes(path))
    views = int(path.stem.rpartition("-")[2])
    where = f"{_date(path.stat().st_mtime)}, in {path.name}"
    step = int(Path(printed["of"][0]).name.removeprefix("step-"))
    return Scored("best", step, split, data, views, _score(printed), where, {}, None)


def _score(values: Mapping[str, Any]) -> Score:
    """Return a score from JSON; raises KeyError, TypeError or ValueError if it is not one."""
    samples, right, among = (int(values[key]) for key in ("samples", "correct1", "correct5"))
    if not 0 < samples < 2**53 or not (0 <= right <= samples and 0 <= among <= samples):
        raise ValueError(f"a score of {right} and {among} of {samples} samples")
    return Score(samples, right, among, float(values["loss"]))


def _scored(one: Mapping[str, Any], which: str) -> Scored:
    """Return a score that `evaluate` saved, with where and how it was made."""
    machine = one["machine"]
    device = machine.get("gpu") or f"{machine.get('cores')} × {machine.get('cpu')}"
    where = (
        f"{one['date'][:10]}, {one.get('host')}: {device}, torch {machine.get('torch')}, "
        f"alexnet-dist {one.get('version')}"
    )
    keys = one["split"], str(one.get("data")), int(one["views"])
    return Scored(which, int(one["step"]), *keys, _score(one), where, one["changed"], one)


def _date(seconds: Any) -> str:
    """Return the day of a time in s since 1970; "?" if it is none, as in a damaged run.json."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if type(seconds) is float:
            return time.strftime("%Y-%m-%d", time.gmtime(seconds))
    return "?"


def confusion_of(kept: Mapping[str, Any]) -> Tensor:
    """Return a saved score's confusion, (classes, classes) int64 counts."""
    classes = len(kept["classes"])
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for row, column, count in kept["confusion"]:
        counts[row, column] = count
    return counts


def differing(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Return each config's value of every key in which they differ, other than the run's name."""
    each = [flat(config) for config in configs]
    return {
        key: [values[key] for values in each]
        for key in each[0]
        if key not in _NAMING and any(values[key] != each[0][key] for values in each)
    }


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    """Return the keys that define a run, for every shipped config by name."""
    return {name: _defining(load_config(configs_folder() / f"{name}.yaml")) for name in shipped()}


def _defining(config: Config) -> dict[str, Any]:
    return fingerprint(config) | {"train.epochs": config.train.epochs}


def recipe(config: Config) -> str:
    """Return what runs have in common that differ in their seed alone."""
    values = _defining(config) | {"data.path": config.data.path}
    return as_json({key: values[key] for key in values if key not in _SEEDED})


def nearest_preset(config: Config) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """Return the name of the shipped config that differs least in keys that define a run, and for
    each of those keys (this config's value, the shipped one's)."""
    own, each = _defining(config), {}
    for name, values in _shipped().items():
        keys = sorted({*own, *values})
        differ = {k: (own.get(k), values.get(k)) for k in keys if own.get(k) != values.get(k)}
        each[name] = differ
    name = min(each, key=lambda name: (len(each[name]), name))
    return name, each[name]


def check_replaces(path: Path, mark: bytes, what: str) -> None:
    """Raise ConfigError if `path` is an existing file that this program did not make.

    Args:
        mark: bytes in the first 4 KB of every file of ours.
        what: the kind of file that the command makes, for the message.
    """
    if path.exists():
        with opened(path) as file:
            ours = mark in file.read(4096)
        if not ours:
            raise ConfigError(
                f"{path}: there is such a file, and it is no {what} that this program made: name "
                "another by --out, or move it away"
            )
