"""Load a config: YAML files and `key=value` arguments, layered over `configs/base.yaml`.

An experiment's YAML holds only what differs from base.yaml; `key=value` arguments come last. A
typed value is converted by the type of its key, never by YAML's rules for numbers (which read 010
as eight and 1:20 as eighty). This is the only module that imports OmegaConf.
"""

import dataclasses
import functools
import itertools
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexnet_dist.config.from_data import fill_from_data
from alexnet_dist.config.names import nearest, nearest_key
from alexnet_dist.config.rules import check_combinations
from alexnet_dist.config.schema import SCORED_WITH, Config, flat, keys
from alexnet_dist.config.values import Typed, check_value, parse
from alexnet_dist.config.yaml_text import NOT_YAML, bounded_yaml
from alexnet_dist.errors import ConfigError, looked_in, one_line
from alexnet_dist.files import json_object, read_bytes

Source = str | Path | Mapping[str, Any]
IN_ONE_PROCESS = ("layout.kind=one", "layout.ranks=0", "layout.share_gpu=false")
# Keys that no longer exist, and what to do instead. Saved configs may still hold them.
RETIRED = {"train.compile": "leave it out; train.execution says how a GPU runs a step"}
_SAVED = "a saved config"


def load_config(sources: Source | Sequence[Source]) -> Config:
    """Return the config of `base.yaml` with each source laid over it in order.

    Keys whose values are left to the data set are then filled in from it (`from_data.py`).

    Args:
        sources: a YAML file, the name of a shipped one, a `key=value`, or a mapping of keys; or a
            sequence of these.

    Raises ConfigError for the first error found.
    """
    layers = [sources] if isinstance(sources, str | Path | Mapping) else sources
    values, origin = _layered(layers)
    for dotted, _, _ in keys():
        if dotted not in values:
            raise ConfigError(
                f"{dotted}: configs/base.yaml has no value for this key: install alexnet_dist again"
            )
    fill_from_data(values, origin)
    config = build(values)
    check_combinations(config, origin)
    return config


def overridden(config: Config, *sources: Source) -> Config:
    """Return the config with each source laid over it in order; raises as `load_config` does."""
    return load_config([flat(config), *sources])


def check_scored_with(overrides: Sequence[str], command: str) -> None:
    """Raise ConfigError for a command's `key=value` that no evaluation depends on."""
    for text in overrides:
        for dotted, _ in flatten(parse_argument(text), "the command line"):
            if dotted not in SCORED_WITH and dotted.partition(".")[0] not in SCORED_WITH:
                whole = ", ".join(name for name in SCORED_WITH if "." not in name)
                others = ", ".join(name for name in SCORED_WITH if "." in name)
                raise ConfigError(
                    f"{command} {text}: {dotted} changes nothing in an evaluation: leave it out; "
                    f"keys of {whole} can be set, and {others}"
                )


def source_of(error: Exception, sources: Sequence[Source]) -> str:
    """Return "SOURCE: ", to begin the message of an error of a loaded config that begins with
    KEY=, or an empty string where no source but base.yaml or a saved config gave that key."""
    try:
        _, origin = _layered(sources)
    except ConfigError:
        return ""
    source = origin.get(str(error).partition("=")[0], "")
    by_default = source in ("", _SAVED, str(_base())) or source.endswith(".json")
    return "" if by_default else f"{source}: "


def _layered(sources: Sequence[Source]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each key's value, and the name of the source that gave it, in the order in which they
    were given."""
    values = dict(_defaults(_base()))
    origin = dict.fromkeys(values, str(_base()))
    for source in sources:
        name, layer = _read_layer(source)
        for dotted, value in flatten(layer, name):
            values[dotted] = value
            origin.pop(dotted, None)
            origin[dotted] = name
    return values, origin


def _base() -> Path:
    return configs_folder() / "base.yaml"


@functools.cache
def _defaults(base: Path) -> Mapping[str, Any]:
    """Return each key's value in base.yaml; reading it takes longer than all the rest."""
    name, layer = _read_layer(base)
    return dict(flatten(layer, name))


def build(values: Mapping[str, Any]) -> Config:
    """Build a Config from a mapping of every dotted key to a value of the right type."""

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
    """Return the folder of the shipped YAML files: inside an installed package, or beside
    it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped() -> dict[str, str]:
    """Map the name of each shipped config to the first sentence of its file."""
    # configs/cluster is read by launch.
    files = (p for p in configs_folder().rglob("*.yaml") if p.parent.name != "cluster")
    return {
        str(path.relative_to(configs_folder()).with_suffix("")): _first_sentence(path)
        for path in sorted(files)
    }


def _first_sentence(path: Path) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    sentence = re.split(r"(?<=\.) (?=\D)", text, maxsplit=1)[0]
    return textwrap.shorten(
        sentence.removesuffix("."), 90, placeholder=" …", break_on_hyphens=False
    )


def _read_layer(source: Source) -> tuple[str, Mapping[str, Any]]:
    """Return a source's name, for error messages, and its (nested) mapping of keys to values."""
    if isinstance(source, Mapping):
        return _SAVED, source
    text = str(source)
    own = Path(os.path.expanduser(text))
    if "=" in text and not is_file(own):
        return "the command line", parse_argument(text)
    shipped_names = (configs_folder() / text, configs_folder() / f"{text}.yaml")
    path = next(filter(is_file, (own, *shipped_names)), None)
    if path is None:
        if text in {dotted for dotted, _, _ in keys()}:
            raise ConfigError(f"{text!r} is a key without a value: write {text}=VALUE")
        if is_file(own / "config.json"):
            raise ConfigError(f"{text!r} is a run folder; its config is {own / 'config.json'}")
        if is_file(own / "dataset.json"):
            raise ConfigError(f"{text!r} is a packed data set: write data.path={text}")
        where = looked_in(own) if own.suffix in (".yaml", ".yml", ".json") else ""
        here = [file.name for file in Path().glob("*.y*ml")]
        raise ConfigError(
            f"{text!r} is neither a config file nor key=value{where}; `alexnet-dist configs` lists "
            f"the shipped configs{nearest(text, [*here, *shipped()])}"
        )
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        if kind == "JSON":  # it escapes an emoji otherwise than YAML
            layer: Any = json_object(read_bytes(path))
        else:
            layer = OmegaConf.to_container(OmegaConf.create(bounded_yaml(path)), resolve=False)
    except (OmegaConfBaseException, *NOT_YAML) as error:
        raise ConfigError(
            f"{path}: not a {kind} file of keys and values: {one_line(error)}"
        ) from error
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: holds a {type(layer).__name__}, not keys and values")
    return str(path), layer


def parse_argument(text: str) -> dict[str, Typed]:
    """Parse a `key=value` argument."""
    key, _, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ConfigError(f"{text!r}: {key!r} is not a key; write key=value, e.g. train.batch=64")
    return {key: Typed(value)}


def is_file(path: Path) -> bool:
    """Whether this is the path of a file; not if there can be none of such a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def flatten(
    layer: Mapping[Any, Any], source: str, of: type = Config, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and checked values of a nested mapping; raise ConfigError.

    Args:
        source: where the mapping comes from, for error messages.
        of: the dataclass that declares the keys.
        prefix: prefix of all its keys, such as `cluster.`.
    """
    known = {dotted: (kind, key) for dotted, kind, key in keys(of, prefix)}
    sections = {dotted.rpartition(".")[0] for dotted in known} - {""}
    saved = source == _SAVED or Path(source).name == "config.json"

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            dotted = f"{prefix}{name}"
            if dotted in known:
                yield dotted, check_value(dotted, value, *known[dotted], source)
                continue
            if dotted in RETIRED:
                if not saved:
                    raise ConfigError(f"{source}: {dotted} is no longer a key: {RETIRED[dotted]}")
                continue
            section = dotted in sections and isinstance(value, Typed | dict)
            inside = parse(value, dotted) if section and isinstance(value, Typed) else value
            if section and isinstance(inside, dict):
                yield from walk(inside, dotted + ".")
            elif dotted in sections:
                off = f"; {dotted}.layers=[] switches it off" if f"{dotted}.layers" in known else ""
                raise ConfigError(
                    f"{source}: {dotted}={value!r}: {dotted} is a section: set one of its keys, "
                    f"{', '.join(k for k in known if k.startswith(dotted + '.'))}{off}"
                )
            else:
                near = nearest_key(dotted, known)
                meant = f"; did you mean {near}?" if near else ""
                if saved:
                    meant += " (if a newer alexnet-dist saved it, use that version)"
                raise ConfigError(f"{source}: unknown key {dotted}{meant}")

    yield from walk(layer, "")
