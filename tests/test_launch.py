"""Launching without a real Slurm: its variables, what follows a run's end, what is refused."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, alexnet_dist, as_overrides, on_ranks
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

from alexnet_dist.cli import main
from alexnet_dist.config.load import configs_folder, load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import AlexNetDistError, ConfigError, RunFolderError
from alexnet_dist.files import appended, read_run
from alexnet_dist.parallel import environment, topology
from alexnet_dist.parallel.device import cores_of, take_device
from alexnet_dist.parallel.environment import Place
from alexnet_dist.parallel.layouts import check_columns_meet
from alexnet_dist.parallel.rendezvous import meet
from alexnet_dist.parallel.stop_signals import StopSignals
from alexnet_dist.training import run_folder
from alexnet_dist.training.run_folder import RunFolder
from launch import cluster, ensemble, job, status, submit

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURMD_NODENAME": "n2",
}


def test_a_step_of_slurm_says_who_a_rank_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert environment.place() == Place(3, 4, 1, 2, 1, (2, 2), None, "n2", "7-0-0")
    monkeypatch.delenv("SLURMD_NODENAME")
    assert environment.place().address == socket.gethostname()  # type: ignore[union-attr]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert environment.place().meeting == "7-2-0"  # type: ignore[union-attr]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # salloc, srun --pty bash
    assert environment.place() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment.place() == Place(1, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x': must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: must be less than WORLD_SIZE=2, counted from"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2': must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK='a': must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK=0: must be less"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
         "LOCAL_RANK=2: must be less than LOCAL_WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}, "must be at most WORLD_SIZE=1"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4: must be less than SLURM_STEP_NUM_TASKS=4"),
        (STEP | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2: must be less than the nodes of SLURM"),
        (STEP | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2: must be less than this node's tasks=2"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS='two': must be"),
        (STEP | {"SLURM_NODEID": ""}, "SLURM_NODEID='': must be a number"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": ""}, "SLURM_STEP_TASKS_PER_NODE=: must be"),
    ],
)  # fmt: skip
def test_a_launchers_variable_that_makes_no_sense_is_named(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        environment.place()


def test_empty_variables_of_a_launcher_count_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")
    assert environment.place() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment.place() == Place(1, 2)


def test_a_launchers_bad_variable_is_one_line() -> None:
    odd = os.environ | {"RANK": "x", "WORLD_SIZE": "2"}
    done = alexnet_dist("configs", fresh=True, env=odd)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "RANK='x': must be a number" in done.stderr


def test_tasks_on_nodes_are_read_as_slurm_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.tasks_per_node("2(x3),1") == (2, 2, 2, 1)
    assert environment.tasks_per_node("4") == (4,)
    with pytest.raises(ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE=two: must be as Slurm"):
        environment.tasks_per_node("two")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "two")
    with pytest.raises(ConfigError, match=r"^SLURM_TASKS_PER_NODE=two: must be as Slurm"):
        job.before(["demo"])


@pytest.mark.parametrize(
    ("kind", "tasks", "said"),
    [
        ("columns", (2,), ""),
        ("columns_x_replicas", (2, 2), ""),
        ("one", (1,), ""),
        ("columns", (1,), ""),  # a task alone starts its own ranks
        ("replicas", (2, 1), "every node must have the same number"),
        ("columns_x_replicas", (1, 1, 1, 1), "ask for cluster.tasks_per_node=2"),
        ("columns_x_replicas", (3, 3), "ask for cluster.tasks_per_node=2"),
        ("columns", (2, 2), "takes 2 ranks"),
    ],
)
def test_columns_share_a_node(
    kind: str, tasks: tuple[int, ...], said: str, tiny: Callable[..., Config]
) -> None:
    config = tiny(f"layout.kind={kind}", "train.batch=24")
    if said:
        with pytest.raises(ConfigError, match=said):
            job.check_placement(config, tasks)
    else:
        job.check_placement(config, tasks)


def test_fewer_tasks_than_places_are_seen(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch --nodes=2 --ntasks-per-node=2 --ntasks=3: Slurm still says 2(x2)."""
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    with pytest.raises(ConfigError, match="Slurm put 2, 1 tasks on 2 nodes"):
        job.before(as_overrides(tiny("layout.kind=replicas")))


def test_a_batch_script_outside_a_job_says_to_submit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bash slurm/train.sbatch demo` ended in a traceback, and left a run that had failed."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for command in (["before", "demo"], ["after", "3", "demo"]):
        with pytest.raises(ConfigError, match="not a Slurm job: submit the script with `sbatch`"):
            job.main(command)


def test_columns_that_slurm_laid_apart_are_refused() -> None:
    check_columns_meet([0, 0, 1, 1], 2)
    check_columns_meet([0, 1, 0, 1], 1)
    with pytest.raises(ConfigError, match=r"nodes 0, 1, 0, 1, .*--distribution=block"):
        check_columns_meet([0, 1, 0, 1], 2)


@pytest.mark.parametrize(
    ("visible", "gpus_on_node", "device"),
    [
        (2, 2, "cuda:1"),
        (1, 2, "cuda:0"),  # --gpus-per-task: each task sees its own
        (1, 1, "cpu"),  # two tasks, one GPU
        (0, None, "cpu"),
        (1, None, "cpu"),
    ],
)
def test_a_rank_takes_its_own_gpu(
    visible: int, gpus_on_node: int | None, device: str, tiny: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    place = Place(1, 2, 1, 2, 0, (2,), gpus_on_node)
    assert str(take_device(tiny("layout.device=auto"), place)) == device


def test_a_task_counts_on_the_cores_slurm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    for name, value in (STEP | {"SLURM_CPUS_PER_TASK": "6"}).items():
        monkeypatch.setenv(name, value)
    place = environment.place()
    assert place is not None
    assert cores_of(place) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # bound to fewer
    assert cores_of(place) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert cores_of(Place(1, 8, 1, 4)) == 8


def _meet(folder: str) -> tuple[int, list[str] | None]:
    """Ranks that Slurm started, as far as they can tell, meet without a port agreed on."""
    rank = os.environ["RANK"]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    os.environ |= STEP | {
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURMD_NODENAME": "localhost",
    }
    run = [*TINY, "layout.kind=replicas", f"output_dir={folder}", "name=met"]
    here, met = topology.connect(load_config(run)), Path(folder) / "met"
    total = sum(int(number) for (number,) in here.gather(here.global_rank + 1))
    return total, os.listdir(met) if met.exists() else None


def test_ranks_of_a_step_meet_in_the_run_folder(tmp_path: Path) -> None:
    """Which is left as it was, since the start may be refused."""
    assert on_ranks(2, _meet, str(tmp_path)) == [(3, None), (3, None)]
    (tmp_path / "met").mkdir()
    assert on_ranks(2, _meet, str(tmp_path)) == [(3, []), (3, [])]


def test_a_step_whose_other_ranks_never_come_leaves_nothing(tmp_path: Path) -> None:
    """Ranks that come late then say that rank 0 is not there, and do not call where it was."""
    config = load_config([*TINY, f"output_dir={tmp_path}", "name=met"])
    with pytest.raises(dist.DistStoreError):
        meet(config, Place(0, 2, 0, 2, meeting="7-0-0"), timedelta(seconds=0.2))
    assert not [*tmp_path.iterdir()]


def test_an_element_of_an_array_is_not_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last element's own number is the array's."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert job.own_name() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert job.own_name() == "7_4"


def test_what_follows_is_read_from_the_run() -> None:
    for run, state, again in (
        ({"state": "finished"}, "RUNNING", False),
        ({"state": "stopped", "exit": 75, "step": 4}, "RUNNING", True),
        ({"state": "stopped", "exit": 75, "step": 4}, "CANCELLED", False),
        ({"state": "stopped", "exit": 143, "step": 4}, "RUNNING", False),
        ({"state": "stopped", "exit": 143, "step": 4}, "PREEMPTED", True),
        ({"state": "stopped", "exit": 130, "step": 4}, "RUNNING", False),
        ({"state": "failed", "known": True, "reason": "not finite"}, "RUNNING", False),
        ({"state": "failed", "known": False, "reason": "peer closed"}, "RUNNING", True),
        ({"state": "failed", "reason": "no step for 600 s"}, "RUNNING", True),
        ({"state": "running"}, "RUNNING", True),
        ({"state": "starting"}, "RUNNING", True),
        ({"state": "running"}, "CANCELLED", False),
    ):
        assert job.verdict(run, state)[0] == again, run


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("JobState=RUNNING PreemptEligibleTime=2026-11-27T10:00:00 PreemptTime=None", "RUNNING"),
        ("JobState=RUNNING PreemptTime=2026-11-27T10:00:00 RunTime=00:01:00", "PREEMPTED"),
        ("JobState=CANCELLED Reason=None PreemptTime=None", "CANCELLED"),
        (None, "UNKNOWN"),
    ],
)
def test_a_jobs_state_is_read_as_scontrol_writes_it(
    said: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(job, "slurm", lambda *_, **__: (said, ""))
    assert job.job_state() == state


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was put back in the queue of a Slurm that is not there."""
    asked: list[str] = []
    monkeypatch.setattr(job, "requeue", lambda: asked.append(os.environ["SLURM_JOB_ID"]))
    monkeypatch.setattr(job, "job_state", lambda: "RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return asked


def test_a_job_whose_ranks_never_began_is_tried_again_within_a_bound(
    tiny: Callable[..., Config], requeued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("checkpoint.max_idle_restarts=2", "name=never")
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert job.after(137, config) == 0
        assert len(requeued) == restart + 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(RunFolderError, match=r"starts in a row saved nothing.*ended with 137"):
        job.after(137, config)
    assert len(requeued) == 3
    assert job.after(2, tiny("name=mistake")) == 2  # the ranks have said which
    assert job.after(0, tiny("name=done")) == 0
    assert len(requeued) == 3


def test_a_job_whose_starts_cannot_be_counted_is_not_tried_again(
    tiny: Callable[..., Config], requeued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes no run.json, not even in the old one's place on some file systems; without
    one the bound would never be reached."""
    config = tiny("name=full")
    assert job.after(137, config) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    monkeypatch.setattr(run_folder, "overwrite_json", full)
    with pytest.raises(RunFolderError, match=r"run\.json could not be written.*not tried again"):
        job.after(1, config)
    assert requeued == ["7"]


def test_a_job_that_is_not_tried_again_leaves_with_its_runs_code(
    tiny: Callable[..., Config], requeued: list[str]
) -> None:
    """Whatever srun's was."""
    for code, left in ((75, 0), (143, 143)):
        folder = RunFolder(tiny("name=left"))
        folder.take()
        folder.report("stopped", exit=code, step=4)
        folder.close()
        assert job.after(137, folder.config) == left
    assert requeued == ["7"]


def test_a_second_job_of_a_run_is_not_tried_again(
    tiny: Callable[..., Config], requeued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("name=taken")
    first = RunFolder(config)
    with monkeypatch.context() as another:
        another.setenv("SLURM_JOB_ID", "6")
        first.take()
    first.report("running")
    with pytest.raises(RunFolderError, match="is in use by process"):
        job.after(1, config)
    assert requeued == []
    assert read_run(config.folder)["job"] == "6"


def test_stops_that_save_nothing_are_a_crash_loop_too(
    tiny: Callable[..., Config],
) -> None:
    """A time limit shorter than a start would else go round for ever."""
    config = tiny("checkpoint.max_idle_restarts=1", "name=short")
    for _ in range(2):
        folder = RunFolder(config)
        folder.take()
        folder.report("stopped", exit=75)
        folder.close()
    with pytest.raises(RunFolderError, match="2 starts in a row saved nothing"):
        RunFolder(config).take()


@pytest.mark.parametrize("name", [path.stem for path in configs_folder().glob("cluster/*.yaml")])
def test_shipped_clusters_load(name: str) -> None:
    made, rest = cluster.split(["demo", f"cluster={name}", "seed=1", "cluster.nodes=3"])
    assert made == dataclasses.replace(cluster.split([f"cluster={name}"])[0], nodes=3)
    assert rest == ["demo", "seed=1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["cluster=nowhere"],
            r"cluster=nowhere: there is no such file, and it is not one of dev, template",
        ),
        (["cluster=" + "x" * 300], "there is no such file, and it is not one of dev"),
        (["cluster=~no-such-user/site.yaml"], "there is no such file, and it is not one of dev"),
        (
            ["cluster.node=1"],
            r"command line: unknown key cluster\.node; did you mean cluster\.node",
        ),
        (["cluster.nodes=many"], r"cluster\.nodes=many: must be a whole number \(nodes of the job"),
        (["cluster.nodes=true"], r"cluster\.nodes=true: must be a whole number"),
        (
            ["cluster=template", "cluster.nodes=x"],
            r"command line: cluster\.nodes=x: must be a whole",
        ),
        (["cluster.nodes=0"], r"cluster\.nodes=0: must be at least 1"),
        (["cluster.gpus_per_node=-1"], r"cluster\.gpus_per_node=-1: must be at least 0"),
        (
            ["cluster.time_min=2"],
            r"cluster\.signal_s=120: must be less than the 2 minutes of cluster\.time_min",
        ),
        (["cluster.setup=["], r"cluster\.setup=\[: '\[' is not valid YAML"),
        (
            ["cluster.sbatch={begin: 2026-99-99}"],
            r"cluster\.sbatch=.*not valid YAML: month must be",
        ),
        (["cluster.sbatch=long"], r"cluster\.sbatch=long: must be keys and values, as in \{qos:"),
        (["cluster.mem=8"], r"unknown key cluster\.mem; did you mean cluster\.memory_gb\?"),
    ],
)
def test_wrong_clusters_are_named(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cluster.split(arguments)


def test_a_cluster_file_that_would_grow_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not a YAML file of .* has aliases"):
        cluster.split([f"cluster={file}"])


@pytest.mark.parametrize("text", ["cluster: {nodes: 2}\n", "cluster.nodes: 2\n"])
def test_a_cluster_file_of_full_names_is_told_to_shorten_them(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml: .* without `cluster\.`, as in nodes: 2"):
        cluster.split([f"cluster={file}"])


def test_a_cluster_says_what_its_keys_say(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("time_min: 1:20\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*YAML would read 1:20 as another"):
        cluster.split([f"cluster={file}"])
    file.write_text("account: 007\n")
    with pytest.raises(ConfigError, match=r"YAML would read 007 as another number.* in quotes"):
        cluster.split([f"cluster={file}"])
    made, _ = cluster.split(["cluster.account=007", "cluster.sbatch={qos: long, exclusive: true}",
                             "cluster.setup=[module load cuda, ulimit -n 9]"])  # fmt: skip
    assert made.account == "007"
    assert f"{made}" == "1 node of 1 task and 0 GPUs, 1 core a task, 60 minutes"
    assert made.sbatch == {"qos": "long", "exclusive": True}
    assert made.setup == ("module load cuda", "ulimit -n 9")


def test_values_of_an_ensemble() -> None:
    assert ensemble.values_of("seed=0..4") == ("seed", ["0", "1", "2", "3", "4"])
    assert ensemble.values_of("model.dropout=0.3,0.5") == ("model.dropout", ["0.3", "0.5"])
    assert ensemble.values_of("model.fc=[8,8],[4,4]") == ("model.fc", ["[8,8]", "[4,4]"])
    for wrong in ("seed", "seed=", "seed=1,1", "seed=4..0"):
        with pytest.raises(ConfigError, match=r"must be KEY=0\.\.4"):
            ensemble.values_of(wrong)


@pytest.fixture
def run(tiny: Callable[..., Config]) -> list[str]:
    """Arguments of a run of seconds."""
    return [*as_overrides(tiny("layout.kind=one", "train.epochs=0.2")), "name=some"]


def test_several_keys_are_combined(run: list[str]) -> None:
    found = ensemble.members_of(run, ["model.dropout=0.3,0.5", "seed=0..1"], None)
    assert [dict(member.keys) for member in found] == [
        {"model.dropout": "0.3", "seed": "0"}, {"model.dropout": "0.3", "seed": "1"},
        {"model.dropout": "0.5", "seed": "0"}, {"model.dropout": "0.5", "seed": "1"},
    ]  # fmt: skip
    assert [member.config.name for member in found][::3] == [
        "some-dropout-0.3-seed-0", "some-dropout-0.5-seed-1",
    ]  # fmt: skip
    assert (found[3].config.model.dropout, found[3].config.seed) == (0.5, 1)
    with pytest.raises(ConfigError, match="seed, seed: name each key once"):
        ensemble.members_of(run, ["seed=0,1", "seed=2,3"], None)
    with pytest.raises(ConfigError, match=r"two members would be named some-fc-_36_28_"):
        ensemble.members_of(run, ["model.fc=[36,28],[36 ,28]"], None)


def test_an_ensemble_trains_here_and_goes_on_where_it_was(
    run: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[list[str]] = []

    def here(arguments: list[str], code: int = 0) -> int:
        trained.append(list(arguments))
        if code == 0 and "seed=7" not in arguments:
            assert main.main(["train", *arguments]) == 0
        return 1 if "seed=7" in arguments else code

    run = [*run, "schedule.kind=steps"]
    words = [*run, "--over", "seed=0,7,1", "--local"]
    monkeypatch.setattr(ensemble, "run_here", lambda arguments: here(arguments, 130))
    assert ensemble.main(words) == 130
    assert len(trained) == 1
    monkeypatch.setattr(ensemble, "run_here", here)
    assert ensemble.main(words) == 1
    said = capfd.readouterr().out
    rows = [
        line.split()[1:4] for line in said.splitlines() if re.search(r"-seed-\d +\d +fin", line)
    ]
    assert rows == [["0", "finished", "2/2"], ["1", "finished", "2/2"]]
    assert re.search(r"some-seed-7  7     not started  -     -  +-", said)
    assert "  best top-1 error  last\n" in said
    assert "run 2 of 3: " in said
    assert "the average of 2 of 3: top-1 error " in said
    trained.clear()
    assert ensemble.main(words) == 1
    assert [words[-2:] for words in trained] == [["seed=7", "name=some-seed-7"]]
    with pytest.raises(ConfigError, match=r"some-seed-0 .* finished run .* model\.dropout: give"):
        ensemble.main([*words, "model.dropout=0.25"])
    (first,) = ensemble.members_of([*run, "train.epochs=0.1"], ["seed=0"], None)
    with pytest.raises(ConfigError, match=r"another train\.epochs: give"):
        assert first.finished
    (first,) = ensemble.members_of([*run, "train.epochs=0.3"], ["seed=0"], None)
    assert not first.finished, "it can go on"
    with pytest.raises(ConfigError, match="leave out --parallel"):
        ensemble.main([*words, "--parallel", "2"])


def test_an_ensemble_that_starts_nothing_waits_for_its_jobs_too(
    run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked = [True, True, False], set()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(ensemble, "waiting", lambda name: asked.add(name) or answers.pop(0))
    with pytest.raises(ConfigError, match="no run has finished yet"):
        ensemble.main([*run, "--evaluate", "--wait"])
    assert (asked, answers) == ({"some-over-seed"}, [])


def test_a_member_that_has_measured_nothing_yet_is_in_the_table(run: list[str]) -> None:
    (member,) = ensemble.members_of(run, ["seed=3"], None)
    holder = RunFolder(member.config)
    holder.take()
    assert re.search(r"some-seed-3  3     starting  0/\? +- ", ensemble.table([member]))
    holder.close()


def test_a_dry_run_prints_what_would_be_submitted(
    run: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ["cluster.partition=gpu", "cluster.memory_gb=64", "cluster.time_min=90"]
    assert submit.main([*run, *asked, "--dry-run"]) == 0
    script = capsys.readouterr().out
    for line in ("--partition=gpu", "--mem=64G", "--time=90", "--requeue", "--job-name=some"):
        assert f"#SBATCH {line}\n" in script
    assert "\nsrun " in script
    assert f"launch.job after $? --submitted {tmp_path}/runs/some/launch" in script
    assert ensemble.main([*run, *asked, "--dry-run", "--over", "seed=0..2"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2%3\n" in script
    assert script.splitlines()[-1].endswith("seed=2 name=some-seed-2")
    assert submit.main([*run, "--local", "--dry-run"]) == 0
    assert " -m alexnet_dist train " in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("program", [submit, ensemble, status, job])
def test_every_program_has_help_and_usage(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main([])
    assert capsys.readouterr().err.startswith(f"usage: python -m {program.__name__} ")
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    said = capsys.readouterr().out
    for line in re.findall(rf"^  python -m {program.__name__} (.*)$", said, re.M):
        program.parser().parse_args(shlex.split(line))


def test_what_is_wrong_is_said_in_the_clusters_words(run: list[str]) -> None:
    two = ["layout.kind=columns", "cluster.nodes=2", "cluster.tasks_per_node=2"]
    with pytest.raises(ConfigError, match=r"^cluster\.nodes=2, cluster\.tasks_per_node=2: layout"):
        submit.main([*run, *two])
    refused = "sbatch: error: Batch job submission failed: "
    for words, keys in (
        ("invalid partition specified: gpu", "cluster.partition"),
        ("Memory specification can not be satisfied", "cluster.memory_gb"),
        ("Requested time limit is invalid", "cluster.time_min"),
        ("Invalid account or account/partition combination", "cluster.partition"),
        ("Node count specification invalid", "cluster.nodes"),
        ("something new", ""),
    ):
        assert cluster.keys_of_refusal(refused + words) == keys


def test_a_run_here_shows_itself_and_hears_signals(
    run: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*run, "--local"]) == 0
    assert "evaluation: top-1" in capfd.readouterr().err
    long = [*run, "train.epochs=2000", "name=long", "log.every_steps=1"]
    program = [sys.executable, "-m", "launch.submit", *long, "--local"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as here:
        assert here.stderr is not None
        next(line for line in here.stderr if "step 3/" in line)  # while it goes on
        here.send_signal(signal.SIGINT)
        here.stderr.read()
    assert here.returncode == 130
    (folder,) = [text.partition("=")[2] for text in run if text.startswith("output_dir=")]
    assert read_run(Path(folder) / "long")["state"] == "stopped"


def test_a_queue_that_does_not_answer_is_not_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers: list[str | None] = []

    def answered(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if (answer := answers.pop(0)) == "late":
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(command, answer is None, answer or "")

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not ensemble.waiting("five")  # no Slurm here
    assert job.job_state() == "UNKNOWN"
    (tmp_path / "squeue").touch(0o755)
    monkeypatch.setattr(subprocess, "run", answered)
    answers += [None, "late", "7 RUNNING"]
    assert ensemble.waiting("five")
    answers += [None, ""]
    assert not ensemble.waiting("five")
    answers += ["late", "JobId=7 JobState=CANCELLED"]
    assert job.job_state() == "CANCELLED"
    answers += [None] * 10
    with pytest.raises(RunFolderError, match="squeue does not answer"):
        ensemble.waiting("five")
    assert not answers


def test_what_slurm_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(error: BaseException) -> tuple[int, str]:
        def main(arguments: list[str]) -> int:
            raise error

        return job.guarded(main), capsys.readouterr().err

    code, said = refused(FailedJobError("sbatch: error: invalid partition specified: gpu"))
    assert (code, said.count("\n")) == (1, 1)
    assert "Slurm refused: sbatch: error: invalid partition" in said
    assert "(see cluster.partition, and `python -m launch.submit --dry-run`)" in said
    lost = "sbatch: error: fetch_config\nsbatch: fatal: Could not establish a configuration source"
    code, said = refused(FailedJobError(lost))
    assert (code, said.count("\n")) == (1, 1)
    assert said.endswith("controller is out of reach; add --local to train on this machine\n")
    assert refused(KeyboardInterrupt())[0] == 130
    code, said = refused(PermissionError(13, "Permission denied", "/runs"))
    assert (code, said.count("\n")) == (1, 1)


def test_a_refused_submission_leaves_nothing_behind(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.touch(0o755)
    sbatch.write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    for name in ("srun", "squeue"):
        (tmp_path / "bin" / name).touch(0o755)
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    before = {*tmp_path.rglob("*")}
    one = [*run, "name=one"]
    old = os.umask(0o022)
    try:
        for program, arguments in ((submit, one), (ensemble, [*one, "--over", "seed=0..1"])):
            with pytest.raises(FailedJobError, match="invalid partition"):
                program.main(arguments)
            assert {*tmp_path.rglob("*")} == before
        assert "invalid partition" not in capsys.readouterr().err  # but in the error, once
        kept = tmp_path / "runs" / "one" / "launch" / "7_submitted.pkl"  # of a job that waits
        kept.parent.mkdir(parents=True)
        kept.touch()
        before = {*tmp_path.rglob("*")}
        with pytest.raises(FailedJobError, match="invalid partition"):
            submit.main(one)
        assert {*tmp_path.rglob("*")} == before
        sbatch.write_text("#!/bin/sh\necho submitted, but in words that Submitit does not know\n")
        with pytest.raises(FailedSubmissionError):
            submit.main(one)
        assert len({*tmp_path.rglob("*")} - before) == 2, "a job may be there to read them"
    finally:
        os.umask(old)


def test_status_tells_the_dead_from_the_living(tmp_path: Path) -> None:
    def row(queue: dict[str, str] | None, **run: Any) -> dict[str, Any]:
        now = time.time()
        common = {"attempt": 3, "host": socket.gethostname(), "pid": os.getpid(), "job": None,
                  "first_started": now - 100, "updated": now, "newest_step": 40, "last_step": 60,
                  "kept_s": 50.0}  # fmt: skip
        (tmp_path / "run.json").write_text(json.dumps(common | run))
        return status.status(tmp_path, queue)

    with appended(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a run does until its process is gone
        running = row({}, state="running")
        assert running["state"] == "running"
        assert running["restarts"] == 2
        assert running["goodput"] == pytest.approx(0.5, abs=0.01)
        assert running["eta_s"] == pytest.approx(25)
        assert row({}, state="running", host="node7", job="7")["state"] == "running"
    # The process ids of the dead are given to others, and an allocation outlives its runs.
    for number in (None, "7"):
        killed = row({"7": "RUNNING"}, state="running", job=number)
        assert (killed["state"], bool(killed["why"])) == ("killed", number is not None)
    assert killed["why"] == "its process is gone, but its job 7 goes on"
    assert row({"7": "PENDING"}, state="running", job="7")["state"] == "queued"
    assert row({"7": "PENDING"}, state="stopped", exit=75, job="7")["state"] == "queued"
    # Another host's processes, and its locks on some file systems, are not seen.
    elsewhere: dict[str, Any] = {"state": "running", "host": "node7"}
    assert row({"8": "RUNNING"}, **elsewhere, job="7")["state"] == "killed"
    seen = [({"7": "RUNNING"}, "7"), (None, "7"), (None, None)]
    assert {row(queue, **elsewhere, job=its)["state"] for queue, its in seen} == {"running"}
    past = time.time() - 7200
    for queue, its in seen:
        row(queue, **elsewhere, job=its)
        os.utime(tmp_path / "run.json", (past, past))
        found = status.status(tmp_path, queue)
        assert (found["state"], found["why"]) == (
            "unknown", "it has written nothing for 2:00:00, and node7 is not seen here",
        )  # fmt: skip
    (tmp_path / "metrics.jsonl").touch()
    assert status.status(tmp_path, None)["state"] == "running"

    failed = row({}, state="failed", reason="first line\nstack")
    assert failed["why"] == "first line"
    assert "first line" in status.table([failed])
    with pytest.raises(RunFolderError, match=r"has no run\.json"):
        status.status(tmp_path / "nowhere", {})


def test_status_passes_over_what_lies_beside_runs(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(f"output_dir={tmp_path}")
    RunFolder(config).take()
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "report.html").touch()
    assert (
        status.main([str(config.folder), str(tmp_path / "mlruns"), str(tmp_path / "report.html")])
        == 0
    )
    said = capsys.readouterr()
    assert re.findall(r"^\S+", said.out, re.M) == ["run", str(config.folder)]
    beside = ", ".join(str(tmp_path / name) for name in ("mlruns", "report.html"))
    assert said.err == f"skipped, not a run folder: {beside}\n"
    for named in (["mlruns"], [config.name, "typo"]):
        assert status.main([str(tmp_path / name) for name in named]) == 1
        assert f"{tmp_path / named[-1]}: has no run.json" in capsys.readouterr().err


def test_a_container_without_scontrol_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(
        RunFolderError, match=r"scontrol requeue 7: .*No such file.*submit the same"
    ):
        job.requeue()


def test_a_requeue_that_slurm_is_too_busy_for_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    asked: list[Sequence[str]] = []

    def busy(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if len(asked) == 1:
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(
            command, int(len(asked) == 2), "", "Socket timed out on send/recv operation"
        )

    monkeypatch.setattr(subprocess, "run", busy)
    job.requeue()
    assert asked == [("scontrol", "requeue", "7")] * 3
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: asked.clear() or busy([]))
    with pytest.raises(RunFolderError, match=r"requeue 7: .*timed out.*submit the same"):
        job.requeue()


def test_the_container_is_made_of_what_is_there() -> None:
    root = configs_folder().parent
    recipe = (root / "slurm/alexnet_dist.def").read_text()
    files = re.findall(r"^    (\S+) /opt/alexnet_dist/(\S+)$", recipe, re.M)
    assert len(files) == 7
    assert all(source == to and (root / source).exists() for source, to in files)


def test_a_finished_run_that_is_started_again_was_not_restarted(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("name=again")

    def start(end: str, **more: Any) -> dict[str, Any]:
        folder = RunFolder(config)
        folder.take()
        folder.running(0, 8)
        clock[0] += 10
        folder.saved(4)
        assert folder.goodput() == pytest.approx(1)
        folder.report(end, **more)
        folder.close()
        return status.status(config.folder, None)

    clock = [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert start("stopped", exit=143)["restarts"] == 0
    assert start("finished", exit=0)["restarts"] == 1
    for attempt in (3, 4):
        clock[0] += 1000
        found = start("finished", exit=0)
        assert (found["restarts"], found["goodput"]) == (1, pytest.approx(1))
        assert read_run(config.folder)["attempt"] == attempt


@pytest.mark.parametrize("mode", ["720", "702"])
def test_pickles_that_others_could_write_are_not_loaded(tmp_path: Path, mode: str) -> None:
    job.check_private(tmp_path)
    tmp_path.chmod(int(mode, 8))
    with pytest.raises(RunFolderError, match=rf"others may write here .*mode {mode}.*chmod go-w"):
        job.check_private(tmp_path)


def test_what_an_earlier_start_left_is_forgotten(tmp_path: Path) -> None:
    paths = JobPaths(tmp_path, "7", 0)
    for path in (paths.result_pickle, paths.submitted_pickle):
        path.touch()
        path.with_suffix(".pkl.save_tmp").touch()
    job.remove_results(paths)
    assert list(tmp_path.iterdir()) == [paths.submitted_pickle]


def test_a_forked_worker_does_not_answer_for_its_parent() -> None:
    """It inherits handlers: Submitit's would write an error as the job's result."""
    signals = StopSignals()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(signals.flag)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signals.flag == 0
    finally:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_checkpoint_only_returns_the_resubmission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job.TrainJob(["demo"])
    again = run.checkpoint()
    assert again.function is run
    again.dump(tmp_path / "7_submitted.pkl")
    assert b"launch.job" in (tmp_path / "7_submitted.pkl").read_bytes()  # by reference
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert job.submitted(tmp_path).arguments == ["demo"]
    command = [sys.executable, "-m", "launch.job", "after", "0", "--submitted", str(tmp_path)]
    subprocess.run(command, check=True)  # where launch.job is __main__


def test_without_slurm_it_says_so(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    old = os.umask(0o022)
    try:
        with pytest.raises(AlexNetDistError, match="--local"):
            submit.executor(cluster.Cluster(), "run", tmp_path / "run" / "launch", 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run" / "launch").stat().st_mode) == 0o700
