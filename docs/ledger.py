"""Ledgers of measurements: their rows, the commit that a row is of, the parts of pages made from
them, and the options that programs which measure part by part have in common.

A ledger is a JSON line for each row, the oldest first.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Rows = Sequence[Mapping[str, Any]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return every row, the oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row with today's date, in UTC; raise ValueError, and append nothing, where a number
    in it is not finite."""
    dated = {**row, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    try:
        line = json.dumps(dated, allow_nan=False)
    except ValueError as error:
        wrong = ", ".join(
            f"{key}={value}" for key, value in row.items()
            if re.search(r"\b(NaN|Infinity)\b", json.dumps(value))
        )  # fmt: skip
        raise ValueError(
            f"{path}: a row with {wrong} is not JSON, which has neither NaN nor infinity"
        ) from error
    with path.open("a") as file:
        file.write(f"{line}\n")


def commit_of(*measured: str) -> str:
    """Return the last commit that changed what is measured, with a + if there are uncommitted
    changes; exit with a message if there is no git or no such commit."""

    def said(*arguments: str) -> str:
        git = ["git", "-C", str(ROOT), *arguments, "--", *measured]
        return subprocess.check_output(git, text=True).strip()

    try:
        if commit := said("log", "-1", "--abbrev=9", "--format=%h"):
            return commit + ("+" if said("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    sys.exit("git cannot say which commit this is: name it, COMMIT=NAME")


# --- pages


@dataclass(frozen=True)
class Page:
    """A page with a part that `make docs` makes from a ledger's rows, between two marks.

    Attributes:
        ledger: the JSONL file.
        tables: makes the part's text from the rows.
    """

    path: Path
    ledger: Path
    tables: Callable[[Rows], str]

    @property
    def marks(self) -> tuple[str, str]:
        """The lines before and after the part."""
        source = os.path.relpath(self.ledger, self.path.parent)
        return f"<!-- made by make docs from {source} -->\n", "<!-- to here -->\n"

    def documented(self, page: str, rows: Rows) -> str:
        """Return a page's text with its part made anew from the rows."""
        first, last = self.marks
        before, begin, rest = page.partition(first)
        _, end, after = rest.partition(last)
        assert begin
        assert end
        return f"{before}{begin}\n{self.tables(rows)}\n{end}{after}"

    def write(self) -> None:
        """Bring the page up to date with its ledger."""
        self.path.write_text(self.documented(self.path.read_text(), read_rows(self.ledger)))


def table_line(*cells: object) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*cells: object) -> str:
    """Return the two lines of a Markdown table's heading."""
    return f"{table_line(*cells)}\n|{'---|' * len(cells)}"


# --- options


def part_parser(
    description: str | None, parts: Iterable[str], within: float
) -> argparse.ArgumentParser:
    """Return a parser of the options of a program that measures part by part.

    Args:
        description: shown by --help as it is; a module's docstring.
        within: default of --within, in seconds.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="*", help=f"one or more of {', '.join(parts)} (default: all)")
    parser.add_argument("--commit", help="the commit that is measured (default: git's)")
    parser.add_argument(
        "--within", type=float, default=within, help=f"stop after this many seconds ({within:g})"
    )
    return parser


def parse_parts(parser: argparse.ArgumentParser, parts: Iterable[str]) -> argparse.Namespace:
    """Parse the command line, and replace no `part` by all; exit with a message if there is no such
    part."""
    options = parser.parse_args()
    if unknown := {*options.part} - {*parts}:
        parser.error(f"{', '.join(sorted(unknown))}: a part is one of {', '.join(parts)}")
    options.part = options.part or [*parts]
    return options
