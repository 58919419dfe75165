"""Rules that relate several keys of a config, grouped by section."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import ConfigError

# The key at fault, whether the rule holds, and what to say if it does not.
Rule = tuple[str, bool, str]


def check_combinations(config: Config, origin: Mapping[str, str]) -> None:
    """Raise ConfigError for the first rule that does not hold, naming where the value was given
    that broke it: of the key at fault and those that the rule mentions, the one given last.

    Args:
        origin: dotted key to where its value was given, in the order in which they were given.
    """
    values = flat(config)
    for section in (_texts, _lengths, _layers, _model, _data, _layout, _training, _columns):
        for key, holds, rule in section(config, values):
            if not holds:
                mentioned = re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", rule)
                last = next(one for one in reversed([*origin]) if one in (key, *mentioned))
                fault = f"{key}={values[key]!r}"
                if last != key:
                    where = f" of {origin[key]}" if origin[key] != origin[last] else ""
                    fault = f"{last}={values[last]!r}, with {fault}{where}"
                raise ConfigError(f"{origin[last]}: {fault}: {rule}")


def _texts(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """Texts, which are taken as they stand: a config from elsewhere must not copy this machine's
    environment into the run folder, by ${oc.env:…}."""
    for key, value in values.items():
        plain = not isinstance(value, str) or "${" not in value
        yield key, plain, "${…} is not filled in: write the value itself"


def _lengths(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """Lists that must have a fixed length."""
    for key, length in {"model.pool": 2, "data.divide_by": 3, "optimizer.betas": 2}.items():
        yield key, len(values[key]) == length, f"needs {length} numbers"
    steps = list(config.profile.steps)
    yield (
        "profile.steps",
        len(steps) in (0, 2) and steps == sorted(steps),
        "must be the first step and the last, as in [100,105], or []",
    )


def _layers(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """Lists with one number per layer, and lists of layers, which must exist."""
    model = config.model
    convs, layers = len(model.conv), len(model.layer_names)
    yield (
        "model.conv",
        convs > 0 and layers <= 9,
        "a network has at least one convolution, and at most nine layers in all",
    )
    for name in ("kernel", "stride", "padding"):
        fits = len(values[f"model.{name}"]) == convs
        yield f"model.{name}", fits, f"needs {convs} numbers, as model.conv={list(model.conv)}"
    for key in (
        "model.exchange", "model.activation_last", "model.pool_after", "model.lrn.layers",
        "model.spatial_norm.layers", "model.dropout_before", "train.init_new",
    ):  # fmt: skip
        unknown = [name for name in values[key] if name not in model.layer_names]
        yield (
            key,
            not unknown,
            f"name others than {', '.join(unknown)} in {key}: the layers of model.conv and "
            f"model.fc are {', '.join(model.layer_names)}",
        )
    drawn = {} if model.init == "he" else {"init_std": layers, "init_bias": layers}
    for name, length in (drawn | {"lrn.alpha": len(model.lrn.layers)}).items():
        fits = len(values[f"model.{name}"]) in (1, length)
        yield f"model.{name}", fits, f"needs one number for all layers, or {length}"


def _model(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """The network's classes, exchanges, pooling and normalisation."""
    model = config.model
    yield "model.classes", model.classes >= 2, "a network needs at least two classes to tell apart"
    yield (
        "model.exchange",
        "conv1" not in model.exchange,
        "conv1 sees the whole image: leave it out",
    )
    yield (
        "model.pool_average",
        {*model.pool_average} <= {*model.pool_after},
        f"only the layers of model.pool_after={list(model.pool_after)} pool",
    )
    yield "model.spatial_norm.size", model.spatial_norm.size % 2 == 1, "must be odd"
    yield "model.lrn.size", model.lrn.size % 2 == 1, "must be odd, for as many maps on both sides"


def _data(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """Windows that fit the canvas, in the range that the initial weights expect."""
    model, data = config.model, config.data
    yield (
        "data.canvas",
        data.canvas >= model.crop,
        f"must hold a window of model.crop={model.crop}: raise it, or lower model.crop",
    )
    yield (
        "model.init",
        model.init == "he" or {*data.divide_by} == {1},
        f"these weights expect grey levels of 0–255, but data.divide_by={list(data.divide_by)} "
        "scales them, and the loss stays flat: set data.divide_by=[1,1,1] or model.init=he",
    )
    yield (
        "model.init",
        model.init == "he" or data.subtract != "nothing",
        "these weights expect pixels with the mean subtracted: set data.subtract=mean_image or "
        "model.init=he",
    )


def _layout(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """Networks that a layout can split, and what DeepSpeed does not support."""
    model, kind = config.model, config.layout.kind
    zero = kind.startswith("zero")
    yield (
        "layout.kind",
        kind not in ("columns", "columns_x_replicas") or model.columns == 2,
        f"a network of model.columns={model.columns} cannot be split into columns: set "
        "model.columns=2, or layout.kind=one, replicas, zero1, zero2 or sharded_fc",
    )
    yield (
        "layout.kind",
        kind != "sharded_fc" or {*model.fc_names} <= {*model.exchange},
        f"its fully-connected layers need the units of both columns, but model.exchange="
        f"{list(model.exchange)} lacks some of them: add {', '.join(model.fc_names)}, or set "
        "layout.kind=replicas",
    )
    yield (
        "layout.kind",
        not zero or config.optimizer.kind != "lars",
        "DeepSpeed's flat partitions have no layers, but optimizer.kind=lars needs their "
        "norms: set layout.kind=replicas, columns_x_replicas or sharded_fc",
    )
    lacks = {"fp64": "weights in fp64", "fp16": "scaled gradients"}.get(config.train.precision)
    yield (
        "layout.kind",
        not (zero and lacks),
        f"DeepSpeed has no {lacks}, which train.precision={config.train.precision} needs: set "
        "train.precision=fp32 or bf16, or layout.kind=replicas",
    )
    yield (
        "layout.share_gpu",
        not config.layout.share_gpu or config.layout.device != "cpu",
        "layout.device=cpu uses no GPU: set layout.device=auto, or layout.share_gpu=false",
    )


def _training(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """The run's name, batch, initial weights and schedule."""
    train, epochs = config.train, list(config.schedule.at_epochs)
    yield (
        "name",
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", config.name) is not None,
        "must be at most 100 letters, digits, '.', '_' and '-', and begin with a letter or digit",
    )
    yield (
        "train.batch",
        train.batch % train.micro_batches == 0,
        f"must be divisible by train.micro_batches={train.micro_batches}",
    )
    yield (
        "train.init_new",
        train.init_from != "none" or not train.init_new,
        "with train.init_from=none every layer is new: set train.init_new=[], or init_from to "
        "the weights to start from",
    )
    yield "schedule.at_epochs", epochs == sorted({*epochs}), "must increase"


def _columns(config: Config, values: Mapping[str, Any]) -> Iterator[Rule]:
    """Widths, which must split evenly into columns."""
    columns = config.model.columns
    for key in ("model.conv", "model.fc"):
        for width in values[key]:
            yield key, width % columns == 0, f"{width} is not divisible by model.columns={columns}"
