"""What docs/drills.jsonl says: which trials of a storm are left to do, and docs/reliability.md's
tables."""

from collections.abc import Iterator, Sequence

from ledger import ROOT, Page, Rows, table_head, table_line

ROWS = ROOT / "docs/drills.jsonl"


# --- trials by number


def numbers_left(rows: Rows, what: str) -> Iterator[int]:
    """Yield the numbers of a kind's next trials: those that went wrong last time, then new ones."""
    own = [row for row in rows if row["what"] == what]
    yield from sorted(wrong(own))
    new = max((number for row in own for number in _expanded(row["numbers"])), default=-1) + 1
    while True:
        yield new
        new += 1


def wrong(rows: Rows) -> dict[int, str]:
    """Return the trials of one kind that were wrong when they were last tried, with the reasons."""
    found: dict[int, str] = {}
    for row in rows:
        for number in _expanded(row["numbers"]):
            found.pop(number, None)
        found |= {int(number): why for number, why in row["failed"].items()}
    return found


def trials_left(rows: Rows, target: int) -> int:
    """Return how many trials of one kind are left, those that were wrong included."""
    return max(0, target - _trials(rows)) + len(wrong(rows))


def _trials(rows: Rows) -> int:
    """Return the number of trials in rows."""
    return sum(sum(row["ended"].values()) for row in rows)


def ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Return numbers as a list of ranges, [first, last]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def _expanded(ranges: Sequence[Sequence[int]]) -> Iterator[int]:
    """Yield the numbers in a list of ranges."""
    for first, last in ranges:
        yield from range(first, last + 1)


# --- tables


def tables(rows: Rows) -> str:
    """Return the tables of all sessions' outcomes."""
    if not rows:
        return "No storm has been yet.\n"
    kinds = dict.fromkeys(row["what"] for row in rows)
    by_kind = {kind: [row for row in rows if row["what"] == kind] for kind in kinds}
    killed = {kind: own for kind, own in by_kind.items() if kind.startswith("kill ")}
    read = {kind: own for kind, own in by_kind.items() if kind not in killed}
    hours = sum(row["seconds"] for row in rows) / 3600
    commits, machines = (dict.fromkeys(row[key] for row in rows) for key in ("commit", "machine"))
    moments = ("starting", "step", "evaluating", "saving", "preparing")
    lines = [
        f"{sum(map(_trials, killed.values())):,} kills and {sum(map(_trials, read.values())):,} "
        f"changed inputs in {hours:.1f} hours, {rows[0]['date']} to {rows[-1]['date']}, at commits "
        f"{', '.join(commits)}; {'; '.join(machines)}.",
        "",
        table_head("SIGKILL in", "trials", *moments, "most lost, steps", "gone within, s", "wrong"),
    ]
    for kind, own in killed.items():
        at = [_ended(own, moment) for moment in moments]
        worst = _most(own, "lost"), _most(own, "longest_s"), len(wrong(own))
        lines.append(table_line(kind.removeprefix("kill "), _trials(own), *at, *worst))
    heads = "changed inputs", "refused", "accepted", "longest, s", "most memory, MB", "wrong"
    lines += ["", table_head("read", *heads)]
    for kind, own in read.items():
        ended = _ended(own, "refused"), _ended(own, "accepted")
        worst = _most(own, "longest_s"), _most(own, "largest_mb"), len(wrong(own))
        lines.append(table_line(kind, _trials(own), *ended, *worst))
    return "\n".join(lines) + "\n"


def _most(rows: Rows, name: str) -> str:
    """Return the largest of the rows' figures of a name."""
    return f"{max((row['most'].get(name, 0) for row in rows), default=0):g}"


def _ended(rows: Rows, word: str) -> int:
    """Return the number of trials that ended in a way which begins with a word."""
    return sum(n for row in rows for how, n in row["ended"].items() if how.startswith(word))


PAGE = Page(ROOT / "docs/reliability.md", ROWS, tables)
