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

from alexnet_dist.config.from_data import follow_data
from alexnet_dist.config.rules import check_combinations
from alexnet_dist.config.schema import Config, Key, keys
from alexnet_dist.errors import ConfigError
from alexnet_dist.files import read_bytes

Source = str | Path | Mapping[str, Any]
ALONE = ("layout.kind=one", "layout.ranks=0")  # sources: one process
_NOT_YAML = (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError)
# Bounds of a file, which would grow beyond any memory or stack by aliases of aliases, by
# interpolations of interpolations, or by nesting.
_LONGEST, _DEEPEST, _MOST_INTERPOLATIONS = 200_000, 20, 10


def load_config(sources: Source | Sequence[Source]) -> Config:
    """The config of `base.yaml`, then each source in order.

    What they leave to the data set (`from_data.py`) is filled in from it.

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
    follow_data(values, origin)
    config = build(values)
    check_combinations(config, origin)
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
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


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
            raise ConfigError(
                f"{text!r}: {value!r} is not a YAML value: {one_line(error)}"
            ) from error
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
        layer = OmegaConf.to_container(OmegaConf.create(bounded_yaml(path)), resolve=True)
    except _NOT_YAML as error:
        raise ConfigError(
            f"{path}: not a YAML file of keys and values: {one_line(error)}"
        ) from error
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: holds a {type(layer).__name__}; write keys and values")
    return str(path), layer  # type: ignore[return-value]


def bounded_yaml(path: Path) -> str:
    """A YAML file's text, whose values are not much larger than it.

    Raises:
        OSError, ValueError, yaml.YAMLError: it cannot be read, could grow, is not YAML.
    """
    text = read_bytes(path, _LONGEST).decode()
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
    return text


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name a file could have
        return False


def one_line(error: Exception) -> str:
    """An error's words, on one line."""
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
        if not any(type(value) is type(choice) and value == choice for choice in choices):
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
