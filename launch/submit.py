"""Submit a run to Slurm through Submitit.

    python -m launch.submit CONFIG... cluster=NAME [cluster.nodes=4 ...] [key=value ...]

`cluster` is a YAML file, or the name of one in configs/cluster. With --local instead, the same job
runs on this machine.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import submitit
import yaml

from alexnet_dist.config.load import bounded_yaml, configs_folder, load_config, one_line
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.errors import ConfigError
from alexnet_dist.files import read_run
from launch.job import (
    ALL_GPUS,
    PRIVATE,
    SEEN_GPUS,
    TrainJob,
    check_placement,
    check_private,
    guarded,
)

_NEVER = 1_000_000  # timeouts before Submitit gives up: the run counts its own vain starts


@dataclass(frozen=True)
class Cluster:
    """What a job asks Slurm for.

    Attributes:
        tasks_per_node: ranks on each node, one a GPU.
        gpus_per_node: 0 where Slurm hands out none.
        time_min: the limit of one start, minutes; a longer run goes on by itself.
        signal_s: seconds before the limit at which the run saves; Slurm may be 60 early.
        sbatch: any other option of sbatch; true for one without a value.
        setup: lines of shell before the ranks start, as in module load cuda.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    time_min: int = 60
    signal_s: int = 120
    partition: str = ""
    account: str = ""
    comment: str = ""
    sbatch: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)


def split(arguments: Sequence[str]) -> tuple[Cluster, list[str]]:
    """The cluster that `cluster=` and `cluster.KEY=` name, and the arguments of the run.

    Raises ConfigError on what is wrong with the former.
    """
    rest = [text for text in arguments if not text.startswith(("cluster=", "cluster."))]
    values: dict[str, Any] = {}
    for text in arguments:
        name, _, value = text.partition("=")
        if name == "cluster":
            values |= _checked(_read(value), value)
        elif name.startswith("cluster."):
            values |= _checked({name.removeprefix("cluster."): _parsed(value, name)}, text)
    cluster = Cluster(**values)
    if cluster.signal_s >= 60 * cluster.time_min:
        raise ConfigError(
            f"cluster.signal_s={cluster.signal_s}: seconds before the limit of time_min="
            f"{cluster.time_min} minutes: must be fewer than those of the limit"
        )
    return cluster, rest


def _checked(values: dict[str, Any], origin: str) -> dict[str, Any]:
    hints = get_type_hints(Cluster)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{origin}: unknown key {key}; there are {', '.join(hints)}")
        wanted = get_origin(hints[key]) or hints[key]
        if type(value) is not wanted:
            raise ConfigError(f"{origin}: {key}={value!r}: must be of type {wanted.__name__}")
        if wanted is int and value < (least := 0 if key == "gpus_per_node" else 1):
            raise ConfigError(f"{origin}: {key}={value}: must be at least {least}")
    return values


def _parsed(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{origin}: not YAML: {one_line(error)}") from error


def _read(name: str) -> dict[str, Any]:
    folder = configs_folder() / "cluster"
    candidates = (Path(name), folder / f"{name}.yaml")
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"cluster={name}: no such file, nor one of {known}")
    try:
        text = bounded_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: not a YAML file of keys and values: {one_line(error)}"
        ) from error
    found = _parsed(text, str(path))
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}; write keys and values")
    return found


def checked(arguments: Sequence[str], cluster: Cluster) -> Config:
    """The config of a run; raises what its ranks would."""
    config = load_config(arguments)
    check_placement(config, (cluster.tasks_per_node,) * cluster.nodes)
    open_for(config)
    return config


def executor(cluster: Cluster, name: str, folder: Path, parallel: int) -> submitit.SlurmExecutor:
    """Submitit's, that keeps its pickles and logs in a folder none but its owner can open.

    Args:
        parallel: elements of an array that may run at once.

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
        raise ConfigError(f"{error} Run on this machine with --local") from error
    words = {
        key: value
        for key in ("partition", "account", "comment")
        if (value := getattr(cluster, key))
    }
    after = [sys.executable, "-m", "launch.job", "after"]
    made.update_parameters(
        **words,
        job_name=name,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.tasks_per_node,
        gpus_per_node=cluster.gpus_per_node or None,
        cpus_per_task=cluster.cpus_per_task,
        time=cluster.time_min,
        signal_delay_s=cluster.signal_s,
        array_parallelism=parallel,
        stderr_to_stdout=True,
        additional_parameters={"requeue": True, **cluster.sbatch},
        setup=cluster.setup or None,
        # srun no longer takes the job's cores a task by itself (Slurm 22.05).
        srun_args=[
            "--kill-on-bad-exit=1",
            "--wait=120",
            f"--cpus-per-task={cluster.cpus_per_task}",
        ],
        # Submitit's own requeueing knows neither a dead rank nor an array's last element.
        teardown=[f"exec {shlex.join(after)} $? --submitted {shlex.quote(str(folder.absolute()))}"],
    )
    return made


def main(arguments: Sequence[str]) -> int:
    local = "--local" in arguments
    cluster, run = split([text for text in arguments if text != "--local"])
    if local:
        cluster = dataclasses.replace(cluster, nodes=1, tasks_per_node=1)  # it starts its own ranks
    config = checked(run, cluster)
    if local:
        return run_here(TrainJob(run), config.folder)
    made = executor(cluster, config.name, config.folder / "launch", parallel=1)
    job = made.submit(TrainJob(run))
    again = shlex.join(["python", "-m", "launch.submit", *arguments])
    print(
        f"job {job.job_id}, run folder {config.folder}\n"
        f"watch:  tail -F {job.paths.stdout}\n"
        f"        python -m launch.status {config.folder}\n"
        f"stop:   scancel {job.job_id}    (it saves first)\n"
        f"resume: {again}"
    )
    return 0


def run_here(run: TrainJob, run_folder: Path) -> int:
    """Run a job on this machine, in Submitit's processes; what it printed, and its exit code."""
    folder, begun = run_folder / "launch", read_run(run_folder).get("attempt")
    os.umask(PRIVATE)
    folder.mkdir(parents=True, exist_ok=True)
    check_private(folder)
    made = submitit.LocalExecutor(folder.absolute())
    made.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
    os.environ[SEEN_GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES", ALL_GPUS)
    job = made.submit(run)
    print(f"process {job.job_id}; watch: tail -F {job.paths.stdout}", flush=True)
    failed = job.exception()
    print(job.stdout() or "", end="")
    ended = read_run(run_folder)
    code = int(ended.get("exit") or 0) if ended.get("attempt") != begun else 0
    return (code or 1) if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
