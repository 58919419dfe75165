"""Failures around a run lose nothing: non-finite numbers, half-written files, full disks, changed
clocks, moved folders. Each is reported in one line, and earlier data stays."""

import hashlib
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hostile import forge

from alexnet_dist import evaluate, load_checkpoint, train
from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.cli import main
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import CheckpointError, NotFinite, RunFolderError
from alexnet_dist.files import read_run
from alexnet_dist.formats.convert import export_weights, import_weights
from alexnet_dist.reporting import page as pages
from alexnet_dist.reporting.report import report
from alexnet_dist.training import metrics_file, telemetry
from alexnet_dist.training.metrics_file import read_metrics
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Progress
from launch import status

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def made(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A trained run's folder, once for each optimiser."""
    from conftest import TINY, load_config

    root, folders = tmp_path_factory.mktemp("made"), dict[str, Path]()

    def make(kind: str = "sgd") -> Path:
        if kind not in folders:
            places = [f"data.path={packed}", f"output_dir={root}", f"name={kind}"]
            own = ["layout.kind=one", "train.epochs=1", "schedule.rate=0.001"]
            config = load_config([*TINY, *places, *own, f"optimizer.kind={kind}"])
            assert train(config).exit == 0
            folders[kind] = config.folder
        return folders[kind]

    return make


def changed(run: Path, to: Path, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run whose newest checkpoint's tensors were changed, and its hashes made right."""
    shutil.copytree(run, to)
    newest = checkpoints.steps(to / "checkpoints")[-1]
    tensors = load_file(newest / file)
    change(tensors)
    save_file(tensors, newest / file)
    forge(newest)
    return to


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    logging.getLogger().handlers.clear()  # of a run before this test, to a stream that is closed
    capsys.readouterr()
    code = main.main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# --- outputs that are not finite


def test_outputs_that_are_not_finite_are_no_score(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: Path
) -> None:
    def grow(tensors: dict[str, Any]) -> None:
        for name in ("fc7.weight", "fc8.weight", "fc8.bias"):
            tensors[name] = torch.full_like(tensors[name], 3e38)

    run = changed(made(), tmp_path / "grown", "model.safetensors", grow)
    for form in ([], ["--json"]):
        code, out, err = said(capsys, "evaluate", str(run), *form)
        assert (code, out) == (1, "")
        assert "the network's outputs are not finite (loss nan), so it cannot be scored" in err
        assert "Traceback" not in err
    with pytest.raises(NotFinite, match=r"outputs are not finite \(loss nan\)"):
        evaluate(run, views=1)
    from PIL import Image

    Image.new("RGB", (80, 80), (90, 20, 200)).save(tmp_path / "image.png")
    code, out, err = said(capsys, "predict", str(run), str(tmp_path / "image.png"), "--json")
    assert (code, out) == (1, "")
    assert "image.png: the network's outputs are not finite" in err
    with pytest.raises(NotFinite):
        load_checkpoint(run).predict(tmp_path / "image.png")


def test_metrics_are_json_whatever_was_measured(tmp_path: Path) -> None:
    point = {"kind": "speed", "step": 3, "images_per_s": float("inf"), "time": {"own": [1.0, NAN]}}
    line = metrics_file.line(point)
    strict = json.loads(line, parse_constant=pytest.fail)
    assert strict == point | {"images_per_s": None, "time": {"own": [1.0, None]}}
    (tmp_path / "metrics.jsonl").write_bytes(line)
    (found,) = read_metrics(tmp_path)
    assert str(found["images_per_s"]) == "nan"


NAN = float("nan")


def test_a_resumed_run_keeps_the_points_up_to_its_checkpoint(tmp_path: Path) -> None:
    """Of evaluations, not one of its own step that was made after it was saved."""
    scores = {"epoch": 1.0, "loss": 2.0, "top1": 0.5, "top5": 1.0, "correct1": 4, "samples": 8}
    points = [{"kind": kind, "step": step, "images_per_s": 9.0} | scores
              for step in (4, 8, 12) for kind in ("train", "speed", "eval")]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(metrics_file.line, points)))
    for evaluated, kept in ((8, points[:6]), (4, points[:5])):
        assert metrics_file.cut(path, 8, evaluated) == read_metrics(tmp_path) == kept


# --- names from files


def test_no_name_of_a_class_steers_a_terminal(
    made: Callable[..., Path], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(packed, evil)
    meta = json.loads((evil / "dataset.json").read_text())
    meta["classes"] = [f"{name}\x1b[2J" for name in meta["classes"]]
    (evil / "dataset.json").write_text(json.dumps(meta))
    code, out, err = said(capsys, "evaluate", str(made()), f"data.path={evil}")
    assert "\x1b" not in out + err
    assert (r"\x1b[2J" in out) if code == 0 else ("\\x1b" in err)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(
        json.dumps({"state": "\x1b[2J", "reason": "a\x1b]0;b", "job": "\r"})
    )
    assert status.main([str(run)]) == 0
    assert "\x1b" not in capsys.readouterr().out


# --- half-made and damaged input


@pytest.mark.parametrize(
    "content",
    [
        {"state": "running"}, {"state": 3}, {}, {"state": "failed", "reason": 7, "pid": "x"},
        {"state": "running", "host": os.uname().nodename}, {"state": "stopped", "last_step": "x"},
        {"state": "running", "last_step": 10, "newest_step": 3, "kept_s": "x", "attempt": None},
        {"state": "finished", "job": True},
    ],
)  # fmt: skip
def test_status_goes_on_past_a_damaged_run(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, what in (("a", {"state": "finished", "attempt": 1}), ("b", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(what))
    code = status.main([str(tmp_path / name) for name in ("b", "none", "a")])
    out, err = capsys.readouterr()
    assert code == 1
    assert "finished" in out
    assert f"launch: {tmp_path / 'none'}: has no run.json" in err
    assert "Traceback" not in err


LINES = (
    b'{"kind": "eval", "step": 4}', b'{"kind": "train", "step": 5, "epoch": "x"}', b"[]", b"\xff",
    b'{"kind": "eval", "step": 4, "epoch": 1, "loss": [], "top1": 1, "top5": 1}',
    b'{"kind": "eval", "step": 4, "epoch": 1, "loss": 1, "top1": 1, "top5": 1, "correct1": 1, '
    b'"samples": 1' + b"0" * 400 + b"}",
    b'{"kind": "speed", "step": -4, "images_per_s": 3}', b'{"kind": ["eval"], "step": 4}',
    b'{"kind": "eval", "step": 1' + b"0" * 400 + b"}",
)  # fmt: skip


def test_reports_and_figures_of_half_made_runs(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no point costs its line; what is no run is passed over, and counted."""
    runs = []
    for number, line in enumerate(LINES):
        run = tmp_path / f"run-{number}"
        shutil.copytree(made(), run, ignore=shutil.ignore_patterns("evaluations"))
        sound = (run / "metrics.jsonl").read_bytes()
        (run / "metrics.jsonl").write_bytes(line + b"\n" + sound)
        assert read_metrics(run) == read_metrics(made())
        runs.append(run)
    code, _, err = said(capsys, "figures", str(runs[0]))
    assert (code, err) == (0, "")
    for name, content in (
        ("config.json", b"{"), ("config.json", b"[" * 100_000), ("metrics.jsonl", b""),
        ("run.json", b"[]"), ("evaluation-views-10.json", b'{"top1": 1e999}'),
        ("evaluation-views-1.json", b'{"top1":NaN,"top5":1,"correct1":1,"samples":1}'),
        ("evaluation-views-10.json", b"[" * 100_000),
    ):  # fmt: skip
        run = tmp_path / f"damaged-{len(runs)}"
        shutil.copytree(made(), run, ignore=shutil.ignore_patterns("evaluations"))
        (run / name).write_bytes(content)
        runs.append(run)
    unread = tmp_path / "a-file"
    unread.write_bytes(b"[" * 100_000)
    line = report([*runs, unread, made()], tmp_path / "report.html")
    left = "no evaluated run in 4: damaged-9, damaged-10, damaged-11, …"
    assert line.endswith(f"report.html: 14 runs; {left}")
    page = (tmp_path / "report.html").read_text()
    assert "sgd" in page


def test_what_is_imported_is_finite(made: Callable[..., Path], tmp_path: Path) -> None:
    path = export_weights("safetensors", made(), tmp_path / "weights.safetensors")
    tensors = load_file(path)
    tensors["fc7.bias"][3] = NAN
    save_file(tensors, path)
    sources = [str(made() / "config.json")]
    with pytest.raises(CheckpointError, match=r"weights.safetensors: fc7.bias is not finite"):
        import_weights("safetensors", path, tmp_path / "runs" / "theirs", sources)
    assert not (tmp_path / "runs").exists()


# --- a full disk


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["report", "RUN", "--out", "OUT"], "report.html"),
        (["evaluate", "RUN", "--predictions", "OUT"], "predictions.npz"),
        (["export", "RUN", "OUT", "--format", "safetensors"], "weights.safetensors"),
        (["export", "RUN", "OUT", "--format", "caffe"], "weights.caffemodel"),
    ],
)
def test_what_cannot_be_written_whole_leaves_what_was_there(
    arguments: list[str], name: str, made: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = f"{pages.BEGINNING}as it was"
    (tmp_path / name).write_text(before)
    places = {"RUN": str(made()), "OUT": str(tmp_path / name)}
    from alexnet_dist.reporting import figures

    figures.draw(made())  # or its pictures are what is too long
    with no_file_longer_than(600), pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "draw", lambda folder, out: ([], []))
        code, _, err = said(capsys, *(places.get(word, word) for word in arguments))
    assert code == 1
    assert "Traceback" not in err
    assert "ulimit -f unlimited" in err
    assert (tmp_path / name).read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


# --- a clock that is set back


def test_a_clock_that_is_set_back_makes_no_time_negative(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tiny())
    folder.take()
    folder.running(0, 100)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    time.sleep(0.01)
    folder.saved(8)
    found = read_run(folder.path)
    assert 0.01 <= found["kept_s"] < 60
    assert 0 <= folder.goodput() <= 1
    folder.report("finished", exit=0)
    folder.close()
    row = status.status(folder.path, None)
    assert 0 <= row["goodput"] <= 1
    again = RunFolder(tiny())
    again.take()
    assert read_run(again.path)["rested_s"] == 0
    again.close()


# --- a folder that is moved while the run writes to it


def test_a_run_whose_folder_is_moved_says_so_and_writes_nowhere_else(tiny: Tiny) -> None:
    config = tiny("layout.kind=one", "train.epochs=2", "checkpoint.every_steps=4")
    moved = config.folder.with_name("moved")
    step = telemetry.Telemetry.stepped

    def stepped(telemetry: Any, number: int, engine: Any) -> None:
        step(telemetry, number, engine)
        if number == 6:
            for _ in range(3000):  # it is saved behind the steps
                if checkpoints.steps(config.folder / "checkpoints"):
                    break
                time.sleep(0.01)
            config.folder.rename(moved)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(telemetry.Telemetry, "stepped", stepped)
        with pytest.raises(RunFolderError, match=f"was moved to {moved} while this run writes"):
            train(config)
    assert not config.folder.exists()
    found = read_run(moved)
    assert (found["state"], found["exit"]) == ("failed", 1)
    assert "was moved to" in found["reason"]
    assert [path.name for path in checkpoints.steps(moved / "checkpoints")] == ["step-00000004"]
    moved.rename(config.folder)  # as it says
    assert train(config).exit == 0


def test_a_moved_folders_run_leaves_another_in_its_place_alone(tiny: Tiny) -> None:
    first = RunFolder(tiny())
    first.take()
    first.path.rename(first.path.with_name("moved"))
    second = RunFolder(tiny())
    second.take()
    second.report("running", step=7)
    with pytest.raises(RunFolderError, match="was moved to"):
        first.check_held()
    first.report("failed", exit=1, reason="moved")
    assert read_run(second.path)["state"] == "running"
    assert read_run(second.path.with_name("moved"))["reason"] == "moved"
    first.close()
    second.close()


# --- a forged state of the optimiser


def forged(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        if value is None:
            del tensors[name]
        elif isinstance(value, torch.dtype):
            tensors[name] = tensors[name].to(value)
        elif isinstance(value, float):
            tensors[name] = torch.full_like(tensors[name], value)
        else:
            tensors[name] = torch.zeros(value)

    return change


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        ("sgd", "momentum_buffer/conv2.weight", None, "is not there"),
        ("sgd", "momentum_buffer/conv2.weight", (0,), r"is \[0\] there"),
        ("sgd", "momentum_buffer/conv2.weight", torch.float16, "is torch.float16, but a run"),
        ("sgd", "momentum_buffer/conv2.weight", NAN, "is not finite"),
        ("adam", "exp_avg_sq/fc6.bias", -1.0, "is negative"),
        ("adam", "exp_avg/fc6.bias", float("inf"), "is not finite"),
        ("adam", "step/fc8.weight", -1.0, "is negative"),
        ("adam", "step/fc8.weight", 2.5, "is not a whole number"),
        ("adam", "step/fc8.weight", NAN, "is not finite"),
        ("adam", "step/fc8.weight", torch.float64, "is torch.float64, but a run"),
        ("adam", "step/fc8.weight", (2,), r"is \[2\] there"),
    ],
)
def test_a_state_that_no_run_writes_is_refused_by_name(
    kind: str, name: str, value: Any, said: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    run = changed(made(kind), tmp_path / kind, "optimizer.safetensors", forged(name, value))
    before = {
        path: hashlib.sha256(path.read_bytes()).digest() for path in run.rglob("*.safetensors")
    }
    config = checkpoints.at(run).config
    from conftest import load_config

    from alexnet_dist.config.schema import flat

    longer = load_config([flat(config), f"output_dir={tmp_path}"])
    with pytest.raises(CheckpointError, match=f"{name} {said}"):
        train(longer)
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in before}


@pytest.mark.parametrize(
    "state",
    [{"interval": [0.0] * 4}, {"interval": ["x"] * 5}, {"step": -1}, {"skipped": "3"},
     {"best_error": None}, {"best_step": 1.5}],
)  # fmt: skip
def test_a_progress_of_wrong_numbers_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Progress.of({"step": 3, "score": None} | state)
