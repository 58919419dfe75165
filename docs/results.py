"""The paper on data that anyone can have: runs, with a row each in docs/results.jsonl; and the
tables in docs/results.md.

    python docs/results.py [PART ...] [--within SECONDS]    (make results)
    python docs/results.py --document                       (make docs)

A row that is in the ledger is skipped; one that was stopped goes on, one that failed is tried
again. Rows whose data set is not here are left out. A recipe with candidates is chosen first: each
candidate is trained on nine tenths of the training images and scored on the tenth held out; figure
1's learning rates are chosen by training error. Then, seed by seed, the last checkpoint is scored
on the published split, with one view and with ten. Runs are in runs/results.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger
from ledger import ROOT, append_row, between, commit_of, read_rows
from recipes import BY_NAME, PARTS, VARIANTS, Row, Variant, chosen, merit, planned

ROWS, PAGE, RUNS = ROOT / "docs/results.jsonl", ROOT / "docs/results.md", ROOT / "runs/results"
PICTURES, README = ROOT / "docs/images", ROOT / "README.md"
FRONT = "<!-- made by make docs from docs/results.jsonl -->\n"
MEASURED = ("alexnet_dist", "configs", "docs/recipes.py", "docs/results.py")
BEGIN, END = "<!-- made by make docs from results.jsonl -->\n", "<!-- to here -->\n"
START_S = 45  # a row's time besides training: imports, hashes, decoding, kernels, ten views
GRACE_S = 60  # in which to save and end
CURVE = 8  # evaluations during a run, only for the curves
ERRORS = (50, 25, 15)  # %, in figure 1
HELD_OUT, CHOICE_SEED = 0.1, 100
SMALL = (
    "train.batch=8", "train.epochs=0.4", "schedule.warmup_epochs=0", "log.every_steps=1",
)  # fmt: skip


def sources(row: Row, done: Mapping[str, Any], bench: "Bench") -> list[str] | None:
    """Return the arguments of `train` for a row; None if another row must come first."""
    variant = row.variant
    keys = variant.candidates[row.candidate] if row.candidate else chosen(variant, done)
    needed = [*row.of, *([variant.begins] if variant.begins else [])]
    if keys is None or any(name not in done for name in needed):
        return None
    found = [*variant.sources, *keys, *variant.last]
    if variant.begins:
        found.append(f"train.init_from={bench.shown(variant.begins)}")
    if row.candidate:
        found += variant.brief
        if not variant.by_training:
            found += [f"data.hold_out={HELD_OUT}", "data.eval_split=held_out"]
    seed = CHOICE_SEED if row.candidate else row.seed
    found.append(f"seed={seed}")
    if bench.small:
        own = Path(_config(found).data.path).name
        found += [*SMALL, f"data.path={bench.small / own}"]
    return found


# --- a row, in a process of its own


def trained(row: Row, given: Sequence[str], bench: "Bench") -> dict[str, Any]:
    """Train a row, or resume it, score it, and return its figures. Exits if it is stopped; the same
    call resumes."""
    from alexnet_dist.config.load import load_config
    from alexnet_dist.errors import NotFinite
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
    from alexnet_dist.reporting import figures
    from alexnet_dist.training.loop import train
    from alexnet_dist.training.metrics_file import read_metrics

    config = load_config([*given])
    every = config.train.epochs / (1 if row.candidate else CURVE)
    more = [
        f"name={row.name}",
        f"output_dir={bench.runs}",
        "log.to=[]",
        f"evaluate.every_epochs={every}",
    ]
    if bench.small:
        conv = [max(4, maps // 8) for maps in config.model.conv]
        units = [units // 64 for units in config.model.fc]
        more += [f"model.conv={conv}", f"model.fc={units}"]
    try:
        outcome = train(load_config([*given, *more]))
    except NotFinite as error:
        return {"diverged": str(error)}
    if outcome.exit:
        sys.exit(outcome.exit)
    folder = bench.runs / row.name
    last = _last(folder)
    points = read_metrics(folder)
    found: dict[str, Any] = {"steps": outcome.step, "scores": {}, **_curves(points)}
    found["split"] = config.data.eval_split
    if outcome.score is not None:
        found["scores"]["1"] = _score(outcome.score)
    if not row.candidate and not row.variant.by_training:
        ten = evaluate_checkpoints([last], ["evaluate.views=10"])
        found["scores"]["10"] = _score(ten.score)
    if row.variant.by_training:
        to = {f"{e}": figures.epochs_to(e / 100, [folder]) for e in ERRORS}
        found["epochs_to"] = {e: None if math.isinf(at) else round(at, 2) for e, at in to.items()}
    figures.draw(folder)
    return found


def _last(folder: Path) -> Path:
    """Return a run's last checkpoint; the best was chosen on the split that scores it."""
    from alexnet_dist.checkpoint import store

    return max(store.steps(folder / "checkpoints"), key=store.step_of)


def averaged(row: Row, bench: "Bench") -> dict[str, Any]:
    """Score the average of other rows' last networks."""
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints

    last = [_last(bench.runs / name) for name in row.of]
    every = {v: evaluate_checkpoints(last, [f"evaluate.views={v}"]) for v in (1, 10)}
    return {"scores": {f"{views}": _score(found.score) for views, found in every.items()}}


def _score(score: Any) -> dict[str, float]:
    """Return a score in %."""
    return {"top1": round(100 * score.top1, 3), "top5": round(100 * score.top5, 3),
            "samples": score.samples}  # fmt: skip


def _curves(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return training error by epoch (at most 40 points), errors and colour by evaluation,
    and speed."""
    train = [point for point in points if point["kind"] == "train"]
    by_epoch: dict[int, list[float]] = {}
    for point in train:
        by_epoch.setdefault(math.ceil(point["epoch"]), []).append(100 * (1 - point["top1"]))
    errors = {epoch: round(statistics.fmean(found), 2) for epoch, found in by_epoch.items()}
    thin = -(-len(errors) // 40) or 1
    evaluated = [point for point in points if point["kind"] == "eval"]
    found = {
        "training": [[e, v] for e, v in errors.items()][::-thin][::-1],
        "training_error": [*errors.values()][-1],
        "evaluated": [[round(p["epoch"], 2), round(100 * p["top1"], 2)] for p in evaluated],
        "colour": [
            [round(p["epoch"], 2), *(round(p[f"chroma_{c}"], 3) for c in (1, 2))]
            for p in evaluated if "chroma_2" in p
        ],
    }  # fmt: skip
    speeds = [point["images_per_s"] for point in points if point["kind"] == "speed"]
    return found | ({"images_per_s": round(statistics.median(speeds), 1)} if speeds else {})


# --- all rows


@dataclass(frozen=True)
class Bench:
    """Where rows are trained and recorded, and how much time there is.

    Attributes:
        small: folder of small stand-ins for the data sets; networks then have an eighth of the
            maps, and runs a few steps.
    """

    rows: Path = ROWS
    runs: Path = RUNS
    pictures: Path = PICTURES
    commit: str = ""
    within: float = math.inf
    small: Path | None = None

    @classmethod
    def of(cls, small: Path | None, **more: Any) -> "Bench":
        """Return where results go, or, for a check that all rows run, the folder `small`."""
        if small is None:
            return cls(**more)
        return cls(small / "results.jsonl", small / "runs", small, small=small, **more)

    def shown(self, run: str) -> str:
        """Return a run's folder as a command line names it."""
        return os.path.relpath(self.runs / run, ROOT)


def measure(parts: Sequence[str], bench: Bench) -> bool:
    """Train and score the missing rows that fit into the time; return whether none failed."""
    end, sound, machine = time.monotonic() + bench.within - GRACE_S, True, _machine()
    left, tried = planned(parts, bench.small is not None), set[str]()
    while True:
        rows = read_rows(bench.rows)
        done = _done(rows)
        left = [row for row in left if row.name not in done and row.name not in tried]
        why = {row.name: _hindered(row, done, bench) for row in left}
        lasting = end - time.monotonic()
        for row in (row for row in left if not why[row.name]):
            takes = _expected(row, rows, machine, bench)
            if takes > lasting:
                why[row.name] = f"it may take {takes:.0f} s"
        fit = [row for row in left if not why[row.name]]
        if not fit:
            break
        first = fit[0].variant
        batch = [row for row in fit if row.variant.part == first.part][: _at_once(first)]
        tried |= {row.name for row in batch}
        with contextlib.ExitStack() as ending:
            processes = [ending.enter_context(_started(row, bench)) for row in batch]
            for row, process in zip(batch, processes, strict=True):
                failed = ledger.failed(process, min(end - time.monotonic(), 1e7))
                sound &= _kept(row, failed, done, machine, bench)
    for row in left:
        print(f"{row.name}: left: {why[row.name]}")
    _draw_fig1(bench)
    return sound


def _at_once(variant: Variant) -> int:
    """Return how many rows of a variant's part run together: each uses two cores."""
    from alexnet_dist.parallel.device import cores

    return max(1, min(variant.together, cores() // 2))


def _done(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the rows that succeeded, by name."""
    return {row["row"]: row for row in rows if "failed" not in row}


def _machine() -> str:
    """Return the name of what trains here."""
    from alexnet_dist.parallel.device import machine

    found = machine()
    return found["gpu"] or f"{found['cores']} cores of {found['cpu']}"


def _hindered(row: Row, done: Mapping[str, Any], bench: Bench) -> str:
    """Return why a row cannot be trained yet; "" if it can."""
    given = sources(row, done, bench)
    needed = [*row.of, *([row.variant.begins] if row.variant.begins else [])]
    if given is None:
        return "the run it is chosen by, starts from or averages is missing"
    if gone := [name for name in needed if not (bench.runs / name / "checkpoints").exists()]:
        return (
            f"{gone[0]}'s network is missing, and its row in {bench.rows.name} keeps it from being "
            "trained again"
        )
    path = Path(_config(given).data.path)
    there = (ROOT / path / "dataset.json").exists()
    return "" if there else f"{path} is missing: docs/results.md says how to make it"


def _config(given: Sequence[str]) -> Any:
    """Return the config of a row's arguments."""
    return _loaded(tuple(given))


@functools.cache
def _loaded(given: tuple[str, ...]) -> Any:
    from alexnet_dist.config.load import load_config

    return load_config([*given])


def _expected(row: Row, rows: Sequence[Mapping[str, Any]], machine: str, bench: Bench) -> float:
    """Return the seconds that a row may take, by the speed of its part's last row on this
    machine."""
    given = sources(row, _done(rows), bench)
    if row.of or given is None:
        return START_S
    config, same = _config(given), (row.variant.part, machine)
    found = [one["images_per_s"] for one in rows
             if (one["part"], one["machine"]) == same and "images_per_s" in one]  # fmt: skip
    meta = json.loads((ROOT / config.data.path / "dataset.json").read_text())
    images = meta["splits"][config.data.train_split]["samples"] * (1 - config.data.hold_out)
    return START_S + config.train.epochs * images / (found[-1] if found else row.variant.speed)


def _log(row: Row, kind: str, bench: Bench) -> Path:
    """Return the path of a row's output."""
    return bench.runs / "logs" / f"{row.name}.{kind}"


def _started(row: Row, bench: Bench) -> contextlib.AbstractContextManager[Any]:
    """Start a row in a process of its own."""
    print(f"{row.name}: starts", flush=True)
    _log(row, "out", bench).parent.mkdir(parents=True, exist_ok=True)
    small = ["--small", str(bench.small)] if bench.small else []
    command = [sys.executable, __file__, "--row", row.name, *small]
    return ledger.started(command, _log(row, "out", bench), _log(row, "err", bench), GRACE_S)


def one_row(name: str, bench: Bench) -> None:
    """Train and score a row, and print its figures as JSON."""
    row = next(row for row in planned(PARTS, bench.small is not None) if row.name == name)
    given = sources(row, _done(read_rows(bench.rows)), bench)
    assert given is not None
    spent, begin = _log(row, "seconds", bench), time.monotonic()
    before = float(spent.read_text()) if spent.exists() else 0.0
    try:
        found = averaged(row, bench) if row.of else trained(row, given, bench)
    finally:
        seconds = before + time.monotonic() - begin
        spent.write_text(f"{seconds}")
    print(json.dumps({**found, "seconds": round(seconds, 1)}))


def _kept(row: Row, failed: str, done: Mapping[str, Any], machine: str, bench: Bench) -> bool:
    """Record a row that has ended; return False if it failed."""
    if failed.startswith("not done"):
        print(f"{row.name}: stopped; run the same command to continue", flush=True)
        return True
    given = sources(row, done, bench) or []
    command = ["evaluate", *map(bench.shown, row.of)] if row.of else ["train", *given]
    about = {"row": row.name, "part": row.variant.part, "variant": row.variant.name,
             "seed": row.seed, "candidate": row.candidate, "machine": machine,
             "commit": bench.commit, "command": " ".join(["alexnet-dist", *command])}  # fmt: skip
    try:
        if failed:
            said = _log(row, "err", bench).read_text(errors="replace").strip().splitlines()
            raise ValueError(f"{failed}: {[' ', *said][-1][-400:]}")
        found = json.loads(_log(row, "out", bench).read_text().splitlines()[-1])
    except (ValueError, IndexError) as error:
        append_row(bench.rows, about | {"failed": f"{error}"})
        print(f"{row.name}: failed: {error}", flush=True)
        return False
    append_row(bench.rows, about | found)
    print(f"{row.name}: {found['seconds']:.0f} s; {_told(found)}", flush=True)
    if row.variant.average and not row.candidate and not row.of:  # the page shows its kernels
        kernels = bench.runs / row.name / "figures/kernels.png"
        shutil.copy(kernels, bench.pictures / f"results-{row.name}-kernels.png")
    if not _needed_later(row):
        shutil.rmtree(bench.runs / row.name / "checkpoints", ignore_errors=True)
    return True


def _needed_later(row: Row) -> bool:
    """Return whether another row needs this one's network; a checkpoint takes half a gigabyte."""
    begun_from = {variant.begins for variant in VARIANTS}
    return (row.variant.average and not row.candidate) or row.name in begun_from


def _told(found: Mapping[str, Any]) -> str:
    """Return a row's figures in words."""
    if "diverged" in found:
        return f"diverged: {found['diverged']}"
    told = [f"{score['top1']:.2f} % with {'one view' if views == '1' else f'{views} views'}"
            for views, score in found["scores"].items()]  # fmt: skip
    if "epochs_to" in found:
        at = found["epochs_to"]["25"]
        told.append("25 % training error " + ("never" if at is None else f"after {at} epochs"))
    return ", ".join(told)


def _draw_fig1(bench: Bench) -> None:
    """Draw figure 1 from the runs that are here."""
    from alexnet_dist.reporting.figures import draw_fig1

    there: dict[str, list[Path]] = {}
    for variant in VARIANTS:
        folders = [bench.runs / f"{variant.name}-{seed}" for seed in range(variant.seeds)]
        found = [folder for folder in folders if (folder / "metrics.jsonl").exists()]
        if variant.by_training and found:
            there[variant.told] = found
    if there:
        draw_fig1(there, bench.pictures / "results-fig1.png")


# --- the page


TITLES = {
    "tiny-imagenet": ("Tiny ImageNet", "Wanted: 45 % right or more."),
    "fig1": ("Figure 1: CIFAR-10 with ReLU, tanh and logistic units",
             "Published: 25 % of training error in a sixth of tanh's epochs."),
    "cifar10": ("CIFAR-10", "Wanted: 90 % right or more with ten views."),
    "imagenette": ("Imagenette",
                   "Wanted: 86 % right or more with ten views, from nothing."),
    "lrn": ("Response normalisation in four layers, CIFAR-10",
            "Published: 87 % right without, 89 % with it."),
    "fashion-mnist": ("Fashion-MNIST", "Wanted: 93.5 % right or more with ten views."),
    "review": ("A third party's notebook, CIFAR-10", "Its 15 epochs, scored on all test images."),
    "ablations": ("Ablations, Tiny ImageNet", "12 epochs each; what the paper has is above."),
}  # fmt: skip


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's section for each part."""
    done = _done(rows)
    return "\n".join(line for part in PARTS for line in _section(part, [*done.values()]))


def _section(part: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a part's section."""
    title, aim = TITLES[part]
    own = [row for row in rows if row["part"] == part]
    yield f"\n### {title}\n\n`make results PARTS={part}`. {aim}\n"
    if not own:
        yield "Not yet run."
        return
    by_training = any(variant.by_training for variant in VARIANTS if variant.part == part)
    trained = [row for row in own if not row["candidate"]]
    if trained:
        yield _head("", "n", *([f"epochs to {error} %" for error in ERRORS] if by_training else
                               ["one view, %", "top-5", "ten views, %", "top-5"]),
                    "minutes a run", "where")  # fmt: skip
    for variant in VARIANTS:
        found = [row for row in trained if row["variant"] == variant.name]
        average = [row for row in found if row["row"] == f"{variant.name}-average"]
        alone = [row for row in found if row not in average]
        for told, some in ((variant.told, alone), ("the average of them", average)):
            if some:
                cells = _epochs(some) if by_training else _scores(some)
                minutes = statistics.fmean(row["seconds"] for row in some) / 60
                yield _line(told, len(alone), *cells, f"{minutes:.1f}", _where(some))
    yield from _choices(part, own)
    yield from _colours(trained)
    yield from _commands(trained)


def _head(*cells: object) -> str:
    """Return a table's heading."""
    return f"{_line(*cells)}\n{_line(*('---' for _ in cells))}"


def _line(*cells: object) -> str:
    """Return a table's row."""
    return f"| {' | '.join(map(str, cells))} |"


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, and the standard deviation over seeds."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _scores(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of errors."""
    for views in ("1", "10"):
        for top in ("top1", "top5"):
            found = [row["scores"][views][top] for row in rows if views in row.get("scores", {})]
            yield _spread(found) if found else "diverged"


def _epochs(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of epochs to some training errors."""
    for error in ERRORS:
        every = [row.get("epochs_to", {}).get(f"{error}") for row in rows]
        yield "never" if None in every else _spread(every, 1)


def _where(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say when and on what rows were measured."""
    return "; ".join(dict.fromkeys(f"{row['machine']}, {row['commit']}, {row['date']}"
                                   for row in rows))  # fmt: skip


def _choices(part: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what was chosen among the candidates."""
    for variant in (variant for variant in VARIANTS if variant.part == part):
        found = [row for row in rows if row["candidate"] and row["variant"] == variant.name]
        if not found:
            continue
        by = "training error" if variant.by_training else "a tenth of the training images held out"
        best = max(found, key=lambda row: merit(variant, row))
        whole = len(found) == len(variant.candidates)
        each = [
            f"{row['candidate']}: {'diverged' if 'diverged' in row else _told(row)}"
            + (" (taken)" if whole and row is best else "")
            for row in found
        ]
        told = "; ".join(each)
        yield f"\nChosen for {variant.told} by {by} ({_where(found)}): {told}."


def _colours(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the colour of each column's conv1 kernels, for networks whose kernels are shown."""
    found = [row for row in rows if row.get("colour") and BY_NAME[row["variant"]].average]
    if found:
        yield "\nColour, a share of the energy of each column's first kernels (of noise 2/3):\n"
        yield _head("seed", "by epoch: first column, second", "kernels, a column above the other")
    for row in found:
        told = "; ".join(f"{epoch:g}: {one:.2f}, {two:.2f}" for epoch, one, two in row["colour"])
        picture = f"images/results-{row['row']}-kernels.png"
        yield _line(row["seed"], told, f"![kernels of seed {row['seed']}]({picture})")


def _commands(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the commands of the rows."""
    first = {row["variant"]: row for row in reversed(rows) if row["command"].split()[1] == "train"}
    if first:
        yield "\n```bash"
        for variant in (variant for variant in VARIANTS if variant.name in first):
            yield first[variant.name]["command"]
        yield "```"


def front(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the README's table: the paper's network on each data set."""
    lines = [_head("the paper's network, right with ten views, on", "%", "n", "where")]
    for variant in (variant for variant in VARIANTS if variant.name == variant.part):
        found = [row for row in _done(rows).values() if row["variant"] == variant.name
                 and not row["candidate"] and "10" in row.get("scores", {})]  # fmt: skip
        alone = [row for row in found if row["row"] != f"{variant.name}-average"]
        title, _ = TITLES[variant.part]
        if alone:
            score = _spread([row["scores"]["10"]["top1"] for row in alone])
            lines.append(_line(title, score, len(alone), _where(alone)))
    every = "[Every row](docs/results.md#trainings-on-what-can-be-had)"
    if len(lines) == 1:
        return f"{every} of `make results` waits for a GPU."
    return "\n".join([*lines, "", f"{every}."])


def documented(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with its tables made from the rows."""
    return between(page, BEGIN, END, tables(rows))


def introduced(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the README with its table made from the rows."""
    return between(page, FRONT, END, front(rows))


def main() -> int:
    """Train, or write the page; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="*", help=f"one or more of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--commit", help="the commit that is measured (default: git's)")
    parser.add_argument(
        "--within", type=float, default=math.inf, help="stop after this many seconds"
    )
    parser.add_argument(
        "--small", type=Path, metavar="FOLDER",
        help="try all rows on small data sets, with an eighth of each network, for a few steps",
    )  # fmt: skip
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument(
        "--document", action="store_true", help="only write the tables of the pages"
    )
    options = parser.parse_args()
    if unknown := {*options.part} - {*PARTS}:
        parser.error(f"{', '.join(sorted(unknown))}: a part is one of {', '.join(PARTS)}")
    if options.document:
        PAGE.write_text(documented(PAGE.read_text(), read_rows(ROWS)))
        README.write_text(introduced(README.read_text(), read_rows(ROWS)))
        return 0
    small = options.small and options.small.resolve()
    if options.row:
        one_row(options.row, Bench.of(small))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which also ends what was started
    try:
        commit = options.commit or commit_of(*MEASURED)
    except (OSError, subprocess.CalledProcessError):
        sys.exit("git cannot say which commit this is: name it, COMMIT=NAME")
    bench = Bench.of(small, commit=commit, within=options.within)
    return 0 if measure(options.part or PARTS, bench) else 1


if __name__ == "__main__":
    sys.exit(main())
