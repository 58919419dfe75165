"""One self-contained HTML page: the paper's results, and beside them what runs here came to.

Runs come first, what was published after them. A run counts for the preset that its name ends in, a
seed's number left off: fm-no-lrn-2 is a run of paper/no-lrn. What each was trained on stands in its
row, so that nobody compares ten classes with a thousand.
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

from alexnet_dist.errors import AlexNetDistError, printable
from alexnet_dist.files import json_object, read_bytes, written_aside
from alexnet_dist.plotting import MOST_CLASSES, confusion_picture, png
from alexnet_dist.reporting import figures
from alexnet_dist.reporting.runs import (
    RunRead,
    Scored,
    confusion_of,
    nearest_preset,
    read_run_folder,
)  # fmt: skip

_WORST, _MISTAKES = 20, 10  # rows of classes and of mistakes that are shown at once


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


def _group(run: RunRead) -> str:
    """A run's name without a seed's number."""
    return re.sub(r"[-_]\d+$", "", run.folder.name)


def _preset(group: str) -> str:
    """The preset of PUBLISHED that a group's name ends in, or none."""
    known = {row.preset for row in PUBLISHED} - {""}
    return max((p for p in known if group == p or group.endswith(f"-{p}")), key=len, default="")


def report(folders: Sequence[Path], out: Path) -> str:
    """Write the page of these run folders; what was done, in a line.

    Files are what `evaluate --json` said of several runs. What holds no evaluated run is passed
    over, and counted.
    """
    folders = [folder for folder in folders if folder != out]
    averaged = [found for path in folders if (found := _averaged(path)) is not None]
    files = len(averaged)
    read = (read_run_folder(folder) for folder in folders)
    runs = sorted((run for run in read if run and run.scores), key=lambda run: run.folder.name)
    averaged += [(_average_name(one), one) for run in runs for one in run.averages]
    groups: dict[str, list[RunRead]] = {}
    for run in runs:
        groups.setdefault(_group(run), []).append(run)
    parts = [
        "<h1>alexnet_dist: runs, and the paper's results</h1>",
        "<p>Errors in %, in brackets 95 % intervals; means ± deviation over n runs. Only equal "
        "data can be compared.</p>",
        _all_runs(runs),
        *([_ensembles(averaged, runs)] if averaged else []),
    ]
    with tempfile.TemporaryDirectory() as aside:
        parts += [part for run in runs for part in _one_run(run)]
        parts += [*_ablations(groups, Path(aside)), *_fig1(groups, Path(aside))]
    parts.append(_published(groups))
    page = "\n".join(parts)
    page = f"<!doctype html><meta charset=utf-8><title>Report</title>{_STYLE}\n{page}\n"
    with written_aside(out) as aside:
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    over = len(folders) - len(runs) - files
    return f"{out}: {len(runs)} runs" + (f"; {over} hold no evaluated run" if over else "")


def _averaged(path: Path) -> tuple[str, Mapping[str, Any]] | None:
    """The name and content of a file that `evaluate --json` wrote of several checkpoints."""
    try:
        found = json_object(read_bytes(path))
        several = len([Path(one) for one in found["of"]]) > 1
        several &= 0 <= found["top1"] <= 1 and 0 <= found["top5"] <= 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (path.stem, found) if several else None


def _average_name(one: Mapping[str, Any]) -> str:
    names = [Path(path).parent.parent.name for path in map(str, one["of"])]
    return f"{' + '.join(names)}, {one['split']}, views-{one['views']}"


def _ensembles(averaged: Sequence[tuple[str, Mapping[str, Any]]], runs: Sequence[RunRead]) -> str:
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


def _published(groups: Mapping[str, Sequence[RunRead]]) -> str:
    """Every published row, with ours beside it."""
    rows = []
    for row in PUBLISHED:
        ours = [runs for group, runs in groups.items() if row.preset == _preset(group) != ""]
        said = "<br>".join(_said(runs) for runs in ours)
        if not said and row.preset:
            said = f"recipe complete (paper/{row.preset}), not run: needs {row.data.split()[0]}"
        rows.append([row.what, row.data, _number(row.top1), _number(row.top5), said or "not ours"])
    return "<h2>Published</h2>" + _table(["what", "data", "top-1", "top-5", "ours"], rows, raw=4)


def _said(runs: Sequence[RunRead]) -> str:
    """A group in words: its name, data, errors by views."""
    data = html.escape(runs[0].config.data.path)
    found = [f"{html.escape(_group(runs[0]))} on {data}, n = {len(runs)}:"]
    for views in sorted({v for run in runs for v in run.views}):
        errors = _errors(runs, views)
        found.append(f"{_spread(errors)} ({views} view{'s' * (views > 1)})")
    unfinished = sum(run.state != "finished" for run in runs)
    return " ".join(found) + (f" — {unfinished} not finished" if unfinished else "")


def _errors(runs: Iterable[RunRead], views: int) -> list[float]:
    return [1 - run.views[views].top1 for run in runs if views in run.views]


def _all_runs(runs: Sequence[RunRead]) -> str:
    rows = []
    for run in runs:
        for one in run.scores:
            score, network = one.score, one.which or f"step {one.step}"
            first, five = (
                f"{100 * (1 - share):.2f} [{100 * (1 - high):.2f}–{100 * (1 - low):.2f}]"
                for share, (low, high) in (
                    (score.top1, score.top1_interval), (score.top5, score.top5_interval),
                )
            )  # fmt: skip
            rows.append([
                run.folder.name, f"{network} ({one.step})", f"{one.data}, {one.split}",
                str(one.views), first, five, f"{score.correct1:,} of {score.samples:,}",
                f"{score.loss:.4f}", str(run.config.seed), run.state, one.told,
            ])  # fmt: skip
    names = ["run", "network (step)", "data, split", "views", "top-1", "top-5", "right", "loss",
             "seed", "state", "when, where"]  # fmt: skip
    return "<h2>Runs</h2>" + _table(names, rows)


def _one_run(run: RunRead) -> Iterable[str]:
    """What it was, which classes it knows, what it takes for what, and its pictures."""
    yield f"<h2>{html.escape(run.folder.name)}</h2>"
    preset, differ = nearest_preset(run.config)
    rows = [[key, str(own), str(theirs)] for key, (own, theirs) in differ.items()]
    what = f"The shipped config nearest to it is <b>{html.escape(preset)}</b>"
    yield (
        f"<p>{what}; it differs in:</p>" + _table(["key", "here", preset], rows)
        if rows
        else (f"<p>{what}, from which it does not differ.</p>")
    )
    detailed = run.detailed
    if detailed is None or detailed.kept is None:
        yield (
            "<p>What each class came to is not known: <code>alexnet-dist evaluate "
            f"{html.escape(str(run.folder))} --views 10</code></p>"
        )
    else:
        yield from _classes(detailed, detailed.kept)
    yield from _pictures(run.folder)


def _classes(one: Scored, kept: Mapping[str, Any]) -> Iterable[str]:
    """Accuracy by class, the worst first, and confusion, of a score that was kept."""
    confusion, names = confusion_of(kept)
    counts, right = confusion.sum(1).tolist(), confusion.diag().tolist()
    shares = [(r / n, n, r, name) for n, r, name in zip(counts, right, names, strict=True) if n]
    rows = [[name, f"{100 * share:.1f}", f"{r:,} of {n:,}"] for share, n, r, name in sorted(shares)]
    views = f"{one.views} view{'s' * (one.views > 1)}"
    yield (
        f"<h3>Classes: {html.escape(one.which or f'step {one.step}')}, {html.escape(one.split)}, "
        f"{views}</h3>"
    )
    heading = ["class, the worst first", "right, %", ""]
    yield _table(heading, rows[:_WORST])
    if len(rows) > _WORST:
        yield f"<details><summary>all {len(rows)}</summary>{_table(heading, rows)}</details>"
    if len(names) <= MOST_CLASSES:
        yield "<p>A row a class, a column an answer, dark: often.</p>"
        yield _inline(png(confusion_picture(confusion, names)), "confusion")
    wrong = confusion - confusion.diag().diag()
    worst = [divmod(place, len(names)) for place in wrong.flatten().topk(
        min(_MISTAKES, wrong.numel())).indices.tolist()]  # fmt: skip
    mistakes = [[names[a], names[b], f"{int(wrong[a, b]):,}"] for a, b in worst if wrong[a, b]]
    if mistakes:
        yield _table(["of", "taken for", "samples"], mistakes)


def _ablations(groups: Mapping[str, Sequence[RunRead]], aside: Path) -> Iterable[str]:
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


def _fig1(groups: Mapping[str, Sequence[RunRead]], aside: Path) -> Iterable[str]:
    """The curves of each kind of unit at the rate that serves it best, and all rates in a table."""
    chosen: dict[str, tuple[float, str, list[Path]]] = {}
    rows = []
    for group, runs in groups.items():
        preset, folders = _preset(group), [run.folder for run in runs]
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


def _pictures(folder: Path) -> Iterable[str]:
    try:
        drawn, colour = figures.draw(folder), figures.colour(folder)
    except (AlexNetDistError, OSError) as error:
        yield f"<p>{html.escape(str(error))}</p>"
        return
    columns = ", ".join(f"column {i}: {value:.3f}" for i, value in enumerate(colour, start=1))
    yield f"<p>Share of conv1's kernels' energy that is colour: {columns}</p>"
    more = sorted((folder / "figures").glob("fig4-*.png"))
    yield "".join(_image(path) for path in (*drawn, *more))


def _image(path: Path) -> str:
    return _inline(read_bytes(path), path.stem)


def _inline(png: bytes, name: str) -> str:
    encoded = base64.b64encode(png).decode()
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{encoded}"></p>'


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], raw: int = -1) -> str:
    """An HTML table; the column `raw` is HTML already."""

    def line(cells: Sequence[str], tag: str) -> str:
        inner = (
            c if place == raw and tag == "td" else html.escape(printable(c))
            for place, c in enumerate(cells)
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
    "<style>body{font:15px sans-serif;max-width:90em;margin:2em auto}td,th{padding:.2em .8em;"
    "text-align:left;border-bottom:1px solid #ddd}img{max-width:100%}</style>"
)
