"""Load a trained network into one process, whatever layout trained it, to make predictions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.config.load import IN_ONE_PROCESS, overridden
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Dataset, open_trained_on
from alexnet_dist.data.prepare.convert import convert
from alexnet_dist.data.preprocess import Preprocess, on_canvas, rgb_last
from alexnet_dist.errors import ConfigError, DatasetError, NotFinite
from alexnet_dist.evaluation.features import activations, by_one_view, logits
from alexnet_dist.evaluation.predict import Prediction, batches_of, images_in, windows_of
from alexnet_dist.files import MOST_ENCODED, read_bytes, written_aside
from alexnet_dist.network.exchange import side_by_side
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import parameter_dtype
from alexnet_dist.plotting import columns_picture

Images = Path | str | Iterable[Path | str]


@dataclass(frozen=True)
class Trained:
    """A trained network, with the config it was trained with.

    Attributes:
        model: all columns, on the CPU, in eval mode; it takes windows (n, 3, crop, crop) as
            `windows` returns them, and returns logits (n, classes).
        config: the run's config, for one process.
        checkpoint: where the weights come from, with its `path`, `step` and validation `error`.
        data_given: the caller named the data set, which need not be the one trained on.
    """

    model: AlexNet
    config: Config
    checkpoint: Checkpoint
    data_given: bool

    @cached_property
    def dataset(self) -> Dataset:
        """The data set that holds the class names and the mean image.

        Raises DatasetError where it is missing, or is not the one the network was trained on.
        """
        if self.data_given:
            return self.checkpoint.open_data(self.config)
        digest = self.checkpoint.manifest["dataset"]
        return open_trained_on(self.config, digest, self.checkpoint.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the logits; raises as `dataset` does."""
        return self.dataset.classes

    def windows(self, image: Tensor) -> Tensor:
        """Return the windows of an image that evaluation uses: `evaluate.views` of them.

        Args:
            image: (1 or 3, height, width) uint8, red first, as from `torchvision.io.decode_image`.

        Returns:
            (views, 3, crop, crop), cut from the canvas, with the mean subtracted and scaled.

        Raises DatasetError for any other tensor.
        """
        pixels = image.dtype == torch.uint8 and image.ndim == 3 and image.numel() > 0
        if not pixels or len(image) not in (1, 3):
            raise DatasetError(
                f"an image of {(*image.shape,)}, {image.dtype}: must be (1 or 3, height, width), "
                'uint8, as from decode_image(path, mode="RGB")'
            )
        weight = next(self.model.parameters())
        preprocess = Preprocess(self.config, self.dataset.statistics, weight.device, weight.dtype)
        canvas = rgb_last(on_canvas(image, self.config.data.canvas))
        canvases = canvas[None].contiguous().to(weight.device)
        return windows_of(self.config, preprocess, canvases)

    def probabilities(self, image: Tensor) -> Tensor:
        """Return softmax outputs (classes,), averaged over an image's `windows` (paper §4.1)."""
        return logits(self.model, self.config, self.windows(image)).softmax(1).mean(0)

    def predict(self, images: Images, views: Literal[1, 10] | None = None) -> list[Prediction]:
        """Predict the classes of image files of any kind that `prepare` reads, in order.

        A file that cannot be read has a prediction too, whose `refused` says why.

        Args:
            images: a path or several; a folder stands for all images below it.
            views: windows per image; `evaluate.views` by default.
        """
        return list(self.predictions(images, views))

    def predictions(
        self, images: Images, views: Literal[1, 10] | None = None, workers: int = 1
    ) -> Iterator[Prediction]:
        """Yield what `predict` returns, one by one, so that memory does not grow with their number.

        Args:
            workers: number of processes that read files; with more than one, the main program must
                be guarded by `if __name__ == "__main__":`.

        Raises ConfigError for another number of views, NotFinite where the network's outputs are
        not finite.
        """
        config = overridden(self.config, {} if views is None else {"evaluate.views": views})
        for part, windows in self._batches(config, images, workers):
            shares = iter(())
            if len(windows):
                outputs = logits(self.model, config, windows).softmax(1)
                shares = iter(outputs.unflatten(0, (-1, config.evaluate.views)).mean(1).cpu())
            for path, refused in part:
                own = None if refused else next(shares)
                if own is not None and not own.isfinite().all():
                    raise NotFinite(
                        f"{path}: the network's outputs are not finite: use an earlier checkpoint"
                    )
                yield Prediction(path, self.classes, own, refused)

    def features(self, images: Images, layer: str = "fc7") -> Tensor:
        """Return a layer's outputs for image files: (n, units), or (n, maps, height, width).

        They are taken from the centre window, after the activation and before normalisation and
        pooling, both columns' side by side. The last layer's outputs are the logits.

        Args:
            images: as for `predict`.

        Raises DatasetError where an image cannot be read, ConfigError for an unknown layer.
        """
        if layer not in (names := self.config.model.layer_names):
            raise ConfigError(f"layer {layer!r}: this network has only {', '.join(names)}")
        config, outputs = by_one_view(self.config), []
        for part, windows in self._batches(config, images):
            _check_read(part)
            seen = activations(self.model, config, windows, [layer])[layer]
            outputs.append(side_by_side(seen).cpu())
        if not outputs:
            raise ConfigError(f"features of {layer!r}: name at least one image")
        return torch.cat(outputs)

    def draw(self, prediction: Prediction, out: Path) -> None:
        """Draw an image, its prediction, and each column's strongest maps of it, layer by layer.

        Args:
            out: the PNG to write.

        Raises DatasetError where the image cannot be read.
        """
        config = by_one_view(self.config)
        ((part, windows),) = self._batches(config, prediction.path)
        _check_read(part)
        made = activations(self.model, config, windows, config.model.conv_names)
        maps = {name: [x[0].cpu().numpy() for x in parts] for name, parts in made.items()}
        image = convert(read_bytes(prediction.path, MOST_ENCODED), keep=True).image
        whole = rgb_last(image).numpy()
        seen = config.model.crop / config.data.canvas
        with written_aside(out) as aside:
            columns_picture(aside, prediction.path.name, whole, seen, prediction.top(), maps)

    def _batches(
        self, config: Config, images: Images, workers: int = 1
    ) -> Iterator[tuple[list[tuple[Path, str]], Tensor]]:
        """As `batches_of`, of image files and those in folders."""
        named = [images] if isinstance(images, str | Path) else images
        paths, _ = images_in([Path(name) for name in named])
        device = next(self.model.parameters()).device
        return batches_of(config, self.dataset, device, paths, workers)


def _check_read(part: Iterable[tuple[Path, str]]) -> None:
    """Raise DatasetError where a file of a batch was refused."""
    for path, refused in part:
        if refused:
            raise DatasetError(f"{path}: {refused}: leave it out")


def load_checkpoint(path: Path | str, data: Path | str | None = None) -> Trained:
    """Load the network of a checkpoint, or of a run folder's best checkpoint.

    Args:
        data: the packed data set that has its class names and mean image; by default the one the
            config names.

    Raises CheckpointError where there is no undamaged checkpoint.
    """
    found = checkpoints.at(Path(path))
    moved = {} if data is None else {"data.path": str(data)}
    config = overridden(found.config, moved, *IN_ONE_PROCESS)
    dtype = parameter_dtype(config.train.precision)
    model = AlexNet(config.model, config.seed, dtype=dtype, init_weights=False).eval()
    model.load_state_dict(found.parameters().tensors())
    return Trained(model, config, found, data_given=data is not None)
