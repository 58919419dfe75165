"""This process's place among the ranks, as the launcher says it in RANK, SLURM_* and the like.
Other modules ask here.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; srun sets SLURM_* for each task.
A Slurm step of one task does not count as a launcher: a run in it starts its own ranks.
"""

import os
import re
import socket
from dataclasses import dataclass

from alexnet_dist.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """This process's place among those that were started together.

    Attributes:
        node: index of this process's node, counted from 0; None if Slurm did not start it.
        tasks_per_node: number of tasks on each node, if Slurm said so; else empty.
        gpus_on_node: number of GPUs that Slurm gave the job on a node; None if it did not say.
        address: a host name by which the other nodes can reach this one.
        meeting: identifies this start of this job step; empty if ranks meet at MASTER_ADDR.
        cores: number of CPU cores per task that was requested from Slurm; None if none was.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int | None = None
    tasks_per_node: tuple[int, ...] = ()
    gpus_on_node: int | None = None
    address: str = "localhost"
    meeting: str = ""
    cores: int | None = None

    @property
    def on_one_host(self) -> bool:
        return self.world == self.local_world


def launched() -> bool:
    """Whether a launcher started this process, as one of its ranks."""
    return _by_torchrun() or (os.environ.get("SLURM_STEP_NUM_TASKS") or "1") != "1"


def place() -> Place | None:
    """Return this process's place; None if no launcher started it.

    Raises ConfigError where a variable is not as launchers set it.
    """
    if not launched():
        return None
    return _torchrun_place() if _by_torchrun() else _slurm_place()


def _by_torchrun() -> bool:
    return bool(os.environ.get("RANK") and os.environ.get("WORLD_SIZE"))


def _torchrun_place() -> Place:
    place = Place(
        rank=_number("RANK"),
        world=_number("WORLD_SIZE"),
        local_rank=_number("LOCAL_RANK", 0),
        local_world=_number("LOCAL_WORLD_SIZE", 1),
    )
    _check_below("RANK", place.rank, "WORLD_SIZE", place.world)
    if os.environ.get("LOCAL_WORLD_SIZE"):
        _check_below("LOCAL_RANK", place.local_rank, "LOCAL_WORLD_SIZE", place.local_world)
    if place.local_world > place.world:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={place.local_world}: must be at most WORLD_SIZE={place.world}"
        )
    return place


def _slurm_place() -> Place:
    get = os.environ.get
    tasks, node = tasks_per_node(get("SLURM_STEP_TASKS_PER_NODE", "")), _number("SLURM_NODEID")
    gpus, cores = get("SLURM_GPUS_ON_NODE"), get("SLURM_CPUS_PER_TASK")
    start = (*job(), _number("SLURM_STEP_ID"))
    rank, world, local_rank = map(
        _number, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    )
    _check_below("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", world)
    _check_below("SLURM_NODEID", node, "the nodes of SLURM_STEP_TASKS_PER_NODE", len(tasks))
    _check_below("SLURM_LOCALID", local_rank, "this node's tasks", tasks[node])
    return Place(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=tasks[node],
        node=node,
        tasks_per_node=tasks,
        gpus_on_node=int(gpus) if gpus and gpus.isdecimal() else None,
        address=get("SLURMD_NODENAME") or socket.gethostname(),
        meeting="" if "MASTER_ADDR" in os.environ else "-".join(map(str, start)),
        cores=int(cores) if cores and cores.isdecimal() else None,
    )


def job() -> tuple[str | None, int]:
    """Return Slurm's job id, None outside a job, and how often Slurm has restarted the job."""
    return os.environ.get("SLURM_JOB_ID"), _number("SLURM_RESTART_COUNT", 0)


def _number(name: str, default: int | None = None) -> int:
    """Return the number in an environment variable; the default where it is missing or empty."""
    text = os.environ.get(name, "")
    if text.isdecimal():
        return int(text)
    if text or default is None:
        raise ConfigError(
            f"{name}={text!r}: must be a number, as a launcher sets it; to run alone, unset RANK "
            "and SLURM_STEP_NUM_TASKS"
        )
    return default


def _check_below(name: str, value: int, of: str, count: int) -> None:
    """Raise ConfigError unless a place, counted from 0, is one of so many."""
    if value >= count:
        raise ConfigError(f"{name}={value}: must be less than {of}={count}, counted from 0")


def tasks_per_node(text: str, name: str = "SLURM_STEP_TASKS_PER_NODE") -> tuple[int, ...]:
    """Parse Slurm's list of tasks per node, from the variable of this name: 2(x3),1 is
    (2, 2, 2, 1). Raises ConfigError."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ConfigError(f"{name}={text}: must be as Slurm writes it: 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return tuple(counts)


def check_even(tasks: tuple[int, ...]) -> None:
    """Raise ConfigError if nodes have different numbers of tasks."""
    if len(set(tasks)) > 1:
        raise ConfigError(
            f"Slurm put {', '.join(map(str, tasks))} tasks on {len(tasks)} nodes, but every node "
            "must have the same number: ask for --nodes and --ntasks-per-node, not only for "
            "--ntasks"
        )
