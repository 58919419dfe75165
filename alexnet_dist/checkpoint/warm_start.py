"""Beginning from another run's weights, some layers anew: pre-training and fine-tuning; and what a
run settles as it begins."""

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
    """The config with what lies in other files and defines the run: the checkpoint it begins from,
    with its weights' hash, and the hash of its mean image.

    Once the run has checkpoints of its own, those it began from may change or go.

    Raises ConfigError where it asks for another hash, CheckpointError where there is no checkpoint,
    DatasetError where there is no mean image.
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
            "weights this run is to begin from, or set train.init_sha256=any"
        )
    begun = dataclasses.replace(train, init_from=str(source.path), init_sha256=found)
    return dataclasses.replace(config, train=begun)


def _before_means(config: Config) -> bool:
    """Whether the run in this folder began before hashes of mean images were kept, with this."""
    if not checkpoints.steps(config.folder / "checkpoints"):
        return False
    try:
        before = load_config([config.folder / "config.json"]).data
    except ConfigError:
        return False
    return (before.mean_from, before.mean_sha256) == (config.data.mean_from, "any")


def _begun(config: Config) -> TrainConfig | None:
    """`train` with what the run in this folder began from; None where it did not yet, or the config
    asks for other weights."""
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
    """What the run in this folder was last started with; None where it has no checkpoint."""
    if not checkpoints.steps(config.folder / "checkpoints"):
        return None
    try:
        return load_config([config.folder / "config.json"])
    except ConfigError:
        return None


def with_its_pipeline(config: Config) -> Config:
    """The config with the pipeline that the run in this folder took before, where it leaves that to
    `auto`: DALI on a GPU decodes to other bytes than torchvision."""
    last = _last_start(config) if config.data.pipeline == AUTO else None
    if last is None:
        return config
    data = dataclasses.replace(config.data, pipeline=last.data.pipeline)
    return dataclasses.replace(config, data=data)


class InitialWeights:
    """Whole parameters of train.init_from, those of train.init_new drawn as for any new run.

    Raises ConfigError where a layer that is not new has another shape there, or is there alone.
    """

    def __init__(self, config: Config) -> None:
        self.anew = AlexNet(config.model, config.seed)
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
        return {name: tuple(tensor.shape) for name, tensor in self.anew.named_parameters()}

    def rows(self, name: str, rows: slice) -> Tensor:
        if name.partition(".")[0] in self.new:
            return self.anew.get_parameter(name).detach()[rows]
        return self.file.rows(name, rows)
