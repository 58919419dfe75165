"""Write a source's shards, in parallel where there are many images."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path

from alexnet_dist.data.prepare.merge import write_lines
from alexnet_dist.data.prepare.shards import Shard, Task, read_shard, write_shard
from alexnet_dist.data.prepare.sources import Source
from alexnet_dist.errors import DatasetError
from alexnet_dist.parallel.device import cores
from alexnet_dist.parallel.workers import worker_pool
from alexnet_dist.progress import progress_bar

ITEMS_PER_SHARD = 1000
LEAST_IMAGES = 250  # fewest images per process that are worth starting it for
# Images that may be refused unless --max-bad says so: a share, and a number for small sources.
_MAX_BAD, _FEW = 0.001, 3
_BYTES_PER_IMAGE = 45_000  # of a JPEG of 256 × 256, about
_TAR_BYTES = 2048  # of headers and padding per image, about
_PART_BYTES = 256 * 256 * 3 * 4  # of colour sums per shard, until the data set is complete


def tasks_of(
    source: Source, folder: Path, keep: bool, part: tuple[int, int] | None = None
) -> list[Task]:
    """Return the shards to write of a source, or of this command's part of it.

    Args:
        folder: the data set's.
        keep: images keep their own size.
        part: (i, n), every nth shard from the ith on; None for all.
    """
    tasks = []
    for split, items in source.splits.items():
        for number, first in enumerate(range(0, len(items), ITEMS_PER_SHARD)):
            own = items[first : first + ITEMS_PER_SHARD]
            tasks.append(
                Task(folder / split, number, first, own, keep, source.enlarge,
                     statistics=split == "train")
            )  # fmt: skip
    return tasks if part is None else tasks[part[0] - 1 :: part[1]]


def write_shards(
    source: Source, tasks: Sequence[Task], folder: Path, max_bad: float | None, workers: int
) -> dict[str, list[Shard]]:
    """Write the shards that are not yet there; return all shards by split, in order.

    Args:
        folder: the data set's.
        max_bad: share of the source's images that may be refused; None for the default.
        workers: number of processes; 0 = the cores.

    Raises DatasetError as soon as more images are refused, or where the disk is too small.
    """
    # What an earlier command has written, and whether the rest can be.
    for split in source.splits:
        (folder / split).mkdir(exist_ok=True)
    looking = progress_bar("checking what is already packed", tasks, unit=" shards", delay=2)
    shards = [read_shard(task) for task in looking]
    left = [place for place, shard in enumerate(shards) if shard is None]
    _check_disk(folder, [tasks[place] for place in left])
    images = [len(task.items) for task in tasks]
    total = sum(len(items) for items in source.splits.values())
    _check_refused(shards, total, max_bad, folder)
    # Write what is left, in any order.
    done = sum(images) - sum(images[place] for place in left)
    with progress_bar("packing", total=sum(images), initial=done, unit=" images") as bar:
        for place, shard in _written(tasks, left, workers):
            shards[place] = shard
            bar.update(images[place])
            _check_refused(shards, total, max_bad, folder)
    by_split: dict[str, list[Shard]] = {split: [] for split in source.splits}
    for task, written in zip(tasks, shards, strict=True):
        assert written is not None
        by_split[task.folder.name].append(written)
    return by_split


def _written(tasks: Sequence[Task], left: list[int], workers: int) -> Iterator[tuple[int, Shard]]:
    """Write the tasks at the places in `left`, in several processes; yield each place and its shard
    when it is written."""
    images = sum(len(tasks[place].items) for place in left)
    workers = min(workers or cores(), len(left), images // LEAST_IMAGES)
    if workers <= 1:
        yield from ((place, write_shard(tasks[place])) for place in left)
        return
    remedy = "run the same command to continue, with fewer --workers if it happens again"
    with worker_pool(workers, "packs images", remedy) as pool:
        futures = {pool.submit(write_shard, tasks[place]): place for place in left}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _check_refused(
    shards: list[Shard | None], total: int, max_bad: float | None, folder: Path
) -> None:
    """Raise DatasetError, and list the refused images in a file, where there are too many."""
    refused = [entry for shard in shards if shard is not None for entry in shard.meta["refused"]]
    allowed = max(_MAX_BAD * total, min(_FEW, total / 10)) if max_bad is None else max_bad * total
    allowed = int(allowed + 1e-6)  # 0.29 of 100 images, computed, is a little less than 29
    if len(refused) > allowed:
        write_lines(folder / "quarantine.jsonl", map(json.dumps, refused))
        shown = "; ".join(f"{entry['name']!r}: {entry['reason']}" for entry in refused[:3])
        share = "" if max_bad is None else f" {max_bad:g}"
        raise DatasetError(
            f"--max-bad{share}: {len(refused)} of {total} images cannot be packed, more than "
            f"{allowed} ({shown}): all found so far are listed in "
            f"{folder / 'quarantine.jsonl'}; repair them and name another OUT, or raise --max-bad "
            f"to {_rounded_up(len(refused) / total):g} or more"
        )


def _rounded_up(share: float) -> float:
    """Return a share above 0 with two significant digits, rounded up."""
    scale = 10.0 ** (1 - math.floor(math.log10(share)))
    return math.ceil(round(share * scale, 6)) / scale


def _check_disk(folder: Path, left: list[Task]) -> None:
    """Raise DatasetError where the disk is too small for these tasks."""
    need = len(left) * _PART_BYTES
    for task in left:
        for item in task.items:
            own = item.size if item.pixels is None else item.pixels.nbytes
            need += _TAR_BYTES + (own if task.keep else min(own, _BYTES_PER_IMAGE))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DatasetError(
            f"{folder}: needs about {need / 1e9:.1f} GB, but {free / 1e9:.1f} "
            "GB are free: make room, or name a folder on another disk"
        )
