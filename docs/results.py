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
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
from ledger import ROOT, Rows, append_row, commit_of, parse_parts, part_parser, read_rows
from recipes import BY_NAME, PARTS, VARIANTS, Row, Variant, planned, succeeded
from results_page import PAGES, in_words, two_columns
from results_row import Bench, config_of, print_row, sources

MEASURED = ("alexnet_dist", "configs", "docs/recipes.py", "docs/results.py", "docs/results_row.py")
START_S = 45  # a row's time besides training: imports, hashes, decoding, kernels, ten views
GRACE_S = 60  # in which to save and end


def measure(parts: Sequence[str], bench: Bench) -> bool:
    """Train and score the missing rows that fit into the time; return whether none failed."""
    end, sound = time.monotonic() + bench.within - GRACE_S, True
    left, running = planned(parts, bench.small is not None), list[_Running]()
    with contextlib.ExitStack() as endings:
        while True:
            # Which rows are missing, and what hinders each: others that come first, data, or time.
            rows = read_rows(bench.rows)
            done = succeeded(rows)
            left = [row for row in left if row.name not in done]
            obstacles = {row.name: _obstacle(row, done, bench) for row in left}
            time_left = end - time.monotonic()
            for row in (row for row in left if not obstacles[row.name]):
                if (takes := _expected_s(row, rows, bench)) > time_left:
                    obstacles[row.name] = f"it may take {takes:.0f} s"
            # Start the first that fits, and beside it more of its part if its networks are small.
            for row in [row for row in left if not obstacles[row.name]]:
                if cores := _free_cores(row.variant, running):
                    ending = endings.enter_context(contextlib.ExitStack())
                    process = ending.enter_context(_started(row, cores, bench))
                    running.append(_Running(row, cores, process, ending))
                    left.remove(row)
            if not running:
                break
            # Record the first that ends.
            one = _first_ended(running, end)
            running.remove(one)
            failed = processes.failed(one.process, end - time.monotonic())
            sound &= _record(one.row, failed, done, bench)
            one.ending.close()
    for row in left:
        print(f"{row.name}: left: {obstacles[row.name]}")
    _draw_fig1(bench)
    return sound


@dataclass(frozen=True)
class _Running:
    """A row that is being trained.

    Attributes:
        cores: those it has to itself.
        ending: ends its process when it is closed.
    """

    row: Row
    cores: list[int]
    process: subprocess.Popen[bytes]
    ending: contextlib.ExitStack


def _first_ended(running: Sequence[_Running], end: float) -> _Running:
    """Wait for the first row to end; return any when the time is up."""
    while time.monotonic() < end:
        for one in running:
            if one.process.poll() is not None:
                return one
        time.sleep(0.1)
    return running[0]


def _free_cores(variant: Variant, running: Sequence[_Running]) -> list[int]:
    """Return the cores on which a row of this variant can start beside those that run; none if it
    cannot."""
    if any(one.row.variant.part != variant.part for one in running):
        return []
    taken = [one.cores for one in running]
    return next((cores for cores in _shares_of_cores(variant) if cores not in taken), [])


def _machine(variant: Variant) -> str:
    """Return the name of what trains a row of this variant here."""
    from alexnet_dist.errors import counted
    from alexnet_dist.parallel.device import machine

    found, cores = machine(), len(_shares_of_cores(variant)[0])
    return found["gpu"] or f"{counted(cores, 'core')} of {found['cpu']}"


def _shares_of_cores(variant: Variant) -> list[list[int]]:
    """Divide this machine's cores among the rows of a variant's part that run together."""
    cores = sorted(os.sched_getaffinity(0))
    count = min(variant.together, len(cores))
    return [cores[n * len(cores) // count : (n + 1) * len(cores) // count] for n in range(count)]


def _obstacle(row: Row, done: Mapping[str, Any], bench: Bench) -> str:
    """Return why a row cannot be trained yet; "" if it can."""
    arguments = sources(row, done, bench)
    if arguments is None:
        return "the run it is chosen by, starts from or averages is missing"
    if gone := [name for name in row.needs if not (bench.runs / name / "checkpoints").exists()]:
        return (
            f"{gone[0]}'s network is missing, and its row in {bench.rows.name} keeps it from "
            "being trained again"
        )
    path = Path(config_of(arguments).data.path)
    there = (ROOT / path / "dataset.json").exists()
    return "" if there else f"{path} is missing: docs/results.md says how to make it"


def _expected_s(row: Row, rows: Rows, bench: Bench) -> float:
    """Return the seconds that a row may take, by the speed of its part's last row on this
    machine."""
    arguments = sources(row, succeeded(rows), bench)
    if row.of or arguments is None:
        return START_S
    config, same = config_of(arguments), (row.variant.part, _machine(row.variant))
    speeds = [one["images_per_s"] for one in rows
              if (one["part"], one["machine"]) == same and "images_per_s" in one]  # fmt: skip
    meta = json.loads((ROOT / config.data.path / "dataset.json").read_text())
    images = meta["splits"][config.data.train_split]["samples"] * (1 - config.data.hold_out)
    speed = float(speeds[-1]) if speeds else row.variant.speed
    return START_S + float(config.train.epochs * images / speed)


def _started(
    row: Row, cores: Sequence[int], bench: Bench
) -> contextlib.AbstractContextManager[Any]:
    """Start a row in a process of its own, on these cores."""
    print(f"{row.name}: starts", flush=True)
    output, errors = bench.log(row, "out"), bench.log(row, "err")
    output.parent.mkdir(parents=True, exist_ok=True)
    small = ["--small", str(bench.small)] if bench.small else []
    on = ["--cores", *map(str, cores)]
    command = [sys.executable, __file__, "--row", row.name, *on, *small]
    return processes.started(command, output, errors, GRACE_S)


def _record(row: Row, failed: str, done: Mapping[str, Any], bench: Bench) -> bool:
    """Record a row that has ended; return False if it failed."""
    if failed.startswith("not done"):
        print(f"{row.name}: stopped; run the same command to continue", flush=True)
        return True
    # Append what the row's process printed last, or why there is nothing.
    arguments = sources(row, done, bench) or []
    command = ["evaluate", *map(bench.shown, row.of)] if row.of else ["train", *arguments]
    about = {"row": row.name, "part": row.variant.part, "variant": row.variant.name,
             "seed": row.seed, "candidate": row.candidate, "machine": _machine(row.variant),
             "commit": bench.commit, "command": " ".join(["alexnet-dist", *command])}  # fmt: skip
    try:
        if failed:
            said = bench.log(row, "err").read_text(errors="replace").strip().splitlines()
            raise ValueError(f"{failed}: {[' ', *said][-1][-400:]}")
        found = json.loads(bench.log(row, "out").read_text().splitlines()[-1])
        append_row(bench.rows, about | found)
    except (ValueError, IndexError) as error:
        append_row(bench.rows, about | {"failed": f"{error}"})
        print(f"{row.name}: failed: {error}", flush=True)
        return False
    print(f"{row.name}: {found['seconds']:.0f} s; {in_words(found)}", flush=True)
    # Keep the kernels that the page shows, and of the checkpoints, of half a gigabyte each, only
    # those that other rows need.
    averaged_later = row.variant.average and not row.candidate
    shown = averaged_later or (row.seed == 0 and not row.candidate and two_columns(found))
    if shown and not row.of:
        kernels = bench.runs / row.name / "figures/kernels.png"
        shutil.copy(kernels, bench.pictures / f"results-{row.name}-kernels.png")
    if not averaged_later and row.name not in {variant.begins for variant in VARIANTS}:
        shutil.rmtree(bench.runs / row.name / "checkpoints", ignore_errors=True)
    return True


def _draw_fig1(bench: Bench) -> None:
    """Draw figure 1 from the ledger."""
    from alexnet_dist.reporting.figures import Curve, draw_fig1

    curves: dict[str, list[Curve]] = {}
    for row in succeeded(read_rows(bench.rows)).values():
        variant = BY_NAME[row["variant"]]
        if variant.by_training and not row["candidate"] and "diverged" not in row:
            curve = [(epoch - 0.5, error / 100) for epoch, error in row["training"]]
            curves.setdefault(variant.told, []).append(curve)
    if curves:
        draw_fig1(curves, bench.pictures / "results-fig1.png")


def main() -> int:
    """Train, or write the pages; see the module's docstring."""
    parser = part_parser(__doc__, PARTS, within=math.inf)
    parser.add_argument(
        "--small", type=Path, metavar="FOLDER",
        help="try all rows on small data sets, with an eighth of each network, for a few steps",
    )  # fmt: skip
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument(
        "--document", action="store_true", help="only write the tables of the pages"
    )
    options = parse_parts(parser, PARTS)
    small = options.small and options.small.resolve()
    if options.document:
        for page in PAGES:
            page.write()
        return 0
    if options.row:  # in a process that `measure` started
        os.sched_setaffinity(0, options.cores)
        print_row(options.row, Bench.of(small))
        return 0
    processes.exit_at_sigterm()  # and end what was started
    commit = options.commit or commit_of(*MEASURED)
    bench = Bench.of(small, commit=commit, within=options.within)
    return 0 if measure(options.part, bench) else 1


if __name__ == "__main__":
    sys.exit(main())
