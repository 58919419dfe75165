"""Errors that are reported in one line without a traceback: what is wrong, why, what to do."""

import errno
import os
import pwd
import re
import signal
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def printable(text: str) -> str:
    """Escape control characters but line feeds: names come from files, and terminals obey them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(error: Exception) -> str:
    """Return an error's message on one line of at most 300 characters; its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def counted(number: int, thing: str) -> str:
    """Return a number with what it counts: "1 process", "2 processes"."""
    ending = "" if number == 1 else "es" if thing.endswith(("s", "ch")) else "s"
    return f"{number} {thing}{ending}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a text table with aligned columns; control characters are escaped."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def in_hours(seconds: float) -> str:
    """Return a time as H:MM:SS, with as many hours as there are."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class AlexNetDistError(Exception):
    """An error that the user can understand and fix.

    Attributes:
        exit_code: exit code of a program that it ends.
        on_every_rank: all ranks raise it alike, so that only rank 0 reports it.
    """

    exit_code = 1
    on_every_rank = False

    def __init__(self, *args: object, **attributes: int) -> None:
        super().__init__(*args)
        vars(self).update(attributes)


class ConfigError(AlexNetDistError, ValueError):
    """The user's settings cannot be used; the message names the key, value, rule and remedy."""

    exit_code = 2
    on_every_rank = True


class DatasetError(AlexNetDistError, ValueError):
    """A source of images or a packed data set is missing, damaged, or does not fit the config."""


class CheckpointError(AlexNetDistError, RuntimeError):
    """A checkpoint is damaged, missing, or of another run."""


class Damaged(CheckpointError):
    """A checkpoint's bytes differ from those that were written: `Damaged(folder, what)`."""

    def __str__(self) -> str:
        folder, what = self.args
        return f"{folder} is damaged: {what}"


class RunFolderError(AlexNetDistError, RuntimeError):
    """The run folder cannot be used."""


class NotFinite(AlexNetDistError, RuntimeError):
    """A loss, gradient or parameter is not finite; nothing was saved."""

    on_every_rank = True


class ReplicasDiffer(AlexNetDistError, RuntimeError):
    """Replicas that must be equal to the bit differ: a rank's memory or arithmetic is faulty."""

    on_every_rank = True


class CrashLoop(RunFolderError):
    """A run failed several times in a row before it saved a new checkpoint."""

    exit_code = 2


class SaidByRank0(AlexNetDistError, RuntimeError):
    """Rank 0 failed, and reports why."""

    on_every_rank = True


class RanksFailed(AlexNetDistError, RuntimeError):
    """Ranks that this process started failed, and have reported why on standard error."""


class MachineError(AlexNetDistError, RuntimeError):
    """This machine, or the software on it, lacks what a run needs."""


def _memory_kills() -> list[int]:
    """Return the kernel's counts of processes it has killed for lack of memory, on this host and in
    this process's control group, as far as it keeps them."""
    files = [Path("/proc/vmstat")]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":
                files.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
            elif kinds == "memory":
                files.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    kills: list[int] = []
    for file in files:
        with suppress(OSError):
            kills += map(int, re.findall(r"^oom_kill (\d+)$", file.read_text(), re.M))
    return kills


_KILLS_BEFORE = _memory_kills()  # counts when this program started


def killed_by(number: int) -> str:
    """Describe how a process was ended by a signal of this number."""
    name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
    return f"killed by {name}{of_memory()}" if number == signal.SIGKILL else f"killed by {name}"


def of_memory() -> str:
    """Return the end of a sentence about a process that was killed: whether the kernel has killed
    any here for lack of memory since this program started. Empty where it does not count them."""
    if (kills := _memory_kills()) != _KILLS_BEFORE:
        return ", and the kernel has killed a process here for lack of memory"
    return " from outside the run: the kernel killed none for lack of memory" if kills else ""


# Patterns searched for in a library error's "TYPE: TEXT", and what the user is told instead.
_PLAN = "`alexnet-dist plan CONFIG` says what a rank needs"
COMPILER = "install gcc and Python's headers (on Debian: gcc python3-dev), or set CC"
RANK_LOST = "the connection to another rank is lost"
_FULL = r"\w*MemoryError|.*(DefaultCPUAllocator|Cannot allocate memory|std::bad_alloc)"
_TRANSLATIONS = (
    (r"OutOfMemoryError|CUDA error: out of memory|cudaErrorMemoryAllocation",
     "a GPU's memory is full: raise train.micro_batches, lower evaluate.batch, set "
     f"train.precision=bf16, or take more GPUs; {_PLAN}"),
    (f"^({_FULL})",
     "this machine's memory is full: raise train.micro_batches, lower evaluate.batch, "
     f"data.prefetch or data.workers; {_PLAN}"),
    (r"EADDRINUSE|[Aa]ddress already in use",
     "the port where the ranks meet is taken: set MASTER_PORT to another, or let `alexnet-dist "
     "train` start the ranks of one host, which finds a free one"),
    (r"^gaierror|Cannot assign requested address",
     "this node's name does not resolve to one of its addresses: set GLOO_SOCKET_IFNAME to the "
     "interface that other nodes can reach, or correct /etc/hosts"),
    (r"environment variable MASTER_\w+ expected",
     "RANK and WORLD_SIZE say that a launcher started this, but not where the ranks meet: set "
     "MASTER_ADDR and MASTER_PORT, start with torchrun, or unset RANK to run alone"),
    (r"waiting for clients|client socket has timed out|socketStartConnect|No route to host|"
     r"wait timeout after",
     "the ranks did not meet within layout.timeout_s: start all of them, with the same "
     "MASTER_ADDR and MASTER_PORT, which every node must be able to reach"),
    (r"Connection (closed|reset) by peer|NCCL communicator was abort",
     f"{RANK_LOST}: it or its node has ended, and reports why itself; run the same command to "
     "resume from the last checkpoint"),
    (r"failed to map segment from shared object",
     "a library cannot be loaded: raise the limit on address space (ulimit -v unlimited), or move "
     "this Python from a disk that is mounted noexec"),
    (r"Failed to find C compiler|CalledProcessError.*(cuda_utils|triton)",
     f"a GPU's kernels cannot be built: {COMPILER}"),
    (r"inline_container.*unexpected pos|PytorchStreamWriter failed writing",
     "the file could not be written completely: make room, or name another disk"),
    (r"NVIDIA driver|CUDA driver version|libcuda\.so|no kernel image is available",
     "torch and this GPU's driver do not match: update the driver, or install the torch that is "
     "built for it (pytorch.org); `alexnet-dist doctor` shows both"),
)  # fmt: skip
_REMEDIES = {  # what to do about a system call's error
    errno.ENOSPC: "make room, or name another disk by output_dir=, data.path= or TMPDIR",
    errno.EFBIG: "raise the limit on file sizes: ulimit -f unlimited",
    errno.EDQUOT: "make room, or name another disk by output_dir=, data.path= or TMPDIR",
    errno.EACCES: "have its owner let you in (chmod), or name a folder of your own",
    errno.EROFS: "name a folder that is writable by output_dir=, or copy the run to one",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOMEM: "free memory, or lower data.workers and data.prefetch",
}
_PACKAGES = {  # the package that provides a module, where their names differ
    "nvidia": "nvidia-dali-cuda120", "onnx": "'alexnet-dist[export]'", "yaml": "pyyaml",
    "onnxscript": "'alexnet-dist[export]'", "PIL": "pillow", "sklearn": "scikit-learn",
}  # fmt: skip


def in_words(error: Exception) -> AlexNetDistError | None:
    """Translate a library's error into one that says what to do; None where that is not known."""
    if isinstance(error, AlexNetDistError):
        return error
    if isinstance(error, NotAFile):
        return MachineError(f"{error.filename} is {error.strerror}: move it away, or name a file")
    name = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name and not name.startswith("alexnet_dist"):
        top = name.partition(".")[0]
        return MachineError(
            f"{name} is not installed in this Python: pip install {_PACKAGES.get(top, top)}, or "
            "install everything with `make venv` and start .venv/bin/alexnet-dist"
        )
    text = " ".join(str(error).split("Exception raised from")[0].split())[:300]
    from_rust = re.search(r"\(os error (\d+)\)$", text)  # as in safetensors
    number = error.errno if isinstance(error, OSError) else int(from_rust[1]) if from_rust else None
    if number in _REMEDIES:
        return MachineError(f"{text}: {_REMEDIES[number]}")
    for pattern, words in _TRANSLATIONS:
        if re.search(pattern, f"{type(error).__name__}: {text}"):
            return MachineError(f"{words} ({text})")
    return None


class NotAFile(OSError):
    """There is a pipe, socket, device or link where a regular file is expected."""

    @classmethod
    def at(cls, path: str | os.PathLike[str], mode: int) -> "NotAFile":
        """Return the error for a path of this mode. (Unpickled, as from a worker, it is made of
        OSError's own arguments.)"""
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link",
                 stat.S_IFDIR: "a folder"}  # fmt: skip
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        return cls(errno.EINVAL, f"{kind}, not a file", os.fspath(path))


def cannot_be_read(path: Path, error: OSError) -> str:
    """Return an error message for a file or folder that cannot be read: why, who owns it, and what
    to do."""
    if isinstance(error.filename, str | os.PathLike):
        path = Path(error.filename)
    if error.errno == errno.ENOENT:
        return f"{path} cannot be read: it is missing{looked_in(path)}"
    whose, mode = _owner(path)
    match error.errno:
        case errno.EACCES | errno.EPERM:
            remedy = f"run as {whose}, or have {whose} let you read it (chmod)"
        case errno.EMFILE | errno.ENOMEM:
            remedy = _REMEDIES[error.errno]
        case errno.EINVAL | errno.EISDIR if isinstance(error, NotAFile | IsADirectoryError):
            remedy = "put a file in its place, then start again"
        case _:
            remedy = "check the disk or mount that it is on, then start again"
    return (
        f"{path} cannot be read ({error.strerror or error}; owner {whose}, mode {mode}): nothing "
        f"was changed; {remedy}"
    )


def _owner(path: Path) -> tuple[str, str]:
    """Return the owner's name or number, and the mode; those of the nearest folder above where the
    path itself cannot be examined."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            about = place.stat()
            name = f"uid {about.st_uid}"
            with suppress(KeyError):
                name = pwd.getpwuid(about.st_uid).pw_name
            return name, f"{about.st_mode & 0o7777:04o}"
    return "unknown", "unknown"


def is_full(error: Exception) -> bool:
    """Whether an error, of Python's or of torch's allocator, says that memory is full."""
    return re.match(_FULL, f"{error!r}") is not None


@contextmanager
def filled_by(name: str) -> Iterator[None]:
    """Turn a failed allocation inside into a MachineError that names this input, rather than one
    that advises a smaller batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, AlexNetDistError) or not is_full(error):
            raise
        raise MachineError(
            f"{name!r}: this machine ran out of memory while reading it ({one_line(error)}): free "
            "memory, start fewer processes, or leave it out"
        ) from error


def looked_in(path: Path) -> str:
    """Return " (looked in DIRECTORY)" for a relative path, to end what a message says of it."""
    return "" if path.is_absolute() else f" (looked in {Path.cwd()})"
