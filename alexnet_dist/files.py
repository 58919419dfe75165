"""Write files that must survive a crash, and read files that may hold anything.

Files are read within bounds, so that none exhausts memory, time or the stack: one image or header
takes at most 1 GB and 10 s, whatever it claims; a whole archive or checkpoint takes no more than
its size suggests. The bounds are defined here. Only regular files are opened, since opening a pipe
would block.
"""

import errno
import hashlib
import io
import json
import math
import os
import pickletools
import resource
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
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

_MOST = 16 * 2**20  # bytes read by default; ImageNet's dataset.json has a few hundred thousand
MOST_MEMORY = 2**30  # bytes that reading one image or header may take
# Pixels of an image: 8,192 × 8,192. Converting takes up to 12 bytes per pixel: 4 of RGB in Pillow,
# and 8 of coefficients of a progressive JPEG.
MOST_PIXELS = 2**26
LONGEST_SIDE = 65_535  # pixels: the most that the index and JPEG can hold
MOST_ENCODED = 2**28  # bytes of an encoded image
# Scans of a JPEG. One of 31 bytes costs 0.5 ns per pixel; libjpeg's own progressive mode has 10.
MOST_SCANS = 64
# Segments of a JPEG. Pillow copies all metadata once per segment; a long ICC profile has 255.
MOST_SEGMENTS = 1000
MOST_HEADER = 2**20  # bytes of a safetensors header: 8,000 tensors
_OLD = 3600  # seconds after which a file written aside is taken to be abandoned


def opened(path: Path | str) -> io.BufferedReader:
    """Open a regular file to read; raise NotAFile at once where it is anything else, OSError as
    usual."""
    return open(path, "rb", opener=_regular)


def appended(path: Path | str) -> io.FileIO:
    """Open a regular file to append to, unbuffered, and create it where it is missing; raise
    NotAFile where it is anything else: a link could lead to one of the user's own files."""
    return open(path, "ab", 0, opener=lambda path, flags: _regular(path, flags | os.O_NOFOLLOW))


def _regular(path: Path | str, flags: int) -> int:
    """Return a file descriptor of a regular file. O_NONBLOCK keeps a pipe from blocking."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise NotAFile.at(path, os.lstat(path).st_mode) from error
    if stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise NotAFile.at(path, mode)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, data: bytes) -> None:
    """Replace the file at `path`; its content is on the disk when this returns. For its name to be
    there too, `sync` its folder."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically: a reader finds the old or the new one, whole. It may not be
    on the disk yet."""
    with written_aside(path, durably=False) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


def overwrite_json(path: Path, content: Mapping[str, Any]) -> None:
    """Overwrite a JSON file in place, in one write that needs no more room on the disk.

    Raises OSError, with the file as it was, where `content` does not fit into the file's first
    block of 4 KiB, or the file system does need room for it (btrfs, ZFS).
    """
    data = f"{json.dumps(content, indent=1)}\n".encode()
    with open(path, "r+b", buffering=0, opener=_regular) as file:
        about = os.fstat(file.fileno())
        if max(len(data), about.st_size) > min(about.st_blocks * 512, 4096):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(data.ljust(about.st_size))  # spaces after it are JSON too


@contextmanager
def written_aside(path: Path, durably: bool = True) -> Iterator[Path]:
    """Give an empty file beside `path` to write to, which replaces `path`, or a link there, once it
    is complete and on the disk. Until then, and on failure, what is at `path` stays.

    The file's name is unpredictable. `sweep_writing` removes what a killed process leaves.

    Args:
        durably: wait for the disk; without it, a crash of the machine may lose both files.
    """
    if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode):
        raise NotAFile.at(path, mode)  # never replace /dev/null by a file
    # Some libraries go by a file's extension, which is kept.
    aside = path.with_name(f".writing-{secrets.token_hex(8)}-{path.name[-40:]}")
    aside.open("xb").close()  # O_EXCL: a link is not followed
    try:
        yield aside
        if durably:
            sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sweep_writing(folder: Path) -> None:
    """Remove files in a folder that were written aside by processes that ended long ago."""
    for left in folder.glob(".writing-*"):
        with suppress(OSError):
            if (
                stat.S_ISREG((about := left.lstat()).st_mode)
                and about.st_mtime < time.time() - _OLD
            ):
                left.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Read a run folder's run.json; return an empty dict where there is none, or another file.
    Entries that are not of the type that `RunState` gives them are left out.

    (It is in this module so that reading it does not load torch.) Raises RunFolderError where it
    cannot be read.
    """
    path = folder / "run.json"
    try:
        found = json_object(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    except OSError as error:
        raise RunFolderError(cannot_be_read(path, error)) from error

    def fits(key: str, value: Any) -> bool:
        kind = RunState.__annotations__.get(key)
        if kind in (int, float):
            return is_count(value)
        return kind is None or isinstance(value, str | bool)  # None: a newer version's

    return cast(RunState, {key: value for key, value in found.items() if fits(key, value)})


def check_trained(path: Path) -> None:
    """Raise CheckpointError where a path is neither a run folder nor a checkpoint."""
    if not any(is_there(path / name) for name in ("checkpoints", "manifest.json")):
        if path.is_file():
            raise CheckpointError(
                f"{path} is a file, neither a run folder nor a checkpoint: name runs/NAME; if it "
                f"holds another program's weights, make one first: `alexnet-dist import {path} "
                "runs/NAME CONFIG --format …`"
            )
        raise CheckpointError(
            f"{path} is neither a run folder nor a checkpoint{looked_in(path)}: name runs/NAME or "
            "runs/NAME/checkpoints/step-…"
        )


def is_there(path: Path) -> bool:
    """Whether a file or folder exists; raise CheckpointError where that cannot be determined."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(cannot_be_read(path, error)) from error
    return True


def is_count(value: Any) -> bool:
    """Whether a value is a number that is not negative, and below 2⁶³."""
    return type(value) in (int, float) and 0 <= value < 2**63


def read_bytes(path: Path, most: int = _MOST) -> bytes:
    """Read a whole file; raise ValueError where it has more than `most` bytes, OSError as usual."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"longer than {most:,} bytes")
    return content


def as_json(value: Any) -> str:
    """Return a value as JSON, which has no NaN or infinity: null stands for both."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return list(map(finite, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; raise ValueError for anything else."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object")
    return found


def check_opcodes(file: IO[bytes], most: int) -> None:
    """Scan one pickle without running it; raise ValueError where it has more than `most` opcodes.

    An opcode of one byte can cost a hundred bytes of memory and a microsecond. Numbers of more than
    60 bits are refused too, since many with the same hash can be found, and memo indices above
    `most`, since an unpickler allocates memory up to the largest.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= most:
            raise ValueError(f"more than {most:,} opcodes")
        if isinstance(argument, int):
            memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            if argument.bit_length() > 60 or (memo and argument > most):
                raise ValueError("a number or memo that such a file does not need")


@contextmanager
def within_memory(most: int) -> Iterator[None]:
    """Let this process allocate `most` more bytes; beyond them, allocations raise MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (used + most, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def allow_open_files(count: int) -> None:
    """Raise this process's limit on open files to `count`, or as near as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(count, hard)), hard))
