"""Runs on a real Slurm, started by the tests: limits, preemption, lost nodes, dead ranks, arrays.

Run by `make test-slurm`. Each test prints the time from signal to checkpoint, and from start to the
first step.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY
from small_runs import final_state

from alexnet_dist.files import read_run

ROOT = Path(__file__).parent.parent
DEVCLUSTER = ROOT / "slurm" / "devcluster"

pytestmark = pytest.mark.slurm

RUN = [
    *TINY,
    "evaluate.every_epochs=20",
    "log.every_steps=10",
    "checkpoint.every_steps=20",
    "schedule.rate=0.02",
]
FOUR = ("layout.kind=columns_x_replicas", "train.epochs=40")  # 300 steps, two nodes
TWO = ("layout.kind=columns", "train.epochs=100")  # 750 steps, one node
ONE = ("layout.kind=one", "train.epochs=400")  # 3,000 steps
LONGEST_S = 400  # a run of 3,000 steps, on a busy machine
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=2")
ON_ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")


class Cluster:
    """The dev cluster, and a folder of runs on it."""

    def __init__(self, folder: Path, runs: Path, data: Path) -> None:
        self.folder, self.runs = folder, runs
        self.common = [*RUN, f"data.path={data}", f"output_dir={runs}"]
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
        }

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=120, cwd=ROOT,
            env=self.environment,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def sbatch(self, options: Sequence[str], *run: str, script: str = "train") -> str:
        log = f"--output={self.runs}/%j.log"
        script = f"slurm/{script}.sbatch"
        return self.call("sbatch", "--parsable", log, *options, script, *self.common, *run).strip()

    def submit(self, module: str, *arguments: str, check: bool = True) -> str:
        command = [sys.executable, "-m", f"launch.{module}", *self.common, *arguments]
        return self.call(*command, check=check)

    def log(self, job: str) -> str:
        found = self.runs.rglob(f"{job}[._]*")
        return "".join(path.read_text() for path in found if path.suffix in (".log", ".out"))

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job that it has not forgotten."""
        told = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", told))

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 150) -> float:
        """Wait for a condition; seconds since 1970 when it was seen to hold."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.seen()}"
            time.sleep(0.05)
        return time.time()

    def seen(self) -> str:
        logs = sorted(self.runs.rglob("*.log"), key=lambda p: p.stat().st_mtime)[-2:]
        tails = [f"{path}\n{path.read_text()[-3000:]}" for path in logs]
        runs = [f"{path} {path.read_text()}" for path in sorted(self.runs.glob("*/run.json"))[-2:]]
        return "\n".join([self.call("squeue"), *tails, *runs])

    def until_running(self, name: str, attempt: int = 1, saved: bool = False) -> float:
        """Until a start of a run trains; saved: and has put something new on the disk."""

        def trains() -> bool:
            run = read_run(self.runs / name)
            return (
                run.get("state") == "running"
                and run["attempt"] >= attempt
                and (run["newest_step"] > run["resumed_at"] or not saved)
            )

        return self.until(f"{name} trains, attempt {attempt}", trains)

    def until_state(self, name: str, *states: str) -> dict[str, Any]:
        self.until(f"{name} {states}", lambda: read_run(self.runs / name).get("state") in states)
        return read_run(self.runs / name)

    def until_over(self, job: str, seconds: float = 150) -> str:
        """Slurm's last word on a job, when it has one."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.until(f"job {job} over", lambda: self.job(job)["JobState"] in over, seconds)
        return self.job(job)["JobState"]

    def until_requeued(self, job: str, restarts: int = 1) -> None:
        """Until a job waits to start again, which Slurm lets it once its credential expired."""

        def waits() -> bool:
            told = self.job(job)
            return told["JobState"] == "PENDING" and int(told["Restarts"]) >= restarts

        self.until(f"job {job} requeued", waits)

    def processes(self, name: str) -> list[psutil.Process]:
        """The ranks of a run, in the order of their numbers."""
        ranks = {}
        for process in psutil.process_iter():
            try:
                command, has = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if f"name={name}" in command and "alexnet_dist" in command and "SLURM_STEP_ID" in has:
                ranks[int(has["SLURM_PROCID"])] = process
        return [ranks[rank] for rank in sorted(ranks)]

    def same_end(self, name: str, whole: str) -> None:
        assert final_state(self.runs / name) == final_state(self.runs / whole)


@pytest.fixture(scope="session")
def cluster(
    packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:  # fmt: skip
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    up = subprocess.run([DEVCLUSTER, "up", folder], check=False, capture_output=True, text=True)
    if up.returncode:
        pytest.exit(up.stderr.strip().splitlines()[-1], returncode=1)
    try:
        made = Cluster(folder, tmp_path_factory.mktemp("runs"), packed)
        yield made
    finally:
        subprocess.run([DEVCLUSTER, "down", folder], check=False, capture_output=True)


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    """A test that failed does not hold up the next."""
    yield
    cluster.call("scancel", "--user", "root", "--full", check=False)
    cluster.until("the queue is empty", lambda: not cluster.call("squeue", "--noheader").strip())


@pytest.fixture(scope="session")
def whole(cluster: Cluster) -> Callable[..., str]:
    """Runs that nothing interrupts, each made once: whole("four", options, arguments)."""
    made: dict[str, str] = {}

    def make(name: str, options: Sequence[str], *run: str) -> str:
        if name not in made:
            job = cluster.sbatch(options, *run, f"name={name}")
            assert cluster.until_over(job, LONGEST_S) == "COMPLETED", cluster.log(job)
            made[name] = job
        return name

    return make


def say(what: str, **seconds: float) -> None:
    """A line for the table in docs/slurm.md."""
    times = ", ".join(f"{key.replace('_', ' ')} {value:.1f} s" for key, value in seconds.items())
    print(f"\nMEASURED {what}: {times}", flush=True)


def test_two_nodes_of_two_tasks_run_to_the_end(cluster: Cluster, whole: Callable[..., str]) -> None:
    begun = time.time()
    whole("four", ON_TWO_NODES, *FOUR)
    run = read_run(cluster.runs / "four")
    assert run["state"] == "finished"
    assert run["attempt"] == 1
    assert not list((cluster.runs / "four").glob("meet-*"))
    say("2 nodes × 2 tasks", submission_to_end=time.time() - begun)
    if "slurmdbd" in cluster.call("scontrol", "show", "config"):
        told = lambda: cluster.call("sacct", "-nXj", run["job"], "-o", "state")  # noqa: E731
        cluster.until("sacct knows", lambda: "COMPLETED" in told(), 20)


@pytest.mark.parametrize(("options", "layout"), [(ON_ONE_NODE, TWO), (ON_TWO_NODES, FOUR)])
def test_ranks_listen_at_their_nodes_address_alone(
    options: Sequence[str], layout: Sequence[str], cluster: Cluster
) -> None:
    """The dev cluster's nodes are both at 127.0.0.1; tests/test_open_ports.py plays others."""
    name = f"heard-{layout[0].rpartition('=')[2]}"
    cluster.sbatch(options, *layout, f"name={name}")
    cluster.until_running(name)
    ranks = [f"pid={rank.pid}," for rank in cluster.processes(name)]
    told = cluster.call("ss", "-Hltnp").splitlines()
    listening = [line for line in told if any(rank in line for rank in ranks)]
    assert {line.split()[3].rpartition(":")[0] for line in listening} == {"127.0.0.1"}


def test_deepspeed_finds_its_place_without_torchrun(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    whole("zero", ON_ONE_NODE, "layout.kind=zero1", "train.epochs=2")
    assert read_run(cluster.runs / "zero")["state"] == "finished"


def test_a_time_limit_is_survived_and_ends_to_the_bit(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    whole("four", ON_TWO_NODES, *FOUR)
    job = cluster.sbatch([*ON_TWO_NODES, "--signal=USR2@48"], *FOUR, "name=limit")
    cluster.until_running("limit")
    for rank in cluster.processes("limit"):
        rank.suspend()  # until Slurm's signal wakes it: it looks at limits every half a minute
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    run = cluster.until_state("limit", "stopped")
    assert run["exit"] == 75
    assert run["newest_step"] == run["step"] < 300
    cluster.until_requeued(job)
    begun = time.time()
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    trains = cluster.until_running("limit", attempt=2)
    assert cluster.until_over(job) == "COMPLETED", cluster.log(job)
    say("time limit", requeued_to_first_step=trains - begun)
    cluster.same_end("limit", "four")


def preempt(cluster: Cluster, name: str, job: str, restarts: int = 1) -> tuple[float, float]:
    """A job of the high partition takes both nodes: its submission, and when all was saved."""
    begun = time.time()
    high = cluster.call(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--time=1",
        "--output=/dev/null", "--wrap", "true",
    ).strip()  # fmt: skip
    run = cluster.until_state(name, "stopped")
    assert run["exit"] == 75, run
    assert cluster.until_over(high) == "COMPLETED"
    cluster.until_requeued(job, restarts)
    return begun, float(run["updated"])


def test_preemption_is_survived_and_ends_to_the_bit(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    whole("four", ON_TWO_NODES, *FOUR)
    job = cluster.sbatch(ON_TWO_NODES, *FOUR, "name=preempted")
    cluster.until_running("preempted")
    begun, saved = preempt(cluster, "preempted", job)
    requeued = time.time()
    trains = cluster.until_running("preempted", attempt=2)
    assert cluster.until_over(job) == "COMPLETED", cluster.log(job)
    say("preemption", submission_of_the_other_to_saved=saved - begun,
        requeued_to_first_step=trains - requeued)  # fmt: skip
    cluster.same_end("preempted", "four")


def test_a_lost_node_is_survived_and_ends_to_the_bit(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    """Its slurmd, the step's daemon and the tasks on it die at once: no signal, no save."""
    whole("four", ON_TWO_NODES, *FOUR)
    job = cluster.sbatch(ON_TWO_NODES, *FOUR, "name=lost")
    cluster.until_running("lost", saved=True)
    begun = time.time()
    daemon = psutil.Process(int((cluster.folder / "pids" / "n2").read_text()))
    ranks = cluster.processes("lost")[2:]
    for process in [daemon, *{rank.parent() for rank in ranks}, *ranks]:
        if process is not None:
            process.kill()
    cluster.until("all ranks gone", lambda: not cluster.processes("lost"))
    gone = time.time()
    cluster.until_requeued(job)  # Slurm misses the node first, SlurmdTimeout and more later
    requeued = time.time()
    # srun told the lost node too to end the step. Slurm repeats that once the node is back, a
    # minute later at most, and would mean the new step, unless that begins after two minutes, as
    # where cred_expire is not shortened.
    cluster.call("scontrol", "hold", job)
    subprocess.run([DEVCLUSTER, "node", cluster.folder, "2"], check=True, env=cluster.environment)
    queue = re.compile(r"^Agent queue size:\s*(\d+)$", re.MULTILINE)
    cluster.until("nothing is queued", lambda: queue.findall(cluster.call("sdiag")) == ["0"])
    released = time.time()
    cluster.call("scontrol", "release", job)
    trains = cluster.until_running("lost", attempt=2)
    assert cluster.until_over(job) == "COMPLETED", cluster.log(job)
    say("node lost", lost_to_all_ranks_gone=gone - begun, lost_to_requeued=requeued - begun,
        released_to_first_step=trains - released)  # fmt: skip
    cluster.same_end("lost", "four")


def test_a_requeue_by_hand_is_survived_and_ends_to_the_bit(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    whole("two", ON_ONE_NODE, *TWO)
    job = cluster.sbatch(ON_ONE_NODE, *TWO, "name=requeued")
    cluster.until_running("requeued", saved=True)
    begun = time.time()
    cluster.call("scontrol", "requeue", job)
    cluster.until("its ranks gone", lambda: not cluster.processes("requeued"))
    gone = time.time()
    cluster.until_requeued(job)
    trains = cluster.until_running("requeued", attempt=2)
    assert cluster.until_over(job) == "COMPLETED", cluster.log(job)
    say("scontrol requeue", to_all_ranks_gone=gone - begun, to_first_step=trains - begun)
    cluster.same_end("requeued", "two")


def test_a_killed_rank_takes_the_job_down_and_is_retried(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    whole("two", ON_ONE_NODE, *TWO)
    job = cluster.sbatch(ON_ONE_NODE, *TWO, "name=killed")
    cluster.until_running("killed", saved=True)
    begun = time.time()
    cluster.processes("killed")[1].kill()
    cluster.until("its ranks gone", lambda: not cluster.processes("killed"), 15)
    gone = time.time()
    cluster.until_requeued(job)
    trains = cluster.until_running("killed", attempt=2)
    assert cluster.until_over(job) == "COMPLETED", cluster.log(job)
    say("rank killed", to_all_ranks_gone=gone - begun, to_first_step=trains - begun)
    cluster.same_end("killed", "two")


def test_an_interactive_allocation_outlives_a_killed_run(cluster: Cluster) -> None:
    (cluster.runs / "by-hand.sh").write_text(
        """"$PYTHON" -m alexnet_dist train "$@" & run=$!
        state() { "$PYTHON" -m launch.status --json "$RUN_FOLDER"; }
        until state | grep -q '"running"'; do sleep 1; done
        kill -9 $run; wait $run; squeue --noheader --format=%T; state
        """
    )
    cluster.environment["RUN_FOLDER"] = str(cluster.runs / "by-hand")
    command = ["bash", f"{cluster.runs}/by-hand.sh", *cluster.common, *ONE, "name=by-hand"]
    said = cluster.call("salloc", "--nodes=1", "--ntasks=1", *command).splitlines()
    (found,) = json.loads(said[-1])
    assert said[-2] == "RUNNING"
    assert found["state"] == "killed"
    assert re.fullmatch(r"its process is gone, but its job \d+ goes on", found["why"])


def test_a_cancelled_job_saves_and_stays_away_and_its_folder_is_one_jobs(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    whole("two", ON_ONE_NODE, *TWO)
    job = cluster.sbatch(ON_ONE_NODE, *TWO, "name=cancelled")
    cluster.until_running("cancelled")
    ranks = cluster.processes("cancelled")
    for rank in ranks:
        rank.suspend()  # or it might be done before the second begins
    second = cluster.sbatch(ON_ONE_NODE, *TWO, "name=cancelled")
    assert cluster.until_over(second) == "FAILED", cluster.log(second)
    for rank in ranks:
        rank.resume()
    assert "is in use by process" in cluster.log(second)
    assert read_run(cluster.runs / "cancelled")["job"] == job
    begun = time.time()
    cluster.call("scancel", job)
    run = cluster.until_state("cancelled", "stopped")
    assert run["exit"] == 143
    assert run["newest_step"] == run["step"] < 750
    say("scancel", to_saved=run["updated"] - begun)
    assert cluster.until_over(job) == "CANCELLED"
    time.sleep(3)  # a requeue would show by now
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"
    third = cluster.sbatch(ON_ONE_NODE, *TWO, "name=cancelled")
    assert cluster.until_over(third) == "COMPLETED", cluster.log(third)
    cluster.same_end("cancelled", "two")


def test_a_cluster_takes_no_folder_that_holds_something_else(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").touch()
    run = subprocess.run(
        [DEVCLUSTER, "up", tmp_path], check=False, capture_output=True, text=True,
        env=cluster.environment,
    )  # fmt: skip
    assert run.returncode != 0
    assert "holds something else than a devcluster" in run.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_what_cannot_run_is_said_once_and_not_tried_again(cluster: Cluster) -> None:
    wrong = {
        "layout.kind=sharded": (ON_ONE_NODE, "layout.kind"),
        "layout.kind=columns_x_replicas": (("--nodes=2", "--ntasks-per-node=1"), "share a node"),
        "layout.kind=replicas": (
            ("--nodes=2", "--ntasks=3"),
            "every node must have the same number",
        ),
        "data.path=nowhere": (ON_ONE_NODE, "nowhere"),
    }
    jobs = {
        run: cluster.sbatch(options, *TWO, run, "name=wrong") for run, (options, _) in wrong.items()
    }
    for run, job in jobs.items():
        assert cluster.until_over(job) == "FAILED", run
        assert wrong[run][1] in cluster.log(job)
        assert "Restarts=0" in cluster.call("scontrol", "show", "job", job)
    assert not (cluster.runs / "wrong").exists()


def test_a_crash_loop_stops(cluster: Cluster) -> None:
    """Killed at every start before anything is saved."""
    job = cluster.sbatch(["--nodes=1", "--ntasks-per-node=1"], *ONE, "name=loop",
                         "checkpoint.every_steps=100000",
                         "evaluate.every_epochs=400",
                         "checkpoint.max_idle_restarts=1")  # fmt: skip
    for attempt in (1, 2):
        cluster.until_running("loop", attempt)
        for process in cluster.processes("loop"):
            process.kill()
        cluster.until_requeued(job, attempt)
    assert cluster.until_over(job) == "FAILED"
    assert "starts in a row saved nothing" in cluster.log(job)


def test_submitit_runs_and_resumes_to_the_bit(cluster: Cluster, whole: Callable[..., str]) -> None:
    """Submitted, preempted, and a rank killed; pickles are its owner's alone."""
    whole("four", ON_TWO_NODES, *FOUR)
    said = cluster.submit("submit", *FOUR, "name=submitted", "cluster=dev")
    job = re.search(r"job (\d+)", said)[1]  # type: ignore[index]
    assert "asks:   2 nodes of 2 tasks and 0 GPUs, 1 core a task, 10 minutes\n" in said
    told = cluster.submit("submit", *FOUR, "name=submitted", "cluster=dev", "--dry-run")
    script = cluster.runs / "submitted" / "launch" / f"{job}_submission.sh"
    assert told.strip() == script.read_text().strip()
    cluster.until_running("submitted")
    begun, saved = preempt(cluster, "submitted", job)
    cluster.until_running("submitted", attempt=2, saved=True)
    folder = cluster.runs / "submitted" / "launch"
    (stale := folder / f"{job}_0_result.pkl.save_tmp").touch()
    ranks = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "submitit.core._submit" in (process.info["cmdline"] or [])
        and str(folder) in process.info["cmdline"]
        and process.parent().name().startswith("slurmstepd")  # type: ignore[union-attr]
    ]
    assert len(ranks) >= 4
    ranks[-1].kill()
    cluster.until_requeued(job, 2)
    rows = json.loads(cluster.call(sys.executable, "-m", "launch.status", "--json",
                                   str(cluster.runs / "submitted")))  # fmt: skip
    assert rows[0]["state"] in ("queued", "killed", "failed", "starting", "running")
    assert rows[0]["restarts"] >= 1
    assert cluster.until_over(job) == "COMPLETED", cluster.log(job)
    say("preemption under Submitit", submission_of_the_other_to_saved=saved - begun)
    cluster.same_end("submitted", "four")
    assert not stale.exists()
    assert (folder / f"{job}_0_result.pkl").exists()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}


def test_an_array_of_five_trains_again_only_the_one_that_failed(cluster: Cluster) -> None:
    arguments = ["layout.kind=one", "train.epochs=4", "name=five", "--over", "seed=0..4",
                 "--parallel", "4", "cluster=dev", "cluster.nodes=1", "cluster.tasks_per_node=1",
                 "--wait"]  # fmt: skip
    in_the_way = cluster.runs / "five-seed-3" / "checkpoints"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    begun = time.time()
    first = cluster.submit("ensemble", *arguments, check=False)
    assert "5 of 5 runs, 4 at a time" in first
    assert "the average of 4 of 5" in first
    say("array of 5", submission_to_score=time.time() - begun)
    in_the_way.unlink()
    second = cluster.submit("ensemble", *arguments)
    assert "1 of 5 runs" in second
    assert "the average of 5 of 5" in second
    attempts = [read_run(cluster.runs / f"five-seed-{seed}")["attempt"] for seed in range(5)]
    assert attempts == [1] * 5


def test_the_array_script_names_its_runs(cluster: Cluster) -> None:
    options = ["--array=0-1", "--ntasks-per-node=1"]
    job = cluster.sbatch(options, "layout.kind=one", "train.epochs=1", script="array")
    cluster.until("both done", lambda: not cluster.call("squeue", "-hj", job, check=False).strip())
    for seed in (0, 1):
        run = json.loads((cluster.runs / f"array-seed-{seed}" / "config.json").read_text())
        assert run["seed"] == seed
        assert read_run(cluster.runs / f"array-seed-{seed}")["state"] == "finished"


def test_twenty_preemptions_in_a_row_lose_nothing(
    cluster: Cluster, whole: Callable[..., str]
) -> None:
    alone = ("--nodes=1", "--ntasks-per-node=1")
    whole("one", alone, *ONE)
    job = cluster.sbatch(alone, *ONE, "name=twenty")
    saving, starting = [], []
    requeued = time.time()
    for attempt in range(1, 21):
        starting.append(cluster.until_running("twenty", attempt) - requeued)
        cluster.until_running("twenty", attempt, saved=True)
        begun, saved = preempt(cluster, "twenty", job, attempt)
        requeued = time.time()
        saving.append(saved - begun)
    assert cluster.until_over(job) == "COMPLETED", cluster.log(job)
    say("20 preemptions, the slowest", submission_of_the_other_to_saved=max(saving),
        requeued_to_first_step=max(starting))  # fmt: skip
    assert read_run(cluster.runs / "twenty")["attempt"] == 21
    cluster.same_end("twenty", "one")


def test_submitit_runs_the_same_job_on_this_machine(cluster: Cluster) -> None:
    said = cluster.submit("submit", "layout.kind=columns", "train.epochs=1", "name=here", "--local")
    assert "done, 7 steps" in said or "done, 8 steps" in said
    assert read_run(cluster.runs / "here")["state"] == "finished"
    assert shutil.which("srun")
