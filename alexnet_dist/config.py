"""Configuration: frozen dataclasses, YAML layered over `configs/base.yaml`, one clear error.

A key's type, unit and bounds stand here; its value stands in `configs/base.yaml`, which holds
every key, so that a recipe is read in one place. An experiment's YAML says only what differs,
and `key=value` arguments come last. Keys marked `free` may change between two starts of one run;
all the others define the run and are part of a checkpoint's fingerprint.
"""

import dataclasses
import difflib
import operator
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexnet_dist.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """What a key means, with its unit and bounds (`ge`: at least, `gt`: more than, …)."""

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    free: bool = False


@dataclass(frozen=True)
class LrnConfig:
    layers: Annotated[
        tuple[Literal["conv1", "conv2"], ...], Key("layers followed by normalisation")
    ]
    size: Annotated[int, Key("n: adjacent maps summed over", ge=1)]
    alpha: Annotated[float, Key("α", ge=0)]
    beta: Annotated[float, Key("β", gt=0)]
    k: Annotated[float, Key("k", gt=0)]
    alpha_over_size: Annotated[
        bool, Key("divide α by n, as the released code and torch do; the printed formula does not")
    ]


@dataclass(frozen=True)
class ModelConfig:
    columns: Annotated[int, Key("columns of the network: 1 or 2", ge=1, le=2)]
    exchange: Annotated[
        tuple[Literal["conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"], ...],
        Key("layers that see both columns; the others see their own"),
    ]
    classes: Annotated[int, Key("classes of the data set", ge=2)]
    crop: Annotated[int, Key("side of the window conv1 sees, pixels", ge=67)]
    conv: Annotated[tuple[int, ...], Key("maps of conv1 … conv5, all columns together", ge=1)]
    fc: Annotated[tuple[int, ...], Key("units of fc6 and fc7, all columns together", ge=1)]
    activation: Annotated[Literal["relu", "tanh", "sigmoid"], Key("after every layer but fc8")]
    pool: Annotated[tuple[int, ...], Key("max pooling's window and stride, pixels", ge=1)]
    pool_before_lrn: Annotated[bool, Key("CaffeNet's order")]
    lrn: LrnConfig
    dropout: Annotated[float, Key("share of fc6's and fc7's units dropped", ge=0, lt=1)]
    dropout_scaling: Annotated[
        Literal["test", "train"], Key("when to scale: units × (1 − p) at test, or ÷ (1 − p)")
    ]
    init: Annotated[
        Literal["paper", "released", "he"],
        Key("initial weights; paper and released expect grey levels of 0–255, he any scale"),
    ]


@dataclass(frozen=True)
class DataConfig:
    path: Annotated[str, Key("packed data set, made by `alexnet-dist prepare`", free=True)]
    train_split: Annotated[str, Key("split to train on")]
    eval_split: Annotated[str, Key("split to evaluate on")]
    pipeline: Annotated[Literal["torch"], Key("who decodes", free=True)]
    workers: Annotated[
        int, Key("decoding threads a rank; 0 = the rank's cores", ge=0, le=256, free=True)
    ]
    prefetch: Annotated[int, Key("batches decoded ahead", ge=1, le=64, free=True)]
    verify_hashes: Annotated[bool, Key("hash every shard before the first step", free=True)]
    canvas: Annotated[int, Key("side of the image windows are cut from, pixels", ge=67)]
    random_crop: Annotated[bool, Key("train on random windows; else the centre's")]
    flip: Annotated[bool, Key("mirror half of the training windows")]
    lighting: Annotated[float, Key("standard deviation of α in PCA lighting; 0 = off", ge=0)]
    lighting_by: Annotated[
        Literal["sqrt_eigenvalue", "eigenvalue"],
        Key("α times √λ of 0–255 pixels (released code), or λ of 0–1 pixels (as printed)"),
    ]
    subtract: Annotated[
        Literal["mean_image", "mean_rgb", "nothing"], Key("what is taken off the pixels")
    ]
    divide_by: Annotated[
        tuple[float, ...], Key("red, green and blue are divided by these, grey levels", gt=0)
    ]


@dataclass(frozen=True)
class LayoutConfig:
    kind: Annotated[
        Literal["one", "columns"],
        Key("one: all columns in one process; columns: a process for each column", free=True),
    ]
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Key("auto: a GPU for each rank where there are enough, else CPU", free=True),
    ]
    threads: Annotated[
        int, Key("arithmetic threads a rank; 0 = cores ÷ ranks on the host", ge=0, free=True)
    ]
    timeout_s: Annotated[int, Key("longest wait of one rank for another, s", ge=1, free=True)]


@dataclass(frozen=True)
class OptimizerConfig:
    kind: Annotated[Literal["sgd", "adam"], Key("sgd: the paper's")]
    momentum: Annotated[float, Key("sgd's momentum", ge=0, lt=1)]
    momentum_form: Annotated[
        Literal["velocity", "torch"],
        Key("velocity: the rate is inside the momentum (paper §5); torch: outside"),
    ]
    betas: Annotated[tuple[float, ...], Key("adam's β1 and β2", ge=0, lt=1)]
    eps: Annotated[float, Key("adam's ε", gt=0)]
    weight_decay: Annotated[float, Key("weight decay (L2)", ge=0)]
    bias_decay: Annotated[bool, Key("decay biases too (paper); the released code does not")]
    bias_rate: Annotated[float, Key("biases' rate ÷ weights' rate; released code: 2", gt=0)]


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Annotated[
        Literal["steps", "plateau", "polynomial"],
        Key("how the rate falls: at given epochs, when the error stalls, or to 0 at the end"),
    ]
    rate: Annotated[float, Key("initial learning rate ε", ge=0)]
    factor: Annotated[float, Key("steps, plateau: the rate is multiplied by this", gt=0, lt=1)]
    at_epochs: Annotated[tuple[float, ...], Key("steps: epochs at which the rate falls", gt=0)]
    patience: Annotated[int, Key("plateau: evaluations without a lower error before a fall", ge=1)]
    max_drops: Annotated[int, Key("plateau: falls in all; paper: 3", ge=0)]
    power: Annotated[float, Key("polynomial: rate × (1 − progress)^power", gt=0)]
    warmup_epochs: Annotated[float, Key("linear warm-up from 0, epochs", ge=0)]


@dataclass(frozen=True)
class TrainConfig:
    batch: Annotated[int, Key("samples in a step, all ranks together", ge=1)]
    epochs: Annotated[float, Key("passes over the training split", gt=0)]
    micro_batches: Annotated[
        int, Key("parts a rank computes its batch in, to save memory", ge=1, free=True)
    ]
    precision: Annotated[
        Literal["bf16", "fp32", "fp64"], Key("bf16: autocast, weights stay in fp32")
    ]
    deterministic: Annotated[bool, Key("GPU: only kernels that repeat to the bit", free=True)]


@dataclass(frozen=True)
class EvaluateConfig:
    every_epochs: Annotated[float, Key("evaluate this often, and at the end, epochs", gt=0)]
    views: Annotated[Literal[1, 10], Key("windows an image: the centre's, or the paper's ten")]
    batch: Annotated[int, Key("images at a time, all ranks together", ge=1, free=True)]


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Annotated[int, Key("save this often, and at the end, steps", ge=1, free=True)]
    keep_last: Annotated[int, Key("newest checkpoints kept; the best is kept too", ge=1, free=True)]


@dataclass(frozen=True)
class LogConfig:
    every_steps: Annotated[int, Key("a line and a point this often, steps", ge=1, free=True)]


@dataclass(frozen=True)
class Config:
    name: Annotated[str, Key("the run's name: its folder under output_dir", free=True)]
    output_dir: Annotated[str, Key("where run folders lie", free=True)]
    seed: Annotated[int, Key("everything random in the run follows from it", ge=0, lt=2**32)]
    model: ModelConfig
    data: DataConfig
    layout: LayoutConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name


def configs_folder() -> Path:
    """Where the shipped YAML files lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def keys(of: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Key]]:
    """Every key as (dotted name, type, Key)."""
    hints = get_type_hints(of, include_extras=True)
    for field in dataclasses.fields(of):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            kind, key = get_args(hint)
            yield prefix + field.name, kind, key


Source = str | Path | Mapping[str, Any]


def load_config(sources: Sequence[Source]) -> Config:
    """The config of `base.yaml`, then each source in order.

    A source is a file, the name of a shipped file, a `key=value`, or a mapping of dotted keys.

    Raises ConfigError on the first thing that is wrong.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source in (configs_folder() / "base.yaml", *sources):
        name, layer = _read_layer(source)
        for dotted, value in _flatten(layer, name):
            values[dotted] = value
            origin[dotted] = name
    for dotted, _, _ in keys():
        if dotted not in values:
            raise ConfigError(
                f"{dotted}: no value; configs/base.yaml must hold every key: reinstall"
            )
    config = build(values)
    _check_combinations(config, origin)
    return config


def build(values: Mapping[str, Any]) -> Config:
    """A Config from a complete mapping of dotted keys to values of the right types."""

    def make(of: type, prefix: str) -> Any:
        hints = get_type_hints(of)
        return of(
            **{
                field.name: make(hints[field.name], f"{prefix}{field.name}.")
                if dataclasses.is_dataclass(hints[field.name])
                else values[prefix + field.name]
                for field in dataclasses.fields(of)
            }
        )

    return make(Config, "")  # type: ignore[no-any-return]


def flat(config: Config) -> dict[str, Any]:
    """The config as a mapping of dotted keys to values (tuples as lists: what JSON keeps)."""

    def value(dotted: str) -> Any:
        node: Any = config
        for part in dotted.split("."):
            node = getattr(node, part)
        return list(node) if isinstance(node, tuple) else node

    return {dotted: value(dotted) for dotted, _, _ in keys()}


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys that define the run, for the checkpoint's manifest.

    The run's length counts only where it shapes the rate: a longer run on `steps` or `plateau`
    begins like a shorter one.
    """
    values = flat(config)
    if config.schedule.kind != "polynomial":
        del values["train.epochs"]
    free = {dotted for dotted, _, key in keys() if key.free}
    return {dotted: value for dotted, value in values.items() if dotted not in free}


def _read_layer(source: Source) -> tuple[str, Mapping[str, Any]]:
    """The name to blame and the nested mapping of one source."""
    if isinstance(source, Mapping):
        return "a saved config", source
    text = str(source)
    if "=" in text and not Path(text).is_file():
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise ConfigError(
                f"{text!r}: {key!r} is not a key; write key=value, e.g. train.batch=64"
            )
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=True)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{text!r}: {value!r} is not a YAML value: {_line(error)}") from error
        return "the command line", parsed  # type: ignore[return-value]
    path = next((p for p in _candidates(text) if p.is_file()), None)
    if path is None:
        if text in {dotted for dotted, _, _ in keys()}:
            raise ConfigError(f"{text!r} is a key without a value: write {text}=VALUE")
        shipped = sorted(
            str(p.relative_to(configs_folder()).with_suffix(""))
            for p in configs_folder().rglob("*.yaml")
        )
        raise ConfigError(
            f"{text!r} is neither a config file nor key=value; shipped configs: "
            f"{', '.join(shipped)}{_nearest(text, shipped)}"
        )
    try:
        loaded = OmegaConf.load(path)
        layer = OmegaConf.to_container(loaded, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file of keys and values: {_line(error)}") from error
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: holds a {type(layer).__name__}; write keys and values")
    return str(path), layer  # type: ignore[return-value]


def _candidates(text: str) -> list[Path]:
    shipped = configs_folder() / text
    return [Path(text), shipped, shipped.with_name(shipped.name + ".yaml")]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _nearest(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _flatten(layer: Mapping[Any, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and checked values of a nested mapping; raises ConfigError."""
    known = {dotted: (kind, key) for dotted, kind, key in keys()}
    sections = {dotted.rpartition(".")[0] for dotted in known} - {""}

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            dotted = f"{prefix}{name}"
            if dotted in known:
                yield dotted, _checked(dotted, value, *known[dotted], source)
            elif dotted in sections and isinstance(value, dict):
                yield from walk(value, dotted + ".")
            elif dotted in sections:
                raise ConfigError(
                    f"{source}: {dotted}={value!r}: {dotted} is a section, with keys "
                    f"{', '.join(k for k in known if k.startswith(dotted + '.'))}"
                )
            else:
                near = _nearest(dotted, [*known, *sections])
                if not near:  # the right last word in the wrong section
                    near = _nearest(str(name), [k.rpartition(".")[2] for k in known])
                raise ConfigError(f"{source}: unknown key {dotted}{near}")

    yield from walk(layer, "")


def _checked(dotted: str, value: Any, kind: Any, key: Key, source: str) -> Any:
    """The value as its key's type; raises ConfigError where type or bounds do not fit."""

    def wrong(rule: str) -> ConfigError:
        return ConfigError(f"{source}: {dotted}={value!r}: must be {rule} ({key.doc})")

    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, list):
            raise wrong("a list, as in [1, 2]")
        return tuple(_checked(dotted, v, item, key, source) for v in value)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices or isinstance(value, bool):
            near = _nearest(str(value), [str(choice) for choice in choices])
            raise wrong(f"one of {', '.join(map(str, choices))}{near}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise wrong(names[kind])
    for word, bound, holds in (
        ("at least", key.ge, operator.ge),
        ("more than", key.gt, operator.gt),
        ("at most", key.le, operator.le),
        ("less than", key.lt, operator.lt),
    ):
        if bound is not None and not holds(value, bound):
            raise wrong(f"{word} {bound:g}")
    if kind is float and not abs(value) < float("inf"):
        raise wrong("finite")
    return value


def _check_combinations(config: Config, origin: Mapping[str, str]) -> None:
    """Rules over several keys; raises ConfigError."""
    model, data, schedule = config.model, config.data, config.schedule
    lengths = types.MappingProxyType(
        {"model.conv": 5, "model.fc": 2, "model.pool": 2, "data.divide_by": 3, "optimizer.betas": 2}
    )
    values = flat(config)
    rules: list[tuple[str, bool, str]] = [
        (key, len(values[key]) == length, f"needs {length} numbers")
        for key, length in lengths.items()
    ]
    rules += [
        (
            "name",
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", config.name) is not None,
            "letters, digits, '.', '_' and '-' only, at most 100, not beginning with a sign",
        ),
        (
            "data.canvas",
            data.canvas >= model.crop,
            f"must hold a window of model.crop={model.crop}: raise it, or lower model.crop",
        ),
        (
            "layout.kind",
            config.layout.kind != "columns" or model.columns == 2,
            f"there is nothing to split in a network of model.columns={model.columns}: "
            "set model.columns=2 or layout.kind=one",
        ),
        (
            "train.batch",
            config.train.batch % config.train.micro_batches == 0,
            f"does not divide into train.micro_batches={config.train.micro_batches}",
        ),
        (
            "schedule.at_epochs",
            list(schedule.at_epochs) == sorted(set(schedule.at_epochs)),
            "epochs must rise",
        ),
        (
            "model.init",
            model.init == "he" or min(data.divide_by) == max(data.divide_by) == 1,
            f"these weights expect grey levels of 0–255, and data.divide_by="
            f"{list(data.divide_by)} scales them: with such inputs the loss stays flat. "
            "Set data.divide_by=[1,1,1] or model.init=he",
        ),
        (
            "model.init",
            model.init == "he" or data.subtract != "nothing",
            "these weights expect the mean to be taken off: set data.subtract=mean_image "
            "or model.init=he",
        ),
    ]
    rules += [
        (key, width % model.columns == 0, f"{width} does not split into {model.columns} columns")
        for key in ("model.conv", "model.fc")
        for width in values[key]
    ]
    for key, holds, rule in rules:
        if not holds:
            raise ConfigError(f"{origin[key]}: {key}={values[key]!r}: {rule}")
