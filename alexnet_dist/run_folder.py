"""A run's folder: who may write it, what it was made with, how it went."""

import dataclasses
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

from alexnet_dist.config import Config
from alexnet_dist.errors import RunFolderError


class RunFolder:
    """`runs/NAME`, held by one process until it ends.

    A kernel lock keeps it to one job, and frees itself when its holder dies. `run.json` tells
    launchers how the run stands: state (running, finished, stopped, failed), exit, reason, step,
    attempt, host and pid.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, config.folder
        self.checkpoints = self.path / "checkpoints"
        self._run: dict[str, Any] = {}
        self._lock: TextIO | None = None

    def take(self) -> None:
        """Make the folder and hold it; raises RunFolderError where another process does."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = read_run(self.path)
            raise RunFolderError(
                f"{self.path} is in use by process {holder.get('pid', '?')} on "
                f"{holder.get('host', '?')}: wait for it, stop it, or give this run another name="
            ) from error
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot be written ({error.strerror}): set output_dir= or name="
            ) from error
        self._run = {
            "attempt": int(read_run(self.path).get("attempt", 0)) + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
        }
        self.report("starting")

    def report(self, state: str, **more: Any) -> None:
        """Replace run.json; nothing where this process does not hold the folder."""
        if self._run:
            self._run |= {"state": state, "updated": time.time(), **more}
            write_json(self.path / "run.json", self._run)

    def save_config(self) -> None:
        write_json(self.path / "config.json", dataclasses.asdict(self.config))


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says; empty where there is none."""
    try:
        return dict(json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file: whoever reads it finds the old or the new one, whole."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
