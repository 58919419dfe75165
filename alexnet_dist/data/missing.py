"""The error for a `data.path` that is not a packed data set, worded by what lies there instead."""

import os
import shlex
from pathlib import Path

from alexnet_dist.config.load import configs_folder
from alexnet_dist.errors import DatasetError, looked_in

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff",
    ".heic", ".heif", ".avif",  # refused, by name: telephones make them
)  # fmt: skip
# Names, in any case, of folders that hold one split's images.
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
PARTIAL = ".partial"  # ends the name of a folder in which `prepare` has not finished
_LOOKED_AT = 10_000  # names read to tell whether a folder holds images


def not_packed(folder: Path) -> DatasetError:
    """Return the error for a folder that has no dataset.json.

    The folder may be the user's own: no remedy given here may remove anything in it.
    """
    path = folder / "dataset.json"
    if folder.name.endswith(PARTIAL):
        whole = folder.with_name(folder.name.removesuffix(PARTIAL))
        return DatasetError(
            f"{folder}: not finished: run the same `alexnet-dist prepare` again, which continues, "
            f"and name {whole}"
        )
    if images := _first_image(folder):
        # A folder with images of its own may be a class, and its parent train/.
        near = (folder,) if "/" in images else (folder, folder.parent)
        root = next((p.parent for p in near if _split_of(p) == "train"), folder)
        root = root if root.name else root.resolve()
        line = ["alexnet-dist", "prepare", "folder", f"{root}", f"{root}-packed"]
        if not {"val", "test"} & {_split_of(p) for p in root.iterdir()}:
            line += ["--validation", "0.1"]
        return DatasetError(
            f"{folder}{looked_in(folder)}: holds images ({images}), not a packed data set: pack "
            f"them with `{shlex.join(line)}`, if each class has a folder of its own, and set "
            + shlex.quote(f"data.path={root}-packed")
        )
    demo = f"fashion_mnist {shlex.quote(str(configs_folder() / 'fashion-mnist-sample'))}"
    source = demo if folder == Path("data/demo") else "SOURCE PATH"
    out = "OUT` and set data.path=OUT" if folder.exists() else f"{shlex.quote(str(folder))}`"
    return DatasetError(
        f"{path} is missing{looked_in(path)}: make the data set with `alexnet-dist prepare "
        f"{source} {out}, or set data.path to where it is"
    )


def _split_of(path: Path) -> str | None:
    return SPLIT_FOLDERS.get(path.name.lower())


def _first_image(folder: Path) -> str:
    """Return the path, relative to the folder, of the first image that a short search finds in it;
    an empty string where it finds none."""
    left = _LOOKED_AT
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names)[:left]:
            # `inspect` draws a contact sheet beside the data set.
            if name.lower().endswith(IMAGE_SUFFIXES) and name != "contact-sheet.png":
                return f"{Path(root, name).relative_to(folder)}"
        left -= len(folders) + len(names)
        if left <= 0:
            break
    return ""
