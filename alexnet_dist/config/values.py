"""One value of a config: converted from what was typed, and checked against its key."""

import operator
import os
import re
from typing import Any, Literal, get_args, get_origin

import yaml

from alexnet_dist.config.names import nearest
from alexnet_dist.config.schema import Key
from alexnet_dist.config.yaml_text import NOT_YAML, check_yaml
from alexnet_dist.errors import ConfigError, one_line

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Typed(str):
    """The text of a value as the user typed it, not yet converted to its key's type."""


def as_typed(value: Any) -> str:
    """Return a value as it is typed on a command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, float):
        return f"{value}".removesuffix(".0")
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def parse(text: Typed, dotted: str) -> Any:
    """Parse the text typed for a list or a section as YAML whose scalars stay `Typed`."""

    def leaves(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(name): leaves(value) for name, value in node.items()}
        return [leaves(value) for value in node] if isinstance(node, list) else Typed(node or "")

    return leaves(_loaded(text, dotted, yaml.BaseLoader))


def _loaded(text: Typed, dotted: str, loader: Any) -> Any:
    """Load typed YAML with one of PyYAML's loaders; raise ConfigError where that is impossible."""
    try:
        check_yaml(text)
        return loader(text).get_single_data()
    except NOT_YAML as error:
        raise ConfigError(
            f"{dotted}={text}: {str(text)!r} is not valid YAML: {one_line(error)}"
        ) from error


def _convert(text: Typed, kind: Any, dotted: str) -> Any:
    """Convert typed text to its key's type; return the text itself where that is impossible."""
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    if get_origin(kind) is tuple:
        return parse(text, dotted)
    if get_origin(kind) is dict:
        mapping = _loaded(text, dotted, yaml.SafeLoader)
        return mapping if isinstance(mapping, dict) else text
    if kind is bool:
        return _WORDS.get(text.lower(), text)
    if kind is str:
        return str(text)
    whole = re.fullmatch(r"[-+]?[0-9]+(_[0-9]+)*", text) is not None
    try:
        return float(text) if kind is float else int(text) if whole else text
    except ValueError:
        return text


def check_value(dotted: str, value: Any, kind: Any, key: Key, source: str) -> Any:
    """Return the value as its key's type; raise ConfigError where it does not fit type or bounds.

    Args:
        dotted: the key's full name.
        kind: its type, as annotated in `schema`.
        source: where the value was given, for the error.
    """

    def wrong(rule: str) -> ConfigError:
        shown = str(value) if isinstance(value, Typed) else repr(value)
        return ConfigError(f"{source}: {dotted}={shown}: must be {rule} ({key.doc})")

    if isinstance(value, Typed):
        value = _convert(value, kind, dotted)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if key.one_for_all and isinstance(value, int | float | Typed):
            value = [value]
        if not isinstance(value, list):
            if value in (None, "", "none", "off", False) or isinstance(value, dict):
                raise wrong("a list, as in []")
            choices = get_args(item) or [value]
            raise wrong(f"a list, as in [{value if value in choices else choices[0]}]")
        return tuple(check_value(dotted, v, item, key, source) for v in value)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            near = nearest(str(value), [str(choice) for choice in choices])
            raise wrong(f"one of {', '.join(map(str, choices))}{near}")
        return value
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise wrong("keys and values, as in {qos: long}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(f"{value}")  # infinity where it is too large
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise wrong(names[kind])
    if broken := _broken_bound(value, key):
        raise wrong(broken)
    return os.path.expanduser(value) if key.path else value


def _broken_bound(value: float | str, key: Key) -> str:
    """Return the bound that a number or text violates, or an empty string."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return "finite"
    for word, bound, holds in (
        ("at least", key.ge, operator.ge),
        ("more than", key.gt, operator.gt),
        ("at most", key.le, operator.le),
        ("less than", key.lt, operator.lt),
    ):
        if bound is not None and not holds(value, bound):
            return f"{word} {bound:g}"
    if isinstance(value, int) and not abs(value) < 2**63:
        return "less than 2⁶³"
    if isinstance(value, str) and not value.isprintable():
        return "text without control characters"
    return "a path" if key.path and not value else ""
