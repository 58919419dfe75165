"""Image folders as users have them: any depth, any name of a split, archives, unrelated files."""

import json
import random
import re
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import made
import numpy as np
import pytest
import torch
from conftest import TINY, alexnet_dist
from torchvision.io import decode_image

from alexnet_dist.config.load import load_config
from alexnet_dist.data.dataset import open_dataset, open_for
from alexnet_dist.data.inspect import inspect
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.prepare.containers import list_files, read_content
from alexnet_dist.data.prepare.folders import IMAGENETTE, folder
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.sampler import evaluation_plan
from alexnet_dist.errors import ConfigError, DatasetError
from alexnet_dist.parallel.topology import Topology

ONE = Options(workers=1)


def small(seed: int, kind: str = "JPEG", side: int = 32) -> bytes:
    return made.encoded(made.photograph(seed, side, side), kind)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def classes(root: Path, count: int, names: tuple[str, ...] = ("ant", "bee")) -> Path:
    """CLASS/*.jpg: so many images of 32 pixels of each class."""
    return write(root, {f"{name}/{i:03d}.jpg": small(100 * label + i)
                        for label, name in enumerate(names) for i in range(count)})  # fmt: skip


def stored(dataset: Path, split: str) -> list[bytes]:
    found = open_dataset(dataset).splits[split]
    return [bytes(found.read(i)) for i in range(len(found))]


def archived(source: Path, kind: str, inside: str = "") -> Path:
    """An archive of a folder's files, in any order, as a system's tools write one."""
    path = source.with_name(f"{source.name}.{kind}")
    names = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    random.Random(3).shuffle(names)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made_zip:
            for place, name in enumerate(names):
                how = zipfile.ZIP_STORED if place % 2 else zipfile.ZIP_DEFLATED
                made_zip.write(source / name, f"{inside}{name}", how)
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as made_tar:
            for name in names:
                made_tar.add(source / name, f"{inside}{name}")
    return path


def test_plain_folders_at_any_depth_and_what_lies_beside_is_named(tmp_path: Path) -> None:
    source = classes(tmp_path / "source", 3)
    more = {
        "bee/winter/2020/deep.jpg": small(7), "bee/no-ending": small(8, "PNG"),
        "bee/notes.txt": b"text", "bee/.DS_Store": b"x", ".git/HEAD": b"x",
        "__MACOSX/ant/._000.jpg": b"x", "labels.csv": b"x", "empty/readme.txt": b"x",
    }  # fmt: skip
    write(source, more)
    (source / "bare").mkdir()
    said = prepare("folder", source, tmp_path / "out", ONE).splitlines()
    assert said == [
        f"{tmp_path / 'out'}: packed 8 train images of 2 classes",
        "left out: hidden: 3 (.git, __MACOSX, bee/.DS_Store); beside class folders: 1 (labels.csv)"
        "; no image, by its first bytes: 2 (bee/notes.txt, empty/readme.txt); without images: 2 "
        "(bare/, empty/)",
        "no split to evaluate on: train with data.hold_out=0.1, or prepare into another OUT with "
        "--validation 0.1",
    ]
    assert open_dataset(tmp_path / "out").classes == ("ant", "bee")
    assert more["bee/winter/2020/deep.jpg"] in stored(tmp_path / "out", "train")


def test_classes_that_are_never_scored_are_named(tmp_path: Path) -> None:
    """A folder that is missing from val/ or test/ is more often forgotten than meant."""
    source = tmp_path / "source"
    for split, names in (
        ("train", ("ant", "bee", "cow")),
        ("val", ("ant",)),
        ("test", ("bee", "cow")),
    ):
        classes(source / split, 2, names)
    said = prepare("folder", source, tmp_path / "out", ONE).splitlines()
    assert said[1:] == [
        "4 of the images in test are in train too",
        "2 of the images in val are in train too",
        "no validation images of bee, cow",
        "no test images of ant",
    ]
    doubts = inspect(tmp_path / "out", None)["doubtful"]
    assert doubts.split("; ") == said[1:3], "`inspect` says it too"


def test_a_class_spelt_as_macos_does_is_the_same_class(tmp_path: Path) -> None:
    """é as two characters, which would sort before f and not after z."""
    names = ("fox", "ours", "\u00e9lan")
    source = classes(tmp_path / "source" / "train", 2, names)
    classes(source.parent / "val", 2, ("fox", "ours", "e\u0301lan"))
    (source / names[2]).rename(source / "e\u0301lan")
    assert "left out" not in prepare("folder", source.parent, tmp_path / "out", ONE)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.classes == names
    assert dataset.splits["val"].index["label"].tolist().count(2) == 2


def test_a_data_set_packed_into_its_source_is_no_class(tmp_path: Path) -> None:
    """Its contact sheets are images."""
    source = classes(tmp_path, 2)
    prepare("folder", source, source / "packed", ONE)
    write(source, {"packed/contact-sheet-train.png": small(9, "PNG")})
    said = prepare("folder", source, tmp_path / "again", ONE)
    assert "packed data set: 1 (packed/)" in said
    assert open_dataset(tmp_path / "again").classes == ("ant", "bee")


def test_what_is_smaller_than_the_canvas_keeps_its_bytes(tmp_path: Path) -> None:
    """Sixty thousand JPEGs of 32 pixels once grew from 55 to 780 MB."""
    progressive = made.encoded(made.photograph(1, 40, 30), "JPEG", progressive=True)
    grey = made.encoded(made.photograph(2, 32, 32).convert("L"))
    png = small(3, "PNG")
    large = made.encoded(made.photograph(4, 300, 256))
    tall = made.encoded(made.photograph(5, 100, 400))
    source = write(tmp_path / "source", {
        "ant/0.jpg": progressive, "ant/1.jpg": grey, "ant/2.png": png, "bee/0.jpg": large,
        "bee/1.jpg": tall,
    })  # fmt: skip
    prepare("folder", source, tmp_path / "out", ONE)
    found = stored(tmp_path / "out", "train")
    assert found[:2] == [progressive, grey]
    assert found[4] == tall
    split = open_dataset(tmp_path / "out").splits["train"]
    sizes = [tuple(row) for row in split.index[["height", "width"]].tolist()]
    assert sizes == [(30, 40), (32, 32), (32, 32), (256, 256), (400, 100)]
    same = decode_image(torch.frombuffer(bytearray(png), dtype=torch.uint8))
    assert torch.equal(decode_image(torch.frombuffer(bytearray(found[2]), dtype=torch.uint8)), same)


def test_a_share_is_cut_by_names_and_stays_when_others_come(tmp_path: Path) -> None:
    names = [f"{name}/{i:04d}.jpg" for name in ("ant", "bee", "cat") for i in range(400)]
    source = write(tmp_path / "source", dict.fromkeys(names, b"x"))
    found = folder(source, 0.1).splits
    val = {item.name for item in found["val"]}
    assert sorted([*val, *(item.name for item in found["train"])]) == names
    for label in range(3):  # a tenth of each class, as closely as a coin falls
        assert 20 <= sum(item.label == label for item in found["val"]) <= 60
    write(source, {f"{name}/new-{i}.jpg": b"x" for name in ("ant", "owl") for i in range(50)})
    more = folder(source, 0.1).splits
    assert {item.name for item in more["val"]} & {*names} == val
    # The same files under train/ are cut alike; a wider share holds the narrower.
    write(tmp_path / "split", {f"train/{name}": b"x" for name in names})
    inside = folder(tmp_path / "split", 0.1).splits["val"]
    assert {item.name.removeprefix("train/") for item in inside} == val
    assert {item.name for item in folder(source, 0.2).splits["val"]} > val


def test_shares_that_cannot_be_are_named(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 1, 1)
    with pytest.raises(
        DatasetError, match=r"--validation 0\.1: .* has its own validation images: leave"
    ):
        prepare("folder", source, tmp_path / "out", Options(validation=0.1))
    few = classes(tmp_path / "few", 1)
    with pytest.raises(
        DatasetError, match=r"--validation 1e-05: would take 0 of 2 images: some must"
    ):
        prepare("folder", few, tmp_path / "out", Options(validation=1e-5))
    said = alexnet_dist("prepare", "folder", str(few), str(tmp_path / "out"), "--validation", "2")
    assert said.returncode == 2
    assert "--validation 2: must be a share between 0 and 1" in said.stderr
    for share in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"--max-bad {share:g}: must be a share, from 0 to"):
            prepare("folder", few, tmp_path / "out", Options(max_bad=share))


def test_a_class_with_no_image_left_to_train_on_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "source", dict.fromkeys(("bee/005.jpg", "ant/000.jpg"), b"x"))
    assert folder(source, 0.1).notes == (
        "no training images of bee", "no validation images of ant"
    )  # fmt: skip


@pytest.mark.parametrize("val", ["val", "valid", "validation", "VAL", "Valid"])
def test_splits_go_by_any_of_their_names(tmp_path: Path, val: str) -> None:
    source = classes(tmp_path / "source" / "Train", 2).parent
    classes(source / val, 1)
    classes(source / "TEST", 1)
    write(source, {"extra/x.jpg": small(1), "LICENSE": b"x"})
    said = prepare("folder", source, tmp_path / "out", ONE)
    assert "packed 4 train, 2 val, 2 test images of 2 classes\n" in said
    assert "\n2 of the images in val are in train too\n" in said
    assert said.endswith("left out: beside train/: 2 (extra/, LICENSE)")
    classes(source / "validate".replace("ate", "ation" if val != "validation" else ""), 1)
    with pytest.raises(DatasetError, match=r"both hold val images: move one away"):
        prepare("folder", source, tmp_path / "out2", ONE)


def test_images_without_classes_are_left_out_and_named(tmp_path: Path) -> None:
    source = classes(tmp_path / "source" / "train", 2).parent
    write(source, {f"test/{i}.jpg": small(i) for i in range(4)})
    said = prepare("folder", source, tmp_path / "out", ONE)
    assert "left out: beside class folders: 4 (test/0.jpg, test/1.jpg, test/2.jpg, …)" in said
    assert [*open_dataset(tmp_path / "out").splits] == ["train"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["cat/1.jpg"],
            "has only one class, cat, but a network needs two to tell apart: put the images",
        ),
        (["train/cat/1.jpg", "val/cat/1.jpg"], r"train: has only one class, cat"),
        (["1.jpg", "2.jpg"], "none of its folders holds images: put the images of each class in"),
        (["a.tar", "b.tar"], r"none of its folders holds images: .*; .* docs/extending\.md"),
        (["val/cat/1.jpg", "cat/1.jpg", "dog/1.jpg"], "has val/, but no folder train/: put"),
        (
            ["train/cat/1.jpg", "train/dog/1.jpg", "val/owl/1.jpg"],
            "val/owl: train/ has no such class",
        ),
    ],
)
def test_folders_that_are_no_classes_are_said_to_be(
    tmp_path: Path, files: list[str], message: str
) -> None:
    write(tmp_path / "source", {name: small(1) for name in files})
    with pytest.raises(DatasetError, match=message) as caught:
        prepare("folder", tmp_path / "source", tmp_path / "out", ONE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_few_bad_images_of_a_small_source_are_borne(tmp_path: Path) -> None:
    source = classes(tmp_path / "source", 20)
    write(source, {f"bee/bad{i}.jpg": b"no image" for i in range(3)})
    assert "40 train images of 2 classes; 3 refused" in prepare(
        "folder", source, tmp_path / "out", ONE
    )
    with pytest.raises(DatasetError, match=r"--max-bad 0\.01: 3 of 43 .*quarantine.* raise --max"):
        prepare("folder", source, tmp_path / "strict", Options(workers=1, max_bad=0.01))
    write(source, {"bee/bad3.jpg": b""})
    with pytest.raises(DatasetError, match=r"--max-bad: 4 of 44 images cannot be packed, more tha"):
        prepare("folder", source, tmp_path / "worse", ONE)


def test_links_lead_to_classes_and_no_further(tmp_path: Path) -> None:
    source = classes(tmp_path / "source", 2)
    classes(tmp_path / "far", 3, ("owl",))
    (source / "owl").symlink_to(tmp_path / "far" / "owl")
    (source / "ant" / "sub").mkdir()
    (source / "ant" / "sub" / "round").symlink_to(source)  # would be walked for ever
    said = prepare("folder", source, tmp_path / "out", Options(workers=1, max_bad=0.5))
    assert "packed 7 train images of 3 classes; 1 refused" in said
    assert "a link to a folder" in (tmp_path / "out" / "quarantine.jsonl").read_text()


# --- archives


@pytest.mark.parametrize("inside", ["", "./", "photos-320/"])
@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_an_archive_is_the_folder_it_was_made_of(tmp_path: Path, kind: str, inside: str) -> None:
    source = classes(tmp_path / "source" / "train", 4).parent
    classes(source / "val", 2)
    write(source, {"train/bee/sub/more.jpg": small(9), "train/bee/plain": small(4), "x.csv": b"x"})
    archive = archived(source, kind, inside)
    prepare("folder", source, tmp_path / "folder", ONE)
    said = prepare("folder", archive, tmp_path / "out", ONE)
    assert "packed 10 train, 4 val images of 2 classes" in said
    assert "(x.csv)" in said
    ours, theirs = open_dataset(tmp_path / "out"), open_dataset(tmp_path / "folder")
    assert ours.classes == theirs.classes
    for split in ("train", "val"):
        pairs = [
            [*zip(stored(path, split), of.splits[split].index["label"].tolist(), strict=True)]
            for path, of in ((tmp_path / "out", ours), (tmp_path / "folder", theirs))
        ]
        if kind == "tgz":  # as they lie in it
            pairs = [sorted(pair) for pair in pairs]
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-8", True), ("utf-8", False), ("cp437", False)]
)
def test_names_in_a_zip_are_those_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, said: bool
) -> None:
    """macOS writes UTF-8 without the flag that says so."""
    flag = 0x800 if said else 0
    names = classes(tmp_path / "source", 2, ("caf\u00e9", "th\u00e9"))
    monkeypatch.setattr(
        zipfile.ZipInfo, "_encodeFilenameFlags", lambda i: (i.filename.encode(encoding), flag)
    )
    assert folder(archived(names, "zip")).classes == ("caf\u00e9", "th\u00e9")


def test_a_tar_with_a_zip_in_it_is_a_tar(tmp_path: Path) -> None:
    """`zipfile` finds a zip's directory in the last 64 KB of any file."""
    source = classes(tmp_path / "source", 2)
    archived(classes(tmp_path / "masks", 1, ("cat", "dog")), "zip").rename(source / "masks.zip")
    assert folder(archived(source, "tar")).classes == ("ant", "bee")


def test_a_gzipped_tar_is_read_by_several_processes_and_goes_on(tmp_path: Path) -> None:
    source = classes(tmp_path / "source", 300)
    archive = archived(source, "tgz")
    for part in ((2, 2), (1, 2)):
        prepare("folder", archive, tmp_path / "out", Options(workers=1, part=part))
    prepare("folder", archive, tmp_path / "out", Options(workers=2))
    prepare("folder", archive, tmp_path / "again", Options(workers=2))
    files = [{p.name: p.read_bytes() for p in (tmp_path / out).rglob("*") if p.is_file()}
             for out in ("out", "again")]  # fmt: skip
    assert files[0] == files[1]
    assert sorted(stored(tmp_path / "out", "train")) == sorted(
        p.read_bytes() for p in source.rglob("*.jpg")
    )


def test_what_an_archive_should_not_hold_is_refused(tmp_path: Path) -> None:
    source = classes(tmp_path / "source", 20)
    path = archived(source, "zip")
    link = zipfile.ZipInfo("ant/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
        for name in ("ant/../../up.jpg", "../up.jpg", "/tmp/up.jpg"):
            archive.writestr(name, small(1))
        archive.writestr("ant/bz.jpg", small(1), zipfile.ZIP_BZIP2)
    said = prepare("folder", path, tmp_path / "out", Options(workers=1, max_bad=0.2))
    assert "packed 40 train images of 2 classes; 5 refused" in said
    refused = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    reasons = {entry["name"]: entry["reason"] for entry in refused}
    assert reasons == {
        "ant/link.jpg": "a link or device in the archive, not a file",
        "ant/../../up.jpg": "a name that leads out of its folder",
        "../up.jpg": "a name that leads out of its folder",
        "/tmp/up.jpg": "a name that leads out of its folder",
        "ant/bz.jpg": "encrypted, or compressed by another method than deflate",
    }
    assert not list(tmp_path.parent.glob("up.jpg"))


def test_a_zip_that_lies_about_sizes_is_read_no_further(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ant/1.jpg", bytes(2**24))
    (item,) = list_files(tmp_path / "a.zip").files
    assert len(read_content(item)) == 2**24
    with pytest.raises(ValueError, match="101 bytes, but 100 were listed"):
        read_content(item._replace(size=100))  # unpacks one byte more, and no other
    with pytest.raises(ValueError, match="more than"):
        read_content(item._replace(packed=2**40))
    with pytest.raises(ValueError, match="no file there"):
        read_content(item._replace(offset=3))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60:80] = bytes(range(20))
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be unpacked|where 16777216 were listed"):
        read_content(item)


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_a_cut_or_changed_archive_is_an_error(tmp_path: Path, kind: str) -> None:
    source = classes(tmp_path / "source", 30)
    path = archived(source, kind)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:700], b"BZh91AY&SY" + bytes(999)):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"source\.(tar|tgz|zip)") as caught:
            prepare("folder", path, tmp_path / "out", ONE)
        assert "\n" not in str(caught.value)
    if kind == "tgz":  # gzip's own checksum
        path.write_bytes(whole[:-8] + struct.pack("<I", 1) + whole[-4:])
        with pytest.raises(DatasetError, match="CRC"):
            prepare("folder", path, tmp_path / "out", ONE)


# --- data sets as they are given out


def tiny_imagenet(root: Path) -> Path:
    files = {
        "wnids.txt": "\n".join(made.WNIDS).encode() + b"\n",
        "words.txt": "".join(f"{w}\t{t}\n" for w, t in zip(made.WNIDS, made.WORDS, strict=True))
        .encode() + b"n00001740\tentity\n",
        "val/val_annotations.txt": "".join(
            f"val_{i}.JPEG\t{made.WNIDS[i % 4]}\t0\t32\t44\t62\n" for i in range(8)
        ).encode(),
    }  # fmt: skip
    for place, wnid in enumerate(made.WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"x"
        for i in range(3):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = small(10 * place + i, side=64)
    files |= {f"val/images/val_{i}.JPEG": small(900 + i, side=64) for i in range(8)}
    files |= {f"test/images/test_{i}.JPEG": small(800 + i, side=64) for i in range(5)}
    return write(root, files)


@pytest.mark.parametrize("kind", ["", "zip"])
def test_tiny_imagenet_as_given_out(tmp_path: Path, kind: str) -> None:
    source = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    path = archived(source, kind, "tiny-imagenet-200/") if kind else source
    said = prepare("tiny_imagenet", path, tmp_path / "out", ONE)
    assert "packed 12 train, 8 val images of 4 classes" in said
    assert "left out: test image without a class: 5 (test/images/test_0.JPEG, " in said
    dataset, ids = open_dataset(tmp_path / "out"), sorted(made.WNIDS)
    assert dataset.classes[0] == "n01440764 tench, Tinca tinca"
    for split in dataset.splits.values():
        assert split.uniform(64)
    label = {small(900 + i, side=64): ids.index(made.WNIDS[i % 4]) for i in range(8)}
    got = zip(stored(tmp_path / "out", "val"), dataset.splits["val"].index["label"], strict=True)
    assert {content: int(own) for content, own in got} == label
    train = dataset.splits["train"].labels(np.arange(12))
    assert train.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wnids.txt", None, "has no file wnids.txt: it is not Tiny ImageNet"),
        ("wnids.txt", b"n01440764\n", "has the class 'n01443537', which is not in wnids.txt"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn01440764\n", "val_1.JPEG has the class ''"),
        ("val/val_annotations.txt", b"val_0.JPEG\n", "cannot be read completely"),
        ("words.txt", b"\xff\xfe\t", "cannot be read completely"),
    ],
)
def test_a_tiny_imagenet_that_is_not_whole_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    source = tiny_imagenet(tmp_path / "source")
    (source / name).unlink() if content is None else (source / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        prepare("tiny_imagenet", source, tmp_path / "out", ONE)


def test_imagenettes_archive_has_names_for_its_classes(tmp_path: Path) -> None:
    source = tmp_path / "imagenette2-320"
    for split, count in (("train", 2), ("val", 1)):
        for place, wnid in enumerate(IMAGENETTE):
            write(source, {f"{split}/{wnid}/{wnid}_{i}.JPEG":
                           made.encoded(made.photograph(10 * place + i, 90, 80))
                           for i in range(count)})  # fmt: skip
    write(source, {"noisy_imagenette.csv": b"path,noisy_labels_0\n"})
    archive = archived(source, "tgz", "imagenette2-320/")
    said = prepare("imagenette", archive, tmp_path / "out", ONE)
    assert "packed 20 train, 10 val images of 10 classes" in said
    assert said.endswith("left out: beside train/: 1 (noisy_imagenette.csv)")
    assert open_dataset(tmp_path / "out").classes[4] == "n03028079 church"
    shutil.rmtree(source / "train" / "n03028079")
    shutil.rmtree(source / "val" / "n03028079")
    with pytest.raises(DatasetError, match="not Imagenette's ten: use `prepare folder`"):
        prepare("imagenette", source, tmp_path / "out2", ONE)


# --- and then


def test_images_of_64_pixels_are_the_same_to_both_pipelines_at_the_papers_window(
    tmp_path: Path,
) -> None:
    prepare("tiny_imagenet", tiny_imagenet(tmp_path / "source"), tmp_path / "out", ONE)
    seen = {}
    for kind in ("torch", "dali"):
        config = load_config([*TINY, f"data.path={tmp_path / 'out'}", "data.eval_split=auto",
                              "model.classes=0", "model.crop=227", "data.canvas=256",
                              f"data.pipeline={kind}", "layout.kind=one",
                              "train.precision=fp32"])  # fmt: skip
        assert (config.model.classes, config.data.eval_split) == (4, "val")
        dataset = open_for(config)
        pipeline = make_pipeline(config, Topology(), dataset, "val")
        (part,) = pipeline.batches(evaluation_plan(config, [range(8)]))
        seen[kind] = part.batch().windows * 60  # divide_by of TINY
        pipeline.close()
        assert seen[kind].shape == (8, 3, 227, 227)
    difference = (seen["torch"] - seen["dali"]).abs()
    assert difference.mean() <= 0.5
    assert difference.flatten().sort().values[int(0.999 * difference.numel())] <= 4
    # The image itself, enlarged: a stored pixel is 4 × 4 of the canvas, whose window begins at 14.
    image = torch.frombuffer(dataset.splits["val"].read(0), dtype=torch.uint8)
    mean = torch.from_numpy(dataset.statistics.mean_image).movedim(-1, 0)[:, 14:241, 14:241]
    middles = (seen["torch"][0] + mean)[:, 3::4, 3::4]
    assert (middles - decode_image(image)[:, 4:60, 4:60]).abs().mean() < 8


def test_jpegs_of_cifar_are_trained_on_and_tested_on_their_test_folder(tmp_path: Path) -> None:
    source = classes(tmp_path / "cifar" / "train", 12, ("airplane", "cat", "dog")).parent
    classes(source / "test", 4, ("airplane", "cat", "dog"))
    prepare("folder", source, tmp_path / "out", ONE)
    config = load_config(["demo", f"data.path={tmp_path / 'out'}"])
    assert (config.model.classes, config.data.eval_split) == (3, "test")


@pytest.mark.parametrize("layout", ["one", "columns"])
def test_a_run_without_a_split_to_evaluate_on_ends_well(tmp_path: Path, layout: str) -> None:
    prepare("folder", classes(tmp_path / "source", 12), tmp_path / "out", ONE)
    own = [a for a in TINY if not a.startswith(("model.classes", "data.eval_split", "schedule"))]
    run = tmp_path / "runs" / "run"
    arguments = ["train", *own, f"data.path={tmp_path / 'out'}", "train.epochs=3",
                 f"output_dir={tmp_path / 'runs'}", "log.pictures=true", "log.embedding=5",
                 "checkpoint.every_steps=4", "log.every_steps=4",
                 f"layout.kind={layout}"]  # fmt: skip
    done = alexnet_dist(*arguments)
    assert done.returncode == 0, done.stderr
    if layout == "one":
        assert f"{run}: done, 9 steps; not scored\nlast checkpoint: " in done.stdout
        assert "evaluate" not in done.stdout
    line = "data.eval_split=none: no evaluation; the last checkpoint is kept, and the rate of sch"
    assert done.stderr.count(line) == 1
    assert re.search(r"epoch 1.33  step 4/9  ETA [\d:]+  loss ", done.stderr)  # of 80 characters
    assert "never drops; data.hold_out=0.1 would set a tenth of the images apart" in done.stderr
    assert (run / "checkpoints/step-00000009/manifest.json").is_file()
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    kept = json.loads((run / "config.json").read_text())
    assert (kept["model"]["classes"], kept["data"]["eval_split"]) == (2, "none")
    again = alexnet_dist(*arguments)  # it is done, and stays so
    assert again.returncode == 0, again.stderr
    scored = alexnet_dist("evaluate", str(run))
    assert scored.returncode == 2
    assert "data.eval_split=none: there is no split to score on: name one of" in scored.stderr
    scored = alexnet_dist("evaluate", str(run), "data.eval_split=train")
    assert scored.returncode == 0, scored.stderr
    assert "step-00000009: top-1" in scored.stdout
