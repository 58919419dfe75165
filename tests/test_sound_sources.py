"""What `prepare` must not accept in silence: swapped files, damaged images, sources with gaps."""

import contextlib
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from conftest import alexnet_dist
from PIL import Image

from alexnet_dist.data.dataset import open_dataset, verify_shards
from alexnet_dist.data.prepare import packing, shards
from alexnet_dist.data.prepare import prepare as prepare_module
from alexnet_dist.data.prepare.convert import RefusedImage, convert
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.errors import DatasetError
from alexnet_dist.files import sha256
from alexnet_dist.parallel.topology import Topology

ONE = Options(workers=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two photographs of one size in each class of `train`, one in `val`."""
    for split, count in (("train", 2), ("val", 1)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 10 * label + number + 100 * (split == "val")
                (folder / f"{number}.bmp").write_bytes(made.encoded(made.photograph(seed), "BMP"))
    return tmp_path / "source"


def swap(one: Path, other: Path) -> None:
    """As `mv` does it: no time of theirs changes but that of the renaming."""
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the items whose bytes `prepare` reads from now on."""
    names: list[str] = []
    real = shards.read_content

    def counted(item: Any, most: int) -> bytes:
        names.append(item.name)
        return real(item, most)

    monkeypatch.setattr(shards, "read_content", counted)
    return names


# --- other bytes under the same names


def test_swapped_files_of_one_size_are_another_source(source: Path, tmp_path: Path) -> None:
    prepare("folder", source, tmp_path / "out", ONE)
    assert "already prepared from these files" in prepare("folder", source, tmp_path / "out", ONE)
    swap(source / "train/ant/0.bmp", source / "train/bee/1.bmp")
    found = r"out holds .* other files: their bytes differ between 'train/ant/0\.bmp' and 'train/be"
    with pytest.raises(DatasetError, match=found):
        prepare("folder", source, tmp_path / "out", ONE)
    swap(source / "train/ant/0.bmp", source / "train/bee/1.bmp")
    assert "already prepared from these files" in prepare("folder", source, tmp_path / "out", ONE)
    changed = source / "val/ant/0.bmp"
    times = changed.stat()
    changed.write_bytes(changed.read_bytes()[:-3] + b"abc")
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DatasetError, match=r"differ between 'val/ant/0\.bmp' and 'val/bee/0\.bmp'"):
        prepare("folder", source, tmp_path / "out", ONE)


def test_a_source_that_was_moved_or_copied_is_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("folder", source, tmp_path / "out", ONE)
    names = read(monkeypatch)
    source.rename(tmp_path / "moved")
    assert "already" in prepare("folder", tmp_path / "moved", tmp_path / "out", ONE)
    assert not names, "nothing is read of what was only moved"
    shutil.copytree(tmp_path / "moved", tmp_path / "copied", copy_function=shutil.copy)
    for _ in range(2):
        assert "already" in prepare("folder", tmp_path / "copied", tmp_path / "out", ONE)
    assert len(names) == 6, "what was copied is read once"


def test_a_data_set_from_before_bytes_were_compared_stays(source: Path, tmp_path: Path) -> None:
    prepare("folder", source, tmp_path / "out", ONE)
    digest = open_dataset(tmp_path / "out").digest
    (tmp_path / "out/.source.json").unlink()
    said = prepare("folder", source, tmp_path / "out", ONE)
    assert said.endswith("already prepared from files of these names and sizes, and complete")
    assert open_dataset(tmp_path / "out").digest == digest


# --- an unfinished preparation


@pytest.fixture
def unfinished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, str]]:
    """OUT.partial with all parts made; and the shards' hashes."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "merge", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare("folder", source, tmp_path / "out", ONE)
    prepare("folder", source, tmp_path / "whole", ONE)
    aside = tmp_path / "out.partial"
    return aside, {p.name: sha256(p) for p in sorted((tmp_path / "whole/train").glob("*.tar"))}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: flip(p / "train/shard-00000.tar", 700),
        lambda p: flip(p / "train/.shard-00000.npz", 200),
        lambda p: flip(p / "train/.shard-00000.npz", -300),
        lambda p: flip(p / "train/.shard-00000.npz", 300_000),
        lambda p: (p / "train/.shard-00000.npz").write_bytes(b""),
        lambda p: os.truncate(p / "train/.shard-00000.npz", 1000),
        lambda p: (p / "train/shard-00000.tar").unlink(),
        lambda p: shutil.copy(p / "val/.shard-00000.npz", p / "train/.shard-00000.npz"),
    ],
    ids=["tar", "header", "directory", "sums", "empty", "cut", "no tar", "another's"],
)
def test_a_damaged_part_is_made_again(
    unfinished: tuple[Path, dict[str, str]], damage: Callable[[Path], object], source: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    aside, whole = unfinished
    damage(aside)
    prepare("folder", source, tmp_path / "out", ONE)
    dataset, other = open_dataset(tmp_path / "out"), tmp_path / "whole"
    verify_shards(dataset, Topology())
    assert {p.name: sha256(p) for p in (tmp_path / "out/train").glob("*.tar")} == whole
    assert dataset.digest == open_dataset(other).digest


def test_a_part_of_other_bytes_is_made_again_and_a_copys_is_not(
    unfinished: tuple[Path, dict[str, str]], source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    swap(source / "train/ant/0.bmp", source / "train/bee/1.bmp")
    shutil.copytree(tmp_path / "out.partial", tmp_path / "copied.partial")
    prepare("folder", source, tmp_path / "out", ONE)
    prepare("folder", source, tmp_path / "anew", ONE)
    found = open_dataset(tmp_path / "out").digest
    assert found == open_dataset(tmp_path / "anew").digest
    assert found != open_dataset(tmp_path / "whole").digest
    swap(source / "train/ant/0.bmp", source / "train/bee/1.bmp")
    shutil.copytree(source, tmp_path / "elsewhere", copy_function=shutil.copy)
    monkeypatch.setattr(packing, "write_shard", None)
    prepare("folder", tmp_path / "elsewhere", tmp_path / "copied", ONE)


@pytest.mark.parametrize("name", [".lock", ".begun.json", "train/shard-00000.tar", "mean.npy",
                                  "train/samples.npy", "dataset.json"])  # fmt: skip
def test_no_link_or_pipe_in_an_unfinished_folder_is_followed(
    name: str, unfinished: tuple[Path, dict[str, str]], source: Path, tmp_path: Path
) -> None:
    aside, _ = unfinished
    shutil.copytree(aside, tmp_path / "piped.partial")
    (tmp_path / "precious").write_bytes(b"precious")
    (aside / name).unlink(missing_ok=True)
    (aside / name).symlink_to(tmp_path / "precious")
    (tmp_path / "piped.partial" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "piped.partial" / name)
    for out in ("out", "piped"):
        arguments = ["prepare", "folder", str(source), str(tmp_path / out), "--workers", "1"]
        said = alexnet_dist(*arguments)  # a process, for it may wait
        if said.returncode:
            last = said.stderr.splitlines()[-1]
            assert last.startswith("alexnet-dist: "), said.stderr
            assert f"{name} is a " in last or "begun from other files" in last, said.stderr
    assert (tmp_path / "precious").read_bytes() == b"precious"


# --- names, and sources with gaps


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"b\xff", r"'b\\udcff'"), (b"b\x1b[2J", r"'b\\x1b\[2J'"), (b"b\nc", r"'b\\nc'"),
     ("b\u2028".encode(), r"'b\\u2028'")],
    ids=["bytes", "escape", "line", "separator"],
)  # fmt: skip
def test_a_class_whose_name_cannot_be_shown_is_refused(
    name: bytes, shown: str, source: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        (source / split / "bee").rename(source / split / os.fsdecode(name))
    with pytest.raises(DatasetError, match=rf"the class {shown} has a name that is not UTF-8"):
        prepare("folder", source, tmp_path / "out", ONE)
    assert not (tmp_path / "out.partial").exists()
    for split in ("train", "val"):
        (source / split / os.fsdecode(name)).rename(source / split / "żółw 亀\u200d\u00a0🐢")
    assert "packed" in prepare("folder", source, tmp_path / "out", ONE)


def without(path: Path, name: str, twice: str = "") -> None:
    """The tar at a path without a member, or with one member twice."""
    import tarfile

    out = io.BytesIO()
    with tarfile.open(path) as before, tarfile.open(fileobj=out, mode="w") as after:
        for member in before:
            for _ in range(2 if member.name == twice else member.name != name):
                after.addfile(member, before.extractfile(member))
    path.write_bytes(out.getvalue())


def test_imagenets_tars_must_have_what_the_devkit_counts(tmp_path: Path) -> None:
    whole = made.imagenet(tmp_path / "whole", 2, 5)
    wnid, val = made.WNIDS[2], "ILSVRC2012_val_00000004.JPEG"
    for tar, name, twice, said in (
        (
            "train",
            f"{wnid}.tar",
            "",
            rf"img_train\.tar: 1 of .* classes are missing \({wnid}\.tar\): ",
        ),
        ("train", "", f"{wnid}.tar", rf"img_train\.tar: '{wnid}\.tar' is in it twice"),
        ("val", val, "", rf"img_val\.tar: 1 of the devkit's 5 .* are missing \({val}\)"),
        ("val", "", val, r"img_val\.tar: has 6 images, not 5"),
    ):
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "source")
        without(tmp_path / f"source/ILSVRC2012_img_{tar}.tar", name, twice)
        with pytest.raises(DatasetError, match=said):
            prepare("imagenet", tmp_path / "source", tmp_path / "out", ONE)


# --- images


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


PHOTOGRAPH = made.photograph(7, 96, 80)
DEEP = np.linspace(0, 2**31 - 1, 96 * 80).reshape(80, 96)


def half(**how: Any) -> bytes:
    content = made.encoded(PHOTOGRAPH, quality=92, **how)
    return content[: len(content) // 2] + b"\xff\xd9"


def tiff(**how: Any) -> bytes:
    return made.encoded(PHOTOGRAPH, "TIFF", **how)


def deep_tiff(array: np.ndarray, bits: int, kind: int, photometric: int = 1) -> bytes:
    """A grey TIFF of one strip, whatever its samples are."""
    tags = [(256, 96), (257, 80), (258, bits), (259, 1), (262, photometric), (273, 200), (277, 1),
            (278, 80), (279, array.nbytes), (339, kind)]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return head.ljust(200, b"\0") + array.tobytes()


def taken(content: bytes, places: Iterable[int]) -> bytes:
    """The image with the first of these bytes flipped that Pillow takes, and shows otherwise."""
    right = np.asarray(Image.open(io.BytesIO(content)))
    for at in places:
        changed = flipped(content, at)
        with contextlib.suppress(Exception):
            if (np.asarray(Image.open(io.BytesIO(changed))) != right).any():
                return changed
    raise AssertionError("Pillow notices all of them")


PNG = made.encoded(PHOTOGRAPH, "PNG")
TIFF = tiff(compression="tiff_adobe_deflate")
BAD = {
    "half a JPEG": (half(), "the JPEG is cut short: copy it again"),
    "half a progressive JPEG": (half(progressive=True), "the JPEG is cut short"),
    "half a JPEG with restarts": (half(restart_marker_rows=1), "the JPEG is cut short"),
    "all but a JPEG's last bytes": (
        made.encoded(PHOTOGRAPH, quality=92)[:-8] + b"\xff\xd9", "the JPEG is cut short"
    ),
    "a flipped PNG": (
        taken(PNG, range(len(PNG) - 20, 0, -1)), "chunk IDAT at byte .* match its checksum"
    ),
    "a PNG with a chunk of no name": (
        PNG.replace(b"IEND", b"IE\n\x1b"), r"chunk IE\\n\\x1b at byte .* match its checksum"
    ),
    "a PNG without its end": (made.encoded(PHOTOGRAPH, "PNG")[:-12], "the PNG is cut short"),
    "a flipped TIFF": (taken(TIFF, range(200, len(TIFF))), "the TIFF is damaged .*: copy it"),
    "int32": (
        made.encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        "a TIFF of 32 bits a sample, signed or floating: which value is white .* save it with 8",
    ),
    "uint32": (deep_tiff(DEEP.astype("<u4"), 32, 1), "a TIFF of 32 bits a sample, unsigned: "),
    "int16": (deep_tiff((DEEP / 2**16).astype("<i2"), 16, 2), "a TIFF of 16 bits .*, signed"),
    "int8": (deep_tiff((DEEP / 2**24).astype("i1"), 8, 2), "a TIFF of 8 bits .*, signed"),
    "float": (made.encoded(Image.fromarray(DEEP.astype("f")), "TIFF"), "of 32 bits .* floating"),
    "white at 0": (deep_tiff((DEEP / 2**16).astype("<u2"), 16, 1, 0), "unsigned, white at 0: "),
}  # fmt: skip


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_an_image_that_would_be_another_picture_is_refused(
    content: bytes, said: str, keep: bool
) -> None:
    Image.open(io.BytesIO(content)).load()  # Pillow takes it
    with pytest.raises(RefusedImage, match=said):
        convert(content, keep)


def test_no_flipped_bit_of_a_png_is_packed() -> None:
    sound = made.encoded(made.photograph(1, 30, 20), "PNG")
    convert(sound, keep=True)
    for at in range(len(sound)):
        with pytest.raises(RefusedImage):
            convert(flipped(sound, at), keep=True)


@pytest.mark.parametrize("keep", [False, True])
def test_a_tiff_is_turned_once(keep: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = convert(tiff(exif=exif), keep).image
    upright = PHOTOGRAPH.transpose(Image.Transpose.ROTATE_270)
    expected = convert(made.encoded(upright, "TIFF"), keep)
    assert torch.equal(found, expected.image)


def test_inks_without_adobes_marker_are_no_negative() -> None:
    inks = made.encoded(PHOTOGRAPH.convert("CMYK"), quality=95)
    at = inks.index(b"\xff\xee")
    plain = inks[:at] + inks[at + 2 + struct.unpack_from(">H", inks, at + 2)[0] :]
    negative = made.encoded(Image.eval(PHOTOGRAPH.convert("CMYK"), lambda v: 255 - v), quality=95)
    at = negative.index(b"\xff\xee")
    bare = negative[:at] + negative[at + 2 + struct.unpack_from(">H", negative, at + 2)[0] :]
    right = convert(inks, keep=True).image.float()  # Adobe's are inverted, and so Pillow reads them
    assert (convert(bare, keep=True).image.float() - right).abs().mean() < 3
    assert (convert(plain, keep=True).image.float() - right).abs().mean() > 40


def test_good_images_of_each_kind_are_packed_as_before() -> None:
    deep = (DEEP / 2**16).astype("<u2") * 2
    sixteen = convert(deep_tiff(deep, 16, 1), keep=True).image[0]
    assert np.array_equal(sixteen, np.rint(deep / 257).astype(np.uint8))
    for how in ({}, {"compression": "tiff_adobe_deflate"}, {"compression": "tiff_lzw"}):
        image = convert(tiff(**how), keep=True).image.movedim(0, -1)
        assert np.array_equal(image, np.asarray(PHOTOGRAPH)), how
    odd = made.encoded(PHOTOGRAPH, quality=92)
    for content in (odd + b"a trailer", odd[:-2] + bytes(20) + b"\xff\xd9"):
        assert convert(content, keep=True).encoded == content, "libjpeg warns, and all is there"


# --- archives


def test_a_zips_checksums_are_compared(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "source.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(source.rglob("*.bmp")):
            archive.write(path, path.relative_to(source))
    assert "packed 4 train" in prepare("folder", packed, tmp_path / "out", ONE)
    flip(packed, 5000)  # a pixel of a stored file
    with pytest.raises(
        DatasetError, match=r"train/ant/0\.bmp': does not match its checksum in the"
    ):
        prepare("folder", packed, tmp_path / "out2", Options(workers=1, max_bad=0))


def test_gzips_checksums_are_compared(tmp_path: Path) -> None:
    folder = made.write_idx(tmp_path / "idx", 20, 10)
    prepare("fashion_mnist", folder, tmp_path / "out", ONE)
    whole = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(whole.read_bytes())
    content[-6] ^= 1  # of its CRC-32
    whole.write_bytes(content)
    with pytest.raises(DatasetError, match="CRC check failed"):
        prepare("fashion_mnist", folder, tmp_path / "out2", ONE)
    assert json.loads((tmp_path / "out/.source.json").read_text())["shards"]
