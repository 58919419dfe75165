"""The readers that docs/storm.py gives changed files to, and intact files for each of them."""

import functools
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from small_runs import RUN, Testbed, made
from torchvision.io import decode_image

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.data.prepare import imagenet as imagenet_module
from alexnet_dist.data.prepare.convert import convert
from alexnet_dist.data.prepare.devkit import read_synsets
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.engines.base import check_fit, check_values
from alexnet_dist.errors import AlexNetDistError, CheckpointError
from alexnet_dist.evaluation.load import load_checkpoint
from alexnet_dist.files import MOST_PIXELS
from alexnet_dist.formats.convert import export_weights, import_weights
from alexnet_dist.network.model import AlexNet
from alexnet_dist.reporting import figures
from alexnet_dist.reporting.report import report
from alexnet_dist.training.state import Progress
from launch.status import status


@dataclass(frozen=True)
class Reader:
    """A reader of files that may hold anything.

    Attributes:
        files: files of which one at a time is changed in place, and then restored.
        read: raises AlexNetDistError or RefusedImage, or has checked what it read.
    """

    files: Sequence[Path]
    read: Callable[[Path, random.Random], object]


def readers(testbed: Testbed) -> dict[str, Reader]:
    """Return all readers, each with intact files of its own below the testbed's folder."""
    root, whole = testbed.root, testbed.folder("whole-one")
    last = checkpoints.steps(whole / "checkpoints")[-1]
    forgeries = root / "forged" / last.name
    for source, to in ((last, forgeries), (root / "data", root / "packed"), (whole, root / "run")):
        shutil.copytree(source, to)
    made.imagenet(root / "imagenet", 2, 4)
    made.cifar10(root / "cifar10", 2, 2)
    images = list(_images(root / "images"))
    weights = _weights(root / "weights")
    # Without this, each trial would start a process.
    imagenet_module.read_synsets = functools.cache(read_synsets)
    imagenet = _prepares("imagenet", root / "imagenet")
    return {
        "checkpoint": Reader(files_of(last), _verifies),
        "checkpoint whose hashes are forged": Reader(
            files_of(forgeries, "*.safetensors", "progress.json"), _answers
        ),
        "packed data set": Reader(
            files_of(root / "packed"), lambda path, dice: _decodes(root / "packed")
        ),
        "ImageNet's tars": Reader(files_of(root / "imagenet", "*img*"), imagenet),
        "devkit": Reader(files_of(root / "imagenet", "*devkit*"), imagenet),
        "CIFAR-10": Reader(files_of(root / "cifar10"), _prepares("cifar10", root / "cifar10")),
        "IDX": Reader(files_of(root / "idx"), _prepares("fashion_mnist", root / "idx")),
        "image": Reader(images, _converts),
        ".pth": Reader(files_of(weights, "*.pth"), _imports("torchvision")),
        ".caffemodel": Reader(files_of(weights, "*.caffemodel"), _imports("caffe")),
        ".safetensors": Reader(files_of(weights, "w.safetensors"), _imports("safetensors")),
        "run folder": Reader(files_of(root / "run", "*.json*"), _reports),
    }


def files_of(folder: Path, *patterns: str) -> list[Path]:
    """Return a folder's files that match patterns, by default all."""
    found = [path for one in patterns or ("**/*",) for path in sorted(folder.glob(one))]
    return [path for path in found if path.is_file()]


def _images(folder: Path) -> Iterator[Path]:
    """Yield an image of each kind that is read, and of each oddity."""
    folder.mkdir()
    picture = made.photograph(1)
    for name, kind, mode, how in (
        ("plain", "JPEG", "RGB", {}), ("scans", "JPEG", "RGB", {"progressive": True}),
        ("ink", "JPEG", "CMYK", {}), ("plain", "PNG", "RGB", {}), ("grey", "PNG", "L", {}),
        ("palette", "PNG", "P", {}), ("plain", "GIF", "RGB", {}), ("plain", "BMP", "RGB", {}),
        ("plain", "WEBP", "RGB", {}), ("plain", "TIFF", "RGB", {}),
        ("packed", "TIFF", "RGB", {"compression": "tiff_lzw"}),
    ):  # fmt: skip
        path = folder / f"{name}.{kind.lower()}"
        path.write_bytes(made.encoded(picture.convert(mode), kind, **how))
        yield path


def _weights(folder: Path) -> Path:
    """Export a small network's weights in every format that can be imported."""
    config = load_config(RUN)
    named = AlexNet(config.model, seed=3).named_parameters()
    tensors = {name: value.detach().contiguous() for name, value in named}
    state = {"step": 0, "score": None}
    ours = checkpoints.save(folder / "ours", config, "none", tensors, {}, state, None)
    export_weights("safetensors", ours, folder / "w.safetensors")
    export_weights("caffe", ours, folder / "w.caffemodel")
    torch.save(tensors, folder / "zipped.pth")
    torch.save(tensors, folder / "before-1.6.pth", _use_new_zipfile_serialization=False)
    return folder


def _verifies(path: Path, dice: random.Random) -> None:
    """Check that a changed checkpoint is not taken for an intact one."""
    checkpoints.verify(path.parent)
    if path.name != "manifest.json":  # its hash covers its content, not its whitespace
        raise AssertionError("bytes that are not as they were written were taken for good")


def _answers(path: Path, dice: random.Random) -> None:
    """Check that a checkpoint whose hashes fit is another network's weights, or an error."""
    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"][path.name] |= {"size": len(data), "sha256": digest}
    manifest["sha256"] = checkpoints.own_sha256(manifest)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    load_checkpoint(path.parent)
    found = checkpoints.verify(path.parent)
    config, states = found.config, found.optimizer()
    check_fit(config, found.parameters(), states)
    check_values(found.parameters(), states)
    try:
        Progress.of(found.progress)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # one line in the loop
        raise CheckpointError(f"{error!r}") from error


def _decodes(folder: Path) -> None:
    """Check that every sample of a packed data set is one that was packed, or a stand-in."""
    dataset = open_dataset(folder)
    for split in dataset.splits.values():
        _, encoded = split.read_batch(np.arange(len(split)))
        for one in encoded:
            decode_image(torch.from_numpy(one))
        split.close()


def _prepares(kind: str, source: Path) -> Callable[[Path, random.Random], object]:
    """Return a reader that prepares a source."""

    def read(path: Path, dice: random.Random) -> None:
        with tempfile.TemporaryDirectory(dir=source.parent) as aside:
            prepare(kind, source, Path(aside) / "out", Options(workers=1, max_bad=1.0))
            _decodes(Path(aside) / "out")

    return read


def _imports(kind: str) -> Callable[[Path, random.Random], object]:
    """Return a reader that imports weights."""

    def read(path: Path, dice: random.Random) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            checkpoints.verify(import_weights(kind, path, Path(aside) / "out", RUN))

    return read


def _converts(path: Path, dice: random.Random) -> None:
    """Convert an image as `prepare` does."""
    image = convert(path.read_bytes(), keep=dice.random() < 0.5).image
    assert image.dtype == torch.uint8
    assert image.shape[0] in (1, 3)
    assert 0 < image[0].numel() <= MOST_PIXELS


def _reports(path: Path, dice: random.Random) -> None:
    """Run `report`, `status` and `train` on a run folder: an error in one must not hide others."""
    run, errors = path.parent, []
    for read in (
        lambda: report([run], run / "report.html"), lambda: status(run, None),
        lambda: load_config([run / "config.json"]), lambda: figures.draw(run),
    ):  # fmt: skip
        try:
            read()
        except AlexNetDistError as error:
            errors.append(error)
    if errors:
        raise errors[0]
