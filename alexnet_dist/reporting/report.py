"""One self-contained HTML page: the paper's results, and beside them what runs here came to.

A run counts for the preset that its name ends in, a seed's number left off: fm-no-lrn-2 is a run
of paper/no-lrn. What each run was trained on stands in its row, so that nobody compares ten classes
with a thousand.
"""

import base64
import html
import math
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import AlexNetDistError
from alexnet_dist.files import json_object, read_bytes, read_run, written_aside
from alexnet_dist.reporting import figures
from alexnet_dist.training.metrics import read_metrics


@dataclass(frozen=True)
class Published:
    """A published result, errors in % (top-5 None where none was given).

    Attributes:
        preset: of configs/paper that would repeat it; "" where there is none to train.
    """

    what: str
    preset: str
    data: str
    top1: float | None
    top5: float | None


_VAL, _2010 = "ILSVRC-2012 validation", "ILSVRC-2010 test"
PUBLISHED = (
    Published("sparse coding (paper, table 1)", "", _2010, 47.1, 28.2),
    Published("SIFT + FVs (table 1)", "", _2010, 45.7, 25.7),
    Published("CNN (table 1)", "alexnet-2010", _2010, 37.5, 17.0),
    Published("CNN, centre's window alone", "alexnet-2010", _2010, 39.0, 18.3),
    Published("SIFT + FVs (table 2; test)", "", "ILSVRC-2012 test", None, 26.2),
    Published("1 CNN (table 2)", "alexnet-2012", _VAL, 40.7, 18.2),
    Published("5 CNNs averaged (table 2)", "ensemble-5", _VAL, 38.1, 16.4),
    Published("1 CNN*, pre-trained (table 2)", "alexnet-star-finetune", _VAL, 39.0, 16.6),
    Published("7 CNNs* averaged (table 2)", "ensemble-7-star", _VAL, 36.7, 15.4),
    Published("CNN, sixth convolution", "alexnet-star-pretrain", "ImageNet Fall 2009", 67.4, 40.9),
    Published("one column (experiment 145-half)", "one-column", _2010, 39.168, 18.229),
    Published("two columns (experiment 145)", "released-code", _VAL, 40.664, 18.210),
    Published("no normalisation (experiment 148)", "no-lrn", _VAL, 42.034, 19.362),
    Published("no overlap (experiment 147)", "no-overlap", _VAL, 41.058, 18.510),
    Published("no exchange (experiment 150)", "no-exchange", _VAL, 41.828, 19.330),
    Published("no lighting (§4.1: more than 1 point worse)", "no-lighting", _VAL, None, None),
    Published("Caffe's CaffeNet, centre", "caffenet", _VAL, 42.6, 19.6),
    Published("Caffe's AlexNet, centre", "caffe-alexnet", _VAL, 42.9, 19.8),
    Published("torchvision's, of 2014, centre", "torchvision-2014", _VAL, 43.478, 20.934),
    Published("LARS, batch 8,192", "large-batch", _VAL, 41.8, None),
    Published("Fig. 1: 25 % training error, ReLU", "fig1-relu", "CIFAR-10", None, None),
    Published("Fig. 1: the same with tanh, about 6 × later", "fig1-tanh", "CIFAR-10", None, None),
    Published("(not in the paper: with the logistic)", "fig1-sigmoid", "CIFAR-10", None, None),
)


@dataclass(frozen=True)
class Run:
    """A run folder that was evaluated.

    Attributes:
        views: (views of an image, what `evaluate --json` said or the run's last evaluation).
    """

    folder: Path
    config: Config
    views: Mapping[int, Mapping[str, Any]]
    finished: bool

    @property
    def group(self) -> str:
        """Its name without a seed's number."""
        return re.sub(r"[-_]\d+$", "", self.folder.name)

    @property
    def preset(self) -> str:
        """The preset of PUBLISHED whose name its own ends in, or none."""
        known = [row.preset for row in PUBLISHED if row.preset and self._is(row.preset)]
        return max(known, key=len, default="")

    def _is(self, preset: str) -> bool:
        return self.group == preset or self.group.endswith(f"-{preset}")


def report(folders: Sequence[Path], out: Path) -> str:
    """Write the page of these run folders; what was done, in a line.

    Files are what `evaluate --json` said of several runs. What holds no evaluated run is passed
    over, and counted.
    """
    folders = [folder for folder in folders if folder != out]
    averaged = [found for path in folders if (found := _averaged(path)) is not None]
    runs = [run for folder in folders if (run := _read(folder)) is not None]
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.folder.name):
        groups.setdefault(run.group, []).append(run)
    parts = [
        "<h1>alexnet_dist: the paper's results, and ours</h1>",
        "<p>Errors in %. Ours: mean ± deviation over n runs, on the data that the row names. "
        "Only equal data can be compared.</p>",
        _published(groups),
        _all_runs(groups),
        *([_ensembles(averaged, runs)] if averaged else []),
    ]
    with tempfile.TemporaryDirectory() as aside:
        parts += [*_ablations(groups, Path(aside)), *_fig1(groups, Path(aside))]
    parts += [part for run in runs for part in _pictures(run)]
    page = "\n".join(parts)
    page = f"<!doctype html><meta charset=utf-8><title>Report</title>{_STYLE}\n{page}\n"
    with written_aside(out) as aside:
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    over = len(folders) - len(runs) - len(averaged)
    return f"{out}: {len(runs)} runs" + (f"; {over} hold no evaluated run" if over else "")


def _read(folder: Path) -> Run | None:
    try:
        config = load_config([json_object(read_bytes(folder / "config.json"))])
        evaluated = [point for point in read_metrics(folder) if point["kind"] == "eval"]
        if not evaluated:
            return None
        views = {int(config.evaluate.views): max(evaluated, key=lambda point: float(point["top1"]))}
        for own in folder.glob("evaluation-views-*.json"):
            found = json_object(read_bytes(own))
            known = {key: float(found[key]) for key in ("top1", "top5", "correct1", "samples")}
            views[int(own.stem.rpartition("-")[2])] = known
        if not all(0 <= one[top] <= 1 for one in views.values() for top in ("top1", "top5")):
            return None
        return Run(folder, config, views, read_run(folder).get("state") == "finished")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AlexNetDistError):
        return None


def _averaged(path: Path) -> tuple[str, Mapping[str, Any]] | None:
    """The name and content of a file that `evaluate --json` wrote of several checkpoints."""
    try:
        found = json_object(read_bytes(path))
        several = len([Path(one) for one in found["of"]]) > 1
        several &= 0 <= found["top1"] <= 1 and 0 <= found["top5"] <= 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (path.stem, found) if several else None


def _ensembles(averaged: Sequence[tuple[str, Mapping[str, Any]]], runs: Sequence[Run]) -> str:
    """Averages of several networks beside the mean of their own errors."""
    rows = []
    for name, found in averaged:
        views = int(name.rpartition("views-")[2]) if re.search(r"views-\d+$", name) else 1
        folders = {str(Path(path).parent.parent) for path in found["of"]}
        own = _errors([run for run in runs if str(run.folder) in folders], views)
        alone = _spread(own) if own else "–"
        errors = [f"{100 * (1 - float(found[top])):.2f}" for top in ("top1", "top5")]
        rows.append([name, str(len(found["of"])), *errors, alone])
    names = ["average", "of", "top-1", "top-5", "their own top-1"]
    return "<h2>Averages of networks</h2>" + _table(names, rows)


def _published(groups: Mapping[str, Sequence[Run]]) -> str:
    """Every published row, with ours beside it."""
    rows = []
    for row in PUBLISHED:
        ours = [runs for runs in groups.values() if row.preset and runs[0].preset == row.preset]
        said = "<br>".join(_said(runs) for runs in ours)
        if not said and row.preset:
            said = f"recipe complete (paper/{row.preset}), not run: needs {row.data.split()[0]}"
        rows.append([row.what, row.data, _number(row.top1), _number(row.top5), said or "not ours"])
    return "<h2>Published</h2>" + _table(["what", "data", "top-1", "top-5", "ours"], rows, raw=4)


def _said(runs: Sequence[Run]) -> str:
    """A group in words: its name, data, errors by views."""
    data = html.escape(runs[0].config.data.path)
    found = [f"{html.escape(runs[0].group)} on {data}, n = {len(runs)}:"]
    for views in sorted({v for run in runs for v in run.views}):
        errors = _errors(runs, views)
        found.append(f"{_spread(errors)} ({views} view{'s' * (views > 1)})")
    unfinished = sum(not run.finished for run in runs)
    return " ".join(found) + (f" — {unfinished} not finished" if unfinished else "")


def _errors(runs: Iterable[Run], views: int) -> list[float]:
    return [1 - float(run.views[views]["top1"]) for run in runs if views in run.views]


def _all_runs(groups: Mapping[str, Sequence[Run]]) -> str:
    rows = [
        [
            run.folder.name, run.config.data.path, str(run.config.seed), str(views),
            f"{100 * (1 - found['top1']):.2f}", f"{100 * (1 - found['top5']):.2f}",
            f"{found['correct1']:.0f} of {found['samples']:.0f}", "yes" if run.finished else "no",
        ]
        for runs in groups.values() for run in runs for views, found in sorted(run.views.items())
    ]  # fmt: skip
    names = ["run", "data", "seed", "views", "top-1", "top-5", "right", "finished"]
    return "<h2>Runs</h2>" + _table(names, rows)


def _ablations(groups: Mapping[str, Sequence[Run]], aside: Path) -> Iterable[str]:
    """A picture for each kind of data that several variants were trained on."""
    by_data: dict[str, dict[str, list[float]]] = {}
    for group, runs in groups.items():
        for views in sorted({v for run in runs for v in run.views}):
            label = f"{group}, {views} view{'s' * (views > 1)}"
            if "fig1" not in group:
                errors = _errors(runs, views)
                by_data.setdefault(runs[0].config.data.path, {})[label] = errors
    for number, (data, variants) in enumerate(by_data.items()):
        if len(variants) > 1:
            path = aside / f"ablations-{number}.png"
            figures.draw_ablations(variants, path)
            yield f"<h2>Variants on {html.escape(data)}</h2>{_image(path)}"


def _fig1(groups: Mapping[str, Sequence[Run]], aside: Path) -> Iterable[str]:
    """The curves of each kind of unit at the rate that serves it best, and all rates in a table."""
    chosen: dict[str, tuple[float, str, list[Path]]] = {}
    rows = []
    for group, runs in groups.items():
        preset, folders = runs[0].preset, [run.folder for run in runs]
        if preset.startswith("fig1-"):
            epochs = figures.epochs_to(0.25, folders)
            rows.append([group, str(len(runs)), f"{epochs:.2f}" if epochs < math.inf else "never"])
            if epochs < chosen.get(preset, (math.inf,))[0] or preset not in chosen:
                chosen[preset] = epochs, group, folders
    if chosen:
        best = {group: folders for _, group, folders in chosen.values()}
        figures.draw_fig1(best, aside / "fig1.png")
        yield "<h2>Fig. 1</h2>" + _image(aside / "fig1.png")
        yield _table(["run", "n", "epochs to 25 % training error, median"], rows)


def _pictures(run: Run) -> Iterable[str]:
    try:
        drawn, colour = figures.draw(run.folder), figures.colour(run.folder)
    except (AlexNetDistError, OSError) as error:
        yield f"<h2>{html.escape(run.folder.name)}</h2><p>{html.escape(str(error))}</p>"
        return
    columns = ", ".join(f"column {i}: {value:.3f}" for i, value in enumerate(colour, start=1))
    yield f"<h2>{html.escape(run.folder.name)}</h2>"
    yield f"<p>Share of conv1's kernels' energy that is colour: {columns}</p>"
    more = sorted((run.folder / "figures").glob("fig4-*.png"))
    yield "".join(_image(path) for path in (*drawn, *more))


def _image(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{encoded}"></p>'


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], raw: int = -1) -> str:
    """An HTML table; the column `raw` is HTML already."""

    def line(cells: Sequence[str], tag: str) -> str:
        inner = (
            c if place == raw and tag == "td" else html.escape(c) for place, c in enumerate(cells)
        )
        return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in inner) + "</tr>"

    return f"<table>{line(names, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _spread(errors: Sequence[float]) -> str:
    percent = [100 * error for error in errors]
    spread = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    return f"{statistics.fmean(percent):.2f}{spread}"


_STYLE = (
    "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto}td,th{padding:.2em .8em;"
    "text-align:left;border-bottom:1px solid #ddd}img{max-width:100%}</style>"
)
