"""Test processes that start with everything imported: forked from a server that has done so.

Importing takes seconds of CPU time, and the tests start hundreds of processes. Tests of start-up
itself use `fresh` ones: new Python processes.
"""

import contextlib
import fcntl
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, ClassVar

import pytest
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from alexnet_dist.compat import elastic_launch
from alexnet_dist.config.load import load_config
from alexnet_dist.errors import AlexNetDistError
from alexnet_dist.parallel import layouts, spawn
from alexnet_dist.reporting import figures

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["warm"])


class Fork:
    """A module's function in a process and a session of its own; a subprocess.Popen in little.

    Args:
        prints: files that its output and its errors are added to.
        environment: all of its variables, by default those that are here now.
        fresh: by a new Python.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, prints: tuple[Path, Path],
        cwd: Path | None = None, environment: Mapping[str, str] | None = None, fresh: bool = False,
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("spawn") if fresh else _SERVER
        place = (prints, cwd or Path.cwd(), dict(environment or os.environ))
        self._process = context.Process(target=_begin, args=(*place, function, args))
        with pytest.MonkeyPatch.context() as patched:
            # Where a new server has warm, and this checkout's package, whichever is installed.
            tests = Path(__file__).parent
            places = (tests, tests.parent, tests.parent / "docs")
            patched.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
            forkserver.ensure_running()
        self._process.start()

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise TimeoutError(f"process {self.pid} is not over within {timeout} s")
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def command(arguments: Sequence[str], **where: Any) -> Fork:
    """`alexnet-dist ARGUMENTS`."""
    return Fork(run, arguments, **where)


def run(arguments: Sequence[str]) -> None:
    """Run `alexnet-dist ARGUMENTS` in this process, which exits; ranks are forks of it. A training
    draws no figures at its end, which would take most of a tiny one's time."""
    if arguments[0] == "train":
        figures.draw = lambda _: ([], [])
    fork_commands(_ranks_of(arguments))
    if arguments[0] in ("compare", "bench", "doctor"):
        fork_ranks()
    sys.argv = ["alexnet-dist", *arguments]
    runpy.run_module("alexnet_dist", run_name="__main__", alter_sys=True)


def fork_commands(count: int) -> None:
    """Make torchrun's API take forks for this many ranks that it starts by a command."""
    for _ in range(count):
        _Rank.waiting.append(_forked())
    subprocess_handler.Popen = _Rank  # by which it starts them


def fork_ranks() -> None:
    """Make torchrun's API fork ranks that run a function, instead of starting new Pythons: from a
    server that is itself a fork of this process, made before there are threads."""
    server = forkserver._forkserver
    if server._forkserver_pid is not None:
        return  # done before
    address = connection.arbitrary_address("AF_UNIX")
    (until_left, held), listener = os.pipe(), socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    if not (pid := os.fork()):
        os.close(held)
        try:
            forkserver.main(listener.detach(), until_left, [])
        finally:
            os._exit(0)
    os.close(until_left)
    listener.close()
    server._forkserver_pid, server._forkserver_alive_fd = pid, held
    server._forkserver_address = address
    spawn.elastic_launch = lambda config, *more: elastic_launch(
        config | {"start_method": "forkserver"}, *more
    )


def _ranks_of(arguments: Sequence[str]) -> int:
    """That this command will start by a command of their own."""
    if arguments[0] != "train" or "RANK" in os.environ:
        return 0
    try:
        wanted = layouts.ranks_wanted(load_config(arguments[1:]), gpus=0)
    except AlexNetDistError:
        return 0
    return wanted if wanted > 1 else 0


def _forked() -> tuple[int, socket.socket]:
    """A child, forked before there are threads, that waits for the rank it is to be."""
    ours, its = socket.socketpair()
    if pid := os.fork():
        its.close()
        return pid, ours
    ours.close()
    for _, other in _Rank.waiting:
        other.close()
    with its, its.makefile("rb") as told:
        if not (call := told.read()):
            os._exit(0)  # the launcher left before
        os.setsid()
        its.send(b"!")
    arguments, environment = pickle.loads(call)
    os.environ.clear()
    os.environ.update(environment)
    code: Any = 1
    try:
        run(arguments)
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


class _Rank:
    """As much of subprocess.Popen as torchrun's API uses, for one that waits."""

    waiting: ClassVar[list[tuple[int, socket.socket]]] = []

    def __init__(self, args: Sequence[str], env: Mapping[str, str], **_: Any) -> None:
        assert list(args[1:3]) == ["-m", "alexnet_dist"]
        self.returncode: int | None = None
        self.pid, its = self.waiting.pop(0)
        with its:
            its.sendall(pickle.dumps((args[3:], dict(env))))
            its.shutdown(socket.SHUT_WR)
            its.recv(1)  # it leads a session now, as torchrun takes for granted

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.02)
        return code


def _begin(
    prints: tuple[Path, Path], cwd: Path, environment: Mapping[str, str],
    function: Callable[..., Any], args: tuple[Any, ...],
) -> None:  # fmt: skip
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    files = {path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in prints}
    for number, path in enumerate(prints, start=1):
        os.dup2(files[path], number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


_compile, _held = Dispatcher.compile, list[Any]()


def _one_at_a_time(loop: Any, signature: Any) -> Any:
    """Compile a loop, or load what another process compiled meanwhile: ranks come to it together,
    and it takes seconds."""
    if _held or not isinstance(loop._cache, FunctionCache):  # _held: another loop calls it
        return _compile(loop, signature)
    with global_compiler_lock, open(loop.py_func.__code__.co_filename) as source:
        fcntl.flock(source, fcntl.LOCK_EX)
        _held.append(loop)
        try:
            return _compile(loop, signature)
        finally:
            _held.pop()


Dispatcher.compile = _one_at_a_time
