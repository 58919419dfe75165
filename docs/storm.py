"""A storm of hours: kills of everything at any moment, and changed bytes for every reader.

    python docs/storm.py [--within SECONDS] [--only WHAT] [--number N]    (make drill DRILLS=full)
    python docs/storm.py --document                                       (make docs)

Each trial has a number, which seeds all its random choices. It continues where docs/drills.jsonl
left off, until each reader has had its 1,000 inputs, and all layouts together their 1,000 kills;
trials that went wrong last time come first. A row every few minutes records kind, numbers, and how
trials ended. Changed bytes are read in a fork of this process, whose memory and time are measured.
Exits with 1 if a trial was not as it should be: an input refused with more than one line, or beyond
its bounds; a process left behind; a run that ends differently from an undisturbed one.
"""

import argparse
import functools
import importlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ledger import ROOT, append_row, read_rows
from processes import scratch
from small_runs import LAYOUTS, SAVE, Started, Testbed, kill, reach, wait_until_gone
from storm_inputs import changed, tried
from storm_page import PAGE, ROWS, numbers_left, ranges, trials_left
from storm_readers import Reader, files_of, readers

from alexnet_dist.files import sha256
from alexnet_dist.parallel.device import machine

forks = importlib.import_module("forks")  # in tests/, by the name that its processes import it by
KILLS, INPUTS = 1000, 1000  # kills in all; inputs of each reader


@dataclass
class Tally:
    """The outcomes of a row's trials."""

    numbers: list[int] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)

    def add(self, number: int, ended: str, why: str = "", **most: float) -> None:
        """Add a trial's outcome; of each figure in `most` the largest is kept.

        Args:
            why: what was wrong; "" if nothing was.
        """
        self.numbers.append(number)
        self.ended[ended] += 1
        if why:
            self.failed[number] = why[:300]
            print(f"\n{number}: {ended}: {why}", flush=True)
        for name, value in most.items():
            self.most[name] = round(max(self.most.get(name, 0), value), 1)

    def compare(self, identical: bool) -> None:
        """Count the last trial as wrong if the final state is not an undisturbed run's."""
        if not identical and self.numbers:
            self.failed.setdefault(self.numbers[-1], "the run did not end as one left alone")
            print(
                f"{self.numbers}: the run did not end as one that nothing happened to", flush=True
            )


def inputs(reader: Reader, name: str, numbers: Iterator[int], until: float) -> Tally:
    """Read changed bytes, of one file after another, until a moment."""
    tally = Tally()
    for number in numbers:
        dice = random.Random(f"{name} {number}")
        with changed(reader.files, dice) as path:
            tally.add(number, **tried(functools.partial(reader.read, path, dice)))
        if time.monotonic() > until:
            break
    return tally


class Forked(Started):
    """A run whose processes are forked with everything imported, which saves each seconds."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = forks.command(arguments, prints=(Path(os.devnull), Path(os.devnull)))

    def end(self) -> tuple[int, str]:
        """Wait for the run to end; return its exit code, and no output."""
        return self.process.wait(timeout=120), ""


def kills(testbed: Testbed, layout: str, numbers: Iterator[int], until: float) -> Tally:
    """SIGKILL a rank, the launcher or all, again and again until a moment; then let the run end."""
    tally, name = Tally(), f"killed-{layout}-{time.monotonic_ns()}"
    testbed.undisturbed(layout)
    for number in numbers:
        # Start or resume the run, and wait for a moment of it.
        dice = random.Random(f"kill {layout} {number}")
        moment = dice.choice(("starting", "step", "step", "evaluating", "saving"))
        begins = Started if moment == "starting" else Forked  # so imports are interrupted too
        run, saved = begins(testbed.arguments(layout, name)), testbed.saved(name)
        step = saved + dice.randint(1, 7)
        if moment == "evaluating":  # every 15 steps, right after the step is logged
            step = (saved // 15 + 1) * 15
        reach(run, testbed.folder(name), moment.replace("evaluating", "step"), step, dice)
        processes = [] if run.ended() else run.processes()
        if not processes:  # it reached its last step
            run.end()
            name += "x"
            continue
        # Kill, and see what is left.
        whom = dice.choice(("all", "launcher", "one"))
        kill(processes, whom, dice)
        gone_s, left = wait_until_gone(run, processes)
        lost = testbed.lost(name)
        why = "a process is left" if left else ""
        why = why or (f"{lost} steps lost" if lost > 2 * SAVE else "")
        tally.add(number, f"{moment}, {whom}", why, lost=lost, longest_s=gone_s)
        if time.monotonic() > until:
            break
    tally.compare(testbed.finish(layout, name))
    return tally


def kills_of_prepare(testbed: Testbed, numbers: Iterator[int], until: float) -> Tally:
    """SIGKILL `prepare` with or without what it started; the same command then finishes it."""
    tally, identical = Tally(), True
    for number in numbers:
        dice, out = random.Random(f"kill prepare {number}"), testbed.root / f"prepared-{number}"
        command = ["prepare", "fashion_mnist", str(testbed.root / "idx"), str(out)]
        fresh = dice.random() < 0.2
        run = Started(command) if fresh else Forked(command)
        time.sleep(dice.uniform(0, 6 if fresh else 2))
        processes = [] if run.ended() else run.processes()
        whom = dice.choice(("all", "launcher"))
        kill(processes, whom, dice)
        gone_s, left = wait_until_gone(run, processes)
        code, _ = Forked(command).end()
        same = out.exists() and _hashes(out) == _hashes(testbed.root / "data")
        why = "" if same and code == 0 else f"it is not whole: {code}"
        why = why or ("a process is left" if left else "")
        tally.add(number, f"preparing, {whom}", why, longest_s=gone_s)
        identical &= same
        shutil.rmtree(out, ignore_errors=True)
        if time.monotonic() > until:
            break
    tally.compare(identical)
    return tally


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's files."""
    return {str(path.relative_to(folder)): sha256(path) for path in files_of(folder)}


def about() -> dict[str, Any]:
    """Return what a row says of the code and the machine."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--abbrev=9", "--format=%h"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    found = machine()
    on = f"{found['cores']} cores, {found['cpu']}, torch {found['torch']}"
    return {"commit": commit or "unknown", "machine": on}


def storm(testbed: Testbed, options: argparse.Namespace, until: float) -> bool:
    """Run slices of each kind, the least tried first; return whether all was as it should be."""
    testbed.undisturbed("one")
    known = readers(testbed)
    per_kind = -(-KILLS // (len(LAYOUTS) + 1))
    targets = {f"kill {what}": per_kind for what in (*LAYOUTS, "prepare")}
    targets |= dict.fromkeys(known, INPUTS)
    if unknown := {*options.only} - {*targets}:
        sys.exit(f"{', '.join(unknown)}: one of {', '.join(targets)}")
    sound = True
    while time.monotonic() < until:
        # Choose the kind of which the largest share is left, or repeat the trial that is asked for.
        rows = read_rows(options.rows)
        left = {what: trials_left([row for row in rows if row["what"] == what], targets[what])
                for what in options.only or targets}  # fmt: skip
        what = max(left, key=lambda what: left[what] / targets[what])
        numbers: Iterator[int] = itertools.islice(numbers_left(rows, what), max(1, left[what]))
        if options.number is not None:
            numbers = iter([options.number])
        elif left[what] == 0:
            break
        # Try as many as fit into a slice.
        begin = time.monotonic()
        end = min(until, begin + options.slice)
        if what in known:
            tally = inputs(known[what], what, numbers, end)
        elif what == "kill prepare":
            tally = kills_of_prepare(testbed, numbers, end)
        else:
            tally = kills(testbed, what.removeprefix("kill "), numbers, end)
        print(f"{what}: {len(tally.numbers)}: {dict(tally.ended)}, {tally.most}", flush=True)
        sound &= not tally.failed
        if options.number is not None:
            break
        seconds = round(time.monotonic() - begin)
        row = {"what": what, "numbers": ranges(tally.numbers), "ended": dict(tally.ended),
               "failed": tally.failed, "most": tally.most, "seconds": seconds}  # fmt: skip
        append_row(options.rows, row | about())
    return sound


def main() -> int:
    """Run the storm, or write the page; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--within", type=float, default=86400, help="stop after this many seconds")
    parser.add_argument(
        "--slice", type=float, default=100, help="seconds that each row covers (default: 100)"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="only this kind of trial; may be repeated"
    )
    parser.add_argument(
        "--number", type=int, help="with --only: only this trial; no row is written"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=ROWS,
        help="file to append rows to (default: docs/drills.jsonl)",
    )
    parser.add_argument(
        "--document", action="store_true", help="only write the tables of reliability.md"
    )
    options = parser.parse_args()
    if options.document:
        PAGE.write()
        return 0
    torch.set_num_threads(1)  # threads that wait for each other would hang in a fork
    until = time.monotonic() + options.within
    with scratch("storm") as folder:
        testbed = Testbed(folder, "layout.timeout_s=15")  # others may use the machine
        sound = storm(testbed, options, until)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
