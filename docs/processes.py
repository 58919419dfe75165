"""Processes of programs that measure: commands with a time limit, of which nothing is left behind,
and temporary folders that are removed even if the program is killed."""

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import psutil
from ledger import ROOT

_MARK = "ALEXNET_DIST_STARTED"  # in the environment of a command and of all that it starts
_START_S = 60  # a new folder is locked well within this time


@contextlib.contextmanager
def started(
    command: Sequence[str], output: Path, errors: Path, grace: float = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command that can import the package; at the end, nothing that it started is left.

    Args:
        grace: seconds from SIGTERM to SIGKILL.
    """
    mark = uuid.uuid4().hex
    environment = os.environ | {
        _MARK: mark,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=ROOT, env=environment, process_group=0
        )
        try:
            yield process
        finally:
            if grace and process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
            with contextlib.suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
            _kill_marked(mark)  # ranks lead sessions of their own
            process.wait()


def _kill_marked(mark: str) -> None:
    """Kill every other process whose environment has the mark, and wait until it is gone."""
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.pid != os.getpid():
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=5)


def failed(process: subprocess.Popen[bytes], limit: float) -> str:
    """Wait at most `limit` seconds; return how a command failed, "" if it did not."""
    try:
        code = process.wait(max(0.0, limit))
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    return f"exit {code}" if code else ""


def exit_at_sigterm() -> None:
    """Make SIGTERM end this program as an exception does, which also ends what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """Make a folder for all temporary files of this program and of what it starts; at the end, or
    at SIGTERM, end those processes and remove it. Folders of the same name that killed programs
    left are removed first: nobody holds their locks, and they are older than a start takes."""
    exit_at_sigterm()
    prefix = f"alexnet-dist-{name}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(left):
            if left.stat().st_mtime < time.time() - _START_S:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as made:
        folder, mark = Path(made), uuid.uuid4().hex
        with _locked(folder), temporary_files_in(folder):
            os.environ[_MARK] = mark
            try:
                yield folder
            finally:
                del os.environ[_MARK]
                _kill_marked(mark)


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let this process, and what it starts, make its temporary files in a folder."""
    own = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    with (
        patch.dict(os.environ, TMPDIR=str(folder)),
        patch.object(tempfile, "tempdir", str(folder)),
        # Else multiprocessing makes one, and fails at exit if it is gone.
        patch.dict(own, tempdir=str(folder)),
    ):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; raise BlockingIOError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
