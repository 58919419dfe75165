"""The configuration: frozen dataclasses that say what can be said.

A key's type, unit and bounds stand here; its value stands in `configs/base.yaml`, which holds
every key, so that a recipe is read in one place. Keys marked `free` may change between two starts
of one run; all the others define the run and are part of a checkpoint's fingerprint.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints


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
    pipeline: Annotated[
        Literal["torch", "dali"],
        Key("who decodes: torchvision in threads, or DALI (nvJPEG on a GPU)", free=True),
    ]
    workers: Annotated[
        int, Key("decoding threads a rank; 0 = the rank's cores", ge=0, le=256, free=True)
    ]
    prefetch: Annotated[int, Key("batches decoded ahead", ge=1, le=64, free=True)]
    verify_hashes: Annotated[bool, Key("hash every shard before the first step", free=True)]
    max_damaged: Annotated[
        float,
        Key("share of a split that may be found damaged in an epoch", ge=0, le=1, free=True),
    ]
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
        Literal["one", "columns", "replicas", "columns_x_replicas", "zero1", "zero2", "sharded_fc"],
        Key("how replicas and columns lie on ranks: alexnet_dist/layouts.py", free=True),
    ]
    ranks: Annotated[
        int,
        Key("0 = the launcher's; without one a GPU each, or the fewest that fit", ge=0, free=True),
    ]
    compress_gradients: Annotated[
        bool, Key("sum gradients over replicas in bf16: half the bytes, 8 bits of precision")
    ]
    deepspeed: Annotated[
        str, Key("zero1, zero2: a DeepSpeed config (JSON) laid over ours, or none", free=True)
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
    kind: Annotated[
        Literal["sgd", "adam", "lars"],
        Key("sgd: the paper's; lars: sgd with a rate for each layer (You et al. 2017)"),
    ]
    trust: Annotated[
        float, Key("lars: a layer's rate is ε × this × ‖w‖ ÷ (‖g‖ + decay × ‖w‖)", gt=0)
    ]
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
    max_skipped: Annotated[
        int,
        Key("updates left out, their loss or gradient not finite, before the run stops", ge=0,
            free=True),
    ]  # fmt: skip
    compare_replicas_every: Annotated[
        int,
        Key("replicas' weights are compared to the bit this often, and before each save, steps; "
            "0 = only then", ge=0, free=True),
    ]  # fmt: skip
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
    keep_every_steps: Annotated[
        int, Key("those of every so many steps are kept for good; 0 = none", ge=0, free=True)
    ]
    max_idle_restarts: Annotated[
        int, Key("failures in a row that save nothing new, before starts are refused", ge=0,
                 free=True),
    ]  # fmt: skip


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
