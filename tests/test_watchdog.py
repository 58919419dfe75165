"""A run that stops making progress ends, and says which rank held it up, and where."""

import ctypes
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conftest import TINY, alexnet_dist, as_overrides
from test_run import RUN, Started

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import StepInput
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.files import read_run
from alexnet_dist.training.metrics_file import read_metrics

FOREVER = ["train.epochs=1000", "evaluate.every_epochs=1000", "layout.timeout_s=5"]


@pytest.fixture(scope="module", autouse=True)
def compiled(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Numba's loops are in its cache, so that ranks need no seconds for them within a step."""
    places = [f"data.path={packed}", f"output_dir={tmp_path_factory.mktemp('compiled')}"]
    run = alexnet_dist("train", *TINY, *places, *RUN, "train.epochs=1")
    assert run.returncode == 0, run.stderr


def started(config: Config, begin: Callable[[list[str]], None] = forks.run) -> Started:
    return Started(["train", *as_overrides(config)], begin=begin)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.drill), 1])
def test_a_stopped_rank_is_named_and_the_run_ends(tiny: Callable[..., Config], rank: int) -> None:
    config = tiny(*RUN, *FOREVER, "name=frozen")
    run = started(config)
    run.wait_for_step(config.folder, 6)
    processes = run.all()
    frozen = processes[1 + rank]
    frozen.suspend()
    begin = time.monotonic()
    code, output = run.end()
    assert time.monotonic() - begin < 15
    assert code == 1
    assert f"rank {rank} (process {frozen.pid} on {os.uname().nodename}) does not answer" in output
    assert "loop.py" in output  # where it is, from outside, and where the other waits
    if rank == 1:
        assert "rank 1" in read_run(config.folder)["reason"]
    assert not any(process.is_running() for process in processes)


def delaying(delay: Callable[[int], object], arguments: list[str]) -> None:
    """Run a command whose steps each begin with a delay."""
    sound = TorchEngine.train_step

    def train_step(
        engine: TorchEngine, batch: StepInput, step: int, rate: float, *more: Any
    ) -> torch.Tensor:
        delay(step)
        return sound(engine, batch, step, rate, *more)

    TorchEngine.train_step = train_step  # type: ignore[method-assign]
    forks.run(arguments)


def stuck(step: int) -> None:
    if os.environ["RANK"] == "1":
        time.sleep(1000 if step == 9 else 0.6)


def test_a_rank_that_is_slow_is_named_and_one_that_hangs_with_its_stack(
    tiny: Callable[..., Config],
) -> None:
    config = tiny(*RUN, *FOREVER, "name=hangs")
    run = started(config, functools.partial(delaying, stuck))
    run.wait_for_step(config.folder, 6)
    processes = run.all()
    code, output = run.end()
    assert code == 1
    points = [point for point in read_metrics(config.folder) if point["kind"] == "speed"]
    assert [point["straggler_rank"] for point in points] == [1.0] * 3
    assert all(point["straggler"] > 1.3 for point in points)
    assert "rank 1 takes" in output
    assert "the others wait for rank 1 (process" in output
    assert "time.sleep(1000 if" in output
    reason = read_run(config.folder)["reason"]
    assert reason.startswith("no step for 4 s: the others wait for rank 1")
    assert reason.endswith("the run ends (layout.timeout_s), start it again to resume")
    assert not any(process.is_running() for process in processes)


def test_a_run_that_was_stopped_for_longer_than_the_timeout_goes_on(
    tiny: Callable[..., Config],
) -> None:
    """As by Ctrl-Z, or `scontrol suspend`: no clock of the ranks saw them stand still."""
    config = tiny(*RUN, "layout.timeout_s=2", "train.epochs=12", "name=suspended")
    run = started(config)
    run.wait_for_step(config.folder, 6)
    processes = run.all()
    for process in processes:
        process.suspend()
    time.sleep(6)  # more than twice what the watchdog waits
    for process in processes:
        process.resume()
    code, output = run.end()
    assert code == 0, output
    assert "no step for" not in output
    assert "Traceback" not in output
    assert read_run(config.folder)["state"] == "finished"


def held(step: int) -> None:
    if step == 3:
        ctypes.PyDLL(None).sleep(100)  # with Python's lock


def test_a_process_whose_python_stands_still_is_ended_with_its_stacks(
    tiny: Callable[..., Config],
) -> None:
    config = tiny(*RUN, "layout.kind=one", "layout.timeout_s=2", "name=held")
    code, output = started(config, functools.partial(delaying, held)).end()
    assert code == -signal.SIGABRT
    assert "in held" in output  # where it is
