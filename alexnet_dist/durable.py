"""Files that are to outlive a crash."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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
    """What a run folder's run.json says; empty where there is none. (Here, it needs no torch.)"""
    try:
        return dict(json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError):
        return {}
