"""Small data sets in exactly the formats of the real ones, with the oddities of real images; and
noise in place of what a pipeline decodes."""

import gzip
import io
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from alexnet_dist.config.load import configs_folder
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Decoded
from alexnet_dist.data.dataset import Statistics
from alexnet_dist.data.prepare.arrays import read_idx
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.network.precision import DTYPES

SAMPLE = configs_folder() / "fashion-mnist-sample"
WNIDS = ("n01440764", "n02105855", "n01443537", "n12057211")
WORDS = ("tench, Tinca tinca", "Shetland sheepdog", "goldfish", "yellow lady's slipper")


NOTHING = bytes(10240)  # a tar of no members


def photograph(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """Smooth colours with some texture: what JPEG is made for."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tar_of(path: Path | io.BytesIO, members: dict[str, bytes], mode: str = "w") -> None:
    target: Any = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(mode=mode, **target) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def imagenet(folder: Path, per_class: int, validation: int) -> Path:
    """ILSVRC2012's two tars and devkit: tar of tars, flat tar, meta.mat and ground truth."""
    from scipy.io import savemat

    folder.mkdir(parents=True)
    outer = {}
    for place, wnid in enumerate(WNIDS):
        inner = io.BytesIO()
        tar_of(
            inner,
            {
                f"{wnid}_{number}.JPEG": encoded(photograph(100 * place + number))
                for number in range(per_class)
            },
        )
        outer[f"{wnid}.tar"] = inner.getvalue()
    tar_of(folder / "ILSVRC2012_img_train.tar", outer)
    tar_of(
        folder / "ILSVRC2012_img_val.tar",
        {
            f"ILSVRC2012_val_{number + 1:08d}.JPEG": encoded(photograph(9000 + number))
            for number in reversed(range(validation))
        },
    )
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
              "wordnet_height", "num_train_images")  # fmt: skip
    rows = [
        (place + 1, wnid, words, "a gloss", 0, np.zeros(0), 0, per_class)
        for place, (wnid, words) in enumerate(zip(WNIDS, WORDS, strict=True))
    ]
    rows.append((5, "n00001740", "entity", "not a leaf", 4, np.arange(1, 5), 3, 0))
    synsets = np.array(rows, dtype=[(field, object) for field in fields]).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number % 4 + 1}\n" for number in range(validation))
    data = "ILSVRC2012_devkit_t12/data/"
    members = {
        data + "meta.mat": meta.getvalue(),
        data + "ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    tar_of(folder / "ILSVRC2012_devkit_t12.tar.gz", members, "w:gz")
    return folder


def cifar10(folder: Path, per_batch: int, test: int) -> Path:
    """The python version's eight files, as Python 2 wrote them: protocol 2, bytes keys."""
    root = folder / "cifar-10-batches-py"
    root.mkdir(parents=True)
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse",
             b"ship", b"truck"]  # fmt: skip
    counts = {f"data_batch_{number}": per_batch for number in range(1, 6)} | {"test_batch": test}
    for place, (name, count) in enumerate(counts.items()):
        images = [np.asarray(photograph(50 * place + i, 32, 32)) for i in range(count)]
        content = {
            b"batch_label": name.encode(),
            b"labels": [(place + i) % 10 for i in range(count)],
            b"data": np.stack(images).transpose(0, 3, 1, 2).reshape(count, 3072),
            b"filenames": [f"image_{i}.png".encode() for i in range(count)],
        }
        (root / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"num_cases_per_batch": per_batch, b"label_names": names, b"num_vis": 3072}
    (root / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def write_idx(folder: Path, train: int, test: int) -> Path:
    """The first images of the bundled sample, in Fashion-MNIST's four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", train), ("t10k", test)):
        for name, dims in (("images-idx3", 3), ("labels-idx1", 1)):
            values = read_idx(SAMPLE / f"{stem}-{name}-ubyte.gz", dims)[:count]
            header = bytes([0, 0, 8, dims]) + struct.pack(f">{dims}I", *values.shape)
            packed = gzip.compress(header + values.tobytes(), mtime=0)
            (folder / f"{stem}-{name}-ubyte.gz").write_bytes(packed)
    return folder


def image_folder(folder: Path, train: int, val: int, size: tuple[int, int] = (120, 90)) -> Path:
    """train/CLASS/*, val/CLASS/*: so many images of each of three classes."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = photograph(1000 * label + number + (split == "val") * 500, *size)
                (folder / split / name / f"{number:03d}.JPEG").write_bytes(encoded(image))
    return folder


def png_of(width: int, height: int) -> bytes:
    """A grey PNG of a few bytes; of more than 100,000 pixels but in its header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = bytes(min(100_000, (width + 1) * height))
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def decoded(config: Config, device: torch.device, resident: bool) -> list[Decoded]:
    """Noise, as a pipeline gives it to three steps: patches, or images that stay on the device."""
    generator = torch.Generator().manual_seed(0)
    n, side, crop = config.train.batch, config.data.canvas, config.model.crop
    held = 3 * n  # images

    def draw(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(most, shape, generator=generator)

    mean = draw(256, side, side, 3).float()
    statistics = Statistics(mean.numpy(), mean[0, 0].numpy(), np.ones(3), np.eye(3))
    preprocess = Preprocess(config, statistics, device, DTYPES[config.train.precision])
    images = draw(256, held, side, side, 3).byte().to(device)
    found = []
    for step in range(3):
        ids = torch.arange(step * n, step * n + n)
        corners = draw(side - crop + 1, n, 2)
        facts = torch.cat([(ids % config.model.classes)[:, None], ids[:, None], draw(1, n, 1),
                           draw(9, n, 3), corners, draw(2, n, 1)], dim=1)  # fmt: skip
        patches = images if resident else draw(256, n, crop, crop, 3).byte().to(device)
        found.append(Decoded(patches, facts.double().to(device), preprocess, resident))
    return found
