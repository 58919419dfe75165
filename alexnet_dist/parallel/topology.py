"""Ranks, groups, threads and devices: who this process is, and with whom it speaks.

Ranks are laid out replica by replica, a replica's columns side by side, so that columns meet
inside a node.
"""

import ctypes
import dataclasses
import datetime
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from alexnet_dist.config.schema import Config
from alexnet_dist.errors import AlexNetDistError, ConfigError, RunFolderError, SaidByRank0
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.environment import Place
from alexnet_dist.parallel.layouts import check, columns_of
from alexnet_dist.partition import share

T = TypeVar("T")
_CPU = torch.device("cpu")
LOOPBACK = "127.0.0.1"
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

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(self.control)

    def each(self, *numbers: float) -> list[list[float]]:
        """Every rank's numbers, on every rank. Collective."""
        if self.control is None:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        found = torch.empty(self.world_size * len(numbers), dtype=torch.float64)
        dist.all_gather_single(found, mine, self.control)
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


def gpus(config: Config) -> int:
    """GPUs of this host that a run may use."""
    return 0 if config.layout.device == "cpu" else torch.cuda.device_count()


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
    device = _device(config, place)
    torch.set_num_threads(config.layout.threads or here.cores)
    torch.backends.cudnn.allow_tf32 = False  # train.precision=fp32 says float32
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    _keep_memory()
    if here.world_size == 1:
        return dataclasses.replace(here, device=device)
    keep_to_this_host(place)
    timeout = datetime.timedelta(seconds=config.layout.timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # one process may go through several layouts
        dist.init_process_group(
            backend, timeout=timeout, device_id=device if backend == "nccl" else None,
            store=_meet(config, place, timeout), rank=place.rank, world_size=place.world,
        )  # fmt: skip
    # Not init_device_mesh: its subgroups would not have our timeout on every backend.
    world, columns = here.world_size, here.columns
    control = _group(range(world), "gloo", timeout)
    if place.node is not None:
        nodes = dataclasses.replace(here, control=control).each(place.node)
        environment.check_even(place.tasks_per_node)  # now, so that rank 0 lives to say it
        _check_columns_meet([int(node) for (node,) in nodes], columns)
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


def keep_to_this_host(place: Place) -> None:
    """Let gloo and NCCL listen on the loopback alone, where all ranks are here."""
    if place.on_one_host:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def store_at(address: str, timeout: datetime.timedelta) -> TCPStore:
    """A store at a free port of this address alone: torch's own listens on all that a host has."""
    family, *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((address, 0), family=family)
    host, port, *_ = listener.getsockname()
    return TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def _own_address(place: Place) -> str:
    """Where the ranks of a step find this one: on gloo's interface, where one is named."""
    if place.on_one_host:
        return LOOPBACK
    named = psutil.net_if_addrs().get(os.environ.get("GLOO_SOCKET_IFNAME", ""), [])
    return next((a.address for a in named if a.family == socket.AF_INET), place.address)


def leave() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(config: Config, place: Place, timeout: datetime.timedelta) -> Store | None:
    """Where the ranks of a Slurm step meet; None where MASTER_ADDR says it.

    Rank 0 takes a free port, and leaves its address in the run folder, in a file that only this
    start of this step looks for: no port to agree on before, none that a neighbour may have.
    """
    if not place.meeting:
        return None
    path = config.folder / f"meet-{place.meeting}"
    if place.rank == 0:
        store = store_at(_own_address(place), timeout)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}")
            aside.write_text(f"{store.host} {store.port}")
            aside.replace(path)
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be written ({error.strerror}): set output_dir= to a folder that "
                "all nodes share"
            ) from error
        for other in range(1, place.world):
            store.wait([f"met/{other}"], timeout)
        path.unlink(missing_ok=True)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    # Listing the folder makes a network file system look again.
    while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{path}: rank 0 did not leave its address within layout.timeout_s="
                f"{config.layout.timeout_s:g}: is output_dir={config.output_dir} shared by all "
                "nodes?"
            )
        time.sleep(0.05)
    address, port = path.read_text().split()
    store = TCPStore(address, int(port), is_master=False, timeout=timeout)
    store.set(f"met/{place.rank}", "")
    return store


def _check_columns_meet(nodes: list[int], columns: int) -> None:
    """Raises ConfigError where the columns of a replica lie on different ones of these nodes."""
    pairs = [nodes[first : first + columns] for first in range(0, len(nodes), columns)]
    if any(len(set(pair)) > 1 for pair in pairs):
        raise ConfigError(
            f"layout.kind: Slurm laid ranks 0, 1, … on nodes {', '.join(map(str, nodes))}, and the "
            f"columns of a replica must share one: ask for --ntasks-per-node={columns} or a "
            "multiple of it, and --distribution=block"
        )


def _device(config: Config, place: Place) -> torch.device:
    found = gpus(config)
    # Slurm may show a task its own GPU alone (--gpus-per-task): the job then has as many as tasks.
    own = found == 1 and (place.gpus_on_node or 0) >= place.local_world
    if config.layout.device == "cuda" and found < place.local_world and not own:
        raise ConfigError(
            f"layout.device=cuda: {place.local_world} ranks on this host need a GPU each, "
            f"and {found} are here; set layout.device=auto or layout.kind=one"
            f"{'' if found else '; `alexnet-dist doctor` says why there is none'}"
        )
    if found < place.local_world and not own:
        if found and place.rank == 0:
            log.warning(
                f"{place.local_world} ranks and {found} GPU(s) here: computing on the CPU; to use "
                "what is there, set layout.kind=one, or layout.ranks to as many"
            )
        return torch.device("cpu")
    device = torch.device("cuda", 0 if own else place.local_rank)
    torch.cuda.set_device(device)
    return device


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def cores_of(place: Place) -> int:
    """That a rank may count on: Slurm's for its task, which may be bound to them; else a share of
    this host's."""
    return min(cores(), place.cores or max(1, cores() // place.local_world))


def cpu_flags() -> set[str]:
    """The kernel's words for what this host's processor can do, as in amx_bf16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.lower().startswith(("flags", "features"))
            for flag in line.partition(":")[2].split()}  # fmt: skip


def _keep_memory() -> None:
    """Keep freed memory in the process: fresh pages cost as much as the arithmetic on them.

    mallopt(3) of glibc: no mmap for blocks below 1 GiB, no trimming. Elsewhere: nothing.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(mmap_max, 0)
