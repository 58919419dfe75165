"""A trained network in one process, whatever layout made it: weights, class names, answers."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.checkpoint.store import Checkpoint
from alexnet_dist.config.load import ALONE, load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import Dataset, open_dataset, open_for
from alexnet_dist.data.preprocess import Finish, on_canvas
from alexnet_dist.data.sampler import views
from alexnet_dist.errors import DatasetError
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import parameter_dtype


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
        folder, made_by = Path(self.config.data.path), self.checkpoint.manifest["dataset"]
        if not (folder / "dataset.json").exists() or open_dataset(folder).digest != made_by:
            raise DatasetError(
                f"data.path={str(folder)!r}: the data set that {self.checkpoint.path} was trained "
                "on is not there: say where it lies, load_checkpoint(path, data=FOLDER)"
            )
        return open_for(self.config, self.checkpoint.path)

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
        dtype = next(self.model.parameters()).dtype
        finish = Finish(self.config, self.dataset.statistics, torch.device("cpu"), dtype)
        canvas = on_canvas(image, self.config.data.canvas).expand(3, -1, -1)  # grey fills all three
        corners, flips = (torch.from_numpy(part)[None] for part in views(self.config))
        if flips.shape[1] == 1:
            (top, left), side = corners[0, 0].tolist(), self.config.model.crop
            canvas = canvas[:, top : top + side, left : left + side]
        return finish(canvas.movedim(0, -1)[None], corners, flips, torch.zeros(1, 3))

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:
        """(classes,) softmax outputs of an image, averaged over its `windows` (paper §4.1)."""
        mean: Tensor = self.model(self.windows(image)).softmax(1).mean(0)
        return mean


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
