"""An ensemble as one job array: python -m launch.ensemble CONFIG... cluster=NAME --over seed=0..4

--over KEY=V,V,… or KEY=A..B (both included) trains one run for each value, --parallel of them at
once. Run again, it starts only what is unfinished; when nothing is left, or with --evaluate, it
scores the average of those that finished. --wait stays until the queue is done, then scores.
"""

import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import ConfigError, RunFolderError
from alexnet_dist.files import read_run
from launch.job import TrainJob, guarded, slurm
from launch.status import queued, status, table
from launch.submit import checked, executor, split


def values_of(over: str) -> tuple[str, list[str]]:
    """The key and the values of an --over; raises ConfigError."""
    key, _, text = over.partition("=")
    if found := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text):
        values = [str(value) for value in range(int(found[1]), int(found[2]) + 1)]
    else:
        values = [value for value in text.split(",") if value]
    if not key or len(set(values)) != len(values) or not values:
        raise ConfigError(f"--over {over}: write KEY=0..4 or KEY=1,2,3, each value once")
    return key, values


def member(arguments: Sequence[str], name: str, key: str, value: str) -> list[str]:
    """The arguments of the run that takes one value."""
    plain = re.sub(r"[^\w.-]", "_", f"{name}-{key.rpartition('.')[2]}-{value}")
    return [*arguments, f"{key}={value}", f"name={plain}"]


def option(arguments: list[str], name: str, default: str) -> str:
    """Take an option and its value out of the arguments."""
    if name not in arguments:
        return default
    place = arguments.index(name)
    if place + 1 == len(arguments):
        raise ConfigError(f"{name}: needs a value, as in {name} {default or '4'}")
    del arguments[place]
    return arguments.pop(place)


def main(arguments: Sequence[str]) -> int:
    rest = [text for text in arguments if text not in ("--evaluate", "--wait")]
    key, values = values_of(option(rest, "--over", "seed=0..4"))
    parallel = option(rest, "--parallel", "256")
    if not parallel.isdecimal() or parallel == "0":
        raise ConfigError(f"--parallel {parallel}: how many runs may go at once, 1 or more")
    cluster, run = split(rest)
    base = load_config(run)
    members = [member(run, base.name, key, value) for value in values]
    configs = [checked(each, cluster) for each in members]
    left = [m for m, config in zip(members, configs, strict=True) if not finished(config)]

    name = f"{base.name}-over-{key}"
    if left and "--evaluate" not in arguments and not waiting(name):
        folder = Path(base.output_dir) / name / "launch"
        made = executor(cluster, name, folder, int(parallel))
        with made.batch():
            jobs = [made.submit(TrainJob(each)) for each in left]
        number = jobs[0].job_id.partition("_")[0]
        print(
            f"job {number}: {len(left)} of {len(members)} runs, {parallel} at a time; in {folder}"
        )
        print(f"stop: scancel {number}    (they save first)", flush=True)
    if left and "--wait" in arguments:
        while waiting(name):
            time.sleep(5)
    begun = [config.folder for config in configs if read_run(config.folder)]
    if begun:
        print(table([status(folder, queued()) for folder in begun]))
    if left and not {"--wait", "--evaluate"} & set(arguments):
        print("when they have ended, the same command starts what is unfinished, or scores all")
        return 0
    return score([config for config in configs if finished(config)], len(members))


def waiting(name: str) -> bool:
    """Whether jobs of this name are in the queue; raises RunFolderError where it is not told."""
    for _ in range(10):
        told = slurm("squeue", "--me", "--noheader", f"--name={name}")
        if told is not None or shutil.which("squeue") is None:
            return bool(told)
        time.sleep(3)
    raise RunFolderError(f"{name}: squeue does not answer: whether its jobs are done is not known")


def finished(config: Config) -> bool:
    return read_run(config.folder).get("state") == "finished"


def score(configs: Sequence[Config], of: int) -> int:
    """Print the score of the average of these runs; 0 where they are all there should be."""
    if not configs:
        raise ConfigError("launch.ensemble: no run has finished yet")
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints

    found = evaluate_checkpoints([config.folder for config in configs]).score
    print(f"the average of {len(configs)} of {of}: top-1 {found.top1:.2%}, top-5 {found.top5:.2%}")
    return 0 if len(configs) == of else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
