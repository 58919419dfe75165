"""One row of docs/results.jsonl: its training's arguments, and how it is trained and scored, in a
process of its own."""

import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger import ROOT, read_rows
from recipes import PARTS, Row, chosen, planned, succeeded

if TYPE_CHECKING:  # the package is imported where a row is trained: it takes seconds
    from alexnet_dist.config.schema import Config

ERRORS = (50, 25, 15)  # % of training error, in figure 1
CURVE = 8  # evaluations during a run, only for the curves
HELD_OUT, CHOICE_SEED = 0.1, 100  # of the trainings by which recipes are chosen
SMALL = (
    "train.batch=8", "train.epochs=0.4", "schedule.warmup_epochs=0", "log.every_steps=1",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where rows are trained and recorded, and how much time there is.

    Attributes:
        small: folder of small stand-ins for the data sets; networks then have an eighth of the
            maps, and runs a few steps.
    """

    rows: Path = ROOT / "docs/results.jsonl"
    runs: Path = ROOT / "runs/results"
    pictures: Path = ROOT / "docs/images"
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

    def log(self, row: Row, kind: str) -> Path:
        """Return the path of a row's output ("out", "err"), or of the time that it took so far."""
        return self.runs / "logs" / f"{row.name}.{kind}"


def sources(row: Row, done: Mapping[str, Any], bench: Bench) -> list[str] | None:
    """Return the arguments of `train` for a row; None if another row must come first.

    Args:
        done: the ledger's rows that did not fail, by name.
    """
    variant = row.variant
    keys = variant.candidates[row.candidate] if row.candidate else chosen(variant, done)
    if keys is None or any(name not in done for name in row.needs):
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
        own = Path(config_of(found).data.path).name
        found += [*SMALL, f"data.path={bench.small / own}"]
    return found


def config_of(arguments: Sequence[str]) -> "Config":
    """Return the config of a row's arguments."""
    return _loaded(tuple(arguments))


@functools.cache
def _loaded(arguments: tuple[str, ...]) -> "Config":
    from alexnet_dist.config.load import load_config

    return load_config([*arguments])


def print_row(name: str, bench: Bench) -> None:
    """Train and score a row, and print its figures as JSON, with the seconds that it took in all,
    earlier attempts included."""
    row = next(row for row in planned(PARTS, bench.small is not None) if row.name == name)
    arguments = sources(row, succeeded(read_rows(bench.rows)), bench)
    assert arguments is not None
    spent, begin = bench.log(row, "seconds"), time.monotonic()
    before = float(spent.read_text()) if spent.exists() else 0.0
    try:
        found = averaged(row, bench) if row.of else trained(row, arguments, bench)
    finally:
        seconds = before + time.monotonic() - begin
        spent.write_text(f"{seconds}")
    print(json.dumps({**found, "seconds": round(seconds, 1)}))


def trained(row: Row, arguments: Sequence[str], bench: Bench) -> dict[str, Any]:
    """Train a row, or resume it, score it, and return its figures. Exits if it is stopped; the same
    call resumes."""
    from alexnet_dist.errors import NotFinite
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
    from alexnet_dist.reporting import figures
    from alexnet_dist.training.loop import train

    # Train, with an evaluation at the end, and a few before it where a curve is drawn.
    config = config_of(arguments)
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
        outcome = train(config_of([*arguments, *more]))
    except NotFinite as error:
        return {"diverged": str(error)}
    if outcome.exit:
        sys.exit(outcome.exit)
    # Score: with one view as training did last, and with ten; or by the epochs to an error.
    folder = bench.runs / row.name
    found: dict[str, Any] = {"steps": outcome.step, "scores": {}, **_curves(folder)}
    found["split"] = config.data.eval_split
    if outcome.score is not None:
        found["scores"]["1"] = _percent(outcome.score)
    if not row.candidate and not row.variant.by_training:
        ten = evaluate_checkpoints([_last(folder)], ["evaluate.views=10"], keep=False)
        found["scores"]["10"] = _percent(ten.score)
    if row.variant.by_training:
        curve = figures.training_curve(folder)
        to = {f"{e}": figures.epochs_to(e / 100, [curve]) for e in ERRORS}
        found["epochs_to"] = {e: None if math.isinf(at) else round(at, 2) for e, at in to.items()}
    figures.draw(folder)
    return found


def averaged(row: Row, bench: Bench) -> dict[str, Any]:
    """Score the average of other rows' last networks."""
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints

    last = [_last(bench.runs / name) for name in row.of]
    every = {v: evaluate_checkpoints(last, [f"evaluate.views={v}"]) for v in (1, 10)}
    return {"scores": {f"{views}": _percent(found.score) for views, found in every.items()}}


def _last(folder: Path) -> Path:
    """Return a run's last checkpoint; the best was chosen on the split that scores it."""
    from alexnet_dist.checkpoint import store

    return max(store.steps(folder / "checkpoints"), key=store.step_of)


def _percent(score: Any) -> dict[str, float]:
    """Return a score in %."""
    return {"top1": round(100 * score.top1, 3), "top5": round(100 * score.top5, 3),
            "samples": score.samples}  # fmt: skip


def _curves(run: Path) -> dict[str, Any]:
    """Return training error by epoch (at most 40 points), errors and colour by evaluation,
    and speed."""
    from alexnet_dist.reporting.figures import by_epoch, training_curve
    from alexnet_dist.training.metrics_file import read_metrics

    points = read_metrics(run)
    errors = [[math.ceil(at), round(100 * error, 2)] for at, error in by_epoch(training_curve(run))]
    thin = -(-len(errors) // 40)
    evaluated = [point for point in points if point["kind"] == "eval"]
    found = {
        "training": errors[::-thin][::-1],
        "training_error": errors[-1][1],
        "evaluated": [[round(p["epoch"], 2), round(100 * p["top1"], 2)] for p in evaluated],
        "colour": [
            [round(p["epoch"], 2), *(round(p[f"chroma_{c}"], 3) for c in (1, 2))]
            for p in evaluated if "chroma_2" in p
        ],
    }  # fmt: skip
    speeds = [point["images_per_s"] for point in points if point["kind"] == "speed"]
    return found | ({"images_per_s": round(statistics.median(speeds), 1)} if speeds else {})
