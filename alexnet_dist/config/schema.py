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
    """What a key means, with its unit and bounds (`ge`: at least, `gt`: more than, …).

    `spread`: of a list, one value may stand for all. `path`: of a file or folder, ~ is expanded.
    """

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    free: bool = False
    spread: bool = False
    path: bool = False


# Layers are numbered through: five convolutions are followed by fc6.
ConvName = Literal[
    "conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "conv7", "conv8",
]  # fmt: skip
FcName = Literal["fc2", "fc3", "fc4", "fc5", "fc6", "fc7", "fc8", "fc9"]
LayerName = Literal[ConvName, FcName]


@dataclass(frozen=True)
class LrnConfig:
    """Local response normalisation (paper §3.3): b = a / (k + α Σ a²)^β, the sum over `size`
    adjacent maps of the same column. `size` is odd."""

    layers: Annotated[tuple[ConvName, ...], Key("layers followed by normalisation")]
    size: Annotated[int, Key("n: adjacent maps summed over", ge=1)]
    alpha: Annotated[
        tuple[float, ...], Key("α of each of these layers, or of all", ge=0, spread=True)
    ]
    beta: Annotated[float, Key("β", gt=0)]
    k: Annotated[float, Key("k", gt=0)]
    alpha_over_size: Annotated[
        bool, Key("divide α by n, as the released code and torch do; the printed formula does not")
    ]


@dataclass(frozen=True)
class SpatialNormConfig:
    """The released code's second normalisation, over neighbouring pixels of a map (`cnorm2`):
    b = a / (1 + α/n² Σ a²)^β, the sum over n × n pixels."""

    layers: Annotated[tuple[ConvName, ...], Key("layers followed by it, after lrn")]
    size: Annotated[int, Key("n: side of the square summed over, pixels", ge=1)]
    alpha: Annotated[float, Key("α", ge=0)]
    beta: Annotated[float, Key("β", gt=0)]


@dataclass(frozen=True)
class ModelConfig:
    """The network. Layers are numbered through: five convolutions are followed by fc6, six by fc7.
    `kernel`, `stride` and `padding` have a number for each layer of `conv`; the widths of `conv`
    and `fc` split into `columns`; every layer that is named must exist; `init=paper` needs pixels
    of 0–255 with a mean taken off."""

    columns: Annotated[int, Key("columns of the network: 1 or 2", ge=1, le=2)]
    exchange: Annotated[
        tuple[LayerName, ...], Key("layers that see both columns; the others see their own")
    ]
    classes: Annotated[
        int, Key("classes of the data set; 0 = as many as it has, 1000 before it is there", ge=0)
    ]
    crop: Annotated[int, Key("side of the window conv1 sees, pixels", ge=8)]
    conv: Annotated[tuple[int, ...], Key("maps of conv1, conv2, …, all columns together", ge=1)]
    kernel: Annotated[tuple[int, ...], Key("side of their kernels, pixels", ge=1)]
    stride: Annotated[tuple[int, ...], Key("their strides, pixels", ge=1)]
    padding: Annotated[tuple[int, ...], Key("zeros on each side of what they see, pixels", ge=0)]
    fc: Annotated[
        tuple[int, ...],
        Key("units of the fully-connected layers before the last, all columns together", ge=1),
    ]
    activation: Annotated[Literal["relu", "tanh", "sigmoid"], Key("after every layer but the last")]
    activation_last: Annotated[
        tuple[ConvName, ...],
        Key("layers activated after normalisation and pooling: conv1 in the released code"),
    ]
    pool_after: Annotated[tuple[ConvName, ...], Key("layers followed by pooling")]
    pool: Annotated[tuple[int, ...], Key("pooling's window and stride, pixels", ge=1)]
    pool_average: Annotated[tuple[ConvName, ...], Key("of pool_after, those that average")]
    pool_before_lrn: Annotated[bool, Key("CaffeNet's order")]
    round_up: Annotated[
        bool,
        Key("maps cover all they see, zeros on the right and below (conv) or less there (pool), "
            "as in the released code; else the rest is cut off"),
    ]  # fmt: skip
    lrn: LrnConfig
    spatial_norm: SpatialNormConfig
    dropout: Annotated[float, Key("share of units dropped", ge=0, lt=1)]
    dropout_before: Annotated[tuple[FcName, ...], Key("layers that do not see the dropped units")]
    dropout_scaling: Annotated[
        Literal["test", "train"], Key("when to scale: units × (1 − p) at test, or ÷ (1 − p)")
    ]
    init: Annotated[
        Literal["paper", "he"],
        Key("initial weights: N(0, init_std) and init_bias, which expect grey levels of 0–255; "
            "or He et al.'s, for any scale"),
    ]  # fmt: skip
    init_std: Annotated[
        tuple[float, ...], Key("paper: of each layer's weights, or of all", ge=0, spread=True)
    ]
    init_bias: Annotated[tuple[float, ...], Key("paper: each layer's, or all", spread=True)]

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


@dataclass(frozen=True)
class DataConfig:
    """What is read, and what conv1 sees of it. A `canvas` holds a window of `model.crop`; under
    `model.init=paper` `divide_by` is [1, 1, 1], and `subtract` is not nothing."""

    path: Annotated[
        str, Key("packed data set, made by `alexnet-dist prepare`", free=True, path=True)
    ]
    train_split: Annotated[str, Key("split to train on")]
    hold_out: Annotated[
        float,
        Key("share of the training images that is not trained on and is the split held_out, each "
            "by its checksum", ge=0, lt=1),
    ]  # fmt: skip
    eval_split: Annotated[
        str,
        Key("split to evaluate on; auto: held_out, val or test, the first that there is; none: do "
            "not"),
    ]  # fmt: skip
    pipeline: Annotated[
        Literal["auto", "resident", "dali", "torch"],
        Key("resident: images decoded once, kept in memory; dali: by DALI (nvJPEG on a GPU); "
            "torch: by torchvision in threads; auto: as docs/data.md says", free=True),
    ]  # fmt: skip
    workers: Annotated[
        int, Key("decoding threads a rank; 0 = the rank's cores", ge=0, le=256, free=True)
    ]
    prefetch: Annotated[int, Key("batches decoded ahead", ge=1, le=64, free=True)]
    verify_hashes: Annotated[bool, Key("hash every shard before the first step", free=True)]
    max_damaged: Annotated[
        float,
        Key("share of a split that may be found damaged in an epoch", ge=0, le=1, free=True),
    ]
    canvas: Annotated[int, Key("side of the image windows are cut from, pixels", ge=8)]
    random_crop: Annotated[bool, Key("train on random windows; else the centre's")]
    flip: Annotated[bool, Key("mirror half of the training windows")]
    lighting: Annotated[float, Key("standard deviation of α in PCA lighting; 0 = off", ge=0)]
    lighting_epochs: Annotated[float, Key("lighting is off from this epoch on", ge=0)]
    lighting_by: Annotated[
        Literal["sqrt_eigenvalue", "eigenvalue"],
        Key("α times √λ of 0–255 pixels (released code), or λ of 0–1 pixels (as printed)"),
    ]
    subtract: Annotated[
        Literal["mean_image", "mean_rgb", "nothing"], Key("what is taken off the pixels")
    ]
    mean_from: Annotated[
        str,
        Key("mean_image: a .npy of (height, width, 3) grey levels, red first, in place of the data "
            "set's own, or none; it counts by its hash", free=True, path=True),
    ]  # fmt: skip
    mean_sha256: Annotated[
        str, Key("SHA-256 that file must have; any = what it has as the run begins")
    ]
    divide_by: Annotated[
        tuple[float, ...], Key("red, green and blue are divided by these, grey levels", gt=0)
    ]


@dataclass(frozen=True)
class LayoutConfig:
    """How the network lies on ranks. `columns` and `columns_x_replicas` need `model.columns=2`;
    `sharded_fc` needs every fully-connected layer in `model.exchange`; `zero1` and `zero2` take
    neither `optimizer.kind=lars` nor `train.precision=fp64`."""

    kind: Annotated[
        Literal["one", "columns", "replicas", "columns_x_replicas", "zero1", "zero2", "sharded_fc"],
        Key("how replicas and columns lie on ranks: docs/layouts.md", free=True),
    ]
    ranks: Annotated[
        int,
        Key("0 = the launcher's; without one a GPU each, or the fewest that fit", ge=0, free=True),
    ]
    compress_gradients: Annotated[
        bool, Key("sum gradients over replicas in bf16: half the bytes, 8 bits of precision")
    ]
    deepspeed: Annotated[
        str,
        Key("zero1, zero2: a DeepSpeed config (JSON) laid over ours, or none", free=True,
            path=True),
    ]  # fmt: skip
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Key("auto: a GPU for each rank where there are enough, else CPU", free=True),
    ]
    share_gpu: Annotated[
        bool, Key("where there are fewer GPUs than ranks, they share them: docs/layouts.md",
                  free=True)
    ]  # fmt: skip
    threads: Annotated[int, Key("arithmetic threads a rank; 0 = its cores", ge=0, free=True)]
    timeout_s: Annotated[int, Key("longest wait of one rank for another, s", ge=1, free=True)]


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights follow from gradients. `kind=lars` does not go with ZeRO."""

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
    """The learning rate over time. `at_epochs` rise."""

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
    """The steps. `batch` divides by `micro_batches` × replicas; `init_new` is empty where
    `init_from=none`."""

    batch: Annotated[int, Key("samples in a step, all ranks together", ge=1)]
    epochs: Annotated[float, Key("passes over the training split", gt=0)]
    init_from: Annotated[
        str,
        Key("begin from this run's or checkpoint's weights, or none; they count by their hash",
            free=True, path=True),
    ]  # fmt: skip
    init_sha256: Annotated[
        str, Key("SHA-256 those weights must have; any = what they have as the run begins")
    ]
    init_new: Annotated[tuple[LayerName, ...], Key("layers that begin anew all the same")]
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
        Literal["bf16", "tf32", "fp32", "fp64"],
        Key("what the network computes in, its weights in fp32; tf32: fp32, and a GPU's products "
            "of factors of 11 bits, from Ampere on; fp64: weights too"),
    ]  # fmt: skip
    deterministic: Annotated[bool, Key("GPU: only kernels that repeat to the bit", free=True)]
    execution: Annotated[
        Literal["graph", "fused", "eager"],
        Key("a GPU's steps: graph, one CUDA graph of fused kernels and of NCCL's exchanges (ZeRO: "
            "up to DeepSpeed's own step); fused, these one by one; eager, torch's operators",
            free=True),
    ]  # fmt: skip


@dataclass(frozen=True)
class EvaluateConfig:
    """Scoring the evaluation split, every image of it once."""

    every_epochs: Annotated[
        float,
        Key("evaluate this often, epochs, and at the end; where that is near, only then", gt=0),
    ]
    views: Annotated[Literal[1, 10], Key("windows an image: the centre's, or the paper's ten")]
    batch: Annotated[int, Key("images at a time, all ranks together", ge=1, free=True)]


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and kept. Saves are written behind the loop."""

    every_steps: Annotated[
        int, Key("save this often, steps; also a new best, and the end", ge=1, free=True)
    ]
    keep_last: Annotated[int, Key("newest checkpoints kept; the best is kept too", ge=1, free=True)]
    keep_every_steps: Annotated[
        int, Key("those of every so many steps are kept for good; 0 = none", ge=0, free=True)
    ]
    max_idle_restarts: Annotated[
        int, Key("failures in a row that save nothing new, before starts are refused", ge=0,
                 free=True),
    ]  # fmt: skip
    begin_anew: Annotated[
        bool,
        Key("where all checkpoints of a run are damaged or gone, begin at step 0 again; else that "
            "is refused", free=True),
    ]  # fmt: skip


@dataclass(frozen=True)
class LogConfig:
    """What is said of a run while it goes on."""

    to: Annotated[
        tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...],
        Key("where numbers go beside metrics.jsonl, pictures too (but csv): docs/tensorboard.md",
            free=True),
    ]  # fmt: skip
    every_steps: Annotated[int, Key("a line and a point this often, steps", ge=1, free=True)]
    histograms_every_steps: Annotated[
        int,
        Key("TensorBoard: weights and gradients by layer this often, steps; 0 = never", ge=0,
            free=True),
    ]  # fmt: skip
    pictures: Annotated[
        bool, Key("TensorBoard: answers and confusion at each evaluation", free=True)
    ]
    embedding: Annotated[
        int,
        Key("TensorBoard: test images in the projector at the end; 0 = none", ge=0, le=10_000,
            free=True),
    ]  # fmt: skip


@dataclass(frozen=True)
class ProfileConfig:
    """Tracing some steps. Two numbers, the first no later than the last, or none."""

    steps: Annotated[
        tuple[int, ...],
        Key("first and last step to be traced by torch's profiler, on rank 0; none: []", ge=1,
            free=True),
    ]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A run. `name` is of letters, digits, '.', '_' and '-', at most 100, and does not begin with a
    sign."""

    name: Annotated[str, Key("the run's name: its folder under output_dir", free=True)]
    output_dir: Annotated[str, Key("where run folders lie", free=True, path=True)]
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
    profile: ProfileConfig

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
