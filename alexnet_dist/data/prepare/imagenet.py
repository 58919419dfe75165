"""List the images in ImageNet's tars as downloaded; they are read in place."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from alexnet_dist.data.prepare.devkit import read_synsets
from alexnet_dist.data.prepare.sources import Item, Source, needed, some
from alexnet_dist.data.prepare.tars import check_end, members, open_tar, read_member
from alexnet_dist.errors import DatasetError

_MOST_TRUTH = 2**20  # bytes of the file of validation classes, which has 245,000


def imagenet(path: Path) -> Source:
    """List ILSVRC-2012 as downloaded: two tars and the devkit. Classes are sorted by WordNet id."""
    train, val, devkit = (
        needed(path / f"ILSVRC2012_{name}", "of the three files that image-net.org offers")
        for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")
    )
    words, truth = _devkit(devkit)
    ids = sorted(words)
    label = {wnid: place for place, wnid in enumerate(ids)}
    splits = {"train": _training(train, label), "val": _validation(val, [label[w] for w in truth])}
    classes = tuple(f"{wnid} {words[wnid]}" for wnid in ids)
    return Source("imagenet", classes, splits, enlarge=True)


def _training(path: Path, label: Mapping[str, int]) -> list[Item]:
    """List the training images: a tar that holds a tar of each class.

    Args:
        label: of each WordNet id of the devkit.
    """
    items: list[Item] = []
    seen = set()
    with open_tar(path) as outer:
        for member in outer:
            wnid = member.name.removesuffix(".tar")
            if wnid not in label or not member.isreg():
                raise DatasetError(f"{path}: {member.name!r} is not one of the devkit's class tars")
            if wnid in seen:
                raise DatasetError(f"{path}: {member.name!r} is in it twice: download it again")
            seen.add(wnid)
            inner = outer.extractfile(member)
            assert inner is not None
            with open_tar(inner) as tar:
                own = members(tar, path, member.offset_data)
                items += [item._replace(label=label[wnid]) for item in own]
        check_end(outer, path)
    _check_whole(path, [f"{wnid}.tar" for wnid in label if wnid not in seen], len(label), "classes")
    return items


def _validation(path: Path, labels: Sequence[int]) -> list[Item]:
    """List the validation images: a tar of images alone.

    Args:
        labels: of images 1, 2, ….
    """
    with open_tar(path) as tar:
        listed = sorted(members(tar, path))
    wanted = {f"ILSVRC2012_val_{n:08d}.JPEG": label for n, label in enumerate(labels, start=1)}
    names = [item.name.rpartition("/")[2] for item in listed]
    for place, (item, name) in enumerate(zip(listed, names, strict=True)):
        if item.refused:
            continue
        if name not in wanted:
            raise DatasetError(
                f"{item.name!r}: not one of the devkit's {len(labels)} validation images, "
                "ILSVRC2012_val_…JPEG"
            )
        listed[place] = item._replace(label=wanted[name])
    _check_whole(path, sorted({*wanted} - {*names}), len(wanted), "validation images")
    if len(listed) > len(wanted):
        raise DatasetError(
            f"{path}: has {len(listed)} images, not {len(wanted)}: download it again"
        )
    return listed


def _check_whole(tar: Path, missing: Sequence[str], count: int, what: str) -> None:
    """Raise DatasetError where a tar lacks files that the devkit lists."""
    if missing:
        raise DatasetError(
            f"{tar}: {len(missing)} of the devkit's {count} {what} are missing ({some(missing)}): "
            "download it again, and compare its MD5 with image-net.org's"
        )


def _devkit(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the words of the 1,000 classes by WordNet id, and the WordNet id of each validation
    image."""
    data = "ILSVRC2012_devkit_t12/data"
    with open_tar(path) as tar:
        try:
            leaves = read_synsets(read_member(tar, f"{data}/meta.mat", path))
            wnid = {leaf.number: leaf.wnid for leaf in leaves}
            file = f"{data}/ILSVRC2012_validation_ground_truth.txt"
            lines = read_member(tar, file, path, _MOST_TRUTH).split()
            truth = [wnid[int(line)] for line in lines]
        except (KeyError, ValueError) as error:
            raise DatasetError(f"{path} is not ILSVRC-2012's devkit: {error}") from error
    return {leaf.wnid: leaf.words for leaf in leaves}, truth
