"""Tell whether a data set was made from the same files: each shard's `stamp` and `contents`, kept
beside dataset.json, which itself is the same wherever the source lies."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_dist.data.dataset import open_dataset, verify_shards
from alexnet_dist.data.prepare.merge import write_lines
from alexnet_dist.data.prepare.shards import Task, contents, stamp
from alexnet_dist.errors import DatasetError
from alexnet_dist.files import json_object, read_bytes
from alexnet_dist.parallel.device import cores
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.progress import progress_bar

_FILE = ".source.json"


def write_provenance(folder: Path, shards: Iterable[tuple[str, str]]) -> None:
    """Record the `stamp` and `contents` of each shard."""
    entries = [{"stamp": stamp, "contents": contents} for stamp, contents in shards]
    write_lines(folder / _FILE, [json.dumps({"shards": entries})])


def _recorded(folder: Path) -> list[tuple[str, str]]:
    """Return the `stamp` and `contents` of each shard; nothing where none can be read."""
    try:
        shards = json_object(read_bytes(folder / _FILE))["shards"]
        return [(str(shard["stamp"]), str(shard["contents"])) for shard in shards]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_same(out: Path, identity: Mapping[str, Any], tasks: Sequence[Task]) -> bool:
    """Raise DatasetError unless `out` is the complete data set of exactly these files and options.

    The bytes of a source file are read where its stamp differs: it may have changed or been copied.

    Args:
        identity: of the source, with the options.
        tasks: all shards of the source.

    Returns:
        Whether bytes could be compared; False where `out` was made before they were recorded.
    """
    if not (out / "dataset.json").exists():
        raise DatasetError(f"{out} exists, but is not a packed data set: name another OUT")
    try:
        found = open_dataset(out)
        verify_shards(found, Topology(cores=cores()))
    except DatasetError as error:
        raise DatasetError(f"{error}: name another OUT, since {out} exists") from error
    if found.source != identity:
        raise DatasetError(
            f"{out} holds a data set made from other files or with other options: name another OUT"
        )
    made = _recorded(out)
    if len(made) != len(tasks):
        return False
    now = [stamp(task.items) for task in tasks]
    moved = [place for place, task in enumerate(tasks) if made[place][0] != now[place]]
    for place in progress_bar("comparing", moved, unit=" shards", delay=2):
        items = tasks[place].items
        if contents(items) != made[place][1]:
            raise DatasetError(
                f"{out} holds a data set made from other files: their bytes differ between "
                f"{items[0].name!r} and {items[-1].name!r}: name another OUT"
            )
    if moved:
        with contextlib.suppress(OSError):  # the folder may not be ours to write
            write_provenance(out, zip(now, (contents for _, contents in made), strict=True))
    return True
