"""Submit a run to Slurm through Submitit, or train it here: `python -m launch.submit --help`."""

import argparse
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from subprocess import CalledProcessError
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from alexnet_dist.cli.parser import Parser
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel.stop_signals import FLAGS, handlers_restored
from launch.cluster import Cluster, split
from launch.job import PRIVATE, TrainJob, check_placement, check_private, guarded

_NEVER = 1_000_000  # time-outs before Submitit gives up: the run limits its own idle restarts
# What Submitit writes before it knows the number of the job, which then takes the place of the hex.
_NOT_YET_A_JOB = re.compile(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh")
CONFIG_HELP = (
    "as for `alexnet-dist train`, and cluster=FILE or cluster.KEY=VALUE (docs/configuration.md)"
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    made = Parser(
        prog="python -m launch.submit",
        description="Submit a run to Slurm, or train it on this machine with the same arguments.",
        examples=(
            "python -m launch.submit paper/alexnet-2012 name=mine cluster=site.yaml",
            "python -m launch.submit demo name=job cluster=dev cluster.nodes=1 --dry-run",
            "python -m launch.submit demo name=try --local",
        ),
    )
    made.add_argument("config", nargs="+", help=CONFIG_HELP)
    add_where(made)
    return made


def add_where(to: argparse.ArgumentParser) -> None:
    """Add the options that say where runs go."""
    to.add_argument("--local", action="store_true", help="train on this machine now, without Slurm")
    to.add_argument(
        "--dry-run", action="store_true", help="print the batch script, and submit nothing"
    )


def checked_config(arguments: Sequence[str], cluster: Cluster | None) -> Config:
    """Load and check a run's config; raises what its ranks would, on a cluster or (None) here."""
    config = load_config(arguments)
    if cluster is not None:
        try:
            check_placement(config, (cluster.tasks_per_node,) * cluster.nodes)
        except ConfigError as error:
            raise ConfigError(
                f"cluster.nodes={cluster.nodes}, cluster.tasks_per_node={cluster.tasks_per_node}: "
                f"{error}"
            ) from error
    open_for(config)
    return config


def job_parameters(cluster: Cluster, name: str, folder: Path, parallel: int) -> dict[str, Any]:
    """Return the parameters of a job for Submitit's executor.

    Args:
        parallel: elements of a job array that may run at once.
    """
    words = {key: getattr(cluster, key) for key in ("partition", "account", "comment")}
    after = [sys.executable, "-m", "launch.job", "after"]
    return {key: value for key, value in words.items() if value} | {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": f"{cluster.memory_gb}G" if cluster.memory_gb else None,
        "time": cluster.time_min,
        "signal_delay_s": cluster.signal_s,
        "array_parallelism": parallel,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **cluster.sbatch},
        "setup": list(cluster.setup) or None,
        # Since Slurm 22.05 srun no longer inherits the job's cores per task.
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--wait=120",
            f"--cpus-per-task={cluster.cpus_per_task}",
        ],
        # Submitit's own requeueing handles neither a dead rank nor the last element of an array.
        "teardown": [
            f"exec {shlex.join(after)} $? --submitted {shlex.quote(str(folder.absolute()))}"
        ],
    }


def script(cluster: Cluster, name: str, folder: Path, parallel: int, jobs: int) -> str:
    """Return the batch script with which `jobs` jobs would be submitted, as Submitit makes it."""
    folder = folder.absolute()
    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder)])
    count = jobs if jobs > 1 else None
    words = job_parameters(cluster, name, folder, parallel)
    return _make_sbatch_string(command=command, folder=folder, map_count=count, **words)


def executor(cluster: Cluster, name: str, folder: Path, parallel: int) -> submitit.SlurmExecutor:
    """Return Submitit's executor; its pickles and logs are in a folder that only its owner can
    open.

    Raises:
        ConfigError: there is no Slurm here.
    """
    os.umask(PRIVATE)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, folder.parent):
        check_private(path)
    try:
        made = submitit.SlurmExecutor(folder.absolute(), max_num_timeout=_NEVER)
    except RuntimeError as error:
        raise ConfigError(f"{error} To run on this machine instead, add --local") from error
    made.update_parameters(**job_parameters(cluster, name, folder, parallel))
    return made


@contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """Remove what a submission leaves in `folder` (RUN/launch) if Slurm refuses it, and those of
    the folders up to output_dir that it created. Submitit prints sbatch's words, which its error
    has too: they are left to who reports that.

    Nothing is removed after another failure, as of reading sbatch's answer: a job may be queued.
    """
    created = [path for path in (folder, *folder.parents[:2]) if not path.exists()]
    before = {*folder.glob("*")}
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except (ConfigError, FailedJobError) as error:
        if isinstance(error, ConfigError) or isinstance(error.__cause__, CalledProcessError):
            for left in {*folder.glob("*")} - before:
                if _NOT_YET_A_JOB.fullmatch(left.name):
                    left.unlink()
            with suppress(OSError):  # something else is in it
                for path in created:
                    path.rmdir()
            printed.truncate(0)
        raise
    finally:
        sys.stderr.write(printed.getvalue())


def train_command(run: Sequence[str]) -> list[str]:
    """Return the command that trains a run in this Python."""
    return [sys.executable, "-m", "alexnet_dist", "train", *run]


def main(arguments: Sequence[str]) -> int:
    """Submit a run, train it here, or print its batch script."""
    options = parser().parse_args(arguments)
    cluster, run = split(options.config)
    config = checked_config(run, None if options.local else cluster)
    folder = config.folder / "launch"
    if options.dry_run:
        text = script(cluster, config.name, folder, parallel=1, jobs=1)
        print(shlex.join(train_command(run)) if options.local else text)
        return 0
    if options.local:
        return run_here(run)
    with removed_if_refused(folder):
        job = executor(cluster, config.name, folder, parallel=1).submit(TrainJob(run))
    again = shlex.join(["python", "-m", "launch.submit", *arguments])
    print(
        f"job {job.job_id}, run folder {config.folder}\n"
        f"asks:   {cluster}\n"
        f"watch:  tail -F {shlex.quote(str(job.paths.stdout))}\n"
        f"        python -m launch.status {shlex.quote(str(config.folder))}\n"
        f"stop:   scancel {job.job_id}    (it saves first)\n"
        f"resume: {again}"
    )
    return 0


def run_here(run: Sequence[str]) -> int:
    """Train on this machine with output on the terminal; pass signals on; return the exit code."""
    training = subprocess.Popen(train_command(run), start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        training.send_signal(number)

    with handlers_restored():
        for number in FLAGS:
            signal.signal(number, pass_on)
        code = training.wait()
    return code if code >= 0 else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
