"""How ranks find each other: a store that listens on one address, and the interfaces they use."""

import datetime
import os
import socket
import time
from contextlib import suppress

import psutil
from torch._C._distributed_c10d import Store, TCPStore

from alexnet_dist.config.schema import Config
from alexnet_dist.errors import RunFolderError
from alexnet_dist.files import read_bytes, written_aside
from alexnet_dist.parallel.environment import Place

LOOPBACK = "127.0.0.1"


def keep_to_this_host(place: Place) -> None:
    """Make gloo and NCCL listen only on the loopback interface, if all ranks are on this host."""
    if place.on_one_host:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def store_at(address: str, timeout: datetime.timedelta) -> TCPStore:
    """Return a store that listens on a free port of this address only; torch's own would listen on
    all interfaces of the host."""
    family, *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((address, 0), family=family)
    host, port, *_ = listener.getsockname()
    return TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def own_address(place: Place) -> str:
    """Return the address at which the other ranks reach this one; GLOO_SOCKET_IFNAME's if set."""
    if place.on_one_host:
        return LOOPBACK
    named = psutil.net_if_addrs().get(os.environ.get("GLOO_SOCKET_IFNAME", ""), [])
    return next((a.address for a in named if a.family == socket.AF_INET), place.address)


def meet(config: Config, place: Place, timeout: datetime.timedelta) -> Store | None:
    """Return the store at which the ranks of a Slurm step meet; None if MASTER_ADDR is set.

    Rank 0 takes a free port, and writes its address to a file in the run folder that only this
    start of this step looks for. So no port has to be agreed on in advance, and none can be taken.

    Raises:
        RunFolderError: the file cannot be written, or did not appear in time.
    """
    if not place.meeting:
        return None
    path = config.folder / f"meet-{place.meeting}"
    if place.rank == 0:
        store, found = store_at(own_address(place), timeout), path.parent.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path, durably=False) as aside:
                aside.write_text(f"{store.host} {store.port}")
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be written ({error.strerror}): set output_dir= to a folder that "
                "all nodes share"
            ) from error
        try:
            for other in range(1, place.world):
                store.wait([f"met/{other}"], timeout)
        finally:
            path.unlink(missing_ok=True)
            if not found:  # the start may yet be refused
                with suppress(OSError):
                    path.parent.rmdir()
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    # Listing the folder makes a network file system refresh its cache.
    while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{path}: rank 0 did not write its address there within "
                f"layout.timeout_s={config.layout.timeout_s:g}: is output_dir={config.output_dir} "
                "shared by all nodes?"
            )
        time.sleep(0.05)
    address, port = read_bytes(path).decode().split()
    store = TCPStore(address, int(port), is_master=False, timeout=timeout)
    store.set(f"met/{place.rank}", "")
    return store
