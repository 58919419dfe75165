"""`report`: one self-contained HTML page of the results of runs, beside the paper's.

Runs come first, then what was published. A run is listed beside the published result whose preset
its name ends in, without the number of a seed: fm-no-lrn-2 counts as a run of paper/no-lrn. Each
row says what data it is about, so that nobody compares ten classes with a thousand.
"""

import html
import math
import re
import shlex
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_dist.config.values import as_typed
from alexnet_dist.errors import AlexNetDistError, ConfigError, counted
from alexnet_dist.plotting import MOST_CLASSES, confusion_picture, png
from alexnet_dist.reporting import figures, page
from alexnet_dist.reporting.published import PUBLISHED, preset_of
from alexnet_dist.reporting.runs import (
    Average,
    RunResults,
    Scored,
    check_replaces,
    confusion_of,
    nearest_preset,
    read_evaluated,
    recipe,
)  # fmt: skip
from alexnet_dist.training.metrics_file import accuracies

_WORST, _MISTAKES = 20, 10  # classes, and pairs of confused classes, that are shown unfolded
_NAMED = 3  # folders without an evaluated run


def _stem(run: RunResults) -> str:
    """Return a run's name without the number of its seed; a preset's own, as 2012, is none."""
    name = run.folder.name
    return name if preset_of(name) else re.sub(r"[-_]\d+$", "", name)


def _groups(runs: Sequence[RunResults]) -> dict[str, list[RunResults]]:
    """Return the runs that differ in their seed alone, by their name without its number, or where
    other runs are called so too, by the path of the first."""
    found: dict[str, dict[str, list[RunResults]]] = {}
    for run in runs:
        found.setdefault(_stem(run), {}).setdefault(recipe(run.config), []).append(run)
    return {
        stem if len(recipes) == 1 else str(alike[0].folder): alike
        for stem, recipes in found.items()
        for alike in recipes.values()
    }


def report(folders: Sequence[Path], out: Path) -> str:
    """Write the page, and return a line that says what it holds.

    Args:
        folders: run folders, and files with the output of `evaluate --json` for several networks;
            those without an evaluation are left out, and named.

    Raises ConfigError if `out` exists and is not a report, or if nothing was evaluated.
    """
    check_replaces(out, page.BEGINNING.encode(), "report")
    runs, averaged, others = read_evaluated([folder for folder in folders if folder != out])
    named = ", ".join(others[:_NAMED]) + ", …" * (len(others) > _NAMED)
    if not (runs or averaged):
        where = f" in {named}" if named else ""
        raise ConfigError(f"report: no evaluated run{where}: name run folders, as in runs/*")
    averaged += [(_average_name(one), one) for run in runs for one in run.averages]
    groups = _groups(runs)
    parts = [
        "<h1>alexnet_dist: runs, and the paper's results</h1>",
        "<p>Errors in %, with 95 % intervals in brackets; means ± deviation over n runs that "
        "differ in their seed alone. Only results on the same data can be compared.</p>",
        _all_runs(runs),
        *([_ensembles(averaged, runs)] if averaged else []),
    ]
    with tempfile.TemporaryDirectory() as aside:
        parts += [part for run in runs for part in _one_run(run, Path(aside))]
        parts += [*_ablations(groups, Path(aside)), *_fig1(groups, Path(aside))]
    parts.append(_published(groups))
    page.write(out, parts)
    left = f"; no evaluated run in {len(others)}: {named}" if others else ""
    return f"{out}: {counted(len(runs), 'run')}{left}"


def _average_name(one: Mapping[str, Any]) -> str:
    """Return what an average of several networks is called in the table."""
    names = [Path(path).parent.parent.name for path in map(str, one["of"])]
    return f"{' + '.join(names)}, {one['split']}, views-{one['views']}"


def _ensembles(averaged: Sequence[Average], runs: Sequence[RunResults]) -> str:
    """Return a table of averages of several networks, beside the mean of their own errors."""
    rows = []
    for name, average in averaged:
        folders = {str(Path(path).parent.parent) for path in map(str, average["of"])}
        alike = [
            run for run in runs
            if str(run.folder) in folders and not average.get("changed")
            and average.get("split", "") in ("", run.config.data.eval_split)
        ]  # fmt: skip
        own = _errors(alike, average.get("views", 1))
        alone = _mean_and_deviation(own) if len(own) == len(average["of"]) else "–"
        classes = average.get("classes")
        shown = accuracies(len(classes) if isinstance(classes, list) else 1000)
        errors = [_percent(1 - float(average[t])) if t in shown else "–" for t in ("top1", "top5")]
        rows.append([name, str(len(average["of"])), *errors, alone])
    names = ["average", "of", "top-1", "top-5", "their own top-1"]
    return "<h2>Averages of networks</h2>" + page.table(names, rows)


def _published(groups: Mapping[str, Sequence[RunResults]]) -> str:
    """Return a table of the published results, each beside the runs of its preset."""
    rows = []
    for row in PUBLISHED:
        ours = [
            _group_in_words(group, runs)
            for group, runs in groups.items()
            if row.preset == preset_of(_stem(runs[0])) != ""
        ]
        beside = "<br>".join(ours)
        if not beside and row.preset:
            needs = f"not among these runs: needs {row.data.split()[0]}"
            beside = f"recipe complete (paper/{row.preset}), {needs}"
        rows.append(
            [row.what, row.data, _or_dash(row.top1), _or_dash(row.top5), beside or "not ours"]
        )
    names = ["what", "data", "top-1", "top-5", "ours"]
    return "<h2>Published</h2>" + page.table(names, rows, raw=4)


def _group_in_words(group: str, runs: Sequence[RunResults]) -> str:
    """Return a group's name, data and errors for each number of views, as HTML."""
    data = html.escape(runs[0].config.data.path)
    parts = [f"{html.escape(group)} on {data}:"]
    for views in sorted({v for run in runs for v in run.views}):
        errors = _errors(runs, views)
        by = f"{counted(views, 'view')}, n = {len(errors)}"
        parts.append(f"{_mean_and_deviation(errors)} ({by})")
    unfinished = sum(run.state != "finished" for run in runs)
    return " ".join(parts) + (f" — {unfinished} not finished" if unfinished else "")


def _errors(runs: Iterable[RunResults], views: int) -> list[float]:
    """Return the top-1 errors (shares) of the runs that were scored with so many views."""
    return [1 - run.views[views].top1 for run in runs if views in run.views]


def _all_runs(runs: Sequence[RunResults]) -> str:
    """Return the table of all scores of all runs."""
    rows = []
    any_top5 = any("top5" in accuracies(run.config.model.classes) for run in runs)
    for run in runs:
        tells = accuracies(run.config.model.classes)
        for one in run.scores:
            score, network = one.score, one.which or f"step {one.step}"
            five = _with_interval(score.top5, score.top5_interval) if "top5" in tells else "–"
            errors = [_with_interval(score.top1, score.top1_interval), *[five] * any_top5]
            rows.append([
                run.folder.name, f"{network} ({one.step})", f"{one.data}, {one.split}",
                str(one.views), *errors, f"{score.correct1:,} of {score.samples:,}",
                f"{score.loss:.4f}", str(run.config.seed), run.state, one.circumstances,
            ])  # fmt: skip
    tops = ["top-1", *(["top-5"] if any_top5 else [])]
    names = ["run", "network (step)", "data, split", "views", *tops, "right", "loss",
             "seed", "state", "when, where"]  # fmt: skip
    return "<h2>Runs</h2>" + page.table(names, rows)


def _one_run(run: RunResults, aside: Path) -> Iterable[str]:
    """Yield what distinguishes a run from its nearest preset, its classes and its pictures."""
    yield f"<h2>{html.escape(run.folder.name)}</h2>"
    preset, differ = nearest_preset(run.config)
    rows = [[key, as_typed(own), as_typed(theirs)] for key, (own, theirs) in differ.items()]
    keys = page.table(["key", "here", preset], rows)
    differs = f"; it differs in:</p>{keys}" if rows else ", from which it does not differ.</p>"
    yield f"<p>The shipped config nearest to it is <b>{html.escape(preset)}</b>{differs}"
    detailed = run.detailed
    if detailed is None or detailed.kept is None:
        views = " --views 10" if run.config.ten_views_differ else ""
        yield (
            "<p>What each class came to is not known: <code>alexnet-dist evaluate "
            f"{html.escape(shlex.quote(str(run.folder)))}{views}</code></p>"
        )
    else:
        yield from _classes(detailed, detailed.kept)
    yield from _pictures(run.folder, aside)


def _classes(one: Scored, kept: Mapping[str, Any]) -> Iterable[str]:
    """Yield the accuracy by class, the worst first, and the confusion, from a saved score."""
    names = [str(row.get("name")) for row in kept["classes"]]
    counts = [(row["samples"], row["right"]) for row in kept["classes"]]
    shares = [(r / n, n, r, name) for (n, r), name in zip(counts, names, strict=True) if n]
    rows = [[name, f"{100 * share:.1f}", f"{r:,} of {n:,}"] for share, n, r, name in sorted(shares)]
    views = counted(one.views, "view")
    yield (
        f"<h3>Classes: {html.escape(one.which or f'step {one.step}')}, {html.escape(one.split)}, "
        f"{views}</h3>"
    )
    heading = ["class, the worst first", "right, %", ""]
    yield page.table(heading, rows[:_WORST])
    if len(rows) > _WORST:
        yield f"<details><summary>all {len(rows)}</summary>{page.table(heading, rows)}</details>"
    if len(names) <= MOST_CLASSES:
        yield "<p>A row a class, a column an answer, dark: often.</p>"
        yield page.inline(png(confusion_picture(confusion_of(kept), names)), "confusion")
    wrong = sorted((-count, a, b) for a, b, count in kept["confusion"] if a != b and count)
    mistakes = [[names[a], names[b], f"{-count:,}"] for count, a, b in wrong[:_MISTAKES]]
    if mistakes:
        yield page.table(["of", "taken for", "samples"], mistakes)


def _ablations(groups: Mapping[str, Sequence[RunResults]], aside: Path) -> Iterable[str]:
    """Yield a bar chart for each data set that several variants were trained on."""
    by_data: dict[tuple[str, str], dict[str, list[float]]] = {}
    for group, runs in groups.items():
        for views in sorted({v for run in runs for v in run.views}):
            label = f"{group}, {counted(views, 'view')}"
            if "fig1" not in group:
                errors, data = _errors(runs, views), runs[0].config.data
                by_data.setdefault((data.path, data.eval_split), {})[label] = errors
    for number, ((of, split), variants) in enumerate(by_data.items()):
        if len(variants) > 1:
            path = aside / f"ablations-{number}.png"
            figures.draw_ablations(variants, path)
            yield f"<h2>Variants on {html.escape(f'{of}, {split}')}</h2>{page.image(path)}"


def _fig1(groups: Mapping[str, Sequence[RunResults]], aside: Path) -> Iterable[str]:
    """Yield the curves of each activation function at its best rate, and all rates in a table."""
    chosen: dict[str, tuple[float, str, list[figures.Curve]]] = {}
    rows = []
    for group, runs in groups.items():
        preset = preset_of(_stem(runs[0]))
        if preset.startswith("fig1-"):
            curves = [figures.training_curve(run.folder) for run in runs]
            epochs = figures.epochs_to(0.25, curves)
            rows.append([group, str(len(runs)), f"{epochs:.2f}" if epochs < math.inf else "never"])
            if preset not in chosen or epochs < chosen[preset][0]:
                chosen[preset] = epochs, group, curves
    if chosen:
        best = {group: curves for _, group, curves in chosen.values()}
        figures.draw_fig1(best, aside / "fig1.png")
        yield "<h2>Fig. 1</h2>" + page.image(aside / "fig1.png")
        yield page.table(["run", "n", "epochs to 25 % training error, median"], rows)


def _pictures(folder: Path, aside: Path) -> Iterable[str]:
    """Yield a run's figures, drawn aside: the run may be another user's."""
    try:
        drawn, colour = figures.draw(folder, aside)
    except (AlexNetDistError, OSError) as error:
        yield f"<p>{html.escape(str(error))}</p>"
        return
    columns = ", ".join(f"column {i}: {value:.3f}" for i, value in enumerate(colour, start=1))
    yield f"<p>Share of conv1's kernels' energy that is colour: {columns}</p>"
    more = sorted((folder / "figures").glob("fig4-*.png"))
    yield "".join(page.image(path) for path in (*drawn, *more))


def _with_interval(share: float, interval: tuple[float, float]) -> str:
    """Return the error of a share of right answers with its 95 % interval, in %."""
    low, high = interval
    return f"{_percent(1 - share)} [{_percent(1 - high)}–{_percent(1 - low)}]"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _or_dash(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if value == round(value, 1) else f"{value:.3f}"


def _mean_and_deviation(errors: Sequence[float]) -> str:
    """Return the mean of errors (shares) in %, with the standard deviation if there are several."""
    percent = [100 * error for error in errors]
    spread = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    return f"{statistics.fmean(percent):.2f}{spread}"
