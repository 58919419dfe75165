"""Reading configuration: YAML layered over `configs/base.yaml`, and one clear error.

An experiment's YAML says only what differs from base.yaml, and `key=value` arguments come last.
What is typed is taken as it stands where its key is text, and else as its key's type, never by
YAML's rules for numbers (010 is eight there, 1:20 eighty). The only importer of OmegaConf.
"""

import dataclasses
import difflib
import itertools
import operator
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
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
ALONE = ("layout.kind=one", "layout.ranks=0", "layout.share_gpu=false")  # sources: one process
_NOT_YAML = (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError)
# Bounds of a file, which would grow beyond any memory or stack by aliases of aliases, by
# interpolations of interpolations, or by nesting.
_LONGEST, _DEEPEST, _MOST_INTERPOLATIONS = 200_000, 20, 10
# Keys that there once were, and what to do in their place; what a run has saved may have them.
RETIRED = {"train.compile": "a GPU's step is fused without it (train.execution): leave it out"}
_SAVED = "a saved config"
# Numbers that YAML 1.1 reads to base 8, 2, 16 or 60.
_ODD_NUMBER = re.compile(r"[-+]?(0[\d_]+|0b[01_]+|0x[\da-fA-F_]+|[\d_]+(:[\d_]+)+(\.\d*)?)")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# What other programs call a key.
_SYNONYMS = {
    "name": "run_name exp_name experiment",
    "output_dir": "out out_dir output save_dir log_dir run_dir",
    "seed": "random_seed manual_seed",
    "model.classes": "num_classes n_classes nclasses",
    "model.crop": "crop_size image_size img_size imgsz input_size resolution",
    "data.path": "dataset data_dir data_path root",
    "data.workers": "num_workers",
    "data.prefetch": "prefetch_factor",
    "layout.kind": "strategy distributed parallel ddp zero fsdp",
    "layout.ranks": "gpus num_gpus n_gpus ngpus devices nproc nproc_per_node world_size",
    "layout.device": "cuda cpu",
    "optimizer.kind": "opt",
    "optimizer.weight_decay": "wd decay l2",
    "schedule.kind": "scheduler lr_scheduler",
    "schedule.rate": "lr learning_rate base_lr",
    "schedule.factor": "gamma lr_gamma",
    "schedule.at_epochs": "milestones lr_steps",
    "schedule.warmup_epochs": "warmup",
    "train.batch": "batch batch_size batchsize bs global_batch_size",
    "train.epochs": "num_epochs max_epochs n_epochs",
    "train.execution": "compile torch_compile cuda_graph cuda_graphs",
    "train.precision": "fp16 bf16 fp32 amp half mixed_precision dtype",
    "train.micro_batches": "grad_accum accumulation_steps gradient_accumulation_steps",
    "train.init_from": "pretrained weights ckpt finetune finetune_from",
    "evaluate.batch": "eval_batch eval_batch_size val_batch_size test_batch_size",
    "evaluate.every_epochs": "eval_every val_every eval_interval",
    "evaluate.views": "tta ten_crop",
    "checkpoint.every_steps": "save_every save_interval save_freq",
    "log.every_steps": "log_every log_interval print_freq",
    "cluster.memory_gb": "mem memory mem_gb",  # launch's
    "cluster.tasks_per_node": "ntasks_per_node ntasks",
    "cluster.time_min": "time timeout_min time_limit",
}
_KEY_OF = {word: key for key, words in _SYNONYMS.items() for word in words.split()}


class Typed(str):
    """A value as it was typed, of no type yet."""


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
        for dotted, value in flatten(layer, name):
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


def shipped() -> dict[str, str]:
    """The names of the shipped configs, and of each the first sentence of its file."""
    files = (p for p in configs_folder().rglob("*.yaml") if p.parent.name != "cluster")  # launch's
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
    """The name to blame and the nested mapping of one source."""
    if isinstance(source, Mapping):
        return _SAVED, source
    text = str(source)
    own = Path(os.path.expanduser(text))
    if "=" in text and not _is_file(own):
        return "the command line", typed(text)
    shipped_names = (configs_folder() / text, configs_folder() / f"{text}.yaml")
    path = next(filter(_is_file, (own, *shipped_names)), None)
    if path is None:
        if text in {dotted for dotted, _, _ in keys()}:
            raise ConfigError(f"{text!r} is a key without a value: write {text}=VALUE")
        raise ConfigError(
            f"{text!r} is neither a config file nor key=value; `alexnet-dist configs` lists those "
            f"that are shipped{_nearest(text, list(shipped()))}"
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


def typed(text: str) -> dict[str, Typed]:
    """The layer that a key=value is."""
    key, _, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ConfigError(f"{text!r}: {key!r} is not a key; write key=value, e.g. train.batch=64")
    return {key: Typed(value)}


def bounded_yaml(path: Path) -> str:
    """A YAML file's text, whose values are not much larger than it, and numbers as they look.

    Raises:
        OSError, ValueError, yaml.YAMLError: it cannot be read, could grow, is not YAML.
    """
    text = read_bytes(path, _LONGEST).decode()
    _check_yaml(text, of_file=True)
    return text


def _check_yaml(text: str, of_file: bool = False) -> None:
    """Raises ValueError, yaml.YAMLError where a YAML text could grow, or is not what it looks."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("has aliases (*name)")
        if isinstance(event, yaml.ScalarEvent):
            if depth == 0 and of_file:
                raise ValueError("a lone value")
            if event.implicit[0] and not event.style and _ODD_NUMBER.fullmatch(event.value):
                raise ValueError(
                    f"{event.value} is another number to YAML: write it in decimal, without "
                    "leading zeros, or in quotes where it is text"
                )
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST}")
    if text.count("${") > _MOST_INTERPOLATIONS:
        raise ValueError(f"more than {_MOST_INTERPOLATIONS} interpolations (${{…}})")


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


def nearest_key(name: str, known: Collection[str]) -> str:
    """The key that somebody who wrote another name may mean; empty where none is like it."""
    word = name.rpartition(".")[2].lower().replace("-", "_")
    if _KEY_OF.get(word) in known:
        return _KEY_OF[word]
    last = [key for key in known if key.rpartition(".")[2] == word]
    if len(last) == 1:  # the right word in the wrong section
        return last[0]
    sections = {key.rpartition(".")[0] for key in known} - {""}
    near = difflib.get_close_matches(name, [*known, *sections], n=1, cutoff=0.5)
    return near[0] if near else ""


def flatten(
    layer: Mapping[Any, Any], source: str, of: type = Config, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and checked values of a nested mapping; raises ConfigError.

    Args:
        source: the name to blame.
        of: the dataclass whose keys these are.
        prefix: of all its keys, as in `cluster.`.
    """
    known = {dotted: (kind, key) for dotted, kind, key in keys(of, prefix)}
    sections = {dotted.rpartition(".")[0] for dotted in known} - {""}

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            dotted = f"{prefix}{name}"
            if dotted in known:
                yield dotted, _checked(dotted, value, *known[dotted], source)
                continue
            if dotted in RETIRED:
                if source != _SAVED and Path(source).name != "config.json":
                    raise ConfigError(f"{source}: {dotted} is a key no longer: {RETIRED[dotted]}")
                continue
            section = dotted in sections and isinstance(value, Typed | dict)
            inside = _parsed(value, dotted) if section and isinstance(value, Typed) else value
            if section and isinstance(inside, dict):
                yield from walk(inside, dotted + ".")
            elif dotted in sections:
                raise ConfigError(
                    f"{source}: {dotted}={value!r}: {dotted} is a section, with keys "
                    f"{', '.join(k for k in known if k.startswith(dotted + '.'))}"
                )
            else:
                near = nearest_key(dotted, known)
                meant = f"; did you mean {near}?" if near else ""
                raise ConfigError(f"{source}: unknown key {dotted}{meant}")

    yield from walk(layer, "")


def _parsed(text: Typed, dotted: str) -> Any:
    """What is typed for a list or a section: YAML, whose scalars stay as they were typed."""

    def leaves(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(name): leaves(value) for name, value in node.items()}
        return [leaves(value) for value in node] if isinstance(node, list) else Typed(node)

    try:
        _check_yaml(text)
        return leaves(yaml.BaseLoader(text).get_single_data())
    except _NOT_YAML as error:
        raise ConfigError(
            f"{dotted}={text}: {str(text)!r} is not a YAML value: {one_line(error)}"
        ) from error


def _meant(text: Typed, kind: Any, dotted: str) -> Any:
    """What is typed as its key's type; the text itself where it is no such thing."""
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    if get_origin(kind) is tuple:
        return _parsed(text, dotted)
    if get_origin(kind) is dict:
        found = _parsed(text, dotted)
        return yaml.safe_load(text) if isinstance(found, dict) else text
    if kind is bool:
        return _WORDS.get(text.lower(), text)
    if kind is str:
        return str(text)
    whole = re.fullmatch(r"[-+]?[0-9]+(_[0-9]+)*", text) is not None
    try:
        return float(text) if kind is float else int(text) if whole else text
    except ValueError:
        return text


def _checked(dotted: str, value: Any, kind: Any, key: Key, source: str) -> Any:
    """The value as its key's type; raises ConfigError where type or bounds do not fit."""

    def wrong(rule: str) -> ConfigError:
        shown = str(value) if isinstance(value, Typed) else repr(value)
        return ConfigError(f"{source}: {dotted}={shown}: must be {rule} ({key.doc})")

    if isinstance(value, Typed):
        value = _meant(value, kind, dotted)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if key.spread and isinstance(value, int | float | Typed):
            value = [value]
        if not isinstance(value, list):
            nothing = value in (None, "none", "off", False) or isinstance(value, dict)
            raise wrong("a list, as in []" if nothing else f"a list, as in [{value}]")
        return tuple(_checked(dotted, v, item, key, source) for v in value)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            near = _nearest(str(value), [str(choice) for choice in choices])
            raise wrong(f"one of {', '.join(map(str, choices))}{near}")
        return value
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise wrong("keys and values, as in {qos: long}")
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
    if key.path and not value:
        raise wrong("a path")
    return os.path.expanduser(value) if key.path else value
