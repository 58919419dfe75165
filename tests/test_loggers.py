"""Metrics sent elsewhere than metrics.jsonl; no plotting or logging failure ends a run."""

import csv
import dataclasses
import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Dataset, matched, open_for
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel.stop_signals import StopSignals, handlers_restored
from alexnet_dist.training import loggers, loop, tensorboard
from alexnet_dist.training.loop import train
from alexnet_dist.training.metrics_file import TIMES, read_metrics

SHORT = ["layout.kind=one", "train.precision=fp32", "checkpoint.every_steps=4", "name=logged",
         "log.every_steps=2", "schedule.kind=steps", "train.epochs=1"]  # fmt: skip
DRAWN = ["log.pictures=true", "log.embedding=9", "log.histograms_every_steps=4"]


def in_two_starts(tiny: Callable[..., Config], logger: str) -> Config:
    """Of a run that lost its last checkpoint, so that it makes four of its steps again."""
    config = tiny(*SHORT, f"log.to=[{logger}]", "log.pictures=true")
    assert train(config).exit == 0
    shutil.rmtree(config.folder / "checkpoints" / "step-00000008")
    assert train(config).exit == 0
    return config


def test_a_csv_is_the_metrics_with_a_row_for_each_point_whatever_was_made_again(
    tiny: Callable[..., Config],
) -> None:
    config = in_two_starts(tiny, "csv")
    with (config.folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8", "8"]
    points = [point for point in read_metrics(config.folder) if point["kind"] not in TIMES]
    for row, point in zip(rows, points, strict=True):
        told = {f"{point['kind']}/{k}": v for k, v in point.items() if isinstance(v, float)}
        assert {tag: float(row[tag]) for tag in told} == told
        assert (row["speed/images_per_s"] != "") == (point["kind"] == "train")
    assert not list(config.folder.glob("events.*"))


def test_a_row_that_a_full_disk_takes_only_a_part_of_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = loggers._Csv(path, [{"step": 2, "train/loss": 2.5}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left on device"):
            table.scalars(4, {"train/loss": 1.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    table.scalars(6, {"train/loss": 0.5})
    assert path.read_bytes() == b"step,train/loss\r\n2,2.5\r\n6,0.5\r\n"


def test_mlflow_goes_on_in_one_run(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = in_two_starts(tiny, "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((Path(config.output_dir) / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(loggers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (config.folder / "mlflow.id").read_text()
    assert (run.info.run_name, run.info.status) == ("logged", "FINISHED")
    assert run.data.params["train.batch"] == "8"
    told = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
    points = [point for point in read_metrics(config.folder) if point["kind"] == "train"]
    assert told == {point["step"]: point["loss"] for point in points}
    assert any(
        "confusion" in file.path for file in client.list_artifacts(run.info.run_id, "images")
    )


def test_wandb_goes_on_in_one_run(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = in_two_starts(tiny, "wandb")
    (own,) = {path.name.partition("-")[2].rpartition("-")[2]
              for path in (config.folder / "wandb").glob("offline-run-*")}  # fmt: skip
    assert own == (config.folder / "wandb.id").read_text()
    written = b"".join(path.read_bytes() for path in config.folder.glob("wandb/*/run-*.wandb"))
    for tag in (b"train/loss", b"eval/top1", b"confusion/test"):
        assert tag in written


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_what_is_not_installed_is_one_line_before_anything_begins(
    name: str, package: str, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = loggers.importlib.util.find_spec
    monkeypatch.setattr(
        loggers.importlib.util, "find_spec", lambda m: None if m == name else found(m)
    )
    config = tiny(*SHORT, f"log.to=[csv,{name}]")
    with pytest.raises(ConfigError, match=rf"log\.to=.*{name} is not .*: pip install {package},"):
        train(config)
    assert not config.folder.exists()


def test_wandb_without_a_key_is_one_line_and_asks_nothing(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: prompt or verify)
    monkeypatch.setattr(wandb.setup().settings, "mode", "online")
    with pytest.raises(ConfigError, match=r"wandb has no key: .*WANDB_MODE=offline"):
        train(tiny(*SHORT, "log.to=[wandb]"))


@pytest.mark.parametrize("more", [[], ["data.eval_split=none"]])
def test_loggers_are_told_that_a_run_is_finished_however_it_came_there(
    more: list[str], tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(loggers, "close", lambda threads, finished: told.append(finished))
    config = tiny(*SHORT, *more)
    with handlers_restored():
        signals = StopSignals()
        signals.flag = 1
        assert train(config, signals).exit == 75
    for _ in range(2):  # the second has nothing left to do
        assert train(config).exit == 0
    assert told == [False, True, True]


class Failing:
    """A logger whose every call fails."""

    def scalars(self, *_: Any) -> None:
        raise ConnectionError("no route to host")

    picture = close = scalars


@pytest.mark.parametrize("when", ["made", "called", "hangs"])
def test_a_logger_that_fails_is_said_once_and_ends_nothing(
    when: str, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ended = threading.Event()

    def make(*_: Any) -> Failing:
        if when == "made":
            raise ValueError("refused")
        if when == "hangs":
            ended.wait(60)
        return Failing()

    monkeypatch.setattr(loggers, "_Csv", make)
    monkeypatch.setattr(loggers, "_CLOSE_S", 0.2)
    outcome = train(tiny(*SHORT, "log.to=[csv]"))
    said = [line for line in capfd.readouterr().err.splitlines() if "log.to=csv" in line]
    ended.set()
    for thread in threading.enumerate():
        if thread.name == "csv":
            thread.join()
    assert (outcome.exit, outcome.step) == (0, 8)
    expected = {"made": "ValueError: refused", "called": "ConnectionError: no route to host",
                "hangs": "could not take everything within"}  # fmt: skip
    assert len(said) == 1
    assert expected[when] in said[0]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("its thread")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboards_thread_may_fail_and_the_run_ends_as_ever(
    error: Exception, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def write(*_: Any) -> None:
        raise error

    monkeypatch.setattr(RecordWriter, "write", write)
    outcome = train(tiny(*SHORT, *DRAWN))
    assert (outcome.exit, outcome.step) == (0, 8)
    assert capfd.readouterr().err.count("TensorBoard failed, but the run continues") == 1


@pytest.mark.parametrize("what", ["confusion_picture", "draw_answers", "_histograms", "image_of"])
def test_a_picture_that_fails_costs_that_picture(
    what: str, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(tensorboard, what, fail)
    outcome = train(tiny(*SHORT, *DRAWN))
    assert (outcome.exit, outcome.step) == (0, 8)
    assert capfd.readouterr().err.count("TensorBoard failed, but the run continues") == 1


def test_what_kills_a_run_while_it_draws_finds_it_saved(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    config = tiny(*SHORT, *DRAWN, "checkpoint.every_steps=1000")
    monkeypatch.setattr(tensorboard, "confusion_picture", killed)
    with pytest.raises(Killed):
        train(config)
    (path,) = checkpoints.steps(config.folder / "checkpoints")
    assert checkpoints.verify(path).progress["evaluated_step"] == 8


def test_names_that_are_no_utf_8_are_drawn_escaped(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"caf\xe9"), "a\nb\tc", "日本", "x" * 300

    def named(dataset: Dataset, config: Config) -> Dataset:
        dataset = matched(dataset, config)
        return dataclasses.replace(dataset, classes=(*odd, *dataset.classes[4:]))

    monkeypatch.setattr(loop, "matched", named)
    config = tiny(*SHORT, *DRAWN)
    assert train(config).exit == 0
    assert "failed" not in capfd.readouterr().err
    names = {*(config.folder / "00008" / "seen_by_fc8" / "metadata.tsv").read_text().splitlines()}
    assert names <= {"caf\\udce9", "a b\\tc", odd[2], odd[3], *open_for(config).classes[4:]}
    assert (config.folder / "projector_config.pbtxt").exists()
