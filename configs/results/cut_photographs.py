"""Cut ImageNet-like images from Debian's wallpapers: real colour JPEGs to train and measure on.

    apt-get install plasma-workspace-wallpapers gnome-backgrounds mate-backgrounds \
        ukui-wallpapers lomiri-wallpapers-20.04
    python configs/results/cut_photographs.py data/photographs-cut

OUT/train/PHOTOGRAPH/000.JPEG, OUT/val/PHOTOGRAPH/000.JPEG: patches of 500 × 375 pixels (as most
of ImageNet's), labelled by the photograph they are cut from, never overlapping. Flat patches
are left out, as they are nothing like ImageNet's 110 KB a file. The same files give the same bytes.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

FOLDERS = ("/usr/share/wallpapers", "/usr/share/backgrounds")
WIDTH, HEIGHT = 500, 375
LEAST_BYTES = 30_000  # at quality 95
LEAST_PATCHES = 10
VALIDATION = 5  # one patch in so many


def photographs() -> list[Path]:
    """Large pictures, each once however many names it has, the largest of each folder."""
    found: dict[str, tuple[int, Path]] = {}
    for folder in FOLDERS:
        for path in sorted({p.resolve() for p in Path(folder).rglob("*") if p.is_file()}):
            if path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
                continue
            parts = path.relative_to(folder).parts
            name = parts[0] if "contents" in parts else path.stem.split("_")[0]
            with Image.open(path) as image:
                area = image.width * image.height
            if area > found.get(name, (WIDTH * HEIGHT * LEAST_PATCHES, None))[0]:
                found[name] = (area, path)
    return [path for _, (_, path) in sorted(found.items())]


def patches(path: Path) -> Iterator[bytes]:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    for top in range(0, image.height - HEIGHT + 1, HEIGHT):
        for left in range(0, image.width - WIDTH + 1, WIDTH):
            out = io.BytesIO()
            image.crop((left, top, left + WIDTH, top + HEIGHT)).save(out, "JPEG", quality=95)
            if out.tell() >= LEAST_BYTES:
                yield out.getvalue()


def cut(out: Path) -> None:
    total = 0
    for path in photographs():
        found = list(patches(path))
        if len(found) < LEAST_PATCHES:
            continue
        name = path.parts[4] if "contents" in path.parts else path.stem
        for number, encoded in enumerate(found):
            split = "train" if number % VALIDATION else "val"
            (out / split / name).mkdir(parents=True, exist_ok=True)
            (out / split / name / f"{number:03d}.JPEG").write_bytes(encoded)
        total += len(found)
        print(f"{name}: {len(found)} patches of {sum(map(len, found)) // len(found) // 1000} KB")
    print(f"{out}: {total} images")


if __name__ == "__main__":
    cut(Path(sys.argv[1]))
