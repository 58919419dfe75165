"""Start from another run's weights, with some layers new, as for fine-tuning; and fix the settings
that a run resolves once, when it first starts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.from_data import AUTO
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, TrainConfig
from alexnet_dist.data.dataset import other_class
from alexnet_dist.data.preprocess import mean_sha256
from alexnet_dist.errors import CheckpointError, ConfigError
from alexnet_dist.network.model import AlexNet, whole_shapes
from alexnet_dist.network.precision import parameter_dtype
from alexnet_dist.tensor_files import Shape, TensorFile, misfit


def resolved(config: Config) -> Config:
    """Return the config with what a run resolves once, when it first starts: the path and weight
    hash of the checkpoint to start from, and the hash of the mean image. `data.pipeline=auto` stays
    what it became at an earlier start, since DALI on a GPU decodes to other bytes than torchvision.

    Once the run has checkpoints of its own, the files it started from may change or be removed.

    Raises ConfigError where the config demands another hash, CheckpointError where there is no
    checkpoint, DatasetError where there is no mean image.
    """
    last, data, train = _last_start(config), config.data, config.train
    if last is not None and data.pipeline == AUTO:
        data = dataclasses.replace(data, pipeline=last.data.pipeline)
    # A run that started before hashes of mean images were recorded goes on without.
    means = data.mean_from, data.mean_sha256
    unrecorded = last is not None and (last.data.mean_from, last.data.mean_sha256) == means
    if data.mean_sha256 == "any" and not unrecorded:
        data = dataclasses.replace(data, mean_sha256=mean_sha256(config))
    if train.init_from != "none":
        if last is not None and _started_from(train, last.train):
            path, digest = last.train.init_from, last.train.init_sha256
        else:
            source, digest = _source(train)
            path = str(source.path)
        train = dataclasses.replace(train, init_from=path, init_sha256=digest)
    return dataclasses.replace(config, data=data, train=train)


def _last_start(config: Config) -> Config | None:
    """Return the config with which the run in this folder was last started; None where it has no
    checkpoint."""
    if not checkpoints.steps(config.folder / "checkpoints"):
        return None
    try:
        return load_config([config.folder / "config.json"])
    except ConfigError:
        return None


def _started_from(train: TrainConfig, last: TrainConfig) -> bool:
    """Whether the weights that the config asks for are those that the run started from."""
    given, taken = Path(train.init_from), Path(last.init_from)
    same = given == taken or given / "checkpoints" == taken.parent
    return same and train.init_sha256 in ("any", last.init_sha256)


def _source(train: TrainConfig) -> tuple[checkpoints.Checkpoint, str]:
    """Return the checkpoint that train.init_from names, and its weights' hash; raise ConfigError
    where the config demands another hash, CheckpointError where there is no checkpoint."""
    try:
        source = checkpoints.at(Path(train.init_from))
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from={train.init_from!r}: {error}") from error
    digest = str(source.manifest["files"]["model.safetensors"]["sha256"])
    if train.init_sha256 not in ("any", digest):
        raise ConfigError(
            f"train.init_sha256={train.init_sha256!r}: {train.init_from} has {digest}: name the "
            "weights that this run is to start from, or set train.init_sha256=any",
            on_every_rank=False,  # each node may have a copy on its own disk
        )
    return source, digest


def check_fits(config: Config, classes: Sequence[str]) -> None:
    """Check that a run can begin from train.init_from, before its folder is made; raises as
    `InitialWeights`. Does nothing where it begins from its own checkpoint, or from no weights.

    Args:
        config: as `resolved` returned it.
        classes: the data set's class names.
    """
    if config.train.init_from != "none" and not checkpoints.steps(config.folder / "checkpoints"):
        _fitting(checkpoints.read(Path(config.train.init_from)), config, classes)


def _fitting(source: checkpoints.Checkpoint, config: Config, classes: Sequence[str]) -> TensorFile:
    """Open the parameters of train.init_from; raise ConfigError where they do not fit."""
    file, new = source.parameters(), config.train.init_new
    there, here = (
        {name: shape for name, shape in of.items() if name.partition(".")[0] not in new}
        for of in (file.shapes(), whole_shapes(config.model))
    )
    if wrong := misfit(there, here):
        layer = wrong.partition(".")[0]
        known = layer in config.model.layer_names
        remedy = f"add {layer} to train.init_new, or " if known else ""
        raise ConfigError(
            f"train.init_from={config.train.init_from!r}: {wrong}: {remedy}change the network"
        )
    last = config.model.layer_names[-1]
    other = other_class(source.manifest.get("classes"), classes)
    if other and last not in new:
        raise ConfigError(
            f"train.init_from={config.train.init_from!r}: {last} would predict other "
            f"classes: {other} there: add {last} to train.init_new"
        )
    return file


class InitialWeights:
    """Whole initial parameters: those of train.init_from, except that the layers of train.init_new
    begin as in any new run. They are read like a checkpoint's.

    Args:
        classes: the data set's class names.

    Raises ConfigError where a layer that is not new is missing there, has another shape, does not
    exist here, or is the last one and was trained on other classes; and as `_source` does, since
    the files may have changed after the run resolved its config.
    """

    def __init__(self, config: Config, classes: Sequence[str]) -> None:
        source, _ = _source(config.train)
        self.file, self.new = _fitting(source, config, classes), config.train.init_new
        dtype = parameter_dtype(config.train.precision)
        self.fresh = AlexNet(config.model, config.seed, dtype=dtype)

    def shapes(self) -> dict[str, Shape]:
        """Return each parameter's whole shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.fresh.named_parameters()}

    def rows(self, name: str, rows: slice) -> Tensor:
        """Return some rows (dim 0) of a parameter."""
        if name.partition(".")[0] in self.new:
            return self.fresh.get_parameter(name).detach()[rows]
        return self.file.rows(name, rows)
