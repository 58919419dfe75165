"""Writes docs/configuration.md from the config's dataclasses and the values in base.yaml."""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from alexnet_dist.config.from_data import FROM_DATA
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, ConvName, FcName, Key, LayerName, flat
from alexnet_dist.config.values import as_typed
from launch.cluster import Cluster

PATH = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every key, made by `make docs` from [schema.py](../alexnet_dist/config/schema.py) and
[base.yaml](../configs/base.yaml), which holds the defaults: the network and the recipe of the
paper. A file only says what differs. Keys with a ◦ may change between two starts of one run; the
others define the run, and a checkpoint with other values is refused, with the key's name.
(`train.epochs` may change too, unless `schedule.kind=polynomial`.)

```bash
.venv/bin/alexnet-dist train demo my.yaml layout.kind=one 'model.exchange=[conv3,fc6,fc7,fc8]'
```

A source is a YAML file, the name of a shipped one (`demo`, `paper/no-lrn`; `alexnet-dist configs`
lists them), a run folder's `config.json`, or `key=value`. Later ones win, key by key; a list
replaces a list. Quote what the shell would interpret; nothing else needs quotes. The value of a key
of type text is taken as typed (even with a `#`), numbers are decimal, and ~ is the home folder in
every path.
"""


def reference() -> str:
    """Return the text of docs/configuration.md."""
    asked = {f"cluster.{key}": value for key, value in vars(Cluster()).items()}
    values = flat(load_config([])) | FROM_DATA
    return HEAD + "".join((*_section(Config, "", values), *_section(Cluster, "cluster.", asked)))


def _section(of: type, prefix: str, values: dict[str, Any]) -> Iterator[str]:
    """Yield the rows of a dataclass's keys, and below them those of its nested dataclasses."""
    hints, fields = get_type_hints(of), dataclasses.fields(of)
    yield f"\n## {prefix.rstrip('.') or 'The run'}\n\n{inspect.cleandoc(of.__doc__ or '')}\n\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|\n"
    for field in fields:
        if (key := field.metadata.get("key")) is not None:
            name, kind = f"{prefix}{field.name}", _value(hints[field.name], key)
            mark, default = " ◦" if key.mutable else "", as_typed(values[name])
            meaning = key.doc.replace("|", "\\|")
            yield f"| `{name}`{mark} | {kind} | {default} | {meaning} |\n"
    for field in fields:
        if "key" not in field.metadata:
            yield from _section(hints[field.name], f"{prefix}{field.name}.", values)


def _value(kind: Any, key: Key) -> str:
    """Return a key's type and bounds in words."""
    if get_origin(kind) is tuple:
        item = _value(get_args(kind)[0], key)
        return f"list: {item}" + ("; or one for all" if key.one_for_all else "")
    if get_origin(kind) is dict:
        return "keys and values"
    layers = {ConvName: "layers conv1 …", FcName: "layers fc6 …", LayerName: "layers"}
    if kind in layers:
        return layers[kind]
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    bounds = {"≥": key.ge, ">": key.gt, "≤": key.le, "<": key.lt}
    words = [f"{sign} {bound:,.10g}" for sign, bound in bounds.items() if bound is not None]
    names = {int: "whole number", float: "number", bool: "true, false", str: "text"}
    return " ".join([names[kind], ", ".join(words)]).strip()


if __name__ == "__main__":
    PATH.write_text(reference())
