"""docs/storm.py: how its trials are judged, and what its ledger says."""

import itertools
import json
import mmap
import os
import random
import time
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pytest

from alexnet_dist.errors import DatasetError

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def storm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(DOCS)
    import storm

    return storm


def test_a_number_is_a_change(storm: Any) -> None:
    sound = bytes(range(256)) * 4
    for number in range(300):
        one, other = (storm.mutated(sound, random.Random(f"x {number}")) for _ in range(2))
        assert one == other != sound
    assert storm.mutated(b"", random.Random(1)) != b""


def refuse(words: str) -> None:
    raise DatasetError(words)


def test_what_is_neither_refused_in_a_line_nor_sound_is_wrong(
    storm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storm, "LONGEST_S", 0.5)
    monkeypatch.setattr(storm, "PATIENCE", 60)
    monkeypatch.setattr(storm, "LARGEST_MB", 200)
    for read, ended, why in (
        (lambda: None, "accepted", ""),
        (lambda: refuse("a line"), "refused", ""),
        (lambda: refuse("a line\nand another"), "refused", "several lines: a line"),
        (lambda: next(iter(())), "traceback", "StopIteration"),
        (lambda: os._exit(3), "crashed", "ended with 3"),
        (lambda: time.sleep(0.6), "accepted", ""),
        (lambda: list(takewhile(lambda _: time.process_time() < 0.7, count())), "accepted", " s, "),
        # Not from the heap: what tests before this one have freed may lie there.
        (lambda: mmap.mmap(-1, 400_000_000).write(b"x" * 400_000_000), "accepted", " MB"),
    ):
        found = storm.tried(read)
        assert found["ended"] == ended, found
        assert (why in found["why"]) if why else not found["why"], found
        assert found["longest_s"] < 5
    monkeypatch.setattr(storm, "PATIENCE", 4)
    found = storm.tried(lambda: time.sleep(9))
    assert found["ended"] == "hung"
    assert found["why"] == "more than 2.0 s"


def test_what_went_wrong_is_tried_again_first(storm: Any, tmp_path: Path) -> None:
    def row(numbers: list[list[int]], **failed: str) -> dict[str, Any]:
        own = {number.removeprefix("n"): why for number, why in failed.items()}
        return {"what": "IDX", "numbers": numbers, "failed": own, "ended": {"refused": 4},
                "most": {"longest_s": 1.5, "largest_mb": 20}, "seconds": 360, "date": "2026-11-26",
                "commit": "abc", "machine": "2 cores"}  # fmt: skip

    rows = [row([[0, 3]], n1="traceback", n2="hung"), row([[1, 1], [4, 6]])]
    assert storm.wrong(rows) == {2: "hung"}
    assert list(itertools.islice(storm.numbers_left(rows, "IDX"), 3)) == [2, 7, 8]
    assert list(itertools.islice(storm.numbers_left(rows, "image"), 2)) == [0, 1]
    assert storm._runs([2, 7, 8, 9]) == [[2, 2], [7, 9]]
    kill = row([[0, 1]]) | {"what": "kill one", "ended": {"saving, all": 1, "step, one": 1},
                            "most": {"lost": 3, "longest_s": 0.4}}  # fmt: skip
    text = storm.tables([*rows, kill])
    assert "2 kills and 8 changed inputs in 0.3 hours" in text
    assert "| IDX | 8 | 8 | 0 | 1.5 | 20 | 1 |" in text
    assert "| one | 2 | 0 | 1 | 0 | 1 | 0 | 3 | 0.4 | 0 |" in text
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert storm.read_rows(path) == rows
    page = f"before\n{storm.BEGIN}old\n{storm.END}after\n"
    assert storm.documented(page, rows) == storm.documented(storm.documented(page, rows), rows)


def test_the_page_has_what_the_ledger_says(storm: Any) -> None:
    page = storm.PAGE.read_text()
    assert page == storm.documented(page, storm.read_rows(storm.ROWS)), "make docs"
