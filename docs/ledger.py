"""Ledgers of measurements, a JSON line each, oldest first; and the parts of pages they make."""

import contextlib
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

_MARK = "ALEXNET_DIST_STARTED"  # in the environment of a command and of all that it starts
ROOT = Path(__file__).parent.parent


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return every row, the oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row with today's date."""
    with path.open("a") as file:
        file.write(json.dumps({**row, "date": f"{datetime.now(UTC):%Y-%m-%d}"}) + "\n")


def between(page: str, first: str, last: str, text: str) -> str:
    """Return the page with the text between two marks replaced."""
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    assert begin
    assert end
    return f"{before}{begin}\n{text}\n{end}{after}"


def commit_of(*measured: str) -> str:
    """Return the last commit that changed what is measured, with a + if there are uncommitted
    changes.

    Raises OSError or CalledProcessError if there is no git or no such commit.
    """
    git = ["git", "-C", str(ROOT)]

    def said(*arguments: str) -> str:
        return subprocess.check_output([*git, *arguments, "--", *measured], text=True).strip()

    commit = said("log", "-1", "--abbrev=9", "--format=%h")
    return commit + ("+" if said("status", "--porcelain") else "")


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
            for other in _marked(mark):  # ranks lead sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    other.kill()
            process.wait()


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Processes whose environment has it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                yield process


def failed(process: subprocess.Popen[bytes], limit: float) -> str:
    """Wait at most `limit` seconds; return how a command failed, "" if it did not."""
    try:
        code = process.wait(max(0.0, limit))
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    return f"exit {code}" if code else ""
