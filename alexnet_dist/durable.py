"""Files that are to outlive a crash."""

import hashlib
import os
from pathlib import Path
from typing import Any

from alexnet_dist.errors import RunFolderError, cannot_be_read
from alexnet_dist.untrusted import json_object, read_bytes

# Of run.json: what is reckoned with, and left out where it is no number.
_COUNTS = ("attempt", "idle_restarts", "resumed_at", "newest_step", "first_started", "kept_s")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when this returns; `sync` its folder for its name."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_run(folder: Path) -> dict[str, Any]:
    """What a run folder's run.json says; empty where there is none, or one that is no run.json.
    (Here, it needs no torch.) Raises RunFolderError where it cannot be read."""
    path = folder / "run.json"
    try:
        found = json_object(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    except OSError as error:
        raise RunFolderError(cannot_be_read(path, error)) from error
    return {key: value for key, value in found.items() if key not in _COUNTS or _is_count(value)}


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63
