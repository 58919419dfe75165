"""What is made from docs/gpu.jsonl: the tables of docs/gpu-measurements.md, and the step times that
correct `plan`."""

import json
import re
from collections.abc import Iterator
from typing import Any

from ledger import ROOT, Page, Rows, read_rows

ROWS, FROM_ROWS = ROOT / "docs/gpu.jsonl", "docs/gpu.jsonl"
_OF_LIBRARIES = re.compile(r"void |sm\d+_|nvjet|Mem(cpy|set) ")  # kernels
STEPS = ROOT / "alexnet_dist/planning/measured.jsonl"


def tables(rows: Rows) -> str:
    """Return a Markdown table for each part and card: the figures of the first and last commit."""
    if not rows:
        return "Nothing has been measured by `make gpu` yet.\n"
    kinds = dict.fromkeys((row["card"], row["part"]) for row in rows)
    return "\n".join(
        "".join(_table([row for row in rows if (row["card"], row["part"]) == kind]))
        for kind in kinds
    )


def _table(rows: Rows) -> Iterator[str]:
    """Yield the table of one part and card."""
    last = rows[-1]
    yield f"**{last['part']}**, {last['card']}: `{last['command']}`\n"
    if "failed" in last:
        said = " ".join(last["failed"].split()).replace("`", "'")
        said = re.sub(r": .*?(?=FAILED )", ": ", said, count=1)[:200]  # what pytest's summary says
        yield f"\nIt failed at {last['commit']}, {last['date']}: `{said}`\n"
    by_commit = {row["commit"]: row for row in rows if row["figures"]}
    if not by_commit:
        return
    commits = [*by_commit]
    shown = [by_commit[commit] for commit in dict.fromkeys((commits[0], commits[-1]))]
    heads = [
        f"{row['commit']}, {row['date']}, torch {row['torch']}, triton {row['triton']}, CUDA "
        f"{row['cuda']}, driver {row['driver']}"
        for row in shown
    ]
    yield f"\n| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}\n"
    for group, name in dict.fromkeys((g, n) for row in shown for g in row["figures"]
                                     for n in row["figures"][g]):  # fmt: skip
        if _OF_LIBRARIES.match(name):  # long names, which the ledger keeps
            continue
        values = [row["figures"].get(group, {}).get(name) for row in shown]
        cells = ["" if value is None else f"{value:,.10g}" for value in values]
        unit = "" if group in ("ratios", "more", "tests") else f", {group}"
        yield f"| {name.replace('|', '¦')}{unit} | {' | '.join(cells)} |\n"


PAGE = Page(ROOT / "docs/gpu-measurements.md", ROWS, tables)


def steps(rows: Rows) -> list[dict[str, Any]]:
    """Return our step times, as planning/measured.py reads them: the last of each card, batch and
    precision."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in rows:
        if not row["part"].startswith("step") or not row["figures"] or "failed" in row:
            continue
        card = row["card"]
        first = int(row["command"].partition("--batch ")[2].split()[0])
        for name, seconds in row["figures"]["seconds a step"].items():
            if ours := re.fullmatch(r"ours, (\w+)(?:, batch (\d+))?", name):
                step = card, int(ours[2] or first), ours[1]
                found[step] = {
                    "card": card, "batch": step[1], "precision": step[2], "execution": "graph",
                    "ms": float(f"{1e3 * seconds:.4g}"), "commit": row["commit"],
                    "source": FROM_ROWS,
                }  # fmt: skip
    return [*found.values()]


def write() -> None:
    """Bring the page, and the step times that ship with the package, up to date."""
    PAGE.write()
    kept = [step for step in read_rows(STEPS) if step["source"] != FROM_ROWS]
    all_steps = [*kept, *steps(read_rows(ROWS))]
    STEPS.write_text("".join(json.dumps(step) + "\n" for step in all_steps))
