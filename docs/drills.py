"""Fault drills: kill, stop, signal, damage and fill up, again and again, and check what is left.

    python docs/drills.py [--full] [--only NAME] [--seed N]

Prints a table of trials, recoveries, steps lost, seconds until every process of a broken run was
gone, processes left, and whether the final state (weights, optimiser, metrics, best) is bit-
identical to that of an undisturbed run. At most two intervals between saves may be lost: the one in
progress, and the one whose checkpoint was still being written. Exits with 1 unless all of it is as
it should be.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from drills_data import corruptions, crash_loop, flipped_bits, full_disk, wrong_numbers
from drills_processes import freezes, goodput, kills, signals, two_writers
from drills_table import HEADING, Row
from processes import scratch
from small_runs import Testbed

# By name: the drill, and the `count` that it is given by default and with --full.
DRILLS: dict[str, tuple[Callable[[Testbed, int, random.Random], Iterator[Row]], int, int]] = {
    "kills": (kills, 4, 25),
    "signals": (signals, 4, 20),
    "freezes": (freezes, 1, 5),
    "corruptions": (corruptions, 200, 1000),
    "full_disk": (full_disk, 1, 3),
    "two_writers": (two_writers, 1, 5),
    "wrong_numbers": (wrong_numbers, 1, 10),
    "flipped_bits": (flipped_bits, 1, 10),
    "crash_loop": (crash_loop, 1, 1),
    "goodput": (goodput, 0, 1),
}


def main() -> int:
    """Run the drills; return 1 unless all of it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="as often as docs/reliability.md says")
    parser.add_argument(
        "--only", action="append", choices=DRILLS, help="only this drill; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to append rows to")
    options = parser.parse_args()
    rows = []
    with scratch("drills") as folder:
        testbed = Testbed(folder)
        print(HEADING, flush=True)
        for name in options.only or DRILLS:
            drill, few, many = DRILLS[name]
            count, dice = many if options.full else few, random.Random(options.seed)
            for row in drill(testbed, count, dice):
                rows.append(row)
                print(row.line(), flush=True)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    trials = sum(row.trials for row in rows)
    print(f"{trials} trials, {sum(row.recovered for row in rows)} recovered")
    return 0 if all(row.sound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
