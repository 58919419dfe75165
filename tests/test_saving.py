"""Saving in the background, and what a run does if its folder or disk fails."""

import dataclasses
import errno
import io
import json
import logging
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import write_idx

from alexnet_dist import train
from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint import verify
from alexnet_dist.checkpoint.writer import Saver
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import CheckpointError, CrashLoop, Damaged, NotFinite, RunFolderError
from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
from alexnet_dist.evaluation.results import Score
from alexnet_dist.files import read_run
from alexnet_dist.formats.convert import export_weights
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.reporting import figures
from alexnet_dist.timing import TIMELINE
from alexnet_dist.training import loop
from alexnet_dist.training.metrics_file import read_metrics
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.state import Progress
from alexnet_dist.training.telemetry import Telemetry


def test_the_loop_goes_on_while_one_checkpoint_is_written() -> None:
    saver, first, written = Saver(lambda: True), threading.Event(), []

    def slow() -> None:
        assert first.wait(10)
        written.append("first")

    saver.begin(slow)
    assert not written
    first.set()
    saver.begin(lambda: written.append("second"))  # one at a time: it has waited
    assert written[0] == "first"
    saver.finish()
    assert written == ["first", "second"]


def test_a_checkpoint_that_cannot_be_written_is_a_warning_while_an_older_one_remains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And is tried again at the end."""
    saver, fails = Saver(lambda: True), [True, True, False]

    def write() -> None:
        if fails.pop(0):
            raise CheckpointError("the disk is full")

    saver.begin(write)
    saver.close()
    assert not saver.failed
    assert "NOT SAVED, but the run continues: the disk is full" in caplog.text
    caplog.clear()
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.finish()
    assert not caplog.text, "the run does not continue"
    saver.finish()
    assert fails == []


def test_a_run_whose_first_save_fails_once_goes_on(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No older checkpoint is there: it is tried again at once, and the run ends only where that
    fails too."""
    sound, full, synced = checkpoints.save, [1], list[str]()
    monkeypatch.setattr(os, "fsync", lambda of: synced.append(os.readlink(f"/proc/self/fd/{of}")))

    def save(*args: Any) -> Path:
        assert synced[-1].endswith("/metrics.jsonl"), "its points are on the disk before it"
        if full and full.pop():
            raise CheckpointError("the disk is full")
        return sound(*args)

    monkeypatch.setattr(checkpoints, "save", save)
    config = tiny("layout.kind=one", "checkpoint.every_steps=2", "train.epochs=2")
    assert train(config).exit == 0
    assert not full
    full += [1, 1]
    with pytest.raises(CheckpointError, match="the disk is full"):
        train(tiny("layout.kind=one", "checkpoint.every_steps=2", "name=full"))


@pytest.mark.parametrize(
    ("error", "remains"), [(CheckpointError("full"), False), (NotFinite("conv1"), True)]
)
def test_what_ends_the_run_is_said_at_the_next_step(error: Exception, remains: bool) -> None:
    def write() -> None:
        raise error

    saver = Saver(lambda: remains)
    saver.begin(write)
    saver.close()
    assert saver.failed
    with pytest.raises(type(error), match=str(error)):
        saver.finish()
    saver.begin(lambda: None)  # before the loop has looked, and there is room again
    saver.finish()
    assert not saver.failed


def attempt(
    config: Config, state: str, saved: int | None = None, pause_s: float = 0, **more: Any
) -> None:
    """A start that ends in a state, or dies in it."""
    folder = RunFolder(config)
    try:
        folder.take()
        folder.running(0, 100)
        time.sleep(pause_s)
        if saved is not None:
            (folder.checkpoints / f"step-{saved:08d}").mkdir()
            folder.saved(saved)
        folder.report(state, **more)
    finally:
        folder.close()


def test_a_crash_loop_is_broken_and_says_why(tiny: Callable[..., Config]) -> None:
    config = tiny("checkpoint.max_idle_restarts=2")
    attempt(config, "running", saved=8)  # killed
    attempt(config, "failed", saved=16, reason="ran out of memory")  # it got on
    for idle in (0, 1, 2):
        attempt(config, "failed", reason="CUDA error: illegal access")
        assert read_run(config.folder)["idle_restarts"] == idle
    refused = r"3 starts in a row saved nothing after step 16; the last one: CUDA error: ill"
    kept = []  # as a notebook keeps tracebacks; the folder is let go all the same
    for _ in range(2):
        with pytest.raises(CrashLoop, match=rf"{refused}.*max_idle_restarts=3 \(now 2\)") as e:
            RunFolder(config).take()
        kept.append(e)
    found = read_run(config.folder)
    assert (found["state"], found["exit"], found["attempt"]) == ("failed", 2, 7)
    mended = tiny("checkpoint.max_idle_restarts=3")
    attempt(mended, "stopped", saved=24, exit=75)
    attempt(config, "stopped", exit=143)  # stopping is no failure
    attempt(config, "stopped", exit=75)
    assert read_run(config.folder)["idle_restarts"] == 0
    attempt(config, "running")  # but stopped so early that nothing is saved, to be resumed, is
    assert read_run(config.folder)["idle_restarts"] == 1
    attempt(config, "failed", exit=2, reason="belongs to another run")  # it ran nothing
    attempt(config, "failed", exit=2, reason="belongs to another run")
    assert read_run(config.folder)["idle_restarts"] == 2


def test_a_stopped_run_that_was_given_another_config_stays_stopped(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`launch.status` called it failed, at no step, though the right command resumed it."""
    config = tiny()
    attempt(config, "stopped", saved=8, exit=130, step=8)

    def refused(begun: bool = False) -> tuple[object, ...]:
        folder = RunFolder(config)
        folder.take()
        if begun:
            folder.running(8, 100)
        folder.failed(2, "belongs to another run", known=True)
        folder.close()
        run = read_run(config.folder)
        return run["state"], run["exit"], run.get("step")

    assert refused() == ("stopped", 130, 8)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # `launch.job after` reads why its ranks left
    assert refused() == ("failed", 2, None)
    attempt(config, "finished", exit=0, step=8)
    assert refused() == ("finished", 0, 8)
    assert refused(begun=True) == ("failed", 2, 8)


def test_a_run_keeps_its_best_its_last_and_those_of_every_so_many_steps(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says of each how it scored, although the last was saved before it was evaluated."""
    right = iter([10, 15, 12, None, 11])

    def evaluate_engine(*given: Any) -> Score | None:
        if (correct := next(right)) is not None:
            return Score(23, correct, 20, 1.0)
        given[3].flag = 1  # a signal arrives
        return None

    monkeypatch.setattr(loop, "evaluate_engine", evaluate_engine)
    config = tiny("layout.kind=one", "train.epochs=4", "evaluate.every_epochs=1",
                  "checkpoint.every_steps=6", "checkpoint.keep_last=1",
                  "checkpoint.keep_every_steps=12")  # fmt: skip
    for code, last in ((75, None), (0, 1 - 11 / 23)):
        assert train(config).exit == code
        kept = map(checkpoints.verify, checkpoints.steps(config.folder / "checkpoints"))
        assert [(one.step, one.error) for one in kept] == [
            (12, None), (15, 1 - 15 / 23), (24, None), (30, last)
        ]  # fmt: skip
    assert read_run(config.folder)["last_step"] == 30


@pytest.fixture
def kept(tiny: Callable[..., Config]) -> Callable[..., Config]:
    """Makes configs of a run that was stopped at its end, after two checkpoints."""
    config = tiny(*SHORT, "train.epochs=1")
    assert train(config).exit == 0
    assert [path.name for path in checkpoints.steps(config.folder / "checkpoints")] == LEFT
    return lambda *more: tiny(*SHORT, "train.epochs=2", *more)


SHORT = ["layout.kind=one", "train.precision=fp32", "checkpoint.every_steps=4", "name=kept",
         "schedule.kind=steps", "evaluate.every_epochs=9"]  # fmt: skip
LEFT = ["step-00000004", "step-00000008"]


def refused(config: Config, message: str) -> None:
    """Starts fail by a CheckpointError that is no damage, again and again, and rename nothing."""
    folder = config.folder / "checkpoints"
    before = sorted((path.name, path.lstat().st_ino) for path in folder.rglob("*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=message) as raised:
            train(config)
        assert not isinstance(raised.value, Damaged)
        assert sorted((path.name, path.lstat().st_ino) for path in folder.rglob("*")) == before


def test_a_run_whose_checkpoints_are_lost_never_begins_anew_unless_told_to(
    kept: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = kept().folder / "checkpoints"
    away = folder.rename(folder.with_name("away"))
    told = r"restore one, give this run another name=, or set checkpoint\.begin_anew=true"
    refused(kept(), rf"run\.json says that there was one of step 8.*{told}")
    shutil.copytree(away, folder / "from-backup")
    refused(kept(), rf"run\.json says that there was one of step 8.*{told}")
    shutil.copytree(away / LEFT[1], folder / "step-8")
    refused(kept(), rf"\(step-8\).*{told}")
    for name in LEFT:
        shutil.copytree(away / name, folder / name)
        (folder / name / "model.safetensors").write_bytes(b"")
    (kept().folder / "run.json").unlink()
    refused(kept(), rf"\(step-00000004, step-00000008, step-8\).*{told}")
    capfd.readouterr()
    assert train(kept("checkpoint.begin_anew=true", "train.epochs=0.5")).exit == 0
    assert "begins: 4 steps, 2 columns on" in capfd.readouterr().err
    assert read_run(kept().folder)["resumed_at"] == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["from-backup", "step-8", "step-00000004", *(f"damaged-{name}" for name in LEFT)]
    )
    assert train(kept("checkpoint.begin_anew=true", "train.epochs=1")).exit == 0
    assert "continues at step 4 of 8" in capfd.readouterr().err, (
        "it begins anew where none is good only"
    )


def test_a_good_checkpoint_that_is_misplaced_or_cannot_be_read_stops_a_start(
    kept: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = kept().folder / "checkpoints"
    wrong = (folder / LEFT[1]).rename(folder / "step-00000016")
    refused(kept(), rf"another step, 8; nothing was changed.*: mv -nT {wrong} {folder / LEFT[1]}")
    wrong.rename(folder / LEFT[1])
    sound = verify.sha256

    def fails(path: Path) -> str:
        if path.parent.name == LEFT[1]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sound(path)

    with monkeypatch.context() as patched:
        patched.setattr(verify, "sha256", fails)
        refused(kept(), rf"{LEFT[1]}/model\.safetensors cannot be read \(Permission denied; owner ")
    assert train(kept()).exit == 0
    assert "continues at step 8" in capfd.readouterr().err


def test_a_run_that_never_saved_begins_by_itself(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its first save, with metrics written."""

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    config = tiny(*SHORT, "train.epochs=0.5", "log.every_steps=1")
    with monkeypatch.context() as patched:
        patched.setattr(Saver, "finish", killed)
        patched.setattr(checkpoints, "sync", killed)
        patched.setattr(threading, "excepthook", lambda args: None)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    (left,) = (path.name for path in (config.folder / "checkpoints").iterdir())
    assert re.fullmatch(r"\.writing-[0-9a-f]{16}-step-00000004", left)
    assert read_metrics(config.folder)
    assert train(config).exit == 0


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_has_the_umasks_mode(
    tiny: Callable[..., Config], tmp_path: Path, umask: int
) -> None:
    """Of a run folder, what is kept of a bad batch, exports, predictions, and a data set."""
    before, root = os.umask(umask), tmp_path / "made"
    try:
        idx = write_idx(root / "idx", 20, 10)
        prepare("fashion_mnist", idx, root / "data", Options(workers=1))
        config = tiny(*SHORT, "train.epochs=1", f"output_dir={root}", f"data.path={root / 'data'}",
                      "log.pictures=true", "checkpoint.every_steps=1")  # fmt: skip
        assert train(config).exit == 0
        tensors = [torch.zeros(2) for _ in dataclasses.fields(Batch)]
        RunFolder(config).keep_batch(Batch(*tensors), 3, 0)
        export_weights("safetensors", config.folder, root / "w.safetensors")
        export_weights("safetensors", config.folder, root / "w.safetensors")
        export_weights("caffe", config.folder, root / "w.caffemodel")
        evaluate_checkpoints([config.folder]).write(root / "predictions.npz")
        figures.draw(config.folder)
    finally:
        os.umask(before)
    modes = {
        str(path): path.stat().st_mode & 0o777 for path in root.rglob("*")
        if (0o777 if path.is_dir() else 0o666) & ~umask != path.stat().st_mode & 0o777
    }  # fmt: skip
    assert modes == {}
    names = {path.name for path in root.rglob("*") if path.is_file()}
    assert {"model.safetensors", "step-00000003-rank-0.safetensors", "run.json"} <= names


def test_a_state_that_cannot_be_read_is_not_taken_for_none(tiny: Callable[..., Config]) -> None:
    config = tiny()
    attempt(config, "running", saved=8)
    (config.folder / "run.json").unlink()
    (config.folder / "run.json").mkdir()
    for _ in range(2):  # and the folder is let go
        with pytest.raises(
            RunFolderError, match=r"run\.json cannot be read \(Is a directory; .*put a file in its"
        ):
            RunFolder(config).take()


def test_time_whose_steps_were_saved_is_counted(tiny: Callable[..., Config]) -> None:
    config = tiny()
    for step in (8, 16):
        attempt(config, "running", saved=step, pause_s=0.02)
    found = read_run(config.folder)
    assert 0.04 <= found["kept_s"] <= found["updated"] - found["first_started"]
    assert (found["resumed_at"], found["newest_step"], found["attempt"]) == (8, 16, 2)


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def stale(path: Path, to: Path) -> Path:
        if to.name.startswith(".gone-"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stale)
    config = tiny("layout.kind=one", "train.epochs=1", "checkpoint.every_steps=2",
                  "checkpoint.keep_last=1")  # fmt: skip
    assert train(config).exit == 0
    assert len(checkpoints.steps(config.folder / "checkpoints")) > 1
    monkeypatch.undo()
    checkpoints.prune(config.folder / "checkpoints", 1, 0, None)
    assert len(checkpoints.steps(config.folder / "checkpoints")) == 1


def test_the_resolved_config_is_on_the_disk_before_a_run_begins(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced, fsync = RunFolder(tiny()), [], os.fsync
    folder.take()
    monkeypatch.setattr(
        os, "fsync", lambda of: (synced.append(os.readlink(f"/proc/self/fd/{of}")), fsync(of))
    )
    folder.save_config()
    assert [name.endswith("config.json") for name in synced] == [True]
    folder.close()


def test_a_folder_that_vanished_is_made_again(
    tiny: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tiny())
    folder.take()
    folder.check_held()
    assert not caplog.text
    (folder.path / "lock").unlink()
    folder.check_held()
    assert f"{folder.path}/lock has vanished: created again" in caplog.text
    shutil.rmtree(folder.path)
    folder.check_held()
    assert "has vanished, with all that was saved in it: created again" in caplog.text
    assert json.loads((folder.path / "config.json").read_text())["seed"] == 0
    shutil.rmtree(folder.path)
    other = RunFolder(tiny())
    other.take()
    with pytest.raises(RunFolderError, match="is in use by process"):
        folder.check_held()
    folder.failed(1, "another has it", known=True)
    assert read_run(other.path)["state"] == "starting"


def test_what_a_full_disk_refuses_of_the_metrics_is_written_later(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("layout.kind=one")
    folder, dataset = RunFolder(config), open_for(config)
    folder.take()
    folder.running(0, 100)
    schedule = Schedule.of(config, 60)
    telemetry = Telemetry(folder, Topology(), dataset, schedule, Progress())
    values = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "damaged": 0.0, "rate": 0.01}

    def step(number: int) -> None:
        TIMELINE.step()
        telemetry.train(number, values)

    step(1)
    evaluated = {"kind": "eval", "step": 1, "epoch": 0.1, "samples": 8, "correct1": 4}
    metrics = folder.path / "metrics.jsonl"
    with metrics.open("a") as file:  # so long that the limit is no other file's
        file.write((json.dumps(values | evaluated) + "\n") * 10_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size, before[1]))
        try:
            step(2)
            telemetry.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"NOT WRITTEN YET, but the run continues: {metrics}" in caplog.text
    step(3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "said at last")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        telemetry.flush()
    assert f"NOT WRITTEN, but the run continues: {metrics}: " in caplog.text

    class Remote(io.FileIO):
        def close(self) -> None:
            if not self.closed:
                super().close()
                full(0)

    telemetry._metrics.close()
    telemetry._metrics._file = Remote(metrics, "a")
    telemetry.close(finished=False)
    assert telemetry._quarantine not in logging.getLogger("alexnet_dist.data").handlers
    written = [p["step"] for p in read_metrics(folder.path) if p["kind"] != "eval"]
    assert written == [1, 1, 2, 2, 3, 3]
    monkeypatch.setattr(Path, "write_text", lambda *_: full(0))  # of what is written aside
    for reason in ("the disk is full, and it is said at length", "short"):
        folder.failed(1, reason, known=True)
        assert read_run(folder.path)["reason"] == reason
    folder.failed(1, "long" * 1024, known=True)
    assert read_run(folder.path)["reason"] == "short"
    assert f"NOT WRITTEN, but the run continues: {folder.path / 'run.json'}" in caplog.text
