"""Rules over several keys of a configuration."""

import re
from collections.abc import Mapping

from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import ConfigError


def check_combinations(config: Config, origin: Mapping[str, str]) -> None:
    """Raises ConfigError on the first rule that does not hold.

    Args:
        origin: of each dotted key, where its value was said.
    """
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
            "model.classes",
            model.classes >= 2,
            "there is nothing to tell apart: a network needs images of two classes or more",
        ),
        ("model.exchange", "conv1" not in model.exchange, "conv1 sees the image: leave it out"),
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
            "layout.share_gpu",
            not config.layout.share_gpu or config.layout.device != "cpu",
            "layout.device=cpu uses no GPU: set layout.device=auto, or layout.share_gpu=false",
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
            model.init == "he" or {*data.divide_by} == {1},
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
