"""How far DALI's pixels are from torchvision's, by kind of JPEG (`bench data --differences`)."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from alexnet_dist.bench import machine
from alexnet_dist.config.load import load_config, overridden
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Metadata
from alexnet_dist.data.dataset import Dataset, open_dataset
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.sampler import evaluation_plan
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel.topology import Topology, connect

# Pillow's options for each kind; a grey JPEG has a single colour channel.
_KINDS: dict[str, dict[str, Any]] = {
    "quality 75, 4:2:0": {"quality": 75, "subsampling": 2},
    "quality 90, 4:2:0": {"quality": 90, "subsampling": 2},
    "quality 95, 4:2:0": {"quality": 95, "subsampling": 2},
    "quality 90, 4:2:2": {"quality": 90, "subsampling": 1},
    "quality 90, 4:4:4": {"quality": 90, "subsampling": 0},
    "quality 90, 4:2:0, progressive": {"quality": 90, "subsampling": 2, "progressive": True},
    "quality 90, grey": {"quality": 90},
}
_LARGE = (500, 375)  # pixels of the images that are resized when decoded


@dataclass(frozen=True)
class Difference:
    """Differences of pixels' colour values, in grey levels.

    Attributes:
        counts: (256,) number of values that differ by each amount.
        signed: (3,) sum of DALI's minus torchvision's values, for each colour.
        edge: sum of the differences on the images' edges, and the number of values there.
    """

    counts: npt.NDArray[np.int64]
    signed: npt.NDArray[np.int64]
    edge: npt.NDArray[np.int64]

    @classmethod
    def of(cls, ours: npt.NDArray[np.uint8], theirs: npt.NDArray[np.uint8]) -> "Difference":
        """Return the differences between images, both (n, h, w, 3)."""
        signed = ours.astype(np.int16) - theirs
        apart = np.abs(signed)
        inside = apart[:, 1:-1, 1:-1]
        edge = np.array([apart.sum() - inside.sum(), apart.size - inside.size])
        return cls(np.bincount(apart.ravel(), minlength=256), signed.sum((0, 1, 2)), edge)

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.counts + other.counts, self.signed + other.signed, self.edge + other.edge
        )

    def figures(self) -> dict[str, float]:
        """Return the figures that are reported."""
        total = self.counts.sum()
        red, green, blue = (3 * self.signed / total).tolist()
        return {
            "mean": float(self.counts @ np.arange(256) / total),
            "99.9th percentile": float(np.searchsorted(self.counts.cumsum() / total, 0.999)),
            "largest": float(np.flatnonzero(self.counts)[-1]),
            "mean on edges": float(self.edge[0] / self.edge[1]),
            "red": red,
            "green": green,
            "blue": blue,
        }


def differences(
    config: Config, topology: Topology, dataset: Dataset, most: int
) -> dict[str, Difference]:
    """Return the differences by class between the canvases that both pipelines decode from a
    training split, of at most so many images."""
    by_class: dict[str, Difference] = {}
    total, size = min(most, len(dataset.splits["train"])), config.evaluate.batch
    batches = [range(first, min(first + size, total)) for first in range(0, total, size)]
    configs = [
        overridden(config, f"data.pipeline={kind}", "evaluate.views=10")
        for kind in ("dali", "torch")
    ]
    pipelines = [make_pipeline(one, topology, dataset, "train") for one in configs]
    plans = [p.batches(evaluation_plan(configs[0], batches)) for p in pipelines]
    for both in zip(*plans, strict=True):
        ours, theirs = (part.patches.cpu().numpy() for part in both)
        labels = Metadata.unpack(both[0].metadata).labels.cpu().numpy()
        for label in np.unique(labels).tolist():
            here = labels == label
            one, name = Difference.of(ours[here], theirs[here]), dataset.classes[label]
            by_class[name] = by_class[name] + one if name in by_class else one
    for pipeline in pipelines:
        pipeline.close()
    return by_class


def bench_differences(folder: Path, images: int, overrides: list[str]) -> dict[str, Any]:
    """Compare DALI with torchvision on a folder's photographs, saved as each kind of JPEG.

    Args:
        folder: images, at any depth.
        images: number of images in all, at canvas size and larger.
        overrides: key=value arguments of the config.

    Returns:
        Under "runs" each kind's mean difference and the worst of the other figures, for images at
        canvas size and for those that are resized; under "differences" all figures of each kind.
    """
    names = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not names:
        raise ConfigError(f"{folder}: has no .jpg, .jpeg or .png: name a folder that has")
    config = load_config(["layout.kind=one", *overrides])
    topology, side = connect(config), config.data.canvas
    of_each = max(1, images // (2 * len(_KINDS)))
    by_kind: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="alexnet-dist-bench-") as scratch:
        for stored, size in (("at size", (side, side)), ("resized", _LARGE)):
            source = Path(scratch) / stored
            _save_as_each_kind(names[:of_each], size, source / "train")
            out = Path(scratch) / f"{stored}, packed"
            prepare("folder", source, out, Options(keep=True))
            parts = differences(config, topology, open_dataset(out), of_each * len(_KINDS))
            by_kind |= {f"{stored}, {kind}": parts[kind].figures() for kind in _KINDS}
    worst = {
        f"{stored}, worst of all kinds: {what}": max(
            (abs(one[what]) for name, one in by_kind.items() if name.startswith(stored))
        )
        for stored in ("at size", "resized")
        for what in ("99.9th percentile", "largest", "mean on edges", "red", "green", "blue")
    }
    return {
        "ratios": {},
        "differences": by_kind,
        "machine": machine(config.data.workers),
        "unit": "grey levels",
        "runs": [{name: one["mean"] for name, one in by_kind.items()} | worst],
    }


def _save_as_each_kind(names: list[Path], size: tuple[int, int], folder: Path) -> None:
    """Save images at this size as each kind of JPEG, in a folder for each kind."""
    for kind in _KINDS:
        (folder / kind).mkdir(parents=True)
    for number, name in enumerate(names):
        image = ImageOps.fit(Image.open(name).convert("RGB"), size)
        for kind, how in _KINDS.items():
            written = image.convert("L") if "grey" in kind else image
            written.save(folder / kind / f"{number}.jpg", **how)


def lines(result: dict[str, Any]) -> str:
    """Return what `bench_differences` found as text."""
    rows = result["differences"]
    heads = next(iter(rows.values()))
    text = [f"DALI less torchvision, grey levels{'':7}" + "".join(f"{h:>18}" for h in heads)]
    for name, one in rows.items():
        text.append(f"{name:41}" + "".join(f"{value:18,.4g}" for value in one.values()))
    on = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return "\n".join([*text, "red, green and blue are signed means", "", on])
