"""A run as a Slurm job: what is checked before its ranks start, and what follows when they end.

`python -m launch.job --help`: the batch script runs `before` ahead of srun, and `after` when srun
has ended. `run.json` decides, not srun's exit code, which is the highest of all tasks' or that of a
task that srun itself ended. docs/slurm.md has the table.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths

from alexnet_dist.cli.parser import Parser, commands_of, path
from alexnet_dist.cli.streams import with_usable
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.errors import ConfigError, RunFolderError, in_words, printable
from alexnet_dist.files import read_run
from alexnet_dist.parallel import environment, layouts
from launch.cluster import keys_of_refusal, out_of_reach

PRIVATE = 0o077  # umask of jobs: Submitit's results are pickles, and loading a pickle runs code


class TrainJob:
    """The callable that Submitit pickles, by reference: the arguments of one run.

    A rank that is stopped exits without a result: Submitit would take it for the job's. What
    follows is decided in the batch script, once for all ranks.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def __call__(self) -> int:
        os.umask(PRIVATE)
        remove_results(JobEnvironment().paths)
        from alexnet_dist.cli.main import main  # its signal handlers replace Submitit's

        code = main(["train", *self.arguments])
        if code:
            sys.exit(code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Resubmit the job after a signal before the run's own handlers: nothing is lost."""
        return DelayedSubmission(self)


def remove_results(paths: JobPaths) -> None:
    """Remove a result that an earlier start of this rank left, complete or not.

    Submitit refuses to write beside an incomplete one, and would take an old one for the job's.
    """
    for file in (paths.result_pickle, paths.submitted_pickle):
        file.with_suffix(file.suffix + ".save_tmp").unlink(missing_ok=True)
    paths.result_pickle.unlink(missing_ok=True)


def check_private(folder: Path) -> None:
    """Raise RunFolderError if others may write in a folder whose pickles will be loaded."""
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise RunFolderError(
            f"{folder}: others may write here (owner {about.st_uid}, mode "
            f"{about.st_mode & 0o777:o}), but a job runs the pickles in it: chown it to you, chmod "
            "go-w"
        )


def before(arguments: Sequence[str]) -> None:
    """Check a job that is about to start its ranks; raises what all of them would raise."""
    config = load_config(arguments)
    name = "SLURM_TASKS_PER_NODE"
    tasks = environment.tasks_per_node(os.environ.get(name, "1"), name)
    # Of --nodes=2 --ntasks-per-node=2 --ntasks=3 Slurm says 2(x2), but the last node has only one.
    total = int(os.environ.get("SLURM_NTASKS", sum(tasks)))
    check_placement(config, (*tasks[:-1], total - sum(tasks[:-1])))
    open_for(config)


def check_placement(config: Config, tasks: tuple[int, ...]) -> None:
    """Raise ConfigError if a config's ranks do not fit on nodes with these numbers of tasks."""
    ranks = sum(tasks)
    if ranks == 1:
        return  # a single task starts the run's ranks itself
    environment.check_even(tasks)
    layouts.check(config, ranks)
    columns = layouts.columns_of(config)
    if tasks[0] % columns:
        raise ConfigError(
            f"layout.kind={config.layout.kind}: the {columns} columns of a replica must share a "
            f"node, but each of the {len(tasks)} nodes has {tasks[0]} tasks: ask for "
            f"cluster.tasks_per_node={columns} (sbatch: --ntasks-per-node={columns}) or a "
            "multiple of it"
        )


def after(code: int, config: Config) -> int:
    """Decide what follows when the ranks have left: requeue the job, or return its exit code.

    Args:
        code: srun's exit code.
    """
    if code == 0:  # every rank reached the end; another job may hold the folder by now
        return code
    run = read_run(config.folder)
    if (run.get("job"), run.get("restart")) != environment.job():
        if code == 2:
            return code  # the config was refused, and the ranks have explained why
        from alexnet_dist.training.run_folder import RunFolder

        # Raises if another job holds the folder, or if too many starts have failed before.
        folder = RunFolder(config)
        folder.take()
        folder.report("failed", exit=1, reason=f"its ranks ended with {code} before it began")
        run = read_run(config.folder)
        if (run.get("job"), run.get("restart")) != environment.job():
            raise RunFolderError(
                f"{config.folder}/run.json could not be written, so starts cannot be counted: the "
                "job is not tried again; make room, then submit the same command again to resume"
            )
    again, why = verdict(run, job_state())
    print(f"{config.folder}: {why}{': requeued' if again else ''}", flush=True)
    if again:
        requeue()
    return 0 if again else int(run.get("exit") or 0)


def verdict(run: Mapping[str, object], job: str) -> tuple[bool, str]:
    """Return whether a job should start again, and why.

    Args:
        run: content of run.json, written by this start of this job.
        job: Slurm's state of the job; PREEMPTED once Slurm has asked it to leave.
    """
    state, exit_code, step = run["state"], run.get("exit"), run.get("step")
    if job == "CANCELLED":
        return False, f"cancelled at step {step}; submit it again to resume"
    match state:
        case "finished":
            return False, "finished"
        case "stopped" if exit_code == 75 or job == "PREEMPTED":
            return True, f"stopped and saved at step {step}"
        case "stopped":
            return (
                False,
                f"stopped at step {step} with exit code {exit_code}; submit it again to resume",
            )
        case "failed":
            return not run.get("known"), f"failed: {run.get('reason')}"
        case _:
            return True, "killed"


def own_name() -> str:
    """Return this job's name for Slurm's commands.

    For an element of an array that is ARRAY_TASK: the number alone, of the last element, is that of
    the whole array.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{what}_ID") for what in ("JOB", "TASK"))
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def job_state() -> str:
    """Return Slurm's state of this job (RUNNING, CANCELLED, …); PREEMPTED if it is about to be."""
    answer, _ = slurm("scontrol", "--oneliner", "show", "job", own_name(), tries=10)
    if re.search(r"\bPreemptTime=\d", answer or ""):
        return "PREEMPTED"
    match = re.search(r"\bJobState=(\w+)", answer or "")
    return match[1] if match else "UNKNOWN"


def requeue() -> None:
    """Put this job, or this element of an array, back into the queue; raises RunFolderError."""
    command = "scontrol", "requeue", own_name()
    done, refused = slurm(*command, tries=10)
    if done is None:
        raise RunFolderError(
            f"{shlex.join(command)}: {refused}: submit the same command again to resume; sbatch "
            "--requeue allows this, unless the site forbids it"
        )


def slurm(*command: str, tries: int = 1) -> tuple[str | None, str]:
    """Return the output of a Slurm command, or None if it fails so many times or is not installed;
    and why it failed."""
    refused = ""
    for attempt in range(tries):
        time.sleep(3 if attempt else 0)  # slurmctld may be busy, or start again
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired as error:
            refused = str(error)
        except OSError as error:  # in a container, Slurm's commands are the host's
            return None, str(error)
        else:
            if done.returncode == 0:
                return done.stdout, ""
            refused = (done.stderr or done.stdout).strip()
    return None, refused


def submitted(folder: Path) -> TrainJob:
    """Return the callable that Submitit pickled for this job."""
    check_private(folder)
    function = DelayedSubmission.load(JobPaths(folder, own_name()).submitted_pickle).function
    assert isinstance(function, TrainJob)
    return function


def parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    made = Parser(
        prog="python -m launch.job",
        description="Runs in a batch script (slurm/train.sbatch, or Submitit's) before the ranks "
        "of a run start, and after they have ended.",
    )
    command = commands_of(made, "COMMAND")
    sub = command("before", _before, "check config, data and placement, before srun")
    sub.add_argument("config", nargs="+", help="as for `alexnet-dist train`")
    sub = command("after", _after, "requeue the job or end it, as run.json says")
    sub.add_argument("code", type=int, help="srun's exit code")
    sub.add_argument("config", nargs="*", help="as for `alexnet-dist train`")
    sub.add_argument(
        "--submitted", type=path, metavar="FOLDER", help="folder of a job that Submitit pickled"
    )
    return made


def _before(options: argparse.Namespace) -> int:
    before(options.config)
    return 0


def _after(options: argparse.Namespace) -> int:
    job = options.submitted
    return after(options.code, load_config(submitted(job).arguments if job else options.config))


def main(arguments: Sequence[str]) -> int:
    """Run one of the two commands; raises ConfigError outside a Slurm job."""
    options = parser().parse_args(arguments)
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(
            "this is not a Slurm job: submit the script with `sbatch`, or train here with "
            "`alexnet-dist train`"
        )
    return int(options.run(options))


def guarded(main: Callable[[Sequence[str]], int]) -> int:
    """Run a program of this package; an error of a known kind is printed in one line."""
    return with_usable(lambda: _guarded(main))


def _guarded(main: Callable[[Sequence[str]], int]) -> int:
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        print("launch: interrupted; jobs that were submitted continue", file=sys.stderr)
        return 130
    except FailedJobError as error:  # its text is sbatch's
        keys = keys_of_refusal(str(error))
        about = f" (see {keys}, and `python -m launch.submit --dry-run`)" if keys else ""
        words = "; ".join(printable(str(error)).strip().splitlines())
        if out_of_reach(words):
            about = ": its controller is out of reach; add --local to train on this machine"
        print(f"launch: Slurm refused: {words}{about}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:
        explained = in_words(error)
        if explained is None:
            raise
        print(f"launch: {printable(str(explained))}", file=sys.stderr, flush=True)
        return explained.exit_code


if __name__ == "__main__":
    from launch import job  # noqa: PLW0406 (pickles name TrainJob as launch.job's, not __main__'s)

    sys.exit(job.guarded(job.main))
