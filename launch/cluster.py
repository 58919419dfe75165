"""The resources that a job asks Slurm for: `cluster=FILE` and `cluster.KEY=VALUE`."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alexnet_dist.config.load import configs_folder, flatten, is_file, parse_argument
from alexnet_dist.config.schema import Key, key
from alexnet_dist.config.yaml_text import NOT_YAML, bounded_yaml
from alexnet_dist.errors import ConfigError, counted, one_line

# Words in a refusal by Slurm, and the keys that it is about.
_ABOUT = {
    "partition": "partition", "account": "account", "time limit": "time_min",
    "memory": "memory_gb", "qos": "sbatch={qos: …}", "feature": "sbatch={constraint: …}",
    "generic resource": "gpus_per_node", "gres": "gpus_per_node", "gpu": "gpus_per_node",
    "node count": "nodes", "node configuration": "nodes, tasks_per_node, cpus_per_task, memory_gb",
    "cpu": "cpus_per_task",
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """The resources of a run's job, which are not part of its config: what `python -m
    launch.submit` and `launch.ensemble` ask Slurm for. `cluster=FILE` names a YAML file of these
    keys, written without `cluster.`, or one in configs/cluster; `cluster.KEY=VALUE` overrides it.
    `signal_s` is shorter than `time_min`."""

    nodes: int = key("nodes of the job", default=1, ge=1)
    tasks_per_node: int = key(
        "ranks on each node, one per GPU; a replica's columns share a node", default=1, ge=1
    )
    gpus_per_node: int = key("GPUs of each node; 0 if Slurm does not hand out any", default=0, ge=0)
    cpus_per_task: int = key("cores per rank; images are decoded on them", default=1, ge=1)
    memory_gb: int = key(
        "memory of each node, GB (sbatch's --mem); 0 = the site's default", default=0, ge=0
    )
    time_min: int = key(
        "time limit of one start, minutes; a longer run is requeued until it is done",
        default=60, ge=1,
    )  # fmt: skip
    signal_s: int = key(
        "how long before the time limit the run saves, s; Slurm may be 60 s early",
        default=120, ge=1,
    )  # fmt: skip
    partition: str = key("Slurm's partition; empty: the site's default", default="")
    account: str = key("the account to charge; empty: the site's default", default="")
    comment: str = key("sbatch's --comment, for the site's accounting", default="")
    sbatch: dict[str, Any] = field(
        default_factory=dict,
        metadata={"key": Key("any other options of sbatch; true for one without a value")},
    )
    setup: tuple[str, ...] = key(
        "lines of shell to run before the ranks start, as in [module load cuda]", default=()
    )

    def __str__(self) -> str:
        """Return what a job asks for, in words."""
        return (
            f"{counted(self.nodes, 'node')} of {counted(self.tasks_per_node, 'task')} and "
            f"{counted(self.gpus_per_node, 'GPU')}, {counted(self.cpus_per_task, 'core')} a task, "
            f"{counted(self.time_min, 'minute')}"
        )


def split(arguments: Sequence[str]) -> tuple[Cluster, list[str]]:
    """Split arguments into the cluster that `cluster=` and `cluster.KEY=` describe, and those of
    the run.

    Raises ConfigError if one of the former is wrong.
    """
    values: dict[str, Any] = {}
    rest = []
    for text in arguments:
        name, _, value = text.partition("=")
        if name == "cluster":
            path = _find(value)
            values |= _checked({"cluster": _read(path)}, str(path))
        elif name.startswith("cluster."):
            values |= _checked(parse_argument(text), "the command line")
        else:
            rest.append(text)
    cluster = Cluster(**values)
    if cluster.signal_s >= 60 * cluster.time_min:
        raise ConfigError(
            f"cluster.signal_s={cluster.signal_s}: must be less than the {cluster.time_min} "
            "minutes of cluster.time_min"
        )
    return cluster, rest


def _checked(layer: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the keys of a mapping without `cluster.`, checked as a config's keys are."""
    values = flatten(layer, source, Cluster, "cluster.")
    return {dotted.removeprefix("cluster."): value for dotted, value in values}


def _find(name: str) -> Path:
    """Return the path of a cluster file, given as a path or as the name of a shipped one."""
    folder = configs_folder() / "cluster"
    path = next(filter(is_file, (Path(os.path.expanduser(name)), folder / f"{name}.yaml")), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"cluster={name}: there is no such file, and it is not one of {known}")
    return path


def _read(path: Path) -> dict[str, Any]:
    """Return a cluster file's content; raises ConfigError if it is no mapping."""
    try:
        content = yaml.safe_load(bounded_yaml(path))
    except NOT_YAML as error:
        raise ConfigError(
            f"{path}: not a YAML file of keys and values: {one_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not keys and values")
    if any(str(name).partition(".")[0] == "cluster" for name in content):
        raise ConfigError(f"{path}: here, keys are written without `cluster.`, as in nodes: 2")
    return content


def keys_of_refusal(words: str) -> str:
    """Return the keys that a refusal by Slurm is about; empty if they are not known."""
    about = next((keys for word, keys in _ABOUT.items() if word in words.lower()), "")
    return ", ".join(f"cluster.{key}" for key in about.split(", ") if about)


def out_of_reach(words: str) -> bool:
    """Whether a Slurm command says that it cannot find or reach Slurm's controller."""
    return re.search("configuration source|contact slurm controller", words, re.I) is not None
