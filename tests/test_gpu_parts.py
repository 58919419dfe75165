"""docs/gpu.py, which measures on a GPU, with parts that need none."""

import contextlib
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_page
import psutil
import pytest
from gpu import measure
from gpu_parts import PARTS, Part, failures, of_bench, of_compare, of_pytest, photographs
from ledger import ROOT, append_row, read_rows

from alexnet_dist.cli.main import build_parser, main
from alexnet_dist.config.load import load_config
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.planning.measured import Step, read_steps
from alexnet_dist.reporting.compare_layouts import HEADING, Row, line

ABOUT = {"card": "A card", "driver": "580", "torch": "2.11", "triton": "3.6", "cuda": "13.0",
         "commit": "abc123def"}  # fmt: skip
FOUND = {
    "ratios": {"ours / theirs": 1.25},
    "ceilings": {"images/s": 20123.4},
    "unit": "seconds a step",
    "runs": [{"ours": 0.1}, {"ours": 0.3}, {"ours": 0.2}],
}


def says(text: str, then: str = "") -> list[str]:
    return ["-c", f"print({text!r}, flush=True); {then}"]


def test_a_part_leaves_a_row_and_is_asked_once_a_commit_and_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, logs = tmp_path / "gpu.jsonl", tmp_path / "logs"
    parts = {"step": Part([says("before"), says("loading\n" + json.dumps(FOUND))], 60)}
    assert measure(parts, ABOUT, 90, rows, logs)
    (row,) = read_rows(rows)
    assert row["figures"] == {
        "ratios": {"ours / theirs": 1.25},
        "seconds a step": {"ours": 0.2},
        "more": {"images/s": 20120},
    }
    assert {key: row[key] for key in ABOUT} == ABOUT
    assert row["part"] == "step"
    assert row["seconds"] >= 0
    assert "failed" not in row
    assert measure(parts, ABOUT, 90, rows, logs)
    assert "step: answered for abc123def" in capsys.readouterr().out
    assert len(read_rows(rows)) == 1
    for other in ({"commit": "abc123def+"}, {"commit": "abc123def+"}, {"card": "Another"}):
        assert measure(parts, ABOUT | other, 90, rows, logs)
    assert len(read_rows(rows)) == 4


def test_a_figure_that_is_not_finite_is_named_and_not_recorded(tmp_path: Path) -> None:
    odd = FOUND | {"runs": [{"ours": math.inf, "torch": 2.5}]}
    parts = {"step": Part([says(json.dumps(odd))], 60)}
    assert not measure(parts, ABOUT, 90, tmp_path / "gpu.jsonl", tmp_path / "logs")
    (row,) = read_rows(tmp_path / "gpu.jsonl")
    assert row["failed"].startswith("ours is inf, which a ledger cannot hold")
    assert row["figures"]["ratios"] == {"ours / theirs": 1.25}  # what else was measured is kept
    assert "Infinity" not in json.dumps(row["figures"])
    with pytest.raises(ValueError, match=r"x\.jsonl: a row with loss=inf, all=.*nan.* is not JSON"):
        append_row(tmp_path / "x.jsonl", {"loss": math.inf, "all": {"a": [math.nan]}, "top1": 1.0})
    assert not (tmp_path / "x.jsonl").exists()


def test_a_part_that_fails_says_so_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # As in a script's background, where Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    rows, logs = tmp_path / "gpu.jsonl", tmp_path / "logs"
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; "
    child += "time.sleep(99)'], start_new_session=True); print(p.pid, flush=True); p.wait()"
    tested = "tests/test_gpu.py::test_a[x y] PASSED [ 5%]\n[gw1] [ 9%] FAILED tests/test_gpu.py::b"
    hangs = "tests/t.py::a[x y] \ntests/t.py::b \n[gw0] [ 50%] PASSED tests/t.py::a[x y] "
    less = "the step could not be captured as a CUDA graph, so its kernels are launched one by one"
    parts = {
        "slow": Part([["-c", child]], 3),
        "broken": Part([["-c", "raise SystemExit('no such option')"], says("{}")], 60),
        "mute": Part([says("nothing")], 60),
        "tests": Part([says(tested, "raise SystemExit(1)")], 60, of_pytest),
        "hangs": Part([says(hangs, "import time; time.sleep(99)")], 6, of_pytest),
        "less": Part([says(json.dumps(FOUND), f"import sys; sys.stderr.write({less!r})")], 60),
        "long": Part([says(json.dumps(FOUND))], 500),
        "good": Part([says(json.dumps(FOUND))], 60),
    }
    begin = time.monotonic()
    assert not measure(parts, ABOUT, 300, rows, logs)
    assert time.monotonic() - begin < 60
    found = {row["part"]: row for row in read_rows(rows)}
    assert [*found] == ["slow", "broken", "mute", "tests", "hangs", "less", "good"]  # not long
    assert found["slow"]["failed"].startswith("not done after 2 s: ")
    with contextlib.suppress(psutil.NoSuchProcess):  # or killed, and not yet reaped
        led = psutil.Process(int(found["slow"]["failed"].split()[-1]))  # a session, as ranks do
        led.wait(30)
    assert found["broken"]["failed"] == "exit 1: no such option"
    assert found["mute"]["failed"].startswith("its output says nothing")
    assert found["tests"]["failed"].startswith("exit 1: tests/test_gpu.py")
    assert found["tests"]["command"].startswith("-c print(")
    assert found["tests"]["figures"] == {"tests": {"failed": 1, "passed": 1}}
    assert found["hangs"]["failed"].startswith("not done after 4 s, amid tests/t.py::b: ")
    assert found["hangs"]["figures"] == {"tests": {"passed": 1}}
    assert found["less"]["failed"].startswith(f"its figures are of less than they say: {less}")
    printed = capsys.readouterr().out
    assert re.search(r"^--- the end of broken-\d{6}\.err$", printed, re.M)
    assert "KeyboardInterrupt" in printed  # where what was not done was
    assert "failed" not in found["good"]
    mended = Part([says(json.dumps(FOUND))], 60)  # it is asked again, after what is new
    assert measure({"broken": mended, "new": mended}, ABOUT, 90, rows, logs)
    assert [row["part"] for row in read_rows(rows)[-2:]] == ["new", "broken"]
    assert not any("failed" in row for row in read_rows(rows)[-2:])
    assert len([*logs.glob("broken-*.err")]) == 2  # what it printed before is kept


def test_of_each_test_that_fails_a_row_keeps_how_it_begins_and_ends(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(
        "import pytest\n"
        "def test_long():\n"
        "    said = 'begins' + 9000 * ' x' + '\\nCUDA error: the last'\n"
        "    assert [1] == [0], said\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_skipped(): pass\n"
        "def test_short(missing): pass\n"
        "def test_sound(): pass\n"
    )
    run = [*PARTS["first"].commands[-1][:2], "-vv", "-n", "2", "-ra", "-p", "no:cacheprovider"]
    printed = subprocess.run(
        [sys.executable, *run, tmp_path], check=False, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    told = failures(printed)
    assert "-vv" in PARTS["first"].commands[-1]
    assert re.search(r"^FAILED \S+::test_long - AssertionError: begins x", told, re.M)
    assert re.search(r"^ *CUDA error: the last$", told, re.M)
    assert re.search(r"^ERROR \S+::test_short - ", told, re.M)
    assert "fixture 'missing' not found" in told
    assert "no GPU" not in told
    assert 2900 < len(told) < 6200
    assert not failures("no summary")


def test_a_part_is_started_if_the_time_is_enough_for_what_is_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "short": Part([says(json.dumps(FOUND))], 500, expected=5),
        "long": Part([says(json.dumps(FOUND))], 500, expected=30),
    }
    assert measure(parts, ABOUT, 40, tmp_path / "gpu.jsonl", tmp_path / "logs")
    assert [row["part"] for row in read_rows(tmp_path / "gpu.jsonl")] == ["short"]
    printed = capsys.readouterr().out
    assert re.search(r"^short: up to (39|40) s$", printed, re.M)  # not 500
    assert "long: left for the next time: it may take 50 s" in printed


def test_what_takes_a_steps_time_is_read() -> None:
    """Also of kernels whose long names begin alike."""
    found = {
        "kernels": [[80 * "k" + "1", 5.0, 2, "copies"], [80 * "k" + "2", 3.0, 1, "copies"]],
        "groups": {"copies": [8.0, 3]}, "elapsed": 9.0, "ratios": {"copies / all": 1.0},
        "unit": "µs a step",
    }  # fmt: skip
    assert of_bench(json.dumps(found)) == {
        "ratios": {"copies / all": 1.0},
        "µs a step": {"elapsed": 9.0, "copies": 8.0, 80 * "k": 8.0},
        "more": {"copies, launches a step": 3},
    }


def test_the_parts_are_commands_that_there_are() -> None:
    parser = build_parser()
    for part in PARTS.values():
        assert part.least <= part.limit < 570
        for _, module, *arguments in part.commands:
            if module == "alexnet_dist":
                options = parser.parse_args(arguments)
                if hasattr(options, "config"):
                    load_config(options.config)
            for file in (word for word in arguments if word.endswith(".py")):
                assert Path(ROOT, file).exists()


def test_the_parts_run_every_file_of_tests_for_a_gpu() -> None:
    run = {word for part in PARTS.values() for command in part.commands for word in command}
    for file in Path(ROOT, "tests").glob("test_*.py"):
        if re.search(r"pytest\.mark\.gpu\b|\bshared\.marks\b", file.read_text()):
            assert f"tests/{file.name}" in run


def test_what_compare_prints_is_read() -> None:
    rows = [("one", 1, 0.0, 12345.6, None, 2.5e-6), ("columns", 2, 1.3e-15, 99.0, 3e-7, None),
            ("zero1", 2, 2e-3, 100.0, 4e-7, None)]  # fmt: skip
    printed = [HEADING]
    for kind, ranks, difference, speed, drift, floor in rows:
        bound = 1e-5 if kind == "zero1" else 1e-12
        holds = difference <= bound
        row = Row(kind, ranks, 2.3, difference, bound, holds, speed, 12_345_678, 2)
        printed.append(line(row, drift, floor))
    assert of_compare("\n".join([*printed, "images/s are those of a card"])) == {
        "largest difference": {
            "one, 1 rank(s)": 0, "columns, 2 rank(s)": 1.3e-15, "zero1, 2 rank(s)": 2e-3
        },
        "images/s of a shared GPU": {
            "one, 1 rank(s)": 12345.6, "columns, 2 rank(s)": 99, "zero1, 2 rank(s)": 100
        },
        "drift in fp32 (one: its floor)": {
            "one, 1 rank(s)": 2.5e-6, "columns, 2 rank(s)": 3e-7, "zero1, 2 rank(s)": 4e-7
        },
    }  # fmt: skip
    with pytest.raises(ValueError, match="no layout"):
        of_compare("\n".join(printed[:2]))


def test_what_is_made_to_train_on_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "images", 160)
    photographs(tmp_path / "images", 1)  # there already
    assert main(["prepare", "folder", "images", "data"]) == 0
    splits = open_dataset(Path("data")).splits
    assert (len(splits["train"]), len(splits["val"])) == (144, 16)
    bench = next(c for c in PARTS["end-to-end"].commands if "end-to-end" in c)
    assert f"model.classes={len(open_dataset(Path('data')).classes)}" in bench


def test_the_tables_show_the_first_commit_and_the_last() -> None:
    def row(commit: str, value: float, **more: object) -> dict[str, object]:
        figures = {"ratios": {"ours / theirs": value}}
        return ABOUT | {"part": "step", "commit": commit, "date": "2026-11-26", "command": "x",
                        "seconds": 1, "figures": figures} | more  # fmt: skip

    rows = [row("first", 1.5), row("second", 1.6), row("third", 20123)]
    told = gpu_page.tables(rows)
    assert "| ours / theirs | 1.5 | 20,123 |" in told
    assert "first, 2026-11-26, torch 2.11" in told
    assert "second" not in told
    rows.append(row("fourth", 0, figures={}, failed="exit 1: no `card`\n"))
    told = gpu_page.tables(rows)
    assert "failed at fourth, 2026-11-26: `exit 1: no 'card'`" in told
    assert "| ours / theirs | 1.5 | 20,123 |" in told
    rows.append(row("fifth", 0, figures={}, failed=f"exit 1: {'x: ' * 99}\nFAILED tests/a - why"))
    assert ": `exit 1: FAILED tests/a - why`" in gpu_page.tables(rows)
    begin, end = gpu_page.PAGE.marks
    page = f"# P\n{begin}old\n{end}after\n"
    again = gpu_page.PAGE.documented(page, rows)
    assert again == gpu_page.PAGE.documented(again, rows)
    assert "old" not in again
    assert again.startswith("# P\n")
    assert again.endswith("after\n")


def test_the_page_shows_what_was_measured() -> None:
    page = gpu_page.PAGE.path.read_text()
    assert page == gpu_page.PAGE.documented(page, read_rows(gpu_page.ROWS)), "make docs"


def test_steps_that_were_measured_correct_the_plan() -> None:
    row = {"part": "step", "commit": "abc", "command": "bench step paper --batch 128 1024 --json"}
    figures = {"ours, bf16": 0.0021, "ours, bf16, no LRN": 0.002, "ours, fp32": 0.012345,
               "ours, bf16, batch 1024": 0.0151, "eager, fp32": 0.03}  # fmt: skip
    older, again = {"ours, bf16": 1.0}, {"ours, bf16, batch 1024": 0.0149}
    rows = [
        row | {"card": "NVIDIA H200", "figures": {"seconds a step": older}},
        row | {"card": "NVIDIA H200", "figures": {"seconds a step": figures}},
        row | {"card": "NVIDIA H200", "figures": {}, "failed": "exit 1"},
        row | {"card": "NVIDIA H200", "figures": {"seconds a step": older}, "failed": "of less"},
        row | {"card": "NVIDIA H200", "figures": {"seconds a step": again}, "part": "step-best-2"},
        row | {"card": "NVIDIA H100", "figures": {}, "part": "maps"},
    ]
    found = [Step(**step) for step in gpu_page.steps(rows)]
    assert [(s.card, s.batch, s.precision, s.ms) for s in found] == [
        ("NVIDIA H200", 128, "bf16", 2.1), ("NVIDIA H200", 128, "fp32", 12.35),
        ("NVIDIA H200", 1024, "bf16", 14.9),
    ]  # fmt: skip
    assert {step.source for step in found} == {gpu_page.FROM_ROWS}


def test_the_steps_that_ship_are_those_of_the_rows() -> None:
    """`make docs` brings them up to date."""
    shipped = [step for step in read_steps() if step.source == gpu_page.FROM_ROWS]
    assert shipped == [Step(**step) for step in gpu_page.steps(read_rows(gpu_page.ROWS))]
