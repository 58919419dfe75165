"""docs/storm.py: how its trials are judged, what its ledger says, and what it leaves behind."""

import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import drills
import processes
import psutil
import pytest
import storm
import storm_inputs
from ledger import read_rows
from storm_inputs import mutated
from storm_page import PAGE, numbers_left, ranges, wrong

from alexnet_dist.errors import DatasetError


def test_a_number_is_a_change() -> None:
    sound = bytes(range(256)) * 4
    for number in range(300):
        one, other = (mutated(sound, random.Random(f"x {number}")) for _ in range(2))
        assert one == other != sound
    assert mutated(b"", random.Random(1)) != b""


def refuse(words: str) -> None:
    raise DatasetError(words)


def test_what_is_neither_refused_in_a_line_nor_sound_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storm_inputs, "LONGEST_S", 0.5)
    monkeypatch.setattr(storm_inputs, "PATIENCE", 60)
    monkeypatch.setattr(storm_inputs, "LARGEST_MB", 200)
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
        found = storm_inputs.tried(read)
        assert found["ended"] == ended, found
        assert (why in found["why"]) if why else not found["why"], found
        assert found["longest_s"] < 5
    monkeypatch.setattr(storm_inputs, "PATIENCE", 4)
    found = storm_inputs.tried(lambda: time.sleep(9))
    assert found["ended"] == "hung"
    assert found["why"] == "more than 2.0 s"


def test_what_went_wrong_is_tried_again_first(tmp_path: Path) -> None:
    def row(numbers: list[list[int]], **failed: str) -> dict[str, Any]:
        own = {number.removeprefix("n"): why for number, why in failed.items()}
        return {"what": "IDX", "numbers": numbers, "failed": own, "ended": {"refused": 4},
                "most": {"longest_s": 1.5, "largest_mb": 20}, "seconds": 360, "date": "2026-11-26",
                "commit": "abc", "machine": "2 cores"}  # fmt: skip

    rows = [row([[0, 3]], n1="traceback", n2="hung"), row([[1, 1], [4, 6]])]
    assert wrong(rows) == {2: "hung"}
    assert list(itertools.islice(numbers_left(rows, "IDX"), 3)) == [2, 7, 8]
    assert list(itertools.islice(numbers_left(rows, "image"), 2)) == [0, 1]
    assert ranges([2, 7, 8, 9]) == [[2, 2], [7, 9]]
    kill = row([[0, 1]]) | {"what": "kill one", "ended": {"saving, all": 1, "step, one": 1},
                            "most": {"lost": 3, "longest_s": 0.4}}  # fmt: skip
    text = PAGE.tables([*rows, kill])
    assert "2 kills and 8 changed inputs in 0.3 hours" in text
    assert "| IDX | 8 | 8 | 0 | 1.5 | 20 | 1 |" in text
    assert "| one | 2 | 0 | 1 | 0 | 1 | 0 | 3 | 0.4 | 0 |" in text
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert read_rows(path) == rows
    begin, end = PAGE.marks
    page = f"before\n{begin}old\n{end}after\n"
    assert PAGE.documented(page, rows) == PAGE.documented(PAGE.documented(page, rows), rows)


def test_the_page_has_what_the_ledger_says() -> None:
    page = PAGE.path.read_text()
    assert page == PAGE.documented(page, read_rows(PAGE.ledger)), "make docs"


@pytest.mark.parametrize("program", [drills, storm])
def test_the_programs_explain_themselves(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        program.main()
    assert program.__doc__.partition("\n")[0][:60] in capsys.readouterr().out


BEGINS = """
import os, subprocess, sys, tempfile, time
from processes import scratch
with scratch("trial") as folder:
    open(tempfile.mkdtemp() + "/file", "w")
    sleeps = [sys.executable, "-c", "import time; time.sleep(99)"]
    child = subprocess.Popen(sleeps, start_new_session=True)
    print(folder, child.pid, flush=True)
    time.sleep(99)
"""


def test_a_program_that_is_told_to_end_leaves_nothing_and_one_that_was_killed_is_cleaned_up_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(storm.__file__).parent))
    begun = [
        subprocess.Popen([sys.executable, "-c", BEGINS], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    lives, told, killed = (process.stdout.readline().split() for process in begun)  # type: ignore
    assert len(list(tmp_path.iterdir())) == 3
    children = [psutil.Process(int(pid)) for _, pid in (lives, told, killed)]
    try:
        begun[1].terminate()
        assert begun[1].wait(30) == 143
        assert not Path(told[0]).exists()
        children[1].wait(10)
        begun[2].kill()
        begun[2].wait(30)
        assert Path(killed[0]).exists()
        os.utime(killed[0], (0, 0))
        before = signal.getsignal(signal.SIGTERM)
        with processes.scratch("trial") as folder:
            assert {*tmp_path.iterdir()} == {Path(lives[0]), folder}
            assert Path(tempfile.mkdtemp()).parent == folder
        signal.signal(signal.SIGTERM, before)
        assert {*tmp_path.iterdir()} == {Path(lives[0])}
        assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path)
    finally:
        for process in (*begun, children[0], children[2]):
            process.kill()
