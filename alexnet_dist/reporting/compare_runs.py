"""`compare RUN RUN`: the keys in which runs differ, their scores, and their curves in one plot."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alexnet_dist.config.values import as_typed
from alexnet_dist.errors import aligned
from alexnet_dist.plotting import as_label, figure
from alexnet_dist.reporting.runs import RunResults, check_replaces, differing, read_run_folder
from alexnet_dist.training.metrics_file import accuracies

_MARK = "alexnet-dist compare"  # in the PNG's text, by which a comparison is known


def compare_runs(folders: Sequence[Path], picture: Path) -> tuple[dict[str, Any], str]:
    """Draw the runs' curves in `picture`, and return the comparison as data and as text.

    Raises RunFolderError if a run cannot be read, ConfigError if `picture` exists and is not a
    comparison.
    """
    check_replaces(picture, _MARK.encode(), "comparison")
    runs = []
    for folder in folders:
        run = read_run_folder(folder)
        assert run is not None, folder
        runs.append(run)
    differ, names = differing([run.config for run in runs]), _names(folders)
    _draw(runs, names, picture)
    comparison = {
        "runs": [str(folder) for folder in folders],
        "differ": differ,
        "scores": [
            [{**asdict(one.score), **{key: getattr(one, key) for key in
              ("which", "step", "split", "views", "where", "changed")},
              "top1": one.score.top1, "top5": one.score.top5} for one in run.scores]
            for run in runs
        ],
        "picture": str(picture),
    }  # fmt: skip
    rows = [[key, *map(as_typed, values)] for key, values in differ.items()]
    text = aligned([["key", *names], *rows]) if rows else "their configs are equal"
    return comparison, f"{text}\n\n{_scores(runs, names)}\n\ncurves: {picture}"


def _scores(runs: Sequence[RunResults], names: Sequence[str]) -> str:
    """Return the scores of the runs as a table."""
    any_top5 = any("top5" in accuracies(run.config.model.classes) for run in runs)
    scores = []
    for run, name in zip(runs, names, strict=True):
        tells = accuracies(run.config.model.classes)
        for one in run.scores:
            five = f"{100 * (1 - one.score.top5):.2f}" if "top5" in tells else "–"
            errors = [f"{100 * (1 - one.score.top1):.2f}", *([five] if any_top5 else [])]
            scores.append([
                name, one.which or f"step {one.step}", str(one.step), one.split, str(one.views),
                *errors, f"{one.score.loss:.4f}", one.circumstances,
            ])  # fmt: skip
    tops = ["top-1 error", *(["top-5"] if any_top5 else [])]
    heading = ["run", "network", "step", "split", "views", *tops, "loss", "when"]
    return aligned([heading, *scores]) if scores else "none of them has been evaluated"


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's, or the whole path if two have the same."""
    short = [folder.resolve().name for folder in folders]
    return short if len({*short}) == len(short) else [str(folder) for folder in folders]


def _draw(runs: Sequence[RunResults], names: Sequence[str], path: Path) -> None:
    """Draw loss and top-1 error by epoch: a colour for each run, training thin, evaluation dots."""
    with figure(path, 1, 2, (13, 5), software=_MARK) as axes:
        for place, (run, name) in enumerate(zip(runs, names, strict=True)):
            for kind, line, style in (("train", "-", {"alpha": 0.5, "lw": 1}), ("eval", "o-", {})):
                points = [point for point in run.points if point["kind"] == kind]
                if not points:
                    continue
                epochs = [point["epoch"] for point in points]
                errors = [100 * (1 - point["top1"]) for point in points]
                label = f"{as_label(name)}, {'training' if kind == 'train' else 'evaluation'}"
                for panel, values in zip(
                    axes[0], ([point["loss"] for point in points], errors), strict=True
                ):
                    shown = line if len(points) > 1 else "o"
                    panel.plot(epochs, values, shown, color=f"C{place}", label=label, **style)
        axes[0, 0].set(xlabel="epoch", ylabel="loss, nats")
        axes[0, 1].set(xlabel="epoch", ylabel="top-1 error, %", ylim=(0, None))
        for panel in axes[0]:
            panel.grid(alpha=0.3)
        axes[0, 0].legend()
