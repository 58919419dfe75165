"""The packed data set: tar shards that WebDataset's tools read, with an index of our own.

    OUT/dataset.json            classes, counts, colour statistics, size and SHA-256 of every file
    OUT/mean.npy                the training split's mean image, (h, w, 3) float32, grey levels
    OUT/SPLIT/samples.npy       one record per sample: INDEX in split.py
    OUT/SPLIT/shard-00000.tar   00000000.png, 00000000.cls, 00000001.png, …

None of these files is a pickle.
"""

import contextlib
import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from alexnet_dist.config.from_data import HELD_OUT, NO_SPLIT
from alexnet_dist.config.schema import Config
from alexnet_dist.data.missing import not_packed
from alexnet_dist.data.split import Split, open_split
from alexnet_dist.data.verified import load_array
from alexnet_dist.errors import ConfigError, DatasetError, cannot_be_read
from alexnet_dist.files import allow_open_files, json_object, read_bytes

if TYPE_CHECKING:  # errors in a data set are reported before torch is loaded
    from alexnet_dist.parallel.topology import Topology

VERSION = 2
_HASHED_AT_ONCE = 8  # shards by a rank, before the ranks meet
_OTHER_FILES = 1024  # that a process may have open besides shards: the usual limit


@dataclass(frozen=True)
class Statistics:
    """Colour statistics over all pixels of the training split, in grey levels of 0–255.

    Attributes:
        mean_image: (h, w, 3) float32.
        mean_rgb: (3,).
        eigenvalues: (3,), of the covariance of red, green and blue, largest first.
        eigenvectors: (3, 3); row i is the eigenvector of eigenvalue i.
    """

    mean_image: npt.NDArray[np.float32]
    mean_rgb: npt.NDArray[np.float64]
    eigenvalues: npt.NDArray[np.float64]
    eigenvectors: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dataset:
    """An opened packed data set.

    Attributes:
        digest: SHA-256 of dataset.json, which holds the hashes of all other files.
        source: what it was made from.
        resident: decoded images that `data.pipeline=resident` keeps while the data set is open.
    """

    folder: Path
    digest: str
    source: Mapping[str, Any]
    classes: tuple[str, ...]
    statistics: Statistics
    splits: Mapping[str, Split]
    resident: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


def open_dataset(folder: Path) -> Dataset:
    """Open a packed data set; raise DatasetError unless every file is as dataset.json records it.

    Of shards only the sizes are checked; `verify_shards` checks their hashes.
    """
    # The description, whose hash is the data set's identity.
    path = folder / "dataset.json"
    try:
        text = read_bytes(path)
        meta = json_object(text)
    except (FileNotFoundError, NotADirectoryError):
        raise not_packed(folder) from None
    except OSError as error:
        raise DatasetError(cannot_be_read(path, error)) from error
    except ValueError as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    # What it names, each file checked. Its contents may be anything, so any error is damage.
    try:
        if meta["version"] != VERSION:
            raise DatasetError(
                f"{path}: version {meta['version']!r}, but this program reads version {VERSION}: "
                "prepare the data set again"
            )
        source = dict(meta["source"])
        names = str(source["kind"]), *meta["splits"]
        if not all(re.fullmatch(r"[A-Za-z0-9_-]{1,99}", name) for name in names):
            raise ValueError(f"names {names}")
        classes = tuple(str(name) for name in meta["classes"])
        statistics = _statistics(folder, meta)
        splits = {
            name: open_split(folder, name, split, len(classes))
            for name, split in meta["splits"].items()
        }
    except DatasetError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}): prepare the data set again") from error
    # Shards that are read stay open, in each copy of a split.
    allow_open_files(_OTHER_FILES + 2 * sum(len(split.shards) for split in splits.values()))
    digest = hashlib.sha256(text).hexdigest()
    return Dataset(folder, digest, source, classes, statistics, splits)


def _statistics(folder: Path, meta: Mapping[str, Any]) -> Statistics:
    """Return the colour statistics in dataset.json; raise ValueError where they cannot be used."""
    statistics = Statistics(
        load_array(folder, meta["mean_image"], np.dtype("<f4"), dims=3),
        *(np.array(meta[k], float) for k in ("mean_rgb", "eigenvalues", "eigenvectors")),
    )
    arrays = [*vars(statistics).values()]
    shapes = [(*statistics.mean_image.shape[:2], 3), (3,), (3,), (3, 3)]
    usable = all(array.size and np.isfinite(array).all() for array in arrays)
    usable = usable and bool((statistics.eigenvalues >= 0).all())  # their roots are taken
    if not usable or [array.shape for array in arrays] != shapes:
        raise ValueError("colour statistics that training could not use")
    return statistics


def verify_shards(dataset: Dataset, topology: "Topology") -> None:
    """Hash every shard, each rank a share of them, some at once. Collective: ranks meet after each
    few shards, so that hashing many on a slow disk does not run into a timeout. How many must not
    depend on their cores, which may differ from node to node.

    Raises DatasetError on every rank, for one shard that has changed since it was packed. Hashing
    takes about a second per gigabyte in memory.
    """
    every = [(split, n) for split in dataset.splits.values() for n in range(len(split.shards))]
    # Each shard once: a training split and what is held out of it share theirs.
    shards = [*{split.shards[n]: (split, n) for split, n in every}.values()]
    ranks = topology.world_size
    each = ranks * _HASHED_AT_ONCE
    # Hashing does not hold Python's lock.
    with ThreadPoolExecutor(min(topology.cores, _HASHED_AT_ONCE)) as pool:
        for first in range(0, len(shards), each):
            own = shards[first : first + each][topology.global_rank :: ranks]
            with raised_on_every_rank(topology):
                list(pool.map(lambda shard: shard[0].check_shard(shard[1]), own))


@contextlib.contextmanager
def raised_on_every_rank(topology: "Topology") -> Iterator[None]:
    """Raise a DatasetError of any rank's block on every rank, after the block. Collective."""
    wrong = ""
    try:
        yield
    except DatasetError as error:
        wrong = str(error)
    if said := topology.first_message(wrong):
        raise DatasetError(said, on_every_rank=True)


def open_for(config: Config, trained: Path | None = None) -> Dataset:
    """Open the data set that a config names; raise ConfigError where the two do not agree.

    Args:
        trained: checkpoint of the network to run on it; None for a network still to be trained.

    Raises DatasetError where the data set is missing or damaged.
    """
    return matched(open_dataset(Path(config.data.path)), config, trained)


def matched(dataset: Dataset, config: Config, trained: Path | None = None) -> Dataset:
    """Return an opened data set with the splits that the config makes of it; raises as `open_for`
    where the two do not agree."""
    # The split held_out exists only by the config.
    if config.data.hold_out and config.data.train_split in dataset.splits:
        whole = dataset.splits[config.data.train_split]
        parts = {part.name: part for part in _held_out(whole, config.data.hold_out)}
        dataset = dataclasses.replace(dataset, splits={**dataset.splits, **parts})
    named = {"data.train_split": config.data.train_split}
    if config.data.eval_split != NO_SPLIT:
        named["data.eval_split"] = config.data.eval_split
    for key, name in named.items():
        if name not in dataset.splits:
            raise ConfigError(
                f"{key}={name!r}: {dataset.folder} has only the splits {', '.join(dataset.splits)}"
                ": name one of these, or another data set"
            )
        if len(dataset.splits[name]) == 0:
            raise DatasetError(
                f"{key}={name!r}: the split is empty: name another, or hold out another share "
                "(data.hold_out)"
            )
    _check_number_of_classes(config, dataset, trained)
    return dataset


def _check_number_of_classes(config: Config, dataset: Dataset, trained: Path | None) -> None:
    """Raise ConfigError where the network has more or fewer classes than the data set."""
    ours, theirs = config.model.classes, len(dataset.classes)
    if ours == theirs:
        return
    again, last = f"model.classes={theirs}", config.model.layer_names[-1]
    data, init = shlex.quote(str(dataset.folder)), shlex.quote(str(trained))
    raise ConfigError(
        f"model.classes={ours}: {dataset.folder} has {theirs} classes: "
        + (
            f"train a new network on it with {again}, or set data.path= to other data"
            if trained is None
            else f"set data.path= to data of the classes that {trained} was trained on, or "
            f"fine-tune it: train CONFIG name=NEW data.path={data} {again} "
            f"train.init_from={init} 'train.init_new=[{last}]'"
        )
    )


def other_class(trained: Sequence[str] | None, here: Sequence[str]) -> str:
    """Say which class has another name than in training; "" where none has, the names in training
    are not known, or there were more or fewer (which shapes show)."""
    if trained is None or len(trained) != len(here):
        return ""
    for number, (name, was) in enumerate(zip(here, trained, strict=True)):
        if name != was:
            return f"its class {number} is {name!r}, which was {was!r}"
    return ""


def _held_out(split: Split, share: float) -> tuple[Split, Split]:
    """Return what is left of a split, and the share of it that is held out.

    Images are chosen by checksum: the same ones whatever their order or number, and identical
    images together.
    """
    held = split.index["crc32"] < share * 2**32
    return (
        dataclasses.replace(split, index=split.index[~held]),
        dataclasses.replace(split, index=split.index[held], name=HELD_OUT),
    )


def open_trained_on(config: Config, digest: str, trained: Path) -> Dataset:
    """Open the data set that a network was trained on, at the path in its config.

    Args:
        digest: digest of that data set.
        trained: the network's checkpoint.

    Raises DatasetError where it is not there, or another data set is, whose class names and mean
    would be wrong for the network.
    """
    folder = Path(config.data.path)
    dataset = open_dataset(folder) if (folder / "dataset.json").exists() else None
    if dataset is None or dataset.digest != digest:
        raise DatasetError(
            f"data.path={str(folder)!r}: the data set that {trained} was trained on is missing: "
            "say where it is now with --data FOLDER, or in Python load_checkpoint(path, "
            "data=FOLDER)"
        )
    return matched(dataset, config, trained)


def evaluation_split(config: Config, dataset: Dataset) -> Split:
    """Return the split a network is scored on; raise ConfigError where the config names none."""
    if config.data.eval_split == NO_SPLIT:
        raise ConfigError(
            f"data.eval_split={NO_SPLIT}: there is no split to score on: name one of "
            f"{dataset.folder}'s splits, {', '.join(dataset.splits)}, or another data.path= with "
            "data.eval_split=auto"
        )
    return dataset.splits[config.data.eval_split]


def check_damaged(config: Config, split: Split, damaged: int) -> None:
    """Raise DatasetError where more samples of a split are damaged than data.max_damaged allows.

    Args:
        damaged: how many are, counted over all ranks.
    """
    bound = config.data.max_damaged * len(split)
    if damaged > bound:
        raise DatasetError(
            f"data.max_damaged={config.data.max_damaged:g}: {damaged} of the {len(split)} samples "
            f"of split {split.name!r} in {split.shards[0].parent.parent} are damaged: prepare the "
            "data set again, or raise data.max_damaged",
            on_every_rank=True,
        )
