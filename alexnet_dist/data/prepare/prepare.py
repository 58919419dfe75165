"""Turn a source of images into a packed data set (`dataset.py` says how one looks).

It is made in OUT.partial, shard by shard, by processes here or by parts anywhere, and renamed to
OUT when it is whole. Killed at any moment and run again, it goes on, to the same bytes.
"""

import contextlib
import ctypes
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.data.prepare.archives import imagenet
from alexnet_dist.data.prepare.arrays import FASHION_MNIST, cifar10, fashion_mnist
from alexnet_dist.data.prepare.folders import folder, imagenette, tiny_imagenet
from alexnet_dist.data.prepare.merge import merge, write_lines
from alexnet_dist.data.prepare.shards import (
    Part,
    Task,
    contents,
    read_part,
    stamp,
    write_shard,
)
from alexnet_dist.data.prepare.sources import Source
from alexnet_dist.errors import DatasetError, NotAFile, of_memory
from alexnet_dist.files import appended, json_object, read_bytes, sync, write
from alexnet_dist.parallel.device import cores

SOURCES: dict[str, Callable[..., Source]] = {
    "imagenet": imagenet, "folder": folder, "tiny_imagenet": tiny_imagenet,
    "imagenette": imagenette, "cifar10": cifar10, "fashion_mnist": fashion_mnist,
}  # fmt: skip
_CUT = ("folder", "cifar10")  # take --validation
_ARCHIVES = ("folder", "tiny_imagenet", "imagenette")  # may be an archive
ITEMS_PER_SHARD = 1000
_MAX_BAD, _FEW = 0.001, 3  # share, and images of a small source, that may be bad
LEAST_IMAGES = 250  # that are worth the start of a process
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")  # Unicode's: control, half a pair, ends of line and paragraph
_MADE_OF = ".source.json"  # beside dataset.json, which is the same wherever its source lies
_BYTES_PER_IMAGE = 45_000  # of 256 × 256, about
_TAR_BYTES = 2048  # of headers and padding, about
_PART_BYTES = 256 * 256 * 3 * 4  # of colour sums, until the data set is whole
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How to pack.

    Attributes:
        keep: images keep their own size.
        max_bad: share of the source's images that may be refused; None: 0.1 %, or three where they
            are no more than a tenth.
        workers: processes; 0 = the cores.
        part: (i, n): only each nth shard from the ith on, and no merge.
        validation: share that becomes `val`: cifar10's of its test images, folder's of those to
            train on.
    """

    keep: bool = False
    max_bad: float | None = None
    workers: int = 0
    part: tuple[int, int] | None = None
    validation: float = 0.0


def prepare(kind: str, path: Path | None, out: Path, options: Options | None = None) -> str:
    """Pack the source of a kind at a path; nothing where `out` was made of the same already.

    Args:
        path: None for where the system keeps it (fashion_mnist alone).

    Returns:
        What was done, in a line.

    Raises:
        DatasetError: the source is not there, not whole, or too much of it is bad; `out` cannot be
            written or holds something else. What was made so far waits in OUT.partial.
    """
    options = options or Options()
    source = list_source(kind, path, options.validation)
    identity = source.identity() | {"keep": options.keep}
    if out.exists():
        compared = _check_same(out, identity, _tasks(source, out, options))
        _sweep(out)
        like = "these files" if compared else "files of these names and sizes"
        return f"{out}: already prepared from {like}, and whole"
    aside = out.with_name(out.name + ".partial")
    try:
        with held(aside, identity, alone=options.part is None):
            parts = _write_shards(source, aside, options)
            if options.part is not None:
                return (
                    f"{aside}: part {options.part[0]} of {options.part[1]} is written; when all "
                    "are, the same command without --part makes the data set of them"
                )
            merge(source, identity, parts, aside)
            _write_made_of(aside, [part.meta for of in parts.values() for part in of])
            aside.rename(out)
            sync(out.parent)
            _sweep(out)
    except NotAFile:
        raise
    except OSError as error:
        raise DatasetError(
            f"{out} cannot be written: {error}; what was made waits in {aside}, and the same "
            "command goes on"
        ) from error
    counts = ", ".join(f"{sum(len(p.index) for p in parts[s])} {s}" for s in source.splits)
    bad = sum(len(part.meta["refused"]) for split in parts.values() for part in split)
    refused = f"; {bad} refused, see {out / 'quarantine.jsonl'}" if bad else ""
    packed = f"{out}: packed {counts} images of {len(source.classes)} classes{refused}"
    return "\n".join((packed, *source.notes, *_unscored(source)))


def _unscored(source: Source) -> tuple[str, ...]:
    if {"val", "test"} & {*source.splits}:
        return ()
    more = ": --validation 0.1 into another OUT makes one" if source.kind in _CUT else ""
    return (f"no split to evaluate on{more}",)


def list_source(kind: str, path: Path | None, validation: float = 0) -> Source:
    """The source of a kind at a path; raises DatasetError where it is not there or not whole."""
    if path is None:
        if kind != "fashion_mnist":
            raise DatasetError(f"prepare {kind}: say where it lies: prepare {kind} PATH OUT")
        path = FASHION_MNIST
    archive = kind in _ARCHIVES and path.is_file()
    if kind != "fashion_mnist" and not path.is_dir() and not archive:
        raise DatasetError(f"{path} is not a folder: name the one that holds {kind}'s files")
    cut = {"validation": validation} if validation else {}
    if cut and (kind not in _CUT or not 0 < validation < 1):
        raise DatasetError(
            f"--validation {validation:g}: a share between 0 and 1, for {' or '.join(_CUT)}; "
            "leave it out"
        )
    try:
        source = SOURCES[kind](path, **cut)
    except DatasetError:
        raise
    except Exception as error:  # a hostile archive can fail in any way
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise DatasetError(f"{path} cannot be read whole: {reason}") from error
    for name in source.classes:
        if any(unicodedata.category(sign) in _CONTROLS for sign in name):
            raise DatasetError(
                f"{path}: the class {name!a} has a name that is not UTF-8, or holds a control "
                "character: rename its folder"
            )
    if not source.splits.get("train"):
        raise DatasetError(f"{path}: no training images found")
    return source


def _write_made_of(folder: Path, shards: Iterable[Mapping[str, str]]) -> None:
    """Leave what tells the bytes that each shard was made of."""
    found = [{key: shard[key] for key in ("stamp", "contents")} for shard in shards]
    write_lines(folder / _MADE_OF, [json.dumps({"shards": found})])


def _check_same(out: Path, identity: Mapping[str, Any], tasks: Sequence[Task]) -> bool:
    """Raises DatasetError unless `out` is the whole data set of just these files and options.

    Bytes are read where a file may have changed since, or was copied; False where they cannot be
    compared, since it was made before they could.
    """
    if not (out / "dataset.json").exists():
        raise DatasetError(f"{out} is there, and is not a packed data set: name another OUT")
    try:
        found = open_dataset(out, verify_hashes=True)
    except DatasetError as error:
        raise DatasetError(f"{error}: name another OUT, since {out} is there") from error
    if found.source != identity:
        raise DatasetError(f"{out} holds a data set of other files or options: name another OUT")
    try:
        before = json_object(read_bytes(out / _MADE_OF))["shards"]
        made = [(str(shard["stamp"]), str(shard["contents"])) for shard in before]
    except (OSError, ValueError, KeyError, TypeError):
        made = []
    if len(made) != len(tasks):
        return False
    now = [stamp(task.items) for task in tasks]
    moved = [place for place, task in enumerate(tasks) if made[place][0] != now[place]]
    for place in _bar(moved, "comparing"):
        items = tasks[place].items
        if contents(items) != made[place][1]:
            raise DatasetError(
                f"{out} holds a data set of other files: their bytes differ between "
                f"{items[0].name!r} and {items[-1].name!r}: name another OUT"
            )
    if moved:
        with contextlib.suppress(OSError):  # of a folder that is not ours
            same = zip(now, made, strict=True)
            _write_made_of(out, ({"stamp": s, "contents": c} for s, (_, c) in same))
    return True


@contextlib.contextmanager
def held(aside: Path, identity: Mapping[str, Any], alone: bool) -> Iterator[None]:
    """Hold the folder that is being filled: parts share it, a whole run has it alone."""
    aside.mkdir(parents=True, exist_ok=True)
    theirs = [name for name in os.listdir(aside) if not name.startswith(".")]
    if theirs and not (aside / ".begun.json").exists():  # asked last: another part may begin
        raise DatasetError(f"{aside} holds {theirs[0]!r}, not made by `prepare`: name another OUT")
    with appended(aside / ".lock") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatasetError(f"{aside}: another prepare is at work there: wait for it") from error
        begun, ours = aside / ".begun.json", json.dumps(identity, sort_keys=True)
        if begun.exists() and read_bytes(begun) != ours.encode():
            raise DatasetError(
                f"{aside} was begun from other files or options: give the same, or name another OUT"
            )
        write(begun, ours.encode())
        if alone:
            _sweep_writing(aside)
        yield


def _write_shards(source: Source, aside: Path, options: Options) -> dict[str, list[Part]]:
    """The parts of every shard, or of this command's share, in order; written where they were not.

    Raises DatasetError as soon as more than `max_bad` is refused.
    """
    tasks = _tasks(source, aside, options)
    parts = [read_part(task) for task in _bar(tasks, "looking at what is there")]
    left = [place for place, part in enumerate(parts) if part is None]
    _check_disk(aside, [tasks[place] for place in left])
    images = [len(task.items) for task in tasks]
    total = sum(len(items) for items in source.splits.values())
    _check_refused(parts, total, options.max_bad, aside)
    with tqdm(
        total=sum(images),
        initial=sum(images) - sum(images[place] for place in left),
        unit=" images", desc="packing", mininterval=_every(),
    ) as bar:  # fmt: skip
        for place, part in _written(tasks, left, options.workers):
            parts[place] = part
            bar.update(images[place])
            _check_refused(parts, total, options.max_bad, aside)
    found: dict[str, list[Part]] = {split: [] for split in source.splits}
    for task, made in zip(tasks, parts, strict=True):
        assert made is not None
        found[task.folder.name].append(made)
    return found


def _tasks(source: Source, aside: Path, options: Options) -> list[Task]:
    tasks = []
    for split, items in source.splits.items():
        (aside / split).mkdir(exist_ok=True)
        for number, first in enumerate(range(0, len(items), ITEMS_PER_SHARD)):
            own = items[first : first + ITEMS_PER_SHARD]
            train = split == "train"
            how = options.keep, source.enlarge
            tasks.append(Task(aside / split, number, first, own, *how, train))
    if options.part is None:
        return tasks
    return tasks[options.part[0] - 1 :: options.part[1]]


def _written(tasks: list[Task], left: list[int], workers: int) -> Iterator[tuple[int, Part]]:
    """Write the shards that are left, in as many processes; each one's place, as they end."""
    images = sum(len(tasks[place].items) for place in left)
    workers = min(workers or cores(), len(left), images // LEAST_IMAGES)
    if workers <= 1:
        yield from ((place, write_shard(tasks[place])) for place in left)
        return
    # Spawned, since forking a process that has threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(),)) as pool:
        try:
            futures = {pool.submit(write_shard, tasks[place]): place for place in left}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise DatasetError(
                f"a process that packs images was killed{of_memory()}; the same command "
                "goes on, with fewer --workers if need be"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()


def _begin_worker(parent: int) -> None:
    """Of a process that writes shards: stops are its parent's, and it ends when that does."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    set_parent_death_signal = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that was said
        os._exit(1)
    torch.set_num_threads(1)


def _check_refused(
    parts: list[Part | None], total: int, max_bad: float | None, aside: Path
) -> None:
    refused = [entry for part in parts if part is not None for entry in part.meta["refused"]]
    allowed = max(_MAX_BAD * total, min(_FEW, total / 10)) if max_bad is None else max_bad * total
    if len(refused) > allowed:
        write_lines(aside / "quarantine.jsonl", map(json.dumps, refused))
        shown = "; ".join(f"{entry['name']!r}: {entry['reason']}" for entry in refused[:3])
        share = "" if max_bad is None else f" {max_bad:g}"
        raise DatasetError(
            f"--max-bad{share}: {len(refused)} of {total} images cannot be packed, "
            f"more than {int(allowed)} ({shown}): "
            f"all found so far are in {aside / 'quarantine.jsonl'}; mend them and name another "
            "OUT, or raise --max-bad"
        )


def _check_disk(aside: Path, left: list[Task]) -> None:
    need = len(left) * _PART_BYTES
    for task in left:
        for item in task.items:
            own = item.size if item.pixels is None else item.pixels.nbytes
            need += _TAR_BYTES + (own if task.keep else min(own, _BYTES_PER_IMAGE))
    free = shutil.disk_usage(aside).free
    if free < need:
        raise DatasetError(
            f"{aside}: about {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: make "
            "room, or name a folder on another disk"
        )


def _bar(places: Sequence[T], doing: str) -> Iterable[T]:
    """Shards, with a bar where they take a while."""
    return tqdm(places, doing, unit=" shards", delay=2, mininterval=_every())


def _every() -> float:
    """Seconds between a bar's lines."""
    return 0.5 if sys.stderr.isatty() else 30


def _sweep(out: Path) -> None:
    """Remove what was of use only while the data set was made."""
    for left in (path for p in (".lock", ".begun.json", "*/.shard-*.npz") for path in out.glob(p)):
        left.unlink(missing_ok=True)
    _sweep_writing(out)


def _sweep_writing(folder: Path) -> None:
    names = ".writing-*", "*.writing"  # the latter were 0.1.0's
    for left in (
        path for name in names for path in (*folder.glob(name), *folder.glob(f"*/{name}"))
    ):
        left.unlink(missing_ok=True)
