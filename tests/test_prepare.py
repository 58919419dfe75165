"""Packing any source: what is converted, what is refused, and what survives a kill."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forks
import made
import numpy as np
import pytest
import torch
from conftest import alexnet_dist, in_a_fork
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import decode_image

from alexnet_dist.cli.main import build_parser
from alexnet_dist.data.dataset import open_dataset, verify_shards
from alexnet_dist.data.header import size_of
from alexnet_dist.data.inspect import inspect
from alexnet_dist.data.prepare import convert as convert_module
from alexnet_dist.data.prepare import packing
from alexnet_dist.data.prepare import prepare as prepare_module
from alexnet_dist.data.prepare.arrays import read_pickle
from alexnet_dist.data.prepare.convert import RefusedImage, convert
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.prepare.sources import Item, Source
from alexnet_dist.errors import DatasetError, MachineError
from alexnet_dist.files import within_memory
from alexnet_dist.parallel.topology import Topology

ONE = Options(workers=1)


def pixels(dataset: Path, split: str, sample: int) -> torch.Tensor:
    """(1 or 3, h, w) uint8 of a packed sample."""
    found = open_dataset(dataset).splits[split].read(sample)
    return decode_image(torch.frombuffer(found, dtype=torch.uint8))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells which files of the source were read, and when these were
    written."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".source.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --- sources


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.imagenet(tmp_path_factory.mktemp("imagenet") / "downloaded", 6, 8)


def test_imagenet_is_read_in_place_from_its_tars(imagenet: Path, tmp_path: Path) -> None:
    said = prepare("imagenet", imagenet, tmp_path / "out", ONE)
    assert "packed 24 train, 8 val images of 4 classes" in said
    dataset = open_dataset(tmp_path / "out")
    verify_shards(dataset, Topology())
    # In the order of WordNet ids, as PyTorch numbers ImageNet's classes.
    assert [name.split()[0] for name in dataset.classes] == sorted(made.WNIDS)
    assert dataset.classes[0] == "n01440764 tench, Tinca tinca"
    assert dataset.splits["train"].uniform(256)
    assert dataset.splits["train"].within(256)
    train = dataset.splits["train"].labels(np.arange(24))
    assert train.tolist() == [sorted(made.WNIDS).index(w) for w in made.WNIDS for _ in range(6)]
    # The ground truth is of the images' numbers, whatever their order in the tar.
    val = dataset.splits["val"].labels(np.arange(8))
    assert val.tolist() == [sorted(made.WNIDS).index(made.WNIDS[i % 4]) for i in range(8)]
    ours = pixels(tmp_path / "out", "val", 5).float().mean((1, 2))
    centre = np.asarray(made.photograph(9005), np.float32)[:, 15:105]
    np.testing.assert_allclose(ours, centre.mean((0, 1)), atol=1.5)


def test_cifar10_is_packed_as_it_is(tmp_path: Path) -> None:
    source = made.cifar10(tmp_path / "source", 7, 5)
    for path in (source, source / "cifar-10-batches-py"):
        out = tmp_path / f"out-{path.name}"
        assert "packed 35 train, 5 test images of 10" in prepare("cifar10", path, out, ONE)
    with tarfile.open(source / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(source / "cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree(source / "cifar-10-batches-py")
    prepare("cifar10", source, tmp_path / "out-packed", ONE)
    assert contents(tmp_path / "out-packed") == contents(tmp_path / "out-source")
    dataset = open_dataset(tmp_path / "out-source")
    assert dataset.classes[3] == "cat"
    for split, sample, seed in (("train", 9, 52), ("test", 3, 253)):
        expected = torch.from_numpy(np.array(made.photograph(seed, 32, 32))).movedim(-1, 0)
        assert torch.equal(pixels(tmp_path / "out-source", split, sample), expected)
    assert dataset.splits["train"].labels(np.array([9])) == [3]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("imagenet", lambda p: (p / "ILSVRC2012_img_val.tar").unlink(), r"img_val\.tar is missing"),
        ("imagenet", lambda p: (p / "ILSVRC2012_img_train.tar").write_bytes(b"x" * 2000), "cannot"),
        ("imagenet", lambda p: made.tar_of(p / "ILSVRC2012_devkit_t12.tar.gz", {"x": b""}, "w:gz"),
         "is not ILSVRC-2012's devkit"),
        ("imagenet", lambda p: made.tar_of(p / "ILSVRC2012_img_train.tar", {"n1.tar": b""}),
         r"'n1\.tar' is not one of the devkit's"),
        ("imagenet", lambda p: made.tar_of(p / "ILSVRC2012_img_val.tar", {"cat.JPEG": b"x"}),
         r"'cat\.JPEG': not one of the devkit's"),
        ("cifar10", lambda p: (p / "cifar-10-batches-py/data_batch_3").unlink(),
         "is missing: it is one"),
        ("cifar10", lambda p: (p / "cifar-10-batches-py/data_batch_3").write_bytes(b"x"),
         "data_batch_3 is not a pickle of CIFAR-10"),
        ("folder", lambda p: shutil.rmtree(p / "train"), "no folder train/"),
        ("folder", lambda p: [shutil.rmtree(c) for c in (p / "train").iterdir()],
         "none of its folders"),
        ("folder", shutil.rmtree, "there is no such file or folder"),
    ],
)  # fmt: skip
def test_a_source_that_is_not_whole_is_named(
    tmp_path: Path, kind: str, change: Callable[[Path], Any], message: str
) -> None:
    make: dict[str, Callable[[Path], Path]] = {
        "imagenet": lambda p: made.imagenet(p, 1, 4),
        "cifar10": lambda p: made.cifar10(p, 1, 1),
        "folder": lambda p: made.image_folder(p, 1, 1),
    }
    source = make[kind](tmp_path / "source")
    change(source)
    with pytest.raises(DatasetError, match=message) as caught:
        prepare(kind, source, tmp_path / "out", ONE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- hostile sources


class Runs:
    """What a hostile pickle does: run something when it is read."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/alexnet-dist-was-here",))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, protocol: int) -> None:
    source = made.cifar10(tmp_path / "source", 1, 1)
    hostile = pickle.dumps({b"data": Runs(), b"labels": [1]}, protocol=protocol)
    (source / "cifar-10-batches-py" / "data_batch_2").write_bytes(hostile)
    with pytest.raises(DatasetError, match=r"data_batch_2 is not .*it asks for posix\.system"):
        prepare("cifar10", source, tmp_path / "out", ONE)
    assert not Path("/tmp/alexnet-dist-was-here").exists()


@given(st.binary(max_size=80))
def test_any_bytes_are_a_dictionary_or_a_dataset_error(content: bytes) -> None:
    with contextlib.suppress(DatasetError):
        assert isinstance(read_pickle(content, "fuzz"), dict)


def hostile_tar(path: Path) -> None:
    """An inner tar with a good image, and members that would leave the folder if extracted."""
    good = made.encoded(made.photograph(1))
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("good.JPEG", tarfile.REGTYPE), ("/tmp/absolute.JPEG", tarfile.REGTYPE),
            ("../../up.JPEG", tarfile.REGTYPE), ("link.JPEG", tarfile.SYMTYPE),
            ("hard.JPEG", tarfile.LNKTYPE), ("device.JPEG", tarfile.CHRTYPE),
            ("pipe.JPEG", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(good) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(good) if member.size else None)


def of_members() -> set[Path]:
    """What is in /tmp under a name that one of `hostile_tar`'s members has."""
    return {
        path for path in Path("/tmp").iterdir() if path.suffix == ".JPEG" or path.name == "folder"
    }


def test_hostile_members_are_refused_by_name_and_nothing_is_written_outside(tmp_path: Path) -> None:
    source = made.imagenet(tmp_path / "source", 2, 4)
    hostile_tar(tmp_path / "inner.tar")
    first, *others = (f"{wnid}.tar" for wnid in made.WNIDS)
    members = {first: (tmp_path / "inner.tar").read_bytes()} | dict.fromkeys(others, made.NOTHING)
    made.tar_of(source / "ILSVRC2012_img_train.tar", members)
    before = set(tmp_path.parent.rglob("*")) | of_members()
    said = prepare("imagenet", source, tmp_path / "out", Options(workers=1, max_bad=0.9))
    after = set(tmp_path.parent.rglob("*")) | of_members()
    assert all(tmp_path / "out" in (p, *p.parents) for p in after - before)
    assert "packed 1 train, 4 val images of 4 classes; 6 refused" in said
    assert "more images in val than in train: are they swapped?" in said
    refused = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    reasons = {entry["name"]: entry["reason"] for entry in refused}
    for name in ("link.JPEG", "hard.JPEG", "device.JPEG", "pipe.JPEG"):
        assert reasons[name] == "a link, device or hole in the archive, not a file"
    for name in ("/tmp/absolute.JPEG", "../../up.JPEG"):
        assert reasons[name] == "a name that leads out of its folder"


# --- oddities


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def test_what_decoders_read_differently_is_settled_once() -> None:
    image = made.photograph(3, 300, 300)
    plain = torch.from_numpy(np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC)).copy())
    grey16 = (np.asarray(image.convert("L"), np.uint16) * 257).astype(np.uint16)
    clear = image.copy()
    clear.putalpha(255)
    odd = {
        "PNG named JPEG": made.encoded(image, "PNG"),
        "CMYK, Adobe's inverted": made.encoded(image.convert("CMYK"), "JPEG", quality=98),
        "opaque alpha": made.encoded(clear, "PNG"),
        "palette": made.encoded(image.quantize(256), "PNG"),
        "broken EXIF": made.encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=98),
        "BMP": made.encoded(image, "BMP"),
        "WEBP": made.encoded(image, "WEBP", quality=98),
    } | {
        f"turned by EXIF {o}": made.encoded(turned(image, o), "JPEG", exif=exif(o), quality=98)
        for o in range(1, 9)
    }  # fmt: skip
    for name, content in odd.items():
        stored = convert(content, keep=False)
        assert (stored.kind, tuple(stored.image.shape)) == ("jpg", (3, 256, 256)), name
        difference = (stored.image.movedim(0, -1).float() - plain).abs().mean()
        assert difference < (9 if name == "palette" else 4), f"{name}: differs by {difference}"
    for content in (made.encoded(image.convert("L")), made.encoded(Image.fromarray(grey16), "PNG")):
        stored = convert(content, keep=False)
        assert stored.image.shape == (1, 256, 256)
        expected = 0.299 * plain[..., 0] + 0.587 * plain[..., 1] + 0.114 * plain[..., 2]
        assert (stored.image[0] - expected).abs().mean() < 3
    half = image.copy()
    half.putalpha(128)
    on_white = convert(made.encoded(half, "PNG"), keep=False).image.movedim(0, -1)
    assert (on_white - (plain * 0.5 + 127.5)).abs().mean() < 4
    for mode, black in (("1", 0), ("L", 0), ("I;16", 0), ("RGB", (0, 0, 0))):
        clear = made.encoded(Image.new(mode, (300, 300)), "PNG", transparency=black)
        assert (convert(clear, keep=False).image == 255).all(), mode


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera stores it that says so in EXIF."""
    flips = Image.Transpose
    stored = {
        1: [], 2: [flips.FLIP_LEFT_RIGHT], 3: [flips.ROTATE_180], 4: [flips.FLIP_TOP_BOTTOM],
        5: [flips.TRANSPOSE], 6: [flips.ROTATE_90], 7: [flips.TRANSVERSE], 8: [flips.ROTATE_270],
    }  # fmt: skip
    for flip in stored[orientation]:
        image = image.transpose(flip)
    return image


BMP_OF_25_BITS = made.encoded(made.photograph(1), "BMP").replace(b"\x18", b"\x19", 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, this is a text file, not an image", "not one of JPEG, PNG"),
        (made.encoded(made.photograph(1))[:-700], "the JPEG is cut short"),
        (made.encoded(made.photograph(1))[:300], "^the file is cut short: copy it again"),
        (made.encoded(made.photograph(1), "PNG")[:400], "the PNG is cut short"),
        (made.encoded(made.photograph(1), "BMP")[:-700], "^the file is cut short: copy it again"),
        (BMP_OF_25_BITS, r"^damaged, or .* Pillow cannot decode \(Unsupported BMP .*\): copy"),
        (made.png_of(60_000, 60_000), "too many pixels: Image size .3600000000 pixels. exceeds"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not one of JPEG, PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC or AVIF file.*: convert it to JPEG"),
    ],
    ids=["empty", "text", "truncated JPEG", "JPEG's header", "truncated PNG", "truncated BMP",
         "other BMP", "bomb", "PostScript", "HEIC"],
)  # fmt: skip
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_no_image_is_refused_with_its_reason(
    content: bytes, reason: str, keep: bool
) -> None:
    with pytest.raises(RefusedImage, match=reason):
        convert(content, keep)


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"])
)
def test_any_bytes_are_an_image_or_refused(content: bytes, start: bytes) -> None:
    with contextlib.suppress(RefusedImage):
        assert convert(start + content, keep=False).image.shape[1:] == (256, 256)


def many_scans(count: int) -> bytes:
    """A progressive JPEG, its last scan again and again."""
    whole = made.encoded(made.photograph(1), progressive=True)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + scan * (count - whole.count(b"\xff\xda")) + whole[-2:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (many_scans(2000), "a JPEG of more than 64 scans"),
        (b"\xff\xd8" + b"\xff\xe1\0\x08Exif\0\0" * 100_000, "a JPEG of more than 1000 segments"),
        (made.png_of(8193, 8192), "8193 × 8192 pixels: too many"),
    ],
    ids=["scans", "segments", "pixels"],
)
def test_one_image_takes_at_most_a_gigabyte_and_ten_seconds(content: bytes, reason: str) -> None:
    begin = time.process_time()
    with within_memory(5 * 2**28), pytest.raises(RefusedImage, match=reason):
        convert(content, keep=False)
    assert time.process_time() - begin < 10


def test_what_no_header_tells_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_a_decoder_may(content: bytes, keep: bool, enlarge: bool) -> tuple[str, bytes]:
        return "png", np.empty(2**33, np.uint8)[:0].tobytes()  # more than any heap kept

    monkeypatch.setattr(convert_module, "_convert", as_a_decoder_may)
    with pytest.raises(RefusedImage, match="it takes more than 1,073,741,824 bytes to read"):
        convert(b"any", keep=False)


def test_a_jpegs_size_is_what_pillow_reads_and_its_thumbnail_is_not_counted() -> None:
    plain = made.photograph(2, 64, 48)
    thumbnail = exif(1)
    thumbnail[0x9286] = made.encoded(plain, progressive=True) * 20  # as a comment
    for size in ((64, 48), (1, 300), (301, 2)):
        image = made.photograph(1, *size)
        for options in (
            {}, {"progressive": True}, {"exif": thumbnail}, {"restart_marker_rows": 1},
            {"subsampling": 2, "progressive": True, "comment": b"\xff\xda" * 99},
        ):  # fmt: skip
            for mode in ("RGB", "L", "CMYK"):
                content = made.encoded(image.convert(mode), **options)
                assert size_of(content) == (size[1], size[0]), (options, mode)
        assert size_of(made.encoded(image, "PNG")) == (size[1], size[0])
        for kind in ("GIF", "BMP", "WEBP", "TIFF"):
            with pytest.raises(ValueError, match="neither a JPEG nor a PNG"):
                size_of(made.encoded(image, kind))
    assert size_of(many_scans(64)) == (90, 120)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8", made.png_of(3, 4)[:20]]))
def test_any_bytes_have_a_size_or_none(content: bytes, start: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert len(size_of(start + content)) == 2


def test_large_images_are_converted_in_bands_to_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = made.photograph(3, 90, 70)
    grey16 = Image.fromarray((np.asarray(image.convert("L"), np.uint16) * 257).astype(np.uint16))
    half = image.copy()
    half.putalpha(100)
    odd = [made.encoded(grey16, "PNG"), made.encoded(half, "PNG"),
           made.encoded(image.quantize(50), "PNG", transparency=3),
           made.encoded(image.convert("1"), "PNG"), made.encoded(image.convert("CMYK"), "TIFF"),
           made.encoded(image, "PNG", transparency=(1, 2, 3))]  # fmt: skip
    whole = [convert(content, keep=True).encoded for content in odd]
    monkeypatch.setattr(convert_module, "BAND", 90 * 8)
    assert [convert(content, keep=True).encoded for content in odd] == whole


def test_a_long_image_kept_at_its_size_is_packed(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 1, 1)
    (source / "train/ant/thin.png").write_bytes(made.png_of(65535, 1))
    with within_memory(2**30):
        said = prepare("folder", source, tmp_path / "out", Options(workers=1, keep=True))
    assert "packed 4 train, 3 val" in said
    assert open_dataset(tmp_path / "out").splits["train"].index["width"].max() == 65535


def test_very_long_images_do_not_blow_up() -> None:
    thin = Image.fromarray(np.full((2, 60_000, 3), 90, np.uint8))
    image = convert(made.encoded(thin, "PNG"), keep=False, enlarge=True).image
    assert image.shape == (3, 256, 256)


def test_keep_keeps_sizes_and_plain_jpegs_bytes() -> None:
    image = made.photograph(4)
    plain = made.encoded(image)
    assert convert(plain, keep=True).encoded == plain
    sideways = convert(made.encoded(image, exif=exif(6)), keep=True)
    assert sideways.encoded != plain
    assert sideways.image.shape == (3, 120, 90)
    png = convert(made.encoded(image, "PNG"), keep=True)
    assert png.kind == "png"
    assert np.array_equal(png.image.movedim(0, -1), np.asarray(image))


NAMES = ["with space.JPEG", "with\nnewline.JPEG", "żółw 亀.JPEG", "no-ending"]


def test_odd_names_and_bad_images_are_quarantined_and_the_rest_is_packed(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 5, 2)
    for number, name in enumerate(NAMES):
        image = made.encoded(made.photograph(70 + number))
        (source / "train" / "bee" / name).write_bytes(image)
    (source / "train" / "cat" / "bad\nname é.JPEG").write_text("text")
    (source / "train" / "cat" / "folder.JPEG").mkdir()
    os.mkfifo(source / "train" / "cat" / "pipe.JPEG")
    (source / "train" / "cat" / "nowhere.JPEG").symlink_to("/nonexistent")
    undecodable = os.fsencode(source / "train" / "cat") + b"/\xff\xfe.JPEG"
    Path(os.fsdecode(undecodable)).write_bytes(b"")
    strict = alexnet_dist("prepare", "folder", str(source), str(tmp_path / "out"))
    assert strict.returncode == 1
    assert "--max-bad: 4 of 29 images cannot be packed, more than 2 ('train/cat/bad" in (
        strict.stderr
    )
    assert strict.stderr.endswith("name another OUT, or raise --max-bad to 0.14 or more\n")
    assert not (tmp_path / "out").exists()
    arguments = ["prepare", "folder", str(source), str(tmp_path / "out"), "--max-bad", "0.14"]
    said = alexnet_dist(*arguments)
    assert said.returncode == 0, said.stderr
    assert "packed 19 train, 6 val images of 3 classes; 4 refused" in said.stdout
    refused = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    names = [entry["name"] for entry in refused]
    assert "train/cat/bad\nname é.JPEG" in names
    assert os.fsdecode(b"train/cat/\xff\xfe.JPEG") in names
    assert "not one of JPEG, PNG" in refused[names.index("train/cat/bad\nname é.JPEG")]["reason"]


# --- statistics, readers of others


def test_statistics_are_numpys_over_all_training_pixels_in_colour(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 4, 1, (340, 256))
    prepare("folder", source, tmp_path / "out", ONE)
    statistics = open_dataset(tmp_path / "out").statistics
    images = np.stack([pixels(tmp_path / "out", "train", i).movedim(0, -1) for i in range(12)])
    images = images.astype(np.float64)
    np.testing.assert_allclose(statistics.mean_image, images.mean(0), rtol=1e-6)
    flat = images.reshape(-1, 3)
    np.testing.assert_allclose(statistics.mean_rgb, flat.mean(0), rtol=1e-12)
    values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    np.testing.assert_allclose(statistics.eigenvalues, values[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.abs(statistics.eigenvectors), np.abs(vectors.T[::-1]), atol=1e-8)


@pytest.fixture(scope="module")
def folder_packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readers")
    prepare("folder", made.image_folder(root / "source", 4, 1, (340, 256)), root / "out", ONE)
    return root / "out"


def test_the_webdataset_package_reads_it(folder_packed: Path) -> None:
    import webdataset

    url = str(folder_packed / "train" / "shard-00000.tar")
    samples = list(
        webdataset.WebDataset(url, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    )
    assert [label for _, label in samples] == [0] * 4 + [1] * 4 + [2] * 4
    assert {image.size for image, _ in samples} == {(256, 256)}


def test_dalis_webdataset_reader_reads_it_by_our_index(folder_packed: Path, tmp_path: Path) -> None:
    from nvidia.dali import Pipeline, fn
    from wds2idx import IndexCreator

    tar, index = (folder_packed / "train" / f"shard-00000.{kind}" for kind in ("tar", "idx"))
    theirs = tmp_path / "theirs.idx"
    with IndexCreator(str(tar), str(theirs), verbose=False) as creator:
        creator.create_index()
    assert index.read_text().split() == theirs.read_text().split()
    graph = Pipeline(batch_size=12, num_threads=1, device_id=None)
    with graph:
        image, label = fn.readers.webdataset(
            paths=[str(tar)], index_paths=[str(index)], ext=["jpg", "cls"]
        )
        graph.set_outputs(fn.decoders.image(image), label)
    graph.build()
    images, labels = graph.run()
    assert [bytes(labels.at(i)) for i in range(12)] == [b"0"] * 4 + [b"1"] * 4 + [b"2"] * 4
    for i in range(12):
        ours = pixels(folder_packed, "train", i).movedim(0, -1)
        assert np.array_equal(images.at(i), ours)


# --- killed, parted, short of room

SMALL_SHARDS = "import alexnet_dist.data.prepare.packing as p, alexnet_dist.cli.main as m, sys\n" \
    "p.ITEMS_PER_SHARD, p.LEAST_IMAGES = 7, 1\n" \
    "if __name__ == '__main__': sys.exit(m.main(sys.argv[1:]))\n"  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 300 images, two of them bad."""
    root = tmp_path_factory.mktemp("many")
    source = made.image_folder(root / "source", 90, 9, (300, 200))
    for number in range(2):
        (source / "train" / "bee" / f"bad-{number}.JPEG").write_text("no image")
    (root / "prepare.py").write_text(SMALL_SHARDS)
    return root


def arguments(many: Path, out: Path, *more: str) -> list[str]:
    return ["prepare", "folder", str(many / "source"), str(out), "--max-bad", "0.01", *more]


def in_small_shards(arguments: list[str]) -> None:
    packing.ITEMS_PER_SHARD = 7
    forks.run(arguments)


def packed_to_the_end(*more: Any) -> str:
    """What it says, in one process."""
    done = in_a_fork(in_small_shards, [*arguments(*more), "--workers", "1"])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(many: Path) -> dict[str, bytes]:
    """What an uninterrupted run makes, in one process."""
    said = packed_to_the_end(many, many / "whole")
    assert "270 train, 27 val images of 3 classes; 2 refused" in said
    return contents(many / "whole")


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    many: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    random.seed(3)
    out = tmp_path / "out"
    command = [sys.executable, many / "prepare.py", *arguments(many, out)]
    kills = 0
    while not out.exists():
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        if kills < 3:
            time.sleep(random.uniform(0.5, 6))
            kills += run.poll() is None
            number = random.choice(["SIGKILL", "SIGINT", "SIGTERM", "SIGUSR1"])
            run.send_signal(signal.Signals[number])
            codes = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}
            assert run.wait(timeout=120) in (codes[number], -signal.Signals[number], 0)
        run.wait(timeout=120)
    assert kills >= 1
    again = packed_to_the_end(many, out)
    assert "already prepared from these files, and complete" in again
    assert contents(out) == whole


def test_an_interrupted_preparation_says_that_it_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "write_shards", interrupt)
    idx = made.write_idx(tmp_path / "idx", 20, 10)
    with pytest.raises(KeyboardInterrupt):
        prepare("fashion_mnist", idx, tmp_path / "out", Options(workers=1))
    kept = f"what is done is kept in {tmp_path / 'out.partial'}, and the same command continues"
    assert caplog.messages == [kept]


def test_all_names_are_on_the_disk_before_the_folder_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that crashes then leaves either OUT.partial or a whole data set."""
    out, synced = tmp_path / "out", list[tuple[str, bool]]()
    monkeypatch.setattr(
        prepare_module, "sync", lambda path: synced.append((path.name, out.exists()))
    )
    prepare("fashion_mnist", made.write_idx(tmp_path / "idx", 20, 10), out, Options(workers=1))
    aside = [("out.partial", False), ("train", False), ("test", False)]
    assert synced == [*aside, (tmp_path.name, True)]


def test_parts_make_the_same_bytes(many: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ThreadPoolExecutor() as at_once:
        parts = [at_once.submit(packed_to_the_end, many, out, "--part", f"{i}/3") for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        assert (
            f"part {i} of 3 is written; when all are, run the same command without --part"
            in part.result()
        )
    assert not out.exists()
    assert "270 train" in packed_to_the_end(many, out)
    assert contents(out) == whole


def test_two_at_once_and_other_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.image_folder(tmp_path / "source", 2, 1)
    with (
        prepare_module.locked(tmp_path / "out.partial", {"kind": "folder"}, alone=True),
        pytest.raises(DatasetError, match="another prepare is writing there"),
    ):
        prepare("folder", source, tmp_path / "out", ONE)
    with pytest.raises(
        DatasetError, match="begun from other files or with other options: use those"
    ):
        prepare("folder", source, tmp_path / "out", ONE)


def test_where_nothing_can_be_written_nothing_is_said_to_be_kept(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 2, 1)
    with pytest.raises(DatasetError, match=r"^/proc/x cannot be written: .*: name another OUT$"):
        prepare("folder", source, Path("/proc/x"), ONE)


def test_a_full_disk_is_noticed_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.image_folder(tmp_path / "source", 2, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DatasetError, match=r"GB, but 0\.0 GB are free: make room"):
        prepare("folder", source, tmp_path / "out", ONE)


@pytest.mark.parametrize("part", ["0/3", "4/3", "x", "1"])
def test_a_part_is_i_of_n(part: str, tmp_path: Path) -> None:
    result = alexnet_dist("prepare", "folder", str(tmp_path), str(tmp_path / "o"), "--part", part)
    assert result.returncode == 2
    assert f"argument --part: {part!r}: must be I/N" in result.stderr


# --- inspect


def test_inspect_shows_what_is_there_and_finds_what_is_wrong(
    folder_packed: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.png"
    result = alexnet_dist("inspect", str(folder_packed), "--sheet", str(sheet), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["train"]["samples"] == 12
    assert found["train"]["sizes"] == "256 × 256 (12)"
    assert found["train"]["per class"] == "4 to 4"
    assert "doubtful" not in found
    with Image.open(sheet) as image:
        assert image.size == (220 + 10 * 96, 3 * 96)
        assert np.asarray(image)[:, 220:604].std() > 20
    result = alexnet_dist("inspect", str(folder_packed), "--sheet", str(sheet), "--quick")
    assert result.returncode == 2
    assert "argument --quick: not allowed with argument --sheet" in result.stderr
    damaged = tmp_path / "damaged"
    shutil.copytree(folder_packed, damaged)
    content = bytearray((damaged / "train/shard-00000.tar").read_bytes())
    content[5000] ^= 1
    (damaged / "train/shard-00000.tar").write_bytes(content)
    result = alexnet_dist("inspect", str(damaged))
    assert result.returncode == 1
    assert "shard-00000.tar: SHA-256" in result.stderr


def test_inspect_shows_another_split_where_there_is_none_to_train_on(
    folder_packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder_packed, tmp_path / "data")
    about = tmp_path / "data" / "dataset.json"
    meta = json.loads(about.read_text())
    del meta["splits"]["train"]
    about.write_text(json.dumps(meta))
    found = inspect(tmp_path / "data", tmp_path / "sheet.png")
    assert "train" not in found
    assert (tmp_path / "sheet.png").exists()
    about.write_text(json.dumps(meta | {"splits": {}}))
    with pytest.raises(DatasetError, match=r"dataset\.json: has no splits"):
        inspect(tmp_path / "data", None)


def test_inspect_does_not_take_full_memory_for_damage(
    folder_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("alexnet_dist.data.inspect.decode_image", fails)
    with pytest.raises(MachineError, match=r"'train': sample 0.*ran out of memory"):
        inspect(folder_packed, None)


def test_an_image_is_not_refused_because_memory_is_full() -> None:
    """Under a limit (ulimit -v) good photographs were set aside as taking more than a GiB."""
    content = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(content, "JPEG")
    with within_memory(2**24), pytest.raises(MemoryError):
        convert(content.getvalue(), keep=True)


def test_a_data_set_that_nobody_may_write_to_needs_another_place_for_its_sheet(
    folder_packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said only after every image had been decoded, and instead of what was found."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder_packed)
    options = build_parser().parse_args(["inspect", str(folder_packed)])
    with pytest.raises(DatasetError, match=r"contact-sheet.png cannot be written: name another"):
        options.run(options)


def as_program(path: Path, arguments: list[str]) -> None:
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def test_a_program_that_lacks_the_guard_for_its_processes_is_told(
    many: Path, tmp_path: Path
) -> None:
    unguarded = tmp_path / "unguarded.py"
    unguarded.write_text(SMALL_SHARDS.replace("if __name__ == '__main__': ", ""))
    given = arguments(many, tmp_path / "out", "--workers", "2")
    ended = in_a_fork(as_program, unguarded, given)
    assert ended.returncode == 1
    assert 'must do so under if __name__ == "__main__":' in ended.stderr.splitlines()[-1]


def test_options_have_defaults_that_the_command_line_repeats() -> None:
    assert dataclasses.astuple(Options()) == (False, None, 0, None, 0.0)


def test_only_own_processes_are_ended_after_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ITEMS_PER_SHARD", 1)
    monkeypatch.setattr(packing, "LEAST_IMAGES", 1)
    items = [Item(f"{n}", 0, pixels=np.zeros((4, 4), np.uint8)) for n in range(2)]
    source = Source("folder", ("ant",), {"train": items})
    callers = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    callers.start()
    try:
        tasks = packing.tasks_of(source, tmp_path, keep=False)
        found = packing.write_shards(source, tasks, tmp_path, max_bad=None, workers=2)
        assert [len(shard.index) for shard in found["train"]] == [1, 1]
        callers.join(2)  # a signal takes a moment
        assert callers.is_alive()
        assert multiprocessing.active_children() == [callers]
    finally:
        callers.kill()
        callers.join()
