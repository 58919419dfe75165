"""The config schema: frozen dataclasses that declare every key.

A key's type, unit and bounds are declared here; its default is in `configs/base.yaml`, which holds
every key, so that the whole recipe can be read in one place. Keys marked `mutable` may change
between two starts of a run; all others define the run and are part of a checkpoint's fingerprint.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_type_hints


@dataclass(frozen=True)
class Key:
    """A key's meaning, with its unit and its bounds (`ge`: at least, `gt`: more than, …).

    Attributes:
        mutable: it may change between two starts of a run, and is not in the fingerprint.
        one_for_all: a list may be given as one value, which then holds for every item.
        path: the value is the path of a file or folder; ~ is expanded.
    """

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    mutable: bool = False
    one_for_all: bool = False
    path: bool = False


def key(doc: str, default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """Declare a key, whose meaning and bounds are those of `Key`.

    Args:
        default: its value, for a key that base.yaml does not hold.
    """
    return dataclasses.field(default=default, metadata={"key": Key(doc, **about)})


# Layers are numbered consecutively: five convolutions are followed by fc6.
ConvName = Literal[
    "conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "conv7", "conv8",
]  # fmt: skip
FcName = Literal["fc2", "fc3", "fc4", "fc5", "fc6", "fc7", "fc8", "fc9"]
LayerName = Literal[ConvName, FcName]
Activation = Literal["relu", "tanh", "sigmoid"]  # of torch.nn.functional


@dataclass(frozen=True, kw_only=True)
class LrnConfig:
    """Local response normalisation (paper §3.3): b = a / (k + α Σ a²)^β, summed over `size`
    adjacent maps of the same column. `size` must be odd."""

    layers: tuple[ConvName, ...] = key("layers followed by normalisation")
    size: int = key("n: number of adjacent maps summed over", ge=1)
    alpha: tuple[float, ...] = key(
        "α of each of these layers, or one for all", ge=0, one_for_all=True
    )
    beta: float = key("β", gt=0)
    k: float = key("k", gt=0)
    alpha_over_size: bool = key(
        "divide α by n, as the released code and torch do; the printed formula does not"
    )


@dataclass(frozen=True, kw_only=True)
class SpatialNormConfig:
    """The released code's second normalisation, over neighbouring pixels of a map (`cnorm2`):
    b = a / (1 + α/n² Σ a²)^β, summed over n × n pixels. `size` must be odd."""

    layers: tuple[ConvName, ...] = key(
        "layers followed by this normalisation, after lrn where they have both"
    )
    size: int = key("n: side of the square summed over, pixels", ge=1)
    alpha: float = key("α", ge=0)
    beta: float = key("β", gt=0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Layers are numbered consecutively: five convolutions are followed by fc6, six by
    fc7. A network has at least one convolution, at most nine layers and at least two classes.
    `kernel`, `stride` and `padding` have one number per layer of `conv`; the widths in `conv` and
    `fc` must be divisible by `columns`; every layer named must exist, and `exchange` must not name
    conv1, which sees the whole image; `pool_average` names only layers of `pool_after`.
    `init=paper` needs pixels of 0–255 with a mean subtracted."""

    columns: int = key("columns of the network: 1 or 2", ge=1, le=2)
    exchange: tuple[LayerName, ...] = key("layers that see both columns; the others see their own")
    classes: int = key(
        "number of classes; 0 = as many as the data set has, or 1000 if there is none", ge=0
    )
    crop: int = key("side of the window conv1 sees, pixels", ge=8)
    conv: tuple[int, ...] = key("maps of conv1, conv2, …, all columns together", ge=1)
    kernel: tuple[int, ...] = key("side of each layer's kernels, pixels", ge=1)
    stride: tuple[int, ...] = key("stride of each layer, pixels", ge=1)
    padding: tuple[int, ...] = key("zero padding on each side of each layer's input, pixels", ge=0)
    fc: tuple[int, ...] = key(
        "units of the fully-connected layers before the last, all columns together", ge=1
    )
    activation: Literal[Activation] = key("activation after every layer but the last")
    activation_last: tuple[ConvName, ...] = key(
        "layers activated after normalisation and pooling: conv1 in the released code"
    )
    pool_after: tuple[ConvName, ...] = key("layers followed by pooling")
    pool: tuple[int, ...] = key("pooling window and stride, pixels", ge=1)
    pool_average: tuple[ConvName, ...] = key(
        "layers of pool_after whose pooling averages; the rest take the maximum"
    )
    pool_before_lrn: bool = key("pool before normalising, as CaffeNet does")
    round_up: bool = key(
        "windows at the right and bottom edge that are only partly inside the input count, as in "
        "the released code: conv pads them with zeros, pool ignores what is missing; otherwise "
        "they are left out"
    )
    lrn: LrnConfig
    spatial_norm: SpatialNormConfig
    dropout: float = key("share of units dropped", ge=0, lt=1)
    dropout_before: tuple[FcName, ...] = key("layers whose inputs go through dropout")
    dropout_scaling: Literal["test", "train"] = key(
        "when to scale: units × (1 − p) at test, or ÷ (1 − p) in training"
    )
    init: Literal["paper", "he"] = key(
        "initial weights: paper: N(0, init_std) and init_bias, which expect grey levels of 0–255; "
        "he: He et al.'s, for any scale"
    )
    init_std: tuple[float, ...] = key(
        "paper: standard deviation of each layer's weights, or one for all", ge=0, one_for_all=True
    )
    init_bias: tuple[float, ...] = key(
        "paper: bias of each layer, or one for all", one_for_all=True
    )

    @property
    def conv_names(self) -> tuple[str, ...]:
        return tuple(f"conv{number}" for number in range(1, len(self.conv) + 1))

    @property
    def fc_names(self) -> tuple[str, ...]:
        first = len(self.conv) + 1
        return tuple(f"fc{number}" for number in range(first, first + len(self.fc) + 1))

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self.conv_names + self.fc_names


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, and what conv1 sees of an image. A `canvas` must hold a window of `model.crop`;
    `model.init=paper` needs `divide_by=[1,1,1]` and a `subtract` other than nothing."""

    path: str = key("packed data set, made by `alexnet-dist prepare`", mutable=True, path=True)
    train_split: str = key("split to train on")
    hold_out: float = key(
        "share of the training images set apart as the split held_out, chosen by each image's "
        "checksum", ge=0, lt=1,
    )  # fmt: skip
    eval_split: str = key(
        "split to evaluate on; auto: the first that exists of held_out, val and test; none: do not "
        "evaluate"
    )
    pipeline: Literal["auto", "resident", "dali", "torch"] = key(
        "resident: decode images once and keep them in memory; dali: decode with DALI (nvJPEG on a "
        "GPU); torch: with torchvision in threads; auto: see docs/data.md", mutable=True,
    )  # fmt: skip
    workers: int = key(
        "decoding threads per rank; 0 = one for each of the rank's cores",
        ge=0, le=256, mutable=True,
    )  # fmt: skip
    prefetch: int = key("batches decoded ahead", ge=1, le=64, mutable=True)
    verify_hashes: bool = key("hash every shard before the first step", mutable=True)
    max_damaged: float = key(
        "share of a split's samples that may be found damaged in an epoch", ge=0, le=1, mutable=True
    )
    canvas: int = key("side of the image that windows are cut from, pixels", ge=8)
    random_crop: bool = key("train on random windows; otherwise on the centre window")
    flip: bool = key("mirror half of the training windows")
    lighting: float = key("standard deviation of α in PCA lighting; 0 = off", ge=0)
    lighting_epochs: float = key("epoch from which lighting is off", ge=0)
    lighting_by: Literal["sqrt_eigenvalue", "eigenvalue"] = key(
        "α times √λ of 0–255 pixels (released code), or λ of 0–1 pixels (as printed)"
    )
    subtract: Literal["mean_image", "mean_rgb", "nothing"] = key(
        "what is subtracted from the pixels"
    )
    mean_from: str = key(
        "with subtract=mean_image: a .npy of (height, width, 3) grey levels, red first, to "
        "subtract instead of the data set's own mean image, or none; part of the fingerprint by "
        "its hash", mutable=True, path=True,
    )  # fmt: skip
    mean_sha256: str = key(
        "SHA-256 that this file must have; any = whatever it has when the run starts"
    )
    divide_by: tuple[float, ...] = key("divisors of red, green and blue, grey levels", gt=0)


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How the network is laid out on ranks. `columns` and `columns_x_replicas` need
    `model.columns=2`; `sharded_fc` needs every fully-connected layer in `model.exchange`; `zero1`
    and `zero2` support neither `optimizer.kind=lars` nor `train.precision=fp64` or `fp16`;
    `share_gpu` excludes `device=cpu`."""

    kind: Literal[
        "one", "columns", "replicas", "columns_x_replicas", "zero1", "zero2", "sharded_fc"
    ] = key("how replicas and columns are laid out on ranks: docs/layouts.md", mutable=True)
    ranks: int = key(
        "number of ranks; 0 = as many as the launcher started; without a launcher, one per GPU, or "
        "the fewest that the layout allows", ge=0, mutable=True,
    )  # fmt: skip
    compress_gradients: bool = key(
        "sum gradients over replicas in bf16: half the bytes, 8 bits of precision"
    )
    deepspeed: str = key(
        "zero1, zero2: a DeepSpeed config (JSON) whose keys override ours, or none; what it says "
        "is not checked when a run continues, although it may change the run",
        mutable=True, path=True,
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto: a GPU for each rank where there are enough, otherwise the CPU", mutable=True
    )
    share_gpu: bool = key(
        "let ranks share GPUs where there are fewer GPUs than ranks: docs/layouts.md", mutable=True
    )
    threads: int = key(
        "compute threads per rank; 0 = one for each of its cores", ge=0, mutable=True
    )
    timeout_s: int = key("longest time one rank waits for another, s", ge=1, mutable=True)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated from gradients. ZeRO does not support `kind=lars`."""

    kind: Literal["sgd", "adam", "lars"] = key(
        "sgd: the paper's; adam; lars: sgd with a learning rate per layer (You et al. 2017)"
    )
    trust: float = key(
        "lars: a layer's learning rate is ε × this × ‖w‖ ÷ (‖g‖ + decay × ‖w‖)", gt=0
    )
    momentum: float = key("momentum of sgd and lars", ge=0, lt=1)
    momentum_form: Literal["velocity", "torch"] = key(
        "velocity: the learning rate is inside the momentum (paper §5); torch: outside"
    )
    betas: tuple[float, ...] = key("adam's β1 and β2", ge=0, lt=1)
    eps: float = key("adam's ε", gt=0)
    weight_decay: float = key("weight decay (L2)", ge=0)
    bias_decay: bool = key("decay biases too (paper); the released code does not")
    bias_rate: float = key("learning rate of biases ÷ that of weights; released code: 2", gt=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time. `at_epochs` must increase."""

    kind: Literal["steps", "plateau", "polynomial"] = key(
        "when the rate drops: at given epochs, when the error stalls, or steadily to 0 at the end"
    )
    rate: float = key("initial learning rate ε", ge=0)
    factor: float = key("steps, plateau: each drop multiplies the rate by this", gt=0, lt=1)
    at_epochs: tuple[float, ...] = key("steps: epochs at which the rate drops", gt=0)
    patience: int = key("plateau: evaluations without a lower error before a drop", ge=1)
    max_drops: int = key("plateau: largest number of drops in a run; paper: 3", ge=0)
    power: float = key("polynomial: rate × (1 − progress)^power", gt=0)
    warmup_epochs: float = key("linear warm-up from 0, epochs", ge=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training steps. `micro_batches` × replicas must divide `batch`; `init_new` must be empty
    where `init_from=none`."""

    batch: int = key("samples in a step, all ranks together", ge=1, le=1e9)
    epochs: float = key("passes over the training split", gt=0, le=1e9)
    init_from: str = key(
        "run or checkpoint whose weights to start from, or none; part of the fingerprint by their "
        "hash", mutable=True, path=True,
    )  # fmt: skip
    init_sha256: str = key(
        "SHA-256 that those weights must have; any = whatever they have when the run starts"
    )
    init_new: tuple[LayerName, ...] = key(
        "layers to initialise as in a new run, instead of taking their weights from there"
    )
    micro_batches: int = key(
        "number of parts in which a rank computes its batch, to save memory", ge=1, mutable=True
    )
    max_skipped: int = key(
        "updates that may be skipped because the loss or gradient is not finite, before the run "
        "stops", ge=0, mutable=True,
    )  # fmt: skip
    compare_replicas_every: int = key(
        "steps between bitwise comparisons of the replicas' weights, which are also compared "
        "before each save; 0 = only then", ge=0, mutable=True,
    )  # fmt: skip
    precision: Literal["bf16", "fp16", "tf32", "fp32", "fp64"] = key(
        "precision of the arithmetic, with weights in fp32; fp16: for GPUs older than Ampere, with "
        "gradients scaled by 256; tf32: fp32, but matrix products on a GPU (Ampere or newer) round "
        "their inputs to 11 bits; fp64: weights too"
    )
    deterministic: bool = key(
        "GPU: use only kernels whose results repeat bit for bit, not those that cuDNN measures to "
        "be fastest", mutable=True,
    )  # fmt: skip
    execution: Literal["graph", "fused", "eager"] = key(
        "how a GPU runs a step: graph, one CUDA graph of fused kernels and NCCL's exchanges (ZeRO "
        "1: up to DeepSpeed's own step); fused, the same kernels one by one; eager, torch's "
        "operators", mutable=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation, which scores every image of the evaluation split once."""

    every_epochs: float = key(
        "epochs between evaluations; the last follows the last step, and replaces one shortly "
        "before, but not with schedule.kind=plateau", gt=0,
    )  # fmt: skip
    views: Literal[1, 10] = key("windows per image: the centre window, or the paper's ten")
    batch: int = key("images evaluated at a time, all ranks together", ge=1, mutable=True)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints are saved and kept. They are written in the background."""

    every_steps: int = key(
        "steps between saves; also at a new best and at the end", ge=1, mutable=True
    )
    keep_last: int = key(
        "number of newest checkpoints to keep; the best is kept too", ge=1, mutable=True
    )
    keep_every_steps: int = key(
        "keep checkpoints at multiples of this step permanently; 0 = none", ge=0, mutable=True
    )
    max_idle_restarts: int = key(
        "restarts in a row that may fail without a new checkpoint, before a start is refused",
        ge=0, mutable=True,
    )  # fmt: skip
    begin_anew: bool = key(
        "start again from step 0 if all checkpoints of a run are damaged or missing; otherwise "
        "that is an error", mutable=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged of a run."""

    to: tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...] = key(
        "loggers besides metrics.jsonl; all but csv also get pictures: docs/tensorboard.md",
        mutable=True,
    )  # fmt: skip
    every_steps: int = key("steps between log lines", ge=1, mutable=True)
    histograms_every_steps: int = key(
        "TensorBoard: steps between histograms of each layer's weights and gradients; 0 = never",
        ge=0, mutable=True,
    )  # fmt: skip
    pictures: bool = key(
        "TensorBoard: pictures of answers and confusion at each evaluation", mutable=True
    )
    embedding: int = key(
        "TensorBoard: evaluation images in the projector at the end; 0 = none",
        ge=0, le=10_000, mutable=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiling. `steps` is two numbers in order, or empty."""

    steps: tuple[int, ...] = key(
        "first and last step traced by torch's profiler on rank 0; []: none", ge=1, mutable=True
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. `name` has at most 100 letters, digits, '.', '_' and '-', and starts with a letter or
    digit."""

    name: str = key("the run's name, and that of its folder under output_dir", mutable=True)
    output_dir: str = key("folder that holds the run folders", mutable=True, path=True)
    seed: int = key("seed of everything random in the run", ge=0, lt=2**32)
    model: ModelConfig
    data: DataConfig
    layout: LayoutConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    profile: ProfileConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name

    @property
    def ten_views_differ(self) -> bool:
        """Whether the ten views of an image differ in more than their mirroring."""
        return self.data.canvas > self.model.crop


_types_of = functools.cache(get_type_hints)


def keys(of: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Key]]:
    """Yield every key below a dataclass as (dotted name, type, Key)."""
    hints = _types_of(of)
    for field in dataclasses.fields(of):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, kind, field.metadata["key"]


def flat(config: Config) -> dict[str, Any]:
    """Return the config as a mapping of dotted keys to values, tuples as lists, as in JSON."""
    values = {dotted: attrgetter(dotted)(config) for dotted, _, _ in keys()}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }


# What an evaluation may depend on: sections, and keys of others. Those of train's batch also say
# on which layouts a config can be laid.
SCORED_WITH = (
    "model", "data", "layout", "evaluate.views", "evaluate.batch", "train.precision",
    "train.deterministic", "train.execution", "train.batch", "train.micro_batches",
)  # fmt: skip


def fingerprint(config: Config) -> dict[str, Any]:
    """Return the keys that define the run, with their values, to compare with a checkpoint's.

    The run's length counts only where the learning rate depends on it: on `steps` and `plateau`, a
    longer run starts exactly like a shorter one, but for the evaluation at the shorter one's end.
    """
    values = flat(config)
    if config.schedule.kind in ("steps", "plateau"):
        del values["train.epochs"]
    mutable = {dotted for dotted, _, key in keys() if key.mutable}
    return {dotted: value for dotted, value in values.items() if dotted not in mutable}
