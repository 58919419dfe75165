"""Reading configuration: YAML layered over `configs/base.yaml`, and one clear error.

An experiment's YAML says only what differs from base.yaml, and `key=value` arguments come last.
The only importer of OmegaConf.
"""

import dataclasses
import difflib
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexnet_dist.config import Config, Key, flat, keys
from alexnet_dist.errors import ConfigError
from alexnet_dist.untrusted import read_bytes

Source = str | Path | Mapping[str, Any]
_NOT_YAML = (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError)
# Bounds of a file, which would grow beyond any memory or stack by aliases of aliases, by
# interpolations of interpolations, or by nesting.
_LONGEST, _DEEPEST, _MOST_INTERPOLATIONS = 200_000, 20, 10


def load_config(sources: Source | Sequence[Source]) -> Config:
    """The config of `base.yaml`, then each source in order.

    A source is a file, the name of a shipped file, a `key=value`, or a mapping of dotted keys; one
    alone needs no list.

    Raises ConfigError on the first thing that is wrong.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    layers = [sources] if isinstance(sources, str | Path | Mapping) else sources
    for source in (configs_folder() / "base.yaml", *layers):
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


def configs_folder() -> Path:
    """Where the shipped YAML files lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def _read_layer(source: Source) -> tuple[str, Mapping[str, Any]]:
    """The name to blame and the nested mapping of one source."""
    if isinstance(source, Mapping):
        return "a saved config", source
    text = str(source)
    if "=" in text and not _is_file(Path(text)):
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise ConfigError(
                f"{text!r}: {key!r} is not a key; write key=value, e.g. train.batch=64"
            )
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=True)
        except _NOT_YAML as error:
            raise ConfigError(f"{text!r}: {value!r} is not a YAML value: {_line(error)}") from error
        return "the command line", parsed  # type: ignore[return-value]
    shipped_names = (configs_folder() / text, configs_folder() / f"{text}.yaml")
    path = next(filter(_is_file, (Path(text), *shipped_names)), None)
    if path is None:
        if text in {dotted for dotted, _, _ in keys()}:
            raise ConfigError(f"{text!r} is a key without a value: write {text}=VALUE")
        shipped = sorted(
            str(p.relative_to(configs_folder()).with_suffix(""))
            for p in configs_folder().rglob("*.yaml")
            if p.parent.name != "cluster"  # launch's
        )
        raise ConfigError(
            f"{text!r} is neither a config file nor key=value; shipped configs: "
            f"{', '.join(shipped)}{_nearest(text, shipped)}"
        )
    try:
        text = read_bytes(path, _LONGEST).decode()
        _check_growth(text)
        layer = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not a YAML file of keys and values: {_line(error)}") from error
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: holds a {type(layer).__name__}; write keys and values")
    return str(path), layer  # type: ignore[return-value]


def _check_growth(text: str) -> None:
    """Raises ValueError, before it grows, where a YAML text could."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("has aliases (*name)")
        if isinstance(event, yaml.ScalarEvent) and depth == 0:
            raise ValueError("a lone value")
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST}")
    if text.count("${") > _MOST_INTERPOLATIONS:
        raise ValueError(f"more than {_MOST_INTERPOLATIONS} interpolations (${{…}})")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name a file could have
        return False


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
        if key.spread and isinstance(value, int | float):
            value = [value]
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
    if kind is int and not abs(value) < 2**63:
        raise wrong("less than 2⁶³")
    if kind is str and not value.isprintable():
        raise wrong("text without control characters")
    return value


def _check_combinations(config: Config, origin: Mapping[str, str]) -> None:
    """Rules over several keys; raises ConfigError."""
    model, data, schedule = config.model, config.data, config.schedule
    zero = config.layout.kind.startswith("zero")
    lengths = {"model.pool": 2, "data.divide_by": 3, "optimizer.betas": 2}
    values = flat(config)
    rules: list[tuple[str, bool, str]] = [
        (key, len(values[key]) == length, f"needs {length} numbers")
        for key, length in lengths.items()
    ]
    convs, layers = len(model.conv), len(model.layer_names)
    rules += [
        (
            "model.conv",
            convs > 0 and layers <= 9,
            "a network has a convolution at least, and nine layers at most",
        ),
    ]
    rules += [
        (f"model.{key}", len(values[f"model.{key}"]) == convs,
         f"model.conv={list(model.conv)} needs {convs} numbers here")
        for key in ("kernel", "stride", "padding")
    ]  # fmt: skip
    rules += [
        (key, {*values[key]} <= {*model.layer_names},
         f"the network of model.conv and model.fc has {', '.join(model.layer_names)}")
        for key in (
            "model.exchange", "model.activation_last", "model.pool_after", "model.lrn.layers",
            "model.spatial_norm.layers", "model.dropout_before", "train.init_new",
        )
    ]  # fmt: skip
    spread = {"init_std": layers, "init_bias": layers, "lrn.alpha": len(model.lrn.layers)}
    rules += [
        (f"model.{key}", (model.init == "he" and key.startswith("init")) or
         len(values[f"model.{key}"]) in (1, length), f"needs one number, or {length}")
        for key, length in spread.items()
    ]  # fmt: skip
    rules += [
        (
            "model.pool_average",
            {*model.pool_average} <= {*model.pool_after},
            f"model.pool_after={list(model.pool_after)}: only they pool",
        ),
        ("model.spatial_norm.size", model.spatial_norm.size % 2 == 1, "must be odd"),
        (
            "train.init_new",
            config.train.init_from != "none" or not config.train.init_new,
            "all layers begin anew where train.init_from=none",
        ),
    ]
    rules += [
        (
            "name",
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", config.name) is not None,
            "letters, digits, '.', '_' and '-' only, at most 100, not beginning with a sign",
        ),
        ("model.lrn.size", model.lrn.size % 2 == 1, "must be odd: as many maps on both sides"),
        (
            "data.canvas",
            data.canvas >= model.crop,
            f"must hold a window of model.crop={model.crop}: raise it, or lower model.crop",
        ),
        (
            "layout.kind",
            config.layout.kind not in ("columns", "columns_x_replicas") or model.columns == 2,
            f"there is nothing to split in a network of model.columns={model.columns}: "
            "set model.columns=2 or layout.kind=one, replicas, zero1, zero2, sharded_fc",
        ),
        (
            "layout.kind",
            config.layout.kind != "sharded_fc" or {*model.fc_names} <= {*model.exchange},
            "its fully-connected layers see all units, and model.exchange="
            f"{list(model.exchange)} keeps some to their column: add {', '.join(model.fc_names)}, "
            "or set layout.kind=replicas",
        ),
        (
            "layout.kind",
            not zero or config.optimizer.kind != "lars",
            "DeepSpeed's flat partitions have no layers, and optimizer.kind=lars needs their "
            "norms: set layout.kind=replicas, columns_x_replicas or sharded_fc",
        ),
        (
            "layout.kind",
            not zero or config.train.precision != "fp64",
            "DeepSpeed keeps fp32, and train.precision=fp64 asks for more: set "
            "train.precision=fp32 or bf16, or layout.kind=replicas",
        ),
        (
            "train.compile",
            not zero or config.train.compile == "none",
            "DeepSpeed runs the network itself: set train.compile=none, or layout.kind=replicas",
        ),
        (
            "train.batch",
            config.train.batch % config.train.micro_batches == 0,
            f"does not divide into train.micro_batches={config.train.micro_batches}",
        ),
        (
            "profile.steps",
            len(config.profile.steps) in (0, 2)
            and list(config.profile.steps) == sorted(config.profile.steps),
            "the first step and the last: [100,105]; or none: []",
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
