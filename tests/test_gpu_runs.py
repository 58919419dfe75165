"""Whole runs of several ranks on as few GPUs as there are: stopped, resumed, killed, hung."""

import functools
import re
import signal
import time
from collections.abc import Callable

import pytest
import shared
from conftest import alexnet_dist, as_overrides
from shared import SHARED
from small_runs import final_state
from test_run import RUN, Started, start
from test_watchdog import delaying, stuck

from alexnet_dist.config.schema import Config
from alexnet_dist.files import read_run

__all__ = ["start"]  # a fixture

pytestmark = shared.marks
TIMEOUT_S = 50  # of which a first step that builds kernels may take most
FOREVER = [*SHARED, "layout.ranks=2", "train.epochs=100000", "evaluate.every_epochs=100000",
           f"layout.timeout_s={TIMEOUT_S}"]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("columns", 2),
        ("replicas", 3),  # which evaluate 23 images
        ("columns_x_replicas", 4),
        ("sharded_fc", 2),
        ("zero1", 2),
        ("zero2", 2),
    ],
)
def test_every_layout_stopped_ends_as_if_it_never_was(
    kind: str, ranks: int, tiny: Callable[..., Config], start: Callable[..., Started]
) -> None:
    layout = [*SHARED, f"layout.kind={kind}", f"layout.ranks={ranks}", "train.batch=12",
              "train.epochs=6", "train.micro_batches=2", "model.fc=[1024,512]"]  # fmt: skip

    def arguments(name: str) -> list[str]:
        return ["train", *as_overrides(tiny(*RUN, *layout, f"name={name}"))]

    whole = alexnet_dist(*arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    stopped, runs = start(arguments("stopped")), tiny().folder.parent
    stopped.wait_for_step(runs / "stopped", 9)
    stopped.process.send_signal(signal.SIGUSR1)
    code, output = stopped.end()
    assert code == 75, output
    again = alexnet_dist(*arguments("stopped"))
    assert again.returncode == 0, again.stderr
    assert "stopped continues at step" in again.stderr
    assert final_state(runs / "stopped") == final_state(runs / "whole")


def test_a_killed_rank_takes_the_other_with_it_and_is_named(
    tiny: Callable[..., Config], start: Callable[..., Started]
) -> None:
    config = tiny(*RUN, *FOREVER, "name=killed")
    run = start(["train", *as_overrides(config)])
    run.wait_for_step(config.folder, 6)
    processes = run.all()
    processes[2].kill()
    begin = time.monotonic()
    code, output = run.end()
    assert code == 1
    assert time.monotonic() - begin < TIMEOUT_S + 15
    assert not any(process.is_running() for process in processes)
    # By the launcher; or by the other's watchdog, which then found that it does not answer.
    named = r"rank 1 (was killed by SIGKILL|\(process \d+ on)"
    assert re.search(named, output), output
    assert re.search(named, read_run(config.folder)["reason"])


def test_a_rank_that_hangs_is_named_with_its_stack(tiny: Callable[..., Config]) -> None:
    config = tiny(*RUN, *FOREVER, "name=hangs")
    run = Started(["train", *as_overrides(config)], begin=functools.partial(delaying, stuck))
    begin = time.monotonic()
    code, output = run.end()
    assert code == 1
    assert time.monotonic() - begin < 4 * TIMEOUT_S
    assert "time.sleep(1000 if" in output
    reason = read_run(config.folder)["reason"]
    assert re.match(r"no step for \d+ s: the others wait for rank 1", reason), reason
