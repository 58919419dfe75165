"""Files that are to outlive a crash, and files that may hold anything.

The latter are read within bounds, so that none takes memory, time or a stack: one image or header
takes at most 1 GB and 10 s, whatever it says; a whole archive or checkpoint, what its size lets
expect. The bounds stand here. Only regular files are opened: a pipe would be waited for.
"""

import errno
import hashlib
import io
import json
import os
import pickletools
import resource
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypedDict, cast

from alexnet_dist.errors import (
    CheckpointError,
    NotAFile,
    RunFolderError,
    cannot_be_read,
    looked_in,
)

_MOST = 16 * 2**20  # bytes; ImageNet's dataset.json has a few hundred thousand
MOST_MEMORY = 2**30  # bytes that reading one image or header may take
# Of an image. Converting takes up to 12 bytes a pixel: RGB is 4 in Pillow, and progressive JPEG
# keeps 8 of coefficients. That is 8,192 × 8,192.
MOST_PIXELS = 2**26
LONGEST_SIDE = 65_535  # pixels: what the index and JPEG can say
MOST_ENCODED = 2**28  # bytes of a file
# Of a JPEG. A scan of 31 bytes costs half a nanosecond a pixel; libjpeg's own progression has 10.
MOST_SCANS = 64
# Of a JPEG. Pillow copies all metadata once a segment; a long ICC profile has 255.
MOST_SEGMENTS = 1000
MOST_HEADER = 2**20  # bytes of a safetensors header: 8,000 tensors
_OLD = 3600  # seconds after which nobody writes to a file aside any more
# Of run.json: what is reckoned with, and left out where it is no number.
_COUNTS = ("attempt", "restarts", "idle_restarts", "resumed_at", "newest_step", "step", "last_step",
           "first_started", "started", "updated", "kept_s", "rested_s", "pid")  # fmt: skip
_WORDS = ("state", "reason", "host", "job")  # and where it is no text


def opened(path: Path | str) -> io.BufferedReader:
    """A regular file, to be read, as `open` gives it; raises NotAFile at once where it is anything
    else, OSError as ever."""
    return open(path, "rb", opener=_regular)


def appended(path: Path | str) -> io.FileIO:
    """A regular file that is written at its end, unbuffered, and made where it is missing; raises
    NotAFile where it is anything else: a link could lead to a file of the user's own."""
    return open(path, "ab", 0, opener=lambda path, flags: _regular(path, flags | os.O_NOFOLLOW))


def _regular(path: Path | str, flags: int) -> int:
    """A descriptor of a regular file. O_NONBLOCK: opening a pipe would wait for its other end."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise NotAFile(path, os.lstat(path).st_mode) from error
    if stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise NotAFile(path, mode)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, data: bytes) -> None:
    """Put a file in the place of `path` that is on the disk when this returns; `sync` its folder
    for its name."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


@contextmanager
def written_aside(path: Path, durably: bool = True) -> Iterator[Path]:
    """An empty file beside `path` to write to, whose name nobody can foretell; it takes the place
    of `path`, a link as well, when it is whole and on the disk. Until then, and where this fails,
    what is there stays. `sweep_writing` removes what a killed process leaves.

    Args:
        durably: wait for the disk; without it, a crash of the machine may lose either.
    """
    if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode):
        raise NotAFile(path, mode)  # /dev/null is not to become a file
    aside = path.with_name(f".writing-{secrets.token_hex(8)}-{path.name[-40:]}")  # of its ending
    aside.open("xb").close()  # O_EXCL: no link is followed
    try:
        yield aside
        if durably:
            sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sweep_writing(folder: Path) -> None:
    """Remove what processes that are long dead left of files that they wrote aside in a folder."""
    for left in folder.glob(".writing-*"):
        with suppress(OSError):
            if (
                stat.S_ISREG((about := left.lstat()).st_mode)
                and about.st_mtime < time.time() - _OLD
            ):
                left.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


class RunState(TypedDict, total=False):
    """The content of run.json; `training.run_folder.RunFolder` says what each key means."""

    state: str
    exit: int
    reason: str
    known: bool
    attempt: int
    restarts: int
    idle_restarts: int
    rested_s: float
    host: str
    pid: int
    job: str | None
    restart: int
    first_started: float
    started: float
    updated: float
    resumed_at: int
    newest_step: int
    step: int
    last_step: int
    kept_s: float


def read_run(folder: Path) -> RunState:
    """What a run folder's run.json says; empty where there is none, or one that is no run.json.
    (Here, it needs no torch.) Raises RunFolderError where it cannot be read."""
    path = folder / "run.json"
    try:
        found = json_object(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    except OSError as error:
        raise RunFolderError(cannot_be_read(path, error)) from error
    sound = {key: value for key, value in found.items() if key not in _COUNTS or is_count(value)}
    known = {k: v for k, v in sound.items() if k not in _WORDS or isinstance(v, str)}
    return cast(RunState, known)


def check_trained(path: Path) -> None:
    """Raises CheckpointError where a path is neither a run folder nor a checkpoint."""
    if not any(is_there(path / name) for name in ("checkpoints", "manifest.json")):
        raise CheckpointError(
            f"{path} is neither a run folder nor a checkpoint{looked_in(path)}: name runs/NAME or "
            "runs/NAME/checkpoints/step-…"
        )


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; raises CheckpointError where it cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(cannot_be_read(path, error)) from error
    return True


def is_count(value: Any) -> bool:
    """Whether it is a number, not negative, that can be reckoned with."""
    return type(value) in (int, float) and 0 <= value < 2**63


def read_bytes(path: Path, most: int = _MOST) -> bytes:
    """A whole file; raises ValueError where it is longer than `most` bytes, OSError as ever."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"longer than {most:,} bytes")
    return content


def json_object(text: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are; raises ValueError for anything else."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object")
    return found


def check_opcodes(file: IO[bytes], most: int) -> None:
    """Read one pickle without running it; raises ValueError past so many opcodes.

    Each opcode can cost a hundred bytes, and a microsecond, and is one byte. Numbers of 60 bits are
    refused too, since so many can be found that share a hash, and a memo beyond the opcodes, since
    an unpickler takes that much memory.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= most:
            raise ValueError(f"more than {most:,} opcodes")
        if isinstance(argument, int):
            memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            if argument.bit_length() > 60 or (memo and argument > most):
                raise ValueError("a number or memo that no such file needs")


@contextmanager
def within_memory(most: int) -> Iterator[None]:
    """This process may take so many bytes more; beyond them allocations raise MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (used + most, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
