"""Names in a run's `checkpoints` folder, and what an interrupted write or removal leaves there.

step-00012000                 a checkpoint
.writing-…-step-00012000      one that is being written
.old-step-00012000            one that is being replaced
.gone-step-00012000           one that is being removed
damaged-step-…, kept-step-…   set aside
"""

import os
import re
import shutil
from pathlib import Path

from alexnet_dist.errors import CheckpointError, cannot_be_read
from alexnet_dist.files import json_object, read_bytes

NAME = re.compile(r"(\.old-|\.gone-)?step-(\d{8,})")
_WRITING = re.compile(r"\.writing-([0-9a-f]+-)?step-\d{8,}")


def sweep(folder: Path, good: int = -1) -> None:
    """Undo an interrupted replacement, and remove what interrupted writes and removals left.

    Args:
        good: step of a good checkpoint; what was being removed up to that step is no longer needed.
    """
    for name in listed(folder):
        path, kind = folder / name, name.partition("step-")[0]
        if _WRITING.fullmatch(name):
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)
        elif kind in (".old-", ".gone-") and NAME.fullmatch(name):
            if kind == ".old-" and not os.path.lexists(folder / name.removeprefix(kind)):
                path.rename(folder / name.removeprefix(kind))
            elif step_of(path) <= good:
                shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints' folders, oldest first; raise CheckpointError where `folder` cannot be
    read."""
    names = [name for name in listed(folder) if name[0] != "." and NAME.fullmatch(name)]
    return sorted((folder / name for name in names), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.rpartition("step-")[2])


def traces(folder: Path) -> list[str]:
    """Return the names that show there were checkpoints, good or not. An interrupted first save
    leaves none."""
    return sorted(
        name for name in listed(folder)
        if not name.startswith(".writing-")
        and ("step-" in name or os.path.lexists(folder / name / "manifest.json"))
    )  # fmt: skip


def listed(folder: Path) -> list[str]:
    """Return the names in a folder, none where it does not exist; raise CheckpointError where it
    cannot be read."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(cannot_be_read(folder, error)) from error


def claimed_step(path: Path) -> int | None:
    """Return the step in a folder's manifest, unverified; None where there is none."""
    try:
        step = json_object(read_bytes(path / "manifest.json")).get("step")
    except (OSError, ValueError):
        return None
    return step if type(step) is int else None


def put_aside(path: Path, word: str) -> Path:
    """Rename a folder to WORD-NAME, or where that exists to WORD-NAME-2, and so on; return its new
    path."""
    return path.rename(free_path(path.with_name(f"{word}-{path.name.removeprefix('.')}")))


def free_path(path: Path) -> Path:
    """Return the path, or where that exists the first free of PATH-2, PATH-3, …."""
    name, number = path.name, 1
    while os.path.lexists(path):
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path
