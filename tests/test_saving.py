"""Saving behind the loop, and what a run does with a folder or a disk that fails it."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alexnet_dist import train
from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.writer import Saver
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import CheckpointError, CrashLoop, NotFinite, RunFolderError
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import TIMELINE
from alexnet_dist.training.metrics import Telemetry, read_metrics
from alexnet_dist.training.run_folder import RunFolder, read_run


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
    assert "NOT SAVED, the run goes on: the disk is full" in caplog.text
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.finish()
    saver.finish()
    assert fails == []


def test_a_run_whose_first_save_fails_once_goes_on(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No older checkpoint is there: it is tried again at once, and the run ends only where that
    fails too."""
    sound, full = checkpoints.save, [1]

    def save(*args: Any) -> Path:
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
    refused = r"3 starts in a row saved nothing after step 16; the last: CUDA error: ill"
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


def test_time_whose_steps_were_saved_is_counted(tiny: Callable[..., Config]) -> None:
    config = tiny()
    for step in (8, 16):
        attempt(config, "running", saved=step, pause_s=0.02)
    found = read_run(config.folder)
    assert 0.04 <= found["kept_s"] <= found["updated"] - found["first_started"]
    assert (found["resumed_at"], found["newest_step"], found["attempt"]) == (8, 16, 2)


def test_a_folder_that_vanished_is_made_again(
    tiny: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tiny())
    folder.take()
    folder.still_held()
    assert not caplog.text
    shutil.rmtree(folder.path)
    folder.still_held()
    assert "has vanished, with all that was saved in it: made again" in caplog.text
    assert json.loads((folder.path / "config.json").read_text())["seed"] == 0
    shutil.rmtree(folder.path)
    other = RunFolder(tiny())
    other.take()
    with pytest.raises(RunFolderError, match="is in use by process"):
        folder.still_held()


def test_what_a_full_disk_refuses_of_the_metrics_is_written_later(
    tiny: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("layout.kind=one")
    folder, dataset = RunFolder(config), open_for(config)
    folder.take()
    folder.running(0, 100)
    telemetry = Telemetry(config, folder, Topology(), dataset, Schedule.of(config, 60), 0, 0, 1)
    values = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "damaged": 0.0, "rate": 0.01}

    def step(number: int) -> None:
        TIMELINE.step()
        telemetry.train(number, number / 10, values)

    step(1)
    kept = telemetry._metrics
    with Path("/dev/full").open("wb", buffering=0) as full, caplog.at_level(logging.WARNING):
        telemetry._metrics = full
        step(2)
        telemetry.flush()
    assert "NOT WRITTEN YET, the run goes on: /dev/full" in caplog.text
    telemetry._metrics = kept
    step(3)
    telemetry.close()
    assert [point["step"] for point in read_metrics(folder.path)] == [1, 1, 2, 2, 3, 3]
