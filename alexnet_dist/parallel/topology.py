"""Ranks and process groups: this process's place in the layout, and how it joins the others.

Ranks are numbered replica by replica, a replica's columns next to each other, so that the columns
of a replica are on one node.
"""

import dataclasses
import datetime
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from alexnet_dist.compat import all_gather_single, set_timeout
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import AlexNetDistError, SaidByRank0
from alexnet_dist.network.precision import allow_tf32
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.device import (
    cores_of,
    keep_freed_memory,
    shorten_switch_interval,
    take_device,
)
from alexnet_dist.parallel.environment import Place
from alexnet_dist.parallel.layouts import check, check_columns_meet, columns_of
from alexnet_dist.parallel.rendezvous import keep_to_this_host, meet
from alexnet_dist.partition import share

T = TypeVar("T")
_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """This process's place in the layout.

    Attributes:
        columns: number of ranks per replica, one column each; 1 where a rank holds all columns.
        cores: number of this host's CPU cores that this rank may use.
        control: a gloo group of all ranks, for flags and text; None if the world size is 1.
        column_group: the ranks of this replica; None if there is only one.
        replica_group: the ranks that hold this column, one per replica; None if there is only one.
        store: a key-value store in which ranks leave messages without a collective; None if the
            world size is 1.
    """

    global_rank: int = 0
    world_size: int = 1
    columns: int = 1
    cores: int = 1
    device: torch.device = _CPU
    control: dist.ProcessGroup | None = None
    column_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def column(self) -> int:
        return self.global_rank % self.columns

    @property
    def replica(self) -> int:
        return self.global_rank // self.columns

    @property
    def replicas(self) -> int:
        return self.world_size // self.columns

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.global_rank == 0

    def shares(self, samples: range) -> list[range]:
        """Return, for each column rank of this replica, which of these samples it decodes."""
        replica = samples[share(len(samples), self.replica, self.replicas)]
        return [replica[share(len(replica), c, self.columns)] for c in range(self.columns)]

    def decided_by_rank_0(self, decide: Callable[[], T]) -> T:
        """Call `decide` on rank 0, and return its result on every rank. Collective.

        If it raises, every rank raises: the others, `SaidByRank0`. Its result must be JSON: torch's
        object collectives unpickle what a peer sends, and are not used.
        """
        if self.control is None:
            return decide()
        outcome: list[Any] = [None, None]  # the result; the exit code, if it raised
        failure: Exception | None = None
        if self.is_rank_0:
            try:
                outcome = [decide(), None]
            except Exception as error:
                failure = error
                outcome = [None, error.exit_code if isinstance(error, AlexNetDistError) else 1]
        outcome = json.loads(self.first_message(json.dumps(outcome) if self.is_rank_0 else ""))
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise SaidByRank0("rank 0 failed", exit_code=outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    def disable_timeouts(self) -> None:
        """Keep the process groups from timing out: from now on a watchdog looks for ranks that wait
        too long. Unlike the groups' clocks, it knows when a process was suspended."""
        for group in (self.control, self.column_group, self.replica_group):
            if group is not None:
                set_timeout(datetime.timedelta(days=100), group)

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(self.control)

    def gather(self, *numbers: float) -> list[list[float]]:
        """Gather every rank's numbers on every rank: (world size, len(numbers)). Collective."""
        if self.control is None:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        found = torch.empty(self.world_size * len(numbers), dtype=torch.float64)
        all_gather_single(found, mine, self.control)
        return found.view(self.world_size, -1).tolist()

    def first_message(self, text: str) -> str:
        """Return, on every rank, the first non-empty text in rank order; "" if none. Collective."""
        if self.control is None:
            return text
        mine = text.encode(errors="surrogatepass")  # a path may hold any byte
        for rank, (length,) in enumerate(self.gather(len(mine))):
            if length:
                words = bytearray(mine if rank == self.global_rank else int(length))
                dist.broadcast(torch.frombuffer(words, dtype=torch.uint8), rank, self.control)
                return words.decode(errors="surrogatepass")
        return ""


def connect(config: Config) -> Topology:
    """Join the other ranks, and return this rank's topology. Collective.

    It also takes a device and sets this process's threads, TF32, determinism and memory allocation.

    Raises:
        ConfigError: the layout, batch or devices do not fit this number of ranks.
    """
    place = environment.place() or Place()
    here = Topology(
        global_rank=place.rank,
        world_size=place.world,
        columns=columns_of(config),
        cores=cores_of(place),
    )
    check(config, here.world_size)
    here = dataclasses.replace(here, device=take_device(config, place))
    torch.set_num_threads(config.layout.threads or here.cores)
    allow_tf32(config.train.precision)
    deterministic = config.train.deterministic
    torch.backends.cudnn.benchmark = not deterministic  # it chooses what it measures as fastest
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Only where it changes, since setting it imports the compiler.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    keep_freed_memory()
    shorten_switch_interval()
    return here if here.world_size == 1 else _joined(here, config, place)


def _joined(here: Topology, config: Config, place: Place) -> Topology:
    """Meet the other ranks, make the process groups, and return the topology with them.
    Collective."""
    keep_to_this_host(place)
    timeout = datetime.timedelta(seconds=config.layout.timeout_s)
    backend = "nccl" if here.device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # one process may go through several layouts
        dist.init_process_group(
            backend, timeout=timeout, device_id=here.device if backend == "nccl" else None,
            store=meet(config, place, timeout), rank=place.rank, world_size=place.world,
        )  # fmt: skip
    # Not by init_device_mesh: its subgroups lack our timeout on some backends.
    world, columns = here.world_size, here.columns
    here = dataclasses.replace(here, control=_group(range(world), "gloo", timeout))
    if place.node is not None:
        nodes = here.gather(place.node)
        # Only now that they have met: otherwise one's end could kill rank 0 before it reports it.
        environment.check_even(place.tasks_per_node)
        check_columns_meet([int(node) for (node,) in nodes], columns)
    by_replica = [
        _group(range(first, first + columns), backend, timeout) if columns > 1 else None
        for first in range(0, world, columns)
    ]
    by_column = [
        _group(range(column, world, columns), backend, timeout) if here.replicas > 1 else None
        for column in range(columns)
    ]
    return dataclasses.replace(
        here,
        column_group=by_replica[here.replica],
        replica_group=by_column[here.column],
        store=PrefixStore("alexnet_dist", _get_default_store()),
    )


def _group(ranks: range, backend: str, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """Make a group of these ranks; None on the others. Collective over all ranks."""
    group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    return group if isinstance(group, dist.ProcessGroup) else None


def leave_groups() -> None:
    """Destroy the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
