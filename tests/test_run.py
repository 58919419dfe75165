"""Whole runs as users start them: real processes, killed, signalled, resumed, evaluated."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import psutil
import pytest
from conftest import TINY, alexnet_dist, as_overrides, assert_checkpoints_near
from forks import Fork
from small_runs import final_state

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.files import read_run
from alexnet_dist.parallel import spawn
from alexnet_dist.parallel.stop_signals import handlers_restored
from alexnet_dist.training.metrics_file import read_metrics
from alexnet_dist.training.state import Progress

# 60 images, 8 a step, 8 epochs: 60 steps; evaluations after every 15; a save every 4.
RUN = [
    "train.epochs=8",
    "evaluate.every_epochs=2",
    "checkpoint.every_steps=4",
    "log.every_steps=3",
    "schedule.rate=0.02",
    "layout.kind=columns",
]
FRESH = ("-m", "alexnet_dist")
MICRO = "train.micro_batches=2"
ALONE = "layout.kind=one"  # a third of the processes, where the layout is not the point


@pytest.fixture
def command(tiny: Callable[..., Config]) -> Callable[..., list[str]]:
    """Makes the arguments of a run: command("one", "layout.kind=one", …)."""
    return lambda name, *more: ["train", *as_overrides(tiny(*RUN, f"name={name}", *more))]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


class Started:
    """A run in the background.

    Args:
        launcher: what a new Python starts it by, where its start is looked at.
        within: a command that runs that elsewhere.
        begin: what a fork starts it by otherwise.
    """

    def __init__(
        self, arguments: list[str], launcher: tuple[str, ...] = (), within: tuple[str, ...] = (),
        begin: Callable[[list[str]], None] = forks.run,
    ) -> None:  # fmt: skip
        self.printed = tempfile.NamedTemporaryFile("r", delete=False)  # noqa: SIM115
        file = Path(self.printed.name)
        self.process: Fork | subprocess.Popen[bytes]
        if launcher or within:
            self.process = subprocess.Popen(
                [*within, sys.executable, *(launcher or FRESH), *arguments],
                stdout=file.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        else:
            self.process = Fork(begin, arguments, prints=(file, file))

    def all(self) -> list[psutil.Process]:
        """The launcher and its ranks."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def wait_for_step(self, folder: Path, step: int) -> None:
        """Until some rank has logged a step of at least this number."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (folder / "metrics.jsonl").exists():
                points = read_metrics(folder)
                if points and points[-1]["step"] >= step:
                    return
            assert self.process.poll() is None, self.printed.read()
            time.sleep(0.02)
        raise TimeoutError(f"no step {step} within 120 s")

    def wait_for_checkpoint(self, folder: Path, step: int = 1) -> None:
        """Until one of this step or later is whole: they are written behind the steps."""
        self.wait_for_step(folder, step)
        deadline = time.monotonic() + 120
        found = folder / "checkpoints"
        while not any(checkpoints.step_of(path) >= step for path in checkpoints.steps(found)):
            assert self.process.poll() is None, self.printed.read()
            assert time.monotonic() < deadline, "no checkpoint within 120 s"
            time.sleep(0.02)

    def wait_until_it_hears(self) -> None:
        """Until it has a handler of its own for SIGUSR1, which would kill it before."""
        bit = 1 << (signal.SIGUSR1 - 1)
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
            if caught and int(caught[1], 16) & bit:
                return
            time.sleep(0.005)

    def end(self) -> tuple[int, str]:
        """Its exit code and output; and no process of it is left."""
        code = self.process.wait(timeout=120)
        return code, self.printed.read()


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(*args: Any, **how: Any) -> Started:
        started.append(Started(*args, **how))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            for process in one.all():
                process.kill()
            one.process.wait()


@dataclass(frozen=True)
class Whole:
    """A run of RUN and MICRO that nothing happened to; its folder is not to be changed."""

    folder: Path
    errors: str

    def state(self) -> dict[str, Any]:
        return final_state(self.folder)


@pytest.fixture(scope="module")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    config = load_config(
        [*TINY, *RUN, MICRO, f"data.path={packed}", f"output_dir={folder}", "name=whole"]
    )
    done = alexnet_dist("train", *as_overrides(config))
    assert done.returncode == 0, done.stderr
    return Whole(folder / "whole", done.stderr)


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(
    command: Callable[..., list[str]], runs: Path, start: Callable[..., Started], whole: Whole
) -> None:
    expected = whole.state()
    assert expected["progress"]["step"] == 60
    assert [p["step"] for p in expected["metrics"] if p["kind"] == "eval"] == [15, 30, 45, 60]
    for step in (5, 41):
        run = start(command("killed", MICRO))
        run.wait_for_step(runs / "killed", step)
        run.wait_for_checkpoint(runs / "killed", step - 1)
        for process in run.all():
            process.kill()
        run.end()
    last = alexnet_dist(*command("killed", MICRO))
    assert last.returncode == 0, last.stderr
    assert "continues at step 40" in last.stderr or "continues at step 44" in last.stderr
    assert final_state(runs / "killed") == expected
    assert read_run(runs / "killed")["attempt"] == 3


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        pytest.param("replicas", 3, marks=pytest.mark.drill),
        pytest.param("columns_x_replicas", 4, marks=pytest.mark.drill),
        pytest.param("sharded_fc", 2, marks=pytest.mark.drill),
        pytest.param("zero1", 2, marks=pytest.mark.drill),
    ],
)
def test_every_layout_killed_ends_as_if_it_never_was(
    kind: str, ranks: int, command: Callable[..., list[str]], runs: Path,
    start: Callable[..., Started],
) -> None:  # fmt: skip
    """All ranks and the launcher; with more than one bucket of gradients."""
    layout = [f"layout.kind={kind}", f"layout.ranks={ranks}", "train.batch=12", "train.epochs=6",
              "train.micro_batches=2", "model.fc=[1024,512]"]  # fmt: skip
    whole = alexnet_dist(*command("whole", *layout))
    assert whole.returncode == 0, whole.stderr
    assert f"batch 12 in all, {12 // (ranks // (2 if 'columns' in kind else 1))} per replica" in (
        whole.stderr
    )
    run = start(command("killed", *layout))
    run.wait_for_step(runs / "killed", 9)
    run.wait_for_checkpoint(runs / "killed")
    for process in run.all():
        process.kill()
    run.end()
    again = alexnet_dist(*command("killed", *layout))
    assert again.returncode == 0, again.stderr
    assert "killed continues at step" in again.stderr
    assert final_state(runs / "killed") == final_state(runs / "whole")


def test_a_finished_run_says_so_and_changes_nothing(
    command: Callable[..., list[str]], runs: Path, whole: Whole
) -> None:
    assert (
        "batch 8 in all, 8 per replica, in 2 micro-batches of 4; each rank decodes 4"
        in whole.errors
    )
    shutil.copytree(whole.folder, runs / "done")
    again = alexnet_dist(*command("done", MICRO))
    assert again.returncode == 0, again.stderr
    assert "done: done, 60 steps; top-1" in again.stdout
    best = checkpoints.best(runs / "done" / "checkpoints")
    score = Progress.of(best.progress).score
    assert score is not None
    its = "" if best.step == 60 else f": top-1 {score.top1:.2%} ({score.correct1} of "
    assert f"best checkpoint: {best.path}{its}" in again.stdout
    assert "next: alexnet-dist evaluate" in again.stdout
    assert final_state(runs / "done") == whole.state()


@pytest.mark.drill  # tests/test_layouts.py changes layouts at every save, in fewer processes
@pytest.mark.parametrize(
    ("kinds", "optimizer"),
    [(("columns", "one"), "sgd"), (("one", "columns"), "adam")],
)
def test_a_run_made_on_one_layout_continues_on_the_other(
    kinds: tuple[str, str],
    optimizer: str,
    command: Callable[..., list[str]],
    runs: Path,
    start: Callable[..., Started],
) -> None:
    precise = ["train.precision=fp64", "model.lrn.alpha=0.05", f"optimizer.kind={optimizer}"]
    if optimizer == "adam":
        precise.append("schedule.rate=0.001")
    whole = alexnet_dist(*command("whole", f"layout.kind={kinds[1]}", *precise))
    assert whole.returncode == 0, whole.stderr
    run = start(command("moved", f"layout.kind={kinds[0]}", *precise))
    run.wait_for_step(runs / "moved", 18)
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.end()
    assert code == 75, output
    moved = alexnet_dist(*command("moved", f"layout.kind={kinds[1]}", *precise))
    assert moved.returncode == 0, moved.stderr
    assert "continues at step" in moved.stderr
    assert_checkpoints_near(runs / "moved", runs / "whole", 1e-10)
    best = [checkpoints.best(runs / name / "checkpoints").step for name in ("moved", "whole")]
    assert best[0] == best[1]


def torchrun(*options: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc-per-node", "2", *options, "-m", "alexnet_dist")


CODES = {
    signal.SIGUSR1: 75, signal.SIGUSR2: 75, signal.SIGTERM: 143, signal.SIGHUP: 143,
    signal.SIGINT: 130,
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "kind", "to"),
    [
        (signal.SIGUSR1, "columns", "launcher"),
        (signal.SIGTERM, "columns", "launcher"),
        (signal.SIGINT, "columns", "launcher"),
        (signal.SIGHUP, "columns", "rank"),  # one alone hears it
        (signal.SIGUSR2, "one", "launcher"),
        pytest.param(signal.SIGUSR2, "columns", "launcher", marks=pytest.mark.drill),
        *(
            pytest.param(number, "columns", "rank", marks=pytest.mark.drill)
            for number in CODES
            if number != signal.SIGHUP
        ),
    ],
)
def test_a_signal_saves_and_leaves_with_its_code(
    number: signal.Signals, kind: str, to: str, command: Callable[..., list[str]], runs: Path,
    start: Callable[..., Started],
) -> None:  # fmt: skip
    code = CODES[number]
    long = ["train.epochs=500", "evaluate.every_epochs=500", "checkpoint.every_steps=10000"]
    run = start(command("stopped", f"layout.kind={kind}", *long))
    run.wait_for_step(runs / "stopped", 6)
    processes = run.all()
    target = processes[0] if to == "launcher" else processes[-1]
    begin = time.monotonic()
    target.send_signal(number)
    found, output = run.end()
    assert time.monotonic() - begin < 10, output
    assert found == code, output
    assert "stopped at step" in output
    assert output.count("a stop was requested, saving first") == 1
    assert "Traceback" not in output
    assert "torch/distributed" not in output  # torchelastic's own warnings
    state = read_run(runs / "stopped")
    assert (state["state"], state["exit"]) == ("stopped", code)
    (saved,) = checkpoints.steps(runs / "stopped" / "checkpoints")
    assert checkpoints.verify(saved).step == state["step"] >= 6
    assert not any(process.is_running() for process in processes)


def test_a_signal_that_comes_again_and_again_changes_nothing(
    command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    run = start(command("again", "train.epochs=500", "evaluate.every_epochs=500"))
    run.wait_for_step(runs / "again", 6)
    for _ in range(3):
        run.process.send_signal(signal.SIGUSR1)
        time.sleep(0.02)
    code, output = run.end()
    assert (code, read_run(runs / "again").get("exit")) == (75, 75), output


def under_nohup(arguments: list[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    forks.run(arguments)


def test_under_nohup_a_hangup_is_ignored(
    command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    run = start(command("nohup"), begin=under_nohup)
    run.wait_for_step(runs / "nohup", 6)
    for process in run.all():
        process.send_signal(signal.SIGHUP)
    code, output = run.end()
    assert code == 0, output
    assert read_run(runs / "nohup")["state"] == "finished"


def on_a_terminal(arguments: list[str], terminal: str) -> None:
    """Of a session leader, the first terminal that it opens is its own."""
    opened = os.open(terminal, os.O_RDWR)
    for stream in range(3):
        os.dup2(opened, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    forks.run(arguments)


@pytest.mark.parametrize("kind", ["one", "columns"])
def test_a_run_whose_terminal_is_closed_saves(
    kind: str, command: Callable[..., list[str]], runs: Path
) -> None:
    """What it then writes to the terminal is an error (EIO)."""
    arguments = command("closed", f"layout.kind={kind}", "train.epochs=500", "log.every_steps=1")
    terminal, its = pty.openpty()
    elsewhere = runs.parent / "printed"
    process = Fork(on_a_terminal, arguments, os.ttyname(its), prints=(elsewhere, elsewhere))
    try:
        metrics = runs / "closed" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(read_metrics(runs / "closed")) > 12):
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 65536)  # or it would wait for us to read
            assert time.monotonic() < deadline
            assert process.poll() is None
    finally:
        os.close(terminal)
        os.close(its)
    process.wait(timeout=120)
    assert not elsewhere.read_text()
    state = read_run(runs / "closed")
    assert (state["state"], state["exit"]) == ("stopped", 143)
    (*_, saved) = checkpoints.steps(runs / "closed" / "checkpoints")
    assert checkpoints.verify(saved).step == state["step"]


@pytest.mark.parametrize("kind", ["one", "columns"])
def test_a_signal_is_heard_while_the_program_starts(
    kind: str, command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    run = start(command("early", f"layout.kind={kind}", "train.epochs=500"), FRESH)
    run.wait_until_it_hears()  # torch takes seconds to load from here on
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.end()
    assert code == 75, output
    assert "stopped" in output or "interrupted" in output  # before there were ranks
    assert not checkpoints.steps(runs / "early" / "checkpoints")


@pytest.mark.parametrize("kind", ["one", pytest.param("columns", marks=pytest.mark.drill)])
def test_a_stopped_run_ends_as_if_it_never_was(
    kind: str, command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    """Stopped at odd steps, in training and while evaluating."""
    slow = ("evaluate.batch=1", f"layout.kind={kind}")  # so that a signal meets an evaluation
    whole = alexnet_dist(*command("whole", *slow))
    assert whole.returncode == 0, whole.stderr
    for step in (15, 29):
        run = start(command("stopped", *slow))
        run.wait_for_step(runs / "stopped", step)
        run.process.send_signal(signal.SIGTERM)
        code, output = run.end()
        assert code == 143, output
    last = alexnet_dist(*command("stopped", *slow))
    assert last.returncode == 0, last.stderr
    assert final_state(runs / "stopped") == final_state(runs / "whole")


@pytest.mark.parametrize("kind", ["one", "columns"])
def test_a_second_interrupt_leaves_at_once(
    kind: str, command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    run = start(command("hurried", f"layout.kind={kind}", "train.epochs=500"))
    run.wait_for_checkpoint(runs / "hurried")
    processes = run.all()
    begin = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    run.process.send_signal(signal.SIGINT)
    code, output = run.end()
    assert time.monotonic() - begin < 20
    assert code == 130, output
    assert not psutil.wait_procs(processes, timeout=10)[1]
    found, wrong = checkpoints.newest_good(runs / "hurried" / "checkpoints")
    assert found is not None
    assert not wrong


@pytest.mark.parametrize(
    ("to", "number"),
    [
        ("torchrun", signal.SIGTERM),
        pytest.param("a worker", signal.SIGUSR2, marks=pytest.mark.drill),
    ],
)
def test_torchrun_does_the_same(
    to: str, number: signal.Signals, command: Callable[..., list[str]], runs: Path,
    start: Callable[..., Started], whole: Whole,
) -> None:  # fmt: skip
    run = start(command("torchrun", MICRO), torchrun())
    run.wait_for_step(runs / "torchrun", 20)
    processes = run.all()
    (processes[0] if to == "torchrun" else processes[-1]).send_signal(number)
    code, output = run.end()
    assert code != 0  # torchrun hides codes: run.json has them
    assert read_run(runs / "torchrun")["exit"] == CODES[number], output
    again = alexnet_dist(*command("torchrun", MICRO))  # by our own launcher: the same run
    assert again.returncode == 0, again.stderr
    assert final_state(runs / "torchrun") == whole.state()


@pytest.mark.drill
@pytest.mark.parametrize(("handled", "code"), [(True, 75), (False, 143)])
def test_torchrun_passes_on_the_signals_that_it_is_told_of(
    handled: bool, code: int, command: Callable[..., list[str]], runs: Path,
    start: Callable[..., Started],
) -> None:  # fmt: skip
    """One that it is not told of kills it; its ranks notice, save and leave."""
    options = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2") if handled else ()
    run = start(command("torchrun", "train.epochs=500"), torchrun(*options))
    run.wait_for_step(runs / "torchrun", 6)
    ranks = run.all()[1:]
    run.process.send_signal(signal.SIGUSR1)
    assert run.end()[0] != 0
    assert not psutil.wait_procs(ranks, timeout=20)[1]
    found = read_run(runs / "torchrun")
    assert (found["state"], found["exit"]) == ("stopped", code)


def test_no_rank_outlives_its_launcher(
    command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    run = start(command("orphans", "train.epochs=500"))
    run.wait_for_step(runs / "orphans", 6)
    launcher, *ranks = run.all()
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    assert read_run(runs / "orphans")["state"] == "stopped"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_the_others_with_it_and_is_named(
    rank: int, command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    run = start(command("killed", "train.epochs=500"))
    run.wait_for_step(runs / "killed", 6)
    processes = run.all()
    processes[1 + rank].kill()
    begin = time.monotonic()
    code, output = run.end()
    assert code == 1
    assert time.monotonic() - begin < 10
    assert not any(process.is_running() for process in processes)
    found = read_run(runs / "killed")
    assert (found["state"], found["exit"], found["known"]) == ("failed", 1, False)
    name = f"rank {rank} was killed by SIGKILL"
    assert found["reason"].startswith(name)
    assert "from outside the run: the kernel killed none for lack of memory" in found["reason"]
    assert f"{name} from outside" in output


def test_a_rank_deaf_to_a_signal_has_the_time_it_was_given(
    tmp_path: Path, start: Callable[..., Started]
) -> None:
    """One second here, and 120 in a run: torchelastic's own is 30."""
    deaf = tmp_path / "deaf"
    rank = f"""if True:
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(deaf)!r}).touch()
        time.sleep(100)"""
    launcher = f"""if True:
        import sys
        from alexnet_dist.parallel.spawn import launch_ranks
        launch_ranks(sys.executable, 1, 1, "-c", {rank!r})"""
    run = start([], ("-c", launcher))
    while not deaf.exists():
        assert run.process.poll() is None
        time.sleep(0.02)
    processes = run.all()
    begin = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    _, output = run.end()
    assert "SignalException" in output
    assert 1 <= time.monotonic() - begin < 20
    assert not any(process.is_running() for process in processes)


def test_a_signal_after_the_ranks_have_ended_changes_nothing() -> None:
    with handlers_restored():
        spawn.launch_ranks(sys.executable, 1, 1, "-c", "pass")
        signal.raise_signal(signal.SIGTERM)


def test_two_jobs_never_share_a_run_folder(
    command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    first = start(command("shared", ALONE, "train.epochs=500"))
    first.wait_for_step(runs / "shared", 3)
    second = alexnet_dist(*command("shared", ALONE, "train.epochs=500"))
    assert second.returncode == 1
    assert "shared is in use by process" in second.stderr
    assert "Traceback" not in second.stderr
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 143


def test_another_config_in_the_same_folder_is_refused(command: Callable[..., list[str]]) -> None:
    assert alexnet_dist(*command("same", ALONE, "train.epochs=1")).returncode == 0
    other = alexnet_dist(*command("same", ALONE, "train.epochs=1", "seed=5", "model.dropout=0.25"))
    assert other.returncode == 2
    assert "model.dropout: 0.5 there, 0.25 here; seed: 0 there, 5 here" in other.stderr
    assert other.stderr.count("\n") == 1


def test_a_run_cannot_end_before_where_it_is(command: Callable[..., list[str]], runs: Path) -> None:
    steps = "schedule.kind=steps"
    assert alexnet_dist(*command("shorter", ALONE, "train.epochs=2", steps)).returncode == 0
    result = alexnet_dist(*command("shorter", ALONE, "train.epochs=1", steps))
    assert result.returncode == 2
    assert "train.epochs=1: ends at step 8, but the run in" in result.stderr
    assert read_run(runs / "shorter")["state"] == "finished"  # as it was
    assert alexnet_dist(*command("shorter", ALONE, "train.epochs=3", steps)).returncode == 0
    assert read_run(runs / "shorter")["step"] == 22


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(
    command: Callable[..., list[str]], runs: Path
) -> None:
    result = alexnet_dist(*command("wild", "schedule.rate=1e12", "train.precision=fp32"))
    assert result.returncode == 1
    assert "this update was skipped, and its batch is kept in" in result.stderr
    assert "Lower schedule.rate" in result.stderr
    assert "Traceback" not in result.stderr
    assert read_run(runs / "wild")["state"] == "failed"
    for path in checkpoints.steps(runs / "wild" / "checkpoints"):
        found = checkpoints.verify(path)
        tensors = found.parameters()
        assert all(tensors.rows(n, slice(None)).isfinite().all() for n in tensors.keys())  # noqa: SIM118


def test_wrong_numbers_of_ranks_are_refused(command: Callable[..., list[str]]) -> None:
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    result = alexnet_dist(*command("three"), environment=environment)
    assert result.returncode == 2
    assert "layout.kind=columns takes 2 ranks, but the launcher started 3" in result.stderr


def test_a_run_is_scored_and_watched(command: Callable[..., list[str]], runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for seed, name in enumerate("ab"):
        run = command(name, ALONE, "train.epochs=4", f"seed={seed}")
        assert alexnet_dist(*run).returncode == 0

    board = EventAccumulator(str(runs / "a"))
    board.Reload()
    scalars = board.Tags()["scalars"]
    for tag in ("train/loss", "train/rate", "eval/top1", "eval/top5", "speed/images_per_s"):
        assert tag in scalars
    assert [point.step for point in board.Scalars("train/loss")] == list(range(3, 31, 3))
    assert board.Tags()["images"] == ["kernels/conv1"]
    assert "config/text_summary" in board.Tags()["tensors"]

    best = checkpoints.best(runs / "a" / "checkpoints")
    scored = alexnet_dist("evaluate", str(best.path), "--json")
    assert scored.returncode == 0, scored.stderr
    score = json.loads(scored.stdout)
    assert score["samples"] == 23
    assert score["correct1"] == 23 - round(best.error * 23)  # type: ignore[operator]

    both = alexnet_dist("evaluate", str(runs / "a"), str(runs / "b"), "--views", "10")
    assert both.returncode == 0, both.stderr
    assert "/a/checkpoints/step-" in both.stdout
    assert "/b/checkpoints/step-" in both.stdout
    assert "of 23 right" in both.stdout

    for folder in (runs / "nothing", runs):
        missing = alexnet_dist("evaluate", str(folder))
        assert missing.returncode == 1
        assert "is neither a run folder nor a checkpoint" in missing.stderr


def test_tensorboards_steps_go_on_over_restarts(
    command: Callable[..., list[str]], runs: Path, start: Callable[..., Started]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(command("board", ALONE))
    run.wait_for_step(runs / "board", 21)
    for process in run.all():
        process.kill()
    run.end()
    assert alexnet_dist(*command("board", ALONE)).returncode == 0
    board = EventAccumulator(str(runs / "board"))
    board.Reload()
    assert [point.step for point in board.Scalars("train/loss")] == list(range(3, 61, 3))
