"""Turn a source of images into a packed data set (see `dataset.py`).

The data set is written in OUT.partial, shard by shard, by processes here or by commands that each
write a part, and renamed to OUT when it is complete. A command that was killed at any moment can be
run again: it continues, and the result has the same bytes.
"""

import contextlib
import fcntl
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_dist.data.missing import PARTIAL
from alexnet_dist.data.prepare import MODULES
from alexnet_dist.data.prepare.arrays import FASHION_MNIST
from alexnet_dist.data.prepare.merge import merge
from alexnet_dist.data.prepare.packing import tasks_of, write_shards
from alexnet_dist.data.prepare.provenance import check_same, write_provenance
from alexnet_dist.data.prepare.shards import Shard
from alexnet_dist.data.prepare.sources import Source
from alexnet_dist.data.split import INDEX, doubtful
from alexnet_dist.errors import ConfigError, DatasetError, NotAFile, looked_in, one_line
from alexnet_dist.files import appended, read_bytes, sync, write

log = logging.getLogger(__name__)

# What lists the images of each kind of source; a program may add its own.
SOURCES: dict[str, Callable[..., Source]] = {
    kind: getattr(import_module(f"{__package__}.{module}"), kind)
    for kind, module in MODULES.items()
}
# Kinds that take --validation.
_DIVISIBLE = [k for k, lists in SOURCES.items() if "validation" in signature(lists).parameters]
# Unicode categories: control, surrogate, line and paragraph separator.
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
# Files written aside, of which the last two are 0.1.0's.
_WRITING = (".writing-*", "*/.writing-*", "*.writing", "*/*.writing")


@dataclass(frozen=True)
class Options:
    """How to pack.

    Attributes:
        keep: images keep their own size.
        max_bad: share of the source's images that may be refused; None: 0.1 %, or up to three
            images where these are at most a tenth of all.
        workers: number of processes; 0 = the cores.
        part: (i, n): write only every nth shard from the ith on, and do not merge.
        validation: share that becomes `val`: of cifar10's test images, of folder's training images.
    """

    keep: bool = False
    max_bad: float | None = None
    workers: int = 0
    part: tuple[int, int] | None = None
    validation: float = 0.0


def prepare(kind: str, path: Path | None, out: Path, options: Options | None = None) -> str:
    """Pack a source into `out`; do nothing where `out` was already made from the same files.

    Args:
        kind: a key of SOURCES.
        path: where the source lies; None (for fashion_mnist only): where the system keeps it.

    Returns one or more lines that say what was done.

    Raises:
        ConfigError: the arguments do not fit the source.
        DatasetError: the source is missing, incomplete, or too much of it is refused; `out` cannot
            be written or holds something else. What was written so far stays in OUT.partial.
    """
    options = options or Options()
    if options.max_bad is not None and not 0 <= options.max_bad <= 1:
        raise ConfigError(f"--max-bad {options.max_bad:g}: must be a share, from 0 to 1")
    source = list_source(kind, path, options.validation)
    identity = source.identity() | {"keep": options.keep}
    if out.exists():
        return _already_there(source, identity, out, options.keep)
    # Write shards aside, merge them when all are there, rename the folder last.
    aside = out.with_name(out.name + PARTIAL)
    kept = f"what is done is kept in {aside}, and the same command continues"
    try:
        with locked(aside, identity, alone=options.part is None):
            tasks = tasks_of(source, aside, options.keep, options.part)
            shards = write_shards(source, tasks, aside, options.max_bad, options.workers)
            if options.part is not None:
                return (
                    f"{aside}: part {options.part[0]} of {options.part[1]} is written; when all "
                    "are, run the same command without --part to merge them into the data set"
                )
            merge(source, identity, shards, aside)
            _complete(aside, out, shards)
    except NotAFile:  # names what is in the way, whether or not OUT could be written
        raise
    except KeyboardInterrupt:
        log.warning(kept)
        raise
    except OSError as error:
        next_step = f"; {kept}" if os.path.exists(aside) else ": name another OUT"
        raise DatasetError(f"{out} cannot be written: {error}{next_step}") from error
    return _summary(source, out, shards)


def _already_there(source: Source, identity: Mapping[str, Any], out: Path, keep: bool) -> str:
    """Return a line that says that `out` is this data set; raise DatasetError where it is not: what
    is there is never replaced."""
    compared = check_same(out, identity, tasks_of(source, out, keep))
    _sweep(out)
    like = "these files" if compared else "files of these names and sizes"
    return f"{out}: already prepared from {like}, and complete"


def _complete(aside: Path, out: Path, shards: Mapping[str, Sequence[Shard]]) -> None:
    """Give a merged data set its own name, once all names in it are on the disk."""
    metas = [shard.meta for split in shards.values() for shard in split]
    write_provenance(aside, ((meta["stamp"], meta["contents"]) for meta in metas))
    for named in (aside, *(aside / split for split in shards)):
        sync(named)
    aside.rename(out)
    sync(out.parent)
    _sweep(out)


def _summary(source: Source, out: Path, shards: Mapping[str, Sequence[Shard]]) -> str:
    """Return lines that say what was packed, refused and left out."""
    counts = ", ".join(f"{sum(len(shard.index) for shard in shards[s])} {s}" for s in source.splits)
    bad = sum(len(shard.meta["refused"]) for split in shards.values() for shard in split)
    refused = f"; {bad} refused, see {out / 'quarantine.jsonl'}" if bad else ""
    packed = f"{out}: packed {counts} images of {len(source.classes)} classes{refused}"
    indexes = {
        name: np.concatenate([np.empty(0, INDEX), *(shard.index for shard in own)])
        for name, own in shards.items()
    }
    return "\n".join((packed, *doubtful(indexes), *source.notes, *_unscored(source)))


def _unscored(source: Source) -> tuple[str, ...]:
    """Return a line of advice where there is no split to evaluate on."""
    if {"val", "test"} & {*source.splits}:
        return ()
    more = (
        ": train with data.hold_out=0.1, or prepare into another OUT with --validation 0.1"
        if source.kind in _DIVISIBLE
        else ""
    )
    return (f"no split to evaluate on{more}",)


def list_source(kind: str, path: Path | None, validation: float = 0) -> Source:
    """List the images of a source; raise DatasetError where it is missing or incomplete,
    ConfigError where the arguments do not fit it.

    Args: as for `prepare`.
    """
    if path is None:
        if kind != "fashion_mnist":
            raise ConfigError(
                f"prepare {kind}: name the folder or archive: prepare {kind} PATH OUT"
            )
        path = FASHION_MNIST
    if kind != "fashion_mnist":  # which says itself where it can be had
        _check_path(kind, path)
    cut = {"validation": validation} if validation else {}
    if cut and (kind not in _DIVISIBLE or not 0 < validation < 1):
        raise ConfigError(
            f"--validation {validation:g}: must be a share between 0 and 1, and only for "
            f"{' or '.join(_DIVISIBLE)}; leave it out otherwise"
        )
    try:
        source = SOURCES[kind](path, **cut)
    except DatasetError:
        raise
    except Exception as error:  # a hostile archive can fail in any way
        raise DatasetError(f"{path} cannot be read completely: {one_line(error)}") from error
    for name in source.classes:
        if any(unicodedata.category(sign) in _CONTROLS for sign in name):
            raise DatasetError(
                f"{path}: the class {name!a} has a name that is not UTF-8, or holds a control "
                "character: rename its folder"
            )
    if not source.splits.get("train"):
        raise DatasetError(f"{path}: no training images found")
    return source


def _check_path(kind: str, path: Path) -> None:
    """Raise DatasetError unless a source of this kind can lie at a path."""
    if not path.exists():
        raise DatasetError(f"{path}{looked_in(path)}: there is no such file or folder")
    if not path.is_dir() and not (MODULES.get(kind) == "folders" and path.is_file()):
        wrong = "is a file: unpack it, and" if path.is_file() else "is not a folder:"
        raise DatasetError(f"{path} {wrong} name the folder that holds {kind}'s files")


@contextlib.contextmanager
def locked(aside: Path, identity: Mapping[str, Any], alone: bool) -> Iterator[None]:
    """Lock the folder that is being filled: commands that each write a part share it, one that
    writes all has it to itself.

    Raises DatasetError where another holds it, or it was begun from something else.
    """
    aside.mkdir(parents=True, exist_ok=True)
    theirs = [name for name in os.listdir(aside) if not name.startswith(".")]
    # .begun.json is looked for last: another part may just have begun.
    if theirs and not (aside / ".begun.json").exists():
        raise DatasetError(
            f"{aside} holds {theirs[0]!r}, which `prepare` did not make: name another OUT"
        )
    with appended(aside / ".lock") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatasetError(f"{aside}: another prepare is writing there: wait for it") from error
        begun, ours = aside / ".begun.json", json.dumps(identity, sort_keys=True)
        if begun.exists() and read_bytes(begun) != ours.encode():
            raise DatasetError(
                f"{aside} was begun from other files or with other options: use those again, or "
                "name another OUT"
            )
        write(begun, ours.encode())
        if alone:
            _remove(aside, *_WRITING)
        yield


def _sweep(out: Path) -> None:
    """Remove the files that were needed only while the data set was being made."""
    _remove(out, ".lock", ".begun.json", "*/.shard-*.npz", *_WRITING)


def _remove(folder: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        path.unlink(missing_ok=True)
