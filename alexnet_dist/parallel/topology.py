"""Ranks and groups: who this process is, and with whom it speaks.

Ranks are laid out replica by replica, a replica's columns side by side, so that columns meet
inside a node.
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
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from alexnet_dist.compat import all_gather_single, set_timeout
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import AlexNetDistError, SaidByRank0
from alexnet_dist.network.precision import allow_tf32
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.device import cores_of, keep_memory, share_python, take_device
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
        columns: ranks that share a replica, one column each; 1 where all columns are here.
        cores: of this host, that this rank may count on.
        control: a CPU group of all ranks, for flags and words; None in a world of one.
        column_group: the ranks of this replica; None where there is one.
        replica_group: the ranks that hold this column, one a replica; None where there is one.
        store: words that ranks leave for each other without a collective; None in a world of one.
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
    def leads(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.global_rank == 0

    def shares(self, samples: range) -> list[range]:
        """Of these samples, those that each column rank of this replica decodes."""
        replica = samples[share(len(samples), self.replica, self.replicas)]
        return [replica[share(len(replica), c, self.columns)] for c in range(self.columns)]

    def decided_by_rank_0(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, on every rank; where it raises, the others do too.

        It returns what JSON can hold: torch's collectives of objects unpickle what a peer sends.
        """
        if self.control is None:
            return decide()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.leads:
            try:
                outcome = [decide(), None]
            except Exception as error:
                failure = error
                outcome = [None, error.exit_code if isinstance(error, AlexNetDistError) else 1]
        outcome = json.loads(self.first_said(json.dumps(outcome) if self.leads else ""))
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            said = SaidByRank0("rank 0 failed")
            said.exit_code = outcome[1]
            raise said
        return outcome[0]  # type: ignore[no-any-return]

    def put_off_timeouts(self) -> None:
        """From now on another looks whether ranks wait too long: one that knows when they were
        stopped, as these clocks do not."""
        for group in (self.control, self.column_group, self.replica_group):
            if group is not None:
                set_timeout(datetime.timedelta(days=100), group)

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(self.control)

    def each(self, *numbers: float) -> list[list[float]]:
        """Every rank's numbers, on every rank. Collective."""
        if self.control is None:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        found = torch.empty(self.world_size * len(numbers), dtype=torch.float64)
        all_gather_single(found, mine, self.control)
        return found.view(self.world_size, -1).tolist()

    def first_said(self, text: str) -> str:
        """Of every rank's text, the first that is not empty, on every rank. Collective."""
        if self.control is None:
            return text
        mine = text.encode(errors="surrogatepass")  # a path may hold any byte
        for rank, (length,) in enumerate(self.each(len(mine))):
            if length:
                words = bytearray(mine if rank == self.global_rank else int(length))
                dist.broadcast(torch.frombuffer(words, dtype=torch.uint8), rank, self.control)
                return words.decode(errors="surrogatepass")
        return ""

    def sum(self, counts: Tensor) -> Tensor:
        """A CPU tensor summed over all ranks."""
        if self.control is not None:
            dist.all_reduce(counts, group=self.control)
        return counts


def connect(config: Config) -> Topology:
    """Join the other ranks, take a device, set threads; raises ConfigError if ranks do not fit."""
    place = environment.place() or Place()
    here = Topology(
        global_rank=place.rank,
        world_size=place.world,
        columns=columns_of(config),
        cores=cores_of(place),
    )
    check(config, here.world_size)
    device = take_device(config, place)
    torch.set_num_threads(config.layout.threads or here.cores)
    allow_tf32(config.train.precision)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    keep_memory()
    share_python()
    if here.world_size == 1:
        return dataclasses.replace(here, device=device)
    keep_to_this_host(place)
    timeout = datetime.timedelta(seconds=config.layout.timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # one process may go through several layouts
        dist.init_process_group(
            backend, timeout=timeout, device_id=device if backend == "nccl" else None,
            store=meet(config, place, timeout), rank=place.rank, world_size=place.world,
        )  # fmt: skip
    # Not init_device_mesh: its subgroups would not have our timeout on every backend.
    world, columns = here.world_size, here.columns
    control = _group(range(world), "gloo", timeout)
    if place.node is not None:
        nodes = dataclasses.replace(here, control=control).each(place.node)
        environment.check_even(place.tasks_per_node)  # now, so that rank 0 lives to say it
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
        device=device,
        control=control,
        column_group=by_replica[here.replica],
        replica_group=by_column[here.column],
        store=PrefixStore("alexnet_dist", _get_default_store()),
    )


def _group(ranks: range, backend: str, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """A group of these ranks; None on the others. Collective over all ranks."""
    group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    return group if isinstance(group, dist.ProcessGroup) else None


def leave() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
