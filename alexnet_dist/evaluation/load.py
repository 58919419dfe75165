"""A trained network in one process, whatever layout made it: weights, class names, answers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.config.load import ALONE, load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import Dataset, open_for, open_trained_on
from alexnet_dist.data.preprocess import Preprocess, on_canvas
from alexnet_dist.evaluation.predict import (
    Prediction,
    features,
    images_in,
    logits,
    predictions,
    windows_of,
)
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import parameter_dtype

Images = Path | str | Iterable[Path | str]


@dataclass(frozen=True)
class Trained:
    """A network and what it was trained by.

    Attributes:
        model: all columns, on the CPU, in eval mode; takes windows (n, 3, crop, crop) as `windows`
            makes them, gives logits (n, classes).
        config: of the run, for one process.
        checkpoint: where the weights come from: its `path`, `step` and validation `error`.
        given: the data set was named by the caller, and need not be the one trained on.
    """

    model: AlexNet
    config: Config
    checkpoint: Checkpoint
    given: bool = False

    @cached_property
    def dataset(self) -> Dataset:
        """Where the names of classes and the mean image stand.

        Raises DatasetError where it is not there, or is not the one the network was trained on.
        """
        if self.given:
            return open_for(self.config, self.checkpoint.path)
        made_by = self.checkpoint.manifest["dataset"]
        return open_trained_on(self.config, made_by, self.checkpoint.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; raises as `dataset` does."""
        return self.dataset.classes

    def windows(self, image: Tensor) -> Tensor:
        """What the network sees of an image in a test: `evaluate.views` windows of it.

        Args:
            image: (1 or 3, height, width) uint8, red first, as `torchvision.io.decode_image` gives.

        Returns:
            (views, 3, crop, crop), cut from the canvas, the mean off, scaled, unlit.
        """
        weight = next(self.model.parameters())
        preprocess = Preprocess(self.config, self.dataset.statistics, weight.device, weight.dtype)
        canvas = on_canvas(image, self.config.data.canvas).expand(3, -1, -1)  # grey fills all three
        canvases = canvas.movedim(0, -1)[None].contiguous().to(weight.device)
        return windows_of(self.config, preprocess, canvases)

    def probabilities(self, image: Tensor) -> Tensor:
        """(classes,) softmax outputs of an image, averaged over its `windows` (paper §4.1)."""
        return logits(self.model, self.config, self.windows(image)).softmax(1).mean(0)

    def predict(self, images: Images, views: Literal[1, 10] | None = None) -> list[Prediction]:
        """What the network says of image files, of any kind that `prepare` reads, in their order.

        One that cannot be read has a prediction too, whose `refused` says why.

        Args:
            images: paths; one alone needs no list. A folder stands for the images below it.
            views: windows an image; `evaluate.views`, if left out.
        """
        return list(self.predictions(images, views))

    def predictions(
        self, images: Images, views: Literal[1, 10] | None = None, workers: int = 1
    ) -> Iterator[Prediction]:
        """As `predict`, one after another, so that any number of them need no memory.

        Args:
            workers: processes that read; with more than one, the program must guard its start by
                `if __name__ == "__main__":`.
        """
        evaluate = replace(self.config.evaluate, views=views or self.config.evaluate.views)
        config = replace(self.config, evaluate=evaluate)
        return predictions(self.model, config, self.dataset, _files(images), workers)

    def features(self, images: Images, layer: str = "fc7") -> Tensor:
        """What a layer makes of image files: (n, units), or (n, maps, height, width) of conv1 ….

        After the activation, before pooling and normalisation, both columns' side by side, of the
        centre's window; the last layer's are the logits.

        Args:
            images: as for `predict`.

        Raises DatasetError where one cannot be read, ConfigError where there is no such layer.
        """
        config = replace(self.config, evaluate=replace(self.config.evaluate, views=1))
        return features(self.model, config, self.dataset, _files(images), layer)


def _files(images: Images) -> list[Path]:
    named = [images] if isinstance(images, str | Path) else images
    return images_in([Path(name) for name in named])[0]


def load_checkpoint(path: Path | str, data: Path | str | None = None) -> Trained:
    """The network of a checkpoint, or of a run folder's best one.

    Args:
        data: the packed data set that names its classes and holds its mean image; where the
            config says, if left out.

    Raises CheckpointError where there is no checkpoint whose every byte is as written.
    """
    found = checkpoints.at(Path(path))
    moved = {} if data is None else {"data.path": str(data)}
    config = load_config([flat(found.config) | moved, *ALONE])
    file = found.parameters()
    tensors = {name: file.rows(name, slice(None)) for name in file.keys()}  # noqa: SIM118
    dtype = parameter_dtype(config.train.precision)
    model = AlexNet(config.model, config.seed, dtype=dtype, drawn=False).eval()
    model.load_state_dict(tensors)
    return Trained(model, config, found, given=data is not None)
