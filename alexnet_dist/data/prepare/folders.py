"""List images by class, in folders or archives; Tiny ImageNet and Imagenette as downloaded."""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from alexnet_dist.data.missing import IMAGE_SUFFIXES, SPLIT_FOLDERS
from alexnet_dist.data.prepare.containers import Listing, hidden, list_files, read_content
from alexnet_dist.data.prepare.sources import Item, Source, some
from alexnet_dist.errors import DatasetError
from alexnet_dist.files import MOST_ENCODED

_STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL
)
_FIRST = 16  # bytes that tell whether a file is an image
_LAY = "put the images of each class in a folder of its own, PATH/CLASS/*, or PATH/train/CLASS/*"
IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute",
}  # fmt: skip


_LeftOut = defaultdict[str, list[str]]  # files and folders not of a class, by the reason why


def _note(left: _LeftOut) -> tuple[str, ...]:
    """Return a line that lists what was left out, if anything was."""
    parts = [f"{why}: {len(names)} ({some(names)})" for why, names in left.items() if names]
    return (f"left out: {'; '.join(parts)}",) if parts else ()


def folder(path: Path, validation: float = 0) -> Source:
    """List images in `CLASS/*`, or in `train/CLASS/*` with `val/`, `valid/`, `validation/` or
    `test/` beside it, at any depth below a class's folder; or in a tar or zip of that. Classes are
    sorted by name.

    Args:
        validation: share of the training images that becomes `val`, where there is none. Each is
            chosen by a hash of its path, so that it stays in its split when images are added.
    """
    # Find the folder of each split, or take all as the training split.
    left = _LeftOut(list)
    listing = _unwrapped(_visible(list_files(path), left), left)
    tops, found = listing.tops(), {}
    starts = _split_folders(path, tops) or {"train": ""}
    if starts["train"]:
        left["beside train/"] += [f"{t}/" for t in tops if f"{t}/" not in starts.values()]
        left["beside train/"] += [item.name for item in listing.files if "/" not in item.name]
    # List the images of each split, and number the classes.
    for split, start in starts.items():
        images = _images(listing.below(start), start, left)
        # macOS may write é as two characters: such names are the same, and sort alike.
        found[split] = [(unicodedata.normalize("NFC", name), item) for name, item in images]
    classes = tuple(sorted(_classes(found["train"])))
    _check_classes(path, classes, found, starts)
    label = {name: place for place, name in enumerate(classes)}
    splits = {
        split: [item._replace(label=label.get(name, 0)) for name, item in images]
        for split, images in found.items()
        if images
    }
    # Set validation images apart, and say what was left out.
    notes = _note(left)
    if validation:
        splits = _with_validation(path, splits, validation, starts["train"])
    return Source("folder", classes, splits, notes=notes + _incomplete(classes, splits))


def _incomplete(classes: Sequence[str], splits: Mapping[str, Sequence[Item]]) -> tuple[str, ...]:
    """Return a line for each split that has no image of some classes; the training split may have
    none of a small class after some were set apart."""
    notes = []
    for split, kind in (("train", "training"), ("val", "validation"), ("test", "test")):
        held = {item.label for item in splits.get(split, ())}
        never = [name for label, name in enumerate(classes) if label not in held]
        if held and never:
            notes.append(f"no {kind} images of {some(never)}")
    return tuple(notes)


def imagenette(path: Path) -> Source:
    """List Imagenette's archive or folder, of any image size. Classes: WordNet id and words."""
    found = folder(path)
    if found.classes != tuple(IMAGENETTE):
        raise DatasetError(
            f"{path}: its classes are {some(found.classes)}, not Imagenette's ten: use `prepare "
            "folder`"
        )
    classes = tuple(f"{wnid} {words}" for wnid, words in IMAGENETTE.items())
    return Source("imagenette", classes, found.splits, notes=found.notes)


def tiny_imagenet(path: Path) -> Source:
    """List tiny-imagenet-200.zip or its folder. Classes are sorted by WordNet id."""
    left = _LeftOut(list)
    listing = _unwrapped(_visible(list_files(path), left), left)
    files = {item.name: item for item in listing.files}

    def lines(name: str) -> list[str]:
        if name not in files:
            raise DatasetError(f"{path}: has no file {name}: it is not Tiny ImageNet")
        return read_content(files[name]).decode().splitlines()

    words = dict(line.split("\t", 1) for line in lines("words.txt") if "\t" in line)
    ids = sorted({line.strip() for line in lines("wnids.txt")} - {""})
    truth = dict(line.split("\t")[:2] for line in lines("val/val_annotations.txt") if line.strip())
    label = {wnid: place for place, wnid in enumerate(ids)}
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for item in listing.files:
        match item.name.split("/"):
            case ["train", wnid, "images", _]:
                splits["train"].append(item._replace(label=_label_of(wnid, label, item, path)))
            case ["val", "images", name]:
                wnid = truth.get(name, "")
                splits["val"].append(item._replace(label=_label_of(wnid, label, item, path)))
            case ["test", *_]:
                left["test image without a class"] += [item.name]
            case _:
                pass  # no image of a split
    classes = tuple(f"{wnid} {words.get(wnid, '')}".strip() for wnid in ids)
    return Source("tiny_imagenet", classes, splits, notes=_note(left))


def _label_of(wnid: str, label: Mapping[str, int], item: Item, path: Path) -> int:
    if wnid not in label:
        raise DatasetError(f"{path}: {item.name} has the class {wnid!r}, which is not in wnids.txt")
    return label[wnid]


def _visible(listing: Listing, left: _LeftOut) -> Listing:
    """Return a listing without what is hidden and without data sets that were packed into it, which
    are added to `left`."""

    def root(name: str) -> str:
        parts = name.split("/")
        return "/".join(parts[: 1 + next(i for i, part in enumerate(parts) if hidden(part))])

    names = [*(item.name for item in listing.files), *listing.folders]
    left["hidden"] += sorted({root(name) for name in names if hidden(name)})
    files = {item.name for item in listing.files if not hidden(item.name)}
    tops = {name.removesuffix("dataset.json") for name in files if name.endswith("/dataset.json")}
    packed = tuple(sorted(top for top in tops if f"{top}mean.npy" in files))
    left["packed data set"] += packed
    return Listing(
        [item for item in listing.files if item.name in files and not item.name.startswith(packed)],
        [name for name in listing.folders if not (hidden(name) or f"{name}/".startswith(packed))],
    )


def _unwrapped(listing: Listing, left: _LeftOut) -> Listing:
    """Return the contents of the single folder that an archive often holds; else the listing."""
    while (
        len(tops := listing.tops()) == 1
        and tops[0].lower() not in SPLIT_FOLDERS
        and any(item.name.count("/") > 1 for item in listing.files)
    ):
        left[f"beside {tops[0]}/"] += [i.name for i in listing.files if "/" not in i.name]
        listing = listing.below(f"{tops[0]}/")
    return listing


def _split_folders(path: Path, tops: Sequence[str]) -> dict[str, str]:
    """Return the folder of each split, `NAME/`; empty where the top level has none, but classes."""
    found: dict[str, str] = {}
    for top in tops:
        split = SPLIT_FOLDERS.get(top.lower())
        if split in found:
            raise DatasetError(
                f"{path}: {found[split]}/ and {top}/ both hold {split} images: move one away"
            )
        if split:
            found[split] = top
    if found and "train" not in found:
        raise DatasetError(
            f"{path}: has {', '.join(found.values())}/, but no folder train/: {_LAY}"
        )
    return {split: f"{found[split]}/" for split in ("train", "val", "test") if split in found}


def _images(part: Listing, start: str, left: _LeftOut) -> list[tuple[str, Item]]:
    """Return the class and the image of each file of a split.

    Args:
        start: the split's folder, with `/`; empty where classes are at the top level.
        left: files and folders that are left out are added to it.
    """
    found, loose, others = [], [], []
    for item in part.files:
        name, below, _ = item.name.partition("/")
        shown = item._replace(name=f"{start}{item.name}")
        if not below:
            loose.append(shown.name)
        elif item.refused or _is_image(item):
            found.append((name, shown))
        else:
            others.append(shown.name)
    left["beside class folders"] += loose
    left["no image, by its first bytes"] += others
    held = {name for name, _ in found}
    empty = [f"{start}{name}/" for name in part.tops() if name not in held]
    left["without images"] += empty or ([] if found or not start else [start])
    return found


def _classes(images: Sequence[tuple[str, Item]]) -> set[str]:
    """Return the classes that have an image; a refused file's name may be anything."""
    return {name for name, item in images if not item.refused}


def _is_image(item: Item) -> bool:
    """Whether a file claims to be an image, by its name, which may be wrong, or its first bytes."""
    if item.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    first = item if item.packing == "zip" else item._replace(size=min(item.size, _FIRST))
    try:
        return _STARTS.match(read_content(first, MOST_ENCODED)) is not None
    except (OSError, ValueError):
        return True  # packing it reports why it cannot be read


def _check_classes(
    path: Path, classes: Sequence[str], found: Mapping[str, Sequence[tuple[str, Item]]],
    starts: Mapping[str, str],
) -> None:  # fmt: skip
    """Raise DatasetError where there are fewer than two classes, or a split has others than train.

    Args:
        found: the class and image of each file, by split.
        starts: the folder of each split, with `/`; empty where classes are at the top level.
    """
    where = path / starts["train"]
    if not classes:
        shards = path.suffix == ".tar" or any(path.rglob("*.tar"))
        how = "; for images in shards of WebDataset, see docs/extending.md" if shards else ""
        raise DatasetError(f"{where}: none of its folders holds images: {_LAY}{how}")
    if len(classes) == 1:
        raise DatasetError(
            f"{where}: has only one class, {classes[0]}, but a network needs two to tell apart: "
            f"{_LAY}"
        )
    for split, images in found.items():
        for name in sorted(_classes(images) - {*classes}):
            there = path / starts[split] / name
            raise DatasetError(f"{there}: {starts['train']} has no such class")


def _with_validation(
    path: Path, splits: Mapping[str, list[Item]], share: float, start: str
) -> dict[str, list[Item]]:
    """Move a share of `train` to `val`, by the hash of each name below the folder `start`."""
    if "val" in splits:
        raise DatasetError(
            f"--validation {share:g}: {path} has its own validation images: leave the option out"
        )
    cut: dict[str, list[Item]] = {"train": [], "val": []}
    for item in splits["train"]:
        name = item.name.removeprefix(start).encode("utf-8", "surrogateescape")
        uniform = int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64
        cut["val" if uniform < share else "train"].append(item)
    if not all(cut.values()):
        raise DatasetError(
            f"--validation {share:g}: would take {len(cut['val'])} of {len(splits['train'])} "
            "images: some must be left to train on, and some to validate on"
        )
    return {**splits, **cut}
