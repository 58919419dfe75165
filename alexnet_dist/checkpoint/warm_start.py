"""Start from another run's weights, with some layers new, as for fine-tuning; and fix the settings
that a run resolves once, when it first starts."""

import dataclasses
from pathlib import Path

from torch import Tensor

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.from_data import AUTO
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, TrainConfig
from alexnet_dist.data.preprocess import mean_sha256
from alexnet_dist.errors import CheckpointError, ConfigError
from alexnet_dist.network.model import AlexNet
from alexnet_dist.tensor_files import Shape, misfit


def resolved(config: Config) -> Config:
    """Return the config with what it refers to in other files: the path and weight hash of the
    checkpoint to start from, and the hash of the mean image.

    Once the run has checkpoints of its own, the files it started from may change or be removed.

    Raises ConfigError where the config demands another hash, CheckpointError where there is no
    checkpoint, DatasetError where there is no mean image.
    """
    if config.data.mean_sha256 == "any" and not _before_means(config):
        found = mean_sha256(config)
        if found != "any":
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, mean_sha256=found)
            )
    train = config.train
    if train.init_from == "none":
        return config
    if begun := _begun(config):
        return dataclasses.replace(config, train=begun)
    try:
        source = checkpoints.at(Path(train.init_from))
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from={train.init_from!r}: {error}") from error
    found = str(source.manifest["files"]["model.safetensors"]["sha256"])
    if train.init_sha256 not in ("any", found):
        raise ConfigError(
            f"train.init_sha256={train.init_sha256!r}: {train.init_from} has {found}: name the "
            "weights that this run is to start from, or set train.init_sha256=any"
        )
    begun = dataclasses.replace(train, init_from=str(source.path), init_sha256=found)
    return dataclasses.replace(config, train=begun)


def _before_means(config: Config) -> bool:
    """Whether the run in this folder started with the same mean image, before hashes of mean images
    were recorded."""
    if not checkpoints.steps(config.folder / "checkpoints"):
        return False
    try:
        before = load_config([config.folder / "config.json"]).data
    except ConfigError:
        return False
    return (before.mean_from, before.mean_sha256) == (config.data.mean_from, "any")


def _begun(config: Config) -> TrainConfig | None:
    """Return `train` with the weights that the run in this folder started from; None where it has
    not started, or the config asks for other weights."""
    if (last := _last_start(config)) is None:
        return None
    before = last.train
    same = Path(before.init_from).is_relative_to(config.train.init_from)
    if not same or config.train.init_sha256 not in ("any", before.init_sha256):
        return None
    return dataclasses.replace(
        config.train, init_from=before.init_from, init_sha256=before.init_sha256
    )


def _last_start(config: Config) -> Config | None:
    """Return the config with which the run in this folder was last started; None where it has no
    checkpoint."""
    if not checkpoints.steps(config.folder / "checkpoints"):
        return None
    try:
        return load_config([config.folder / "config.json"])
    except ConfigError:
        return None


def with_its_pipeline(config: Config) -> Config:
    """Return the config with `data.pipeline=auto` replaced by the pipeline that the run in this
    folder used before: DALI on a GPU decodes to other bytes than torchvision."""
    last = _last_start(config) if config.data.pipeline == AUTO else None
    if last is None:
        return config
    data = dataclasses.replace(config.data, pipeline=last.data.pipeline)
    return dataclasses.replace(config, data=data)


class InitialWeights:
    """Whole initial parameters: those of train.init_from, but for train.init_new those of any new
    run. They are read like a checkpoint's.

    Raises ConfigError where a layer that is not new is missing there, has another shape, or does
    not exist here.
    """

    def __init__(self, config: Config) -> None:
        self.fresh = AlexNet(config.model, config.seed)
        self.file = checkpoints.at(Path(config.train.init_from)).parameters()
        self.new = config.train.init_new
        there, here = (
            {name: shape for name, shape in of.items() if name.partition(".")[0] not in self.new}
            for of in (self.file.shapes(), self.shapes())
        )
        if wrong := misfit(there, here):
            layer = wrong.partition(".")[0]
            known = layer in config.model.layer_names
            remedy = f"add {layer} to train.init_new, or " if known else ""
            raise ConfigError(
                f"train.init_from={config.train.init_from!r}: {wrong}: {remedy}change the network"
            )

    def shapes(self) -> dict[str, Shape]:
        """Return each parameter's whole shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.fresh.named_parameters()}

    def rows(self, name: str, rows: slice) -> Tensor:
        """Return some rows (dim 0) of a parameter."""
        if name.partition(".")[0] in self.new:
            return self.fresh.get_parameter(name).detach()[rows]
        return self.file.rows(name, rows)
