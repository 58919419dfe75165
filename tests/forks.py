"""Processes that begin with everything imported: forked from a server that has done so.

Importing takes seconds of a core, and the tests start hundreds of processes. Those of which
starting itself is looked at are `fresh`: new Pythons.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

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
            patched.setenv("PYTHONPATH", str(Path(__file__).parent))  # where a new server has warm
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
    return Fork(_command, arguments, **where)


def _command(arguments: Sequence[str]) -> None:
    sys.argv = ["alexnet-dist", *arguments]
    runpy.run_module("alexnet_dist", run_name="__main__", alter_sys=True)


def _begin(
    prints: tuple[Path, Path], cwd: Path, environment: Mapping[str, str],
    function: Callable[..., Any], args: tuple[Any, ...],
) -> None:  # fmt: skip
    os.setsid()
    files = {path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in prints}
    for number, path in enumerate(prints, start=1):
        os.dup2(files[path], number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)
