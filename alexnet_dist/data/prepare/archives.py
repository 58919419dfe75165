"""Sources of encoded images: ImageNet's tars as downloaded, read in place, and image folders."""

import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from alexnet_dist.data.prepare.devkit import read_synsets
from alexnet_dist.data.prepare.sources import (
    LARGEST_MEMBER,
    Item,
    Source,
    needed,
    open_tar,
    read_member,
)
from alexnet_dist.errors import DatasetError

_MOST_TRUTH = 2**20  # bytes of the validation images' classes, which are 245,000


def imagenet(path: Path) -> Source:
    """ILSVRC-2012 as downloaded: two tars and the devkit. Classes in the order of WordNet ids."""
    train, val, devkit = (
        needed(path / f"ILSVRC2012_{name}", "of the three that image-net.org gives out")
        for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")
    )
    words, truth = _devkit(devkit)
    ids = sorted(words)
    label = {wnid: place for place, wnid in enumerate(ids)}
    items: list[Item] = []
    with open_tar(train) as outer:
        for member in outer:
            wnid = member.name.removesuffix(".tar")
            if wnid not in label or not member.isreg():
                raise DatasetError(f"{train}: {member.name!r} is not a class's tar of the devkit")
            inner = outer.extractfile(member)
            assert inner is not None
            with open_tar(inner) as tar:
                own = _members(tar, train, member.offset_data)
                items += [item._replace(label=label[wnid]) for item in own]
        _check_end(outer, train)
    with open_tar(val) as tar:
        validation = [
            item if item.refused else item._replace(label=label[_truth(truth, item.name)])
            for item in sorted(_members(tar, val, 0))
        ]
    classes = tuple(f"{wnid} {words[wnid]}" for wnid in ids)
    return Source("imagenet", classes, {"train": items, "val": validation})


def _truth(truth: Sequence[str], name: str) -> str:
    """The WordNet id of a validation image, by the number in its name."""
    number = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", name)
    if number is None or not 1 <= int(number[1]) <= len(truth):
        raise DatasetError(
            f"{name!r}: not a validation image of the devkit's {len(truth)}, ILSVRC2012_val_…JPEG"
        )
    return truth[int(number[1]) - 1]


def _members(tar: tarfile.TarFile, path: Path, start: int) -> Iterator[Item]:
    """The files of a tar that lies in `path` from byte `start` on, without their classes."""
    whole = path.stat().st_size
    for member in tar:
        offset = start + member.offset_data
        name, refused = member.name, ""
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            refused = "a link, device or hole in the archive, not a file"
        elif name.startswith("/") or ".." in name.split("/"):
            refused = "a name that leaves its folder"
        elif offset + member.size > whole:
            refused = "the archive ends before it does"
        yield Item(name, 0, str(path), offset, member.size, refused=refused)
    _check_end(tar, path)


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """Raises DatasetError where a tar's listing ended by damage: tarfile does not tell."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DatasetError(f"{path}: its archive is damaged or cut at byte {tar.offset}")


def _devkit(path: Path) -> tuple[dict[str, str], list[str]]:
    """Words by WordNet id of the 1,000 classes, and each validation image's WordNet id."""

    def member(name: str, most: int = LARGEST_MEMBER) -> bytes:
        return read_member(tar, f"ILSVRC2012_devkit_t12/data/{name}", path, most)

    with open_tar(path) as tar:
        try:
            leaves = read_synsets(member("meta.mat"))
            wnid = {leaf.number: leaf.wnid for leaf in leaves}
            lines = member("ILSVRC2012_validation_ground_truth.txt", _MOST_TRUTH).split()
            truth = [wnid[int(line)] for line in lines]
        except (KeyError, ValueError) as error:
            raise DatasetError(f"{path} is not ILSVRC-2012's devkit: {error}") from error
    return {leaf.wnid: leaf.words for leaf in leaves}, truth


def folder(path: Path) -> Source:
    """`train/CLASS/*`, and `val/`, `validation/` or `test/` beside it. Classes by name."""
    names = {
        ours: name
        for ours, known in (("train", ["train"]), ("val", ["val", "validation"]),
                            ("test", ["test"]))
        for name in known
        if (path / name).is_dir()
    }  # fmt: skip
    if "train" not in names:
        raise DatasetError(f"{path}: no folder train/ in it: images lie in train/CLASS/")
    classes = tuple(sorted(p.name for p in (path / names["train"]).iterdir() if p.is_dir()))
    if not classes:
        raise DatasetError(f"{path / 'train'}: no folders in it: images lie in train/CLASS/")
    splits = {ours: list(_files(path / name, classes)) for ours, name in names.items()}
    return Source("folder", classes, splits)


def _files(root: Path, classes: tuple[str, ...]) -> Iterator[Item]:
    strangers = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in classes)
    if strangers:
        raise DatasetError(f"{root / strangers[0]}: a class that train/ does not have")
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue
        for entry in sorted(os.scandir(root / name), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            shown = f"{root.name}/{name}/{entry.name}"
            try:
                status = entry.stat()
            except OSError as error:
                yield Item(shown, label, refused=f"cannot be read: {error.strerror}")
                continue
            regular = stat.S_ISREG(status.st_mode)
            refused = "" if regular else "a folder, link, device or pipe, not a file"
            yield Item(shown, label, entry.path, 0, status.st_size, refused=refused)
