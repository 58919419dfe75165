"""Train runs that differ in some keys, and average them: `python -m launch.ensemble --help`."""

import argparse
import itertools
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alexnet_dist.cli.parser import Parser, count
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, fingerprint
from alexnet_dist.errors import ConfigError, RunFolderError, aligned
from alexnet_dist.files import read_run
from alexnet_dist.parallel.stop_signals import EXITS
from alexnet_dist.training.metrics_file import accuracies, read_metrics
from launch.cluster import Cluster, split
from launch.job import TrainJob, guarded, slurm
from launch.status import queued, status
from launch.submit import (
    CONFIG_HELP,
    add_where,
    checked_config,
    executor,
    removed_if_refused,
    run_here,
    script,
    train_command,
)

_AT_ONCE = 256


def parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    made = Parser(
        prog="python -m launch.ensemble",
        description="Train one run for each value of a key, or for each combination of several, "
        "as one Slurm array or on this machine. If run again, it starts only what is "
        "unfinished; when nothing is left, or with --evaluate, it scores the average "
        "of the runs that finished.",
        examples=(
            "python -m launch.ensemble demo --over seed=0..4 --local",
            "python -m launch.ensemble demo --over model.dropout=0.3,0.5 --over seed=0..2 --local",
            "python -m launch.ensemble paper/alexnet-2012 name=five cluster=site.yaml --parallel 2",
        ),
    )
    made.add_argument("config", nargs="+", help=CONFIG_HELP)
    made.add_argument(
        "--over", action="append", metavar="KEY=VALUES",
        help="1,2,3 or 0..4 (both ends included), by default seed=0..4; with several, every "
             "combination",
    )  # fmt: skip
    made.add_argument("--parallel", type=count, metavar="N", help="how many Slurm runs at a time")
    made.add_argument(
        "--evaluate", action="store_true", help="start nothing, score the runs that have finished"
    )
    made.add_argument(
        "--wait", action="store_true", help="wait until the jobs have ended, then score"
    )
    add_where(made)
    return made


def values_of(over: str) -> tuple[str, list[str]]:
    """Return the key and the values of an --over option; raises ConfigError."""
    key, _, text = over.partition("=")
    if span := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text):
        values = [str(value) for value in range(int(span[1]), int(span[2]) + 1)]
    else:
        values = [value for value in re.split(r",(?![^\[{]*[\]}])", text) if value]
    if not key or len(set(values)) != len(values) or not values:
        raise ConfigError(f"--over {over}: must be KEY=0..4 or KEY=1,2,3, with each value once")
    return key, values


@dataclass(frozen=True)
class Member:
    """One run of the ensemble: its values by key, its arguments, its config."""

    keys: Mapping[str, str]
    arguments: list[str]
    config: Config

    @property
    def finished(self) -> bool:
        """Whether the run has reached this config's last step.

        Raises ConfigError if its folder holds a run of another config that has finished.
        """
        folder, config = self.config.folder, self.config
        if read_run(folder).get("state") != "finished":
            return False
        saved = load_config([folder / "config.json"])
        ours, theirs = fingerprint(config), fingerprint(saved)
        differ = {key for key, value in ours.items() if value not in ("any", theirs.get(key))}
        if config.train.epochs < saved.train.epochs:
            differ.add("train.epochs")
        if differ:
            raise ConfigError(
                f"{folder} holds a finished run with another {', '.join(sorted(differ))}: give "
                "this ensemble another name=, or restore those keys"
            )
        return config.train.epochs == saved.train.epochs


def members_of(run: Sequence[str], over: Sequence[str], cluster: Cluster | None) -> list[Member]:
    """Return a member for each combination of values, each checked; raises ConfigError."""
    found = [values_of(text) for text in over]
    axes = dict(found)
    if len(axes) < len(found):
        raise ConfigError(f"--over: {', '.join(key for key, _ in found)}: name each key once")
    base, members = load_config(run), []
    for values in itertools.product(*axes.values()):
        keys = dict(zip(axes, values, strict=True))
        words = [f"{key.rpartition('.')[2]}-{value}" for key, value in keys.items()]
        name = re.sub(r"[^\w.-]+", "_", "-".join([base.name, *words]))
        own = [f"{key}={value}" for key, value in keys.items()]
        arguments = [*run, *own, f"name={name}"]
        members.append(Member(keys, arguments, checked_config(arguments, cluster)))
    names = [member.config.name for member in members]
    if len(set(names)) < len(names):
        raise ConfigError(f"--over: two members would be named {max(names, key=names.count)}")
    return members


def main(arguments: Sequence[str]) -> int:
    """Start what is unfinished, print how the members stand, and score them when all are done."""
    options = parser().parse_args(arguments)
    if options.local and (options.parallel or options.wait):
        raise ConfigError(
            "--local: trains one run after another, so leave out --parallel and --wait"
        )
    cluster, run = split(options.config)
    over = options.over or ["seed=0..4"]
    members = members_of(run, over, None if options.local else cluster)
    left = [member for member in members if not member.finished]
    base = load_config(run)
    name = "-".join([base.name, "over", *members[0].keys])  # of the members' jobs
    if options.dry_run or (left and not options.evaluate):
        folder = Path(base.output_dir) / name / "launch"
        code = _start(options, cluster, name, folder, members, left)
        if options.dry_run or code:
            return code
    while options.wait and waiting(name):
        time.sleep(5)
    if any(read_run(member.config.folder) for member in members):
        print(table(members))
    if any(not member.finished for member in members) and not (
        options.wait or options.evaluate or options.local
    ):
        print(
            "when they have ended, run the same command to start what is unfinished, or to "
            "score all"
        )
        return 0
    return score([member.config for member in members if member.finished], len(members))


def _start(
    options: argparse.Namespace, cluster: Cluster, name: str, folder: Path,
    members: list[Member], left: list[Member],
) -> int:  # fmt: skip
    """Start the members in `left`, or print how they would be started; return the exit code if the
    program must end now, else 0."""
    parallel = options.parallel or _AT_ONCE
    if options.dry_run:
        if not options.local:
            print(script(cluster, name, folder, parallel, max(1, len(left))), end="\n\n")
        for number, member in enumerate(left):
            command = shlex.join(train_command(member.arguments))
            print(command if options.local else f"# {number}: {command}")
        return 0
    if options.local:
        for number, member in enumerate(left, start=1):
            values = " ".join(f"{key}={value}" for key, value in member.keys.items())
            print(f"run {number} of {len(left)}: {member.config.folder}, {values}", flush=True)
            code = run_here(member.arguments)
            if code in EXITS.values():
                print("stopped; run the same command to resume", file=sys.stderr)
                return code
    elif not waiting(name):
        with removed_if_refused(folder):
            made = executor(cluster, name, folder, parallel)
            with made.batch():
                jobs = [made.submit(TrainJob(member.arguments)) for member in left]
        job = jobs[0].job_id.partition("_")[0]
        print(f"job {job}: {len(left)} of {len(members)} runs, {parallel} at a time; in {folder}")
        print(f"asks: {cluster}\nstop: scancel {job}    (they save first)", flush=True)
    return 0


def table(members: Sequence[Member]) -> str:
    """Return a table of the members' states with their lowest and their last top-1 error."""
    queue = queued()
    keys = [key.rpartition(".")[2] for key in members[0].keys]
    lines: list[tuple[str, ...]] = [("run", *keys, "state", "step", "best top-1 error", "last")]
    for member in members:
        row = (str(member.config.folder), *member.keys.values())
        if read_run(member.config.folder):
            now = status(member.config.folder, queue)
            steps = f"{now['step']}/{now['last_step'] or '?'}"
            lines.append((*row, str(now["state"]), steps, *_errors(member.config.folder)))
        else:
            lines.append((*row, "not started", "-", "-", "-"))
    return aligned(lines)


def _errors(folder: Path) -> tuple[str, str]:
    """Return a run's lowest and its last top-1 error, as text."""
    errors = [1 - point["top1"] for point in read_metrics(folder) if point["kind"] == "eval"]
    return (f"{min(errors):.2%}", f"{errors[-1]:.2%}") if errors else ("-", "-")


def waiting(name: str) -> bool:
    """Return whether jobs of this name are in the queue; raises RunFolderError if Slurm does not
    answer."""
    answer, _ = slurm("squeue", "--me", "--noheader", f"--name={name}", tries=10)
    if answer is None and shutil.which("squeue") is not None:
        raise RunFolderError(
            f"{name}: squeue does not answer, so whether its jobs have ended is unknown"
        )
    return bool(answer)


def score(configs: Sequence[Config], of: int) -> int:
    """Print the score of these runs' average; return 0 if they are all `of` members."""
    if not configs:
        raise ConfigError("launch.ensemble: no run has finished yet")
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints

    try:
        average = evaluate_checkpoints([c.folder for c in configs], keep=False).score
    except ConfigError as error:  # the members differ in data.path, or in views
        print(f"no average: {error}")
    else:
        errors = {"top1": 1 - average.top1, "top5": 1 - average.top5}
        names = accuracies(configs[0].model.classes).items()
        words = ", ".join(f"{name} error {errors[top]:.2%}" for top, name in names)
        print(f"the average of {len(configs)} of {of}: {words}")
    return 0 if len(configs) == of else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
