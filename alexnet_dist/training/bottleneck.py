"""What holds a run up, in a sentence, and what would help."""

from collections.abc import Mapping

from alexnet_dist.config.schema import Config
from alexnet_dist.timing import APART

STRAGGLES = 1.3  # a slow rank: its own work takes this many times the median rank's
STARVED = 0.02  # of a GPU's bf16 peak; below it, the GPU mostly waits


def verdict(
    shares: Mapping[str, float], slowest: tuple[float, int], config: Config, cores: int,
    within_canvas: bool, cuda: bool, mfu: float | None = None,
) -> str:  # fmt: skip
    """Return what limits the speed of training, with advice: a slow rank, unless most of the time
    goes into evaluating, saving and logging; else the span that exceeds its acceptable share most;
    else a GPU that is hardly used; else nothing.

    Args:
        shares: share of the time by span, the names of `timing.SPANS`.
        slowest: the longest own work of a rank divided by the median rank's, and that rank.
        cores: CPU cores for each rank of this host.
        within_canvas: whether no training image is stored larger than the canvas.
        cuda: whether the run is on GPUs.
        mfu: share of the GPUs' peak that is used; None if it is not known.
    """
    parts = config.train.micro_batches > 1
    larger = f"{'fewer train.micro_batches, or ' * parts}a larger train.batch"
    faster = _faster_decoding(config, cores, within_canvas, cuda)
    every, save = config.evaluate.every_epochs, config.checkpoint.every_steps
    rules = (  # span, acceptable share of the time, in words, what helps
        ("data", 0.1, "waiting for data", faster),
        ("exchange", 0.3, "exchanging between columns", "see what `plan` says of other layouts"),
        ("all_reduce", 0.25, "summing over ranks", _fewer_bytes(config)),
        ("evaluate", 0.25, "evaluating", f"evaluate.every_epochs={2 * every:g}"),
        ("checkpoint", 0.1, "saving", f"checkpoint.every_steps={2 * save}"),
        ("log", 0.1, "logging", f"log.every_steps={2 * config.log.every_steps}, "
         "log.histograms_every_steps=0"),
        ("other", 0.2, "waiting for Python", larger),
    )  # fmt: skip
    times, rank = slowest
    besides = sum(shares[name] for name in APART)
    if times >= STRAGGLES and shares["data"] < 0.1 and besides < 0.5:
        return f"rank {rank} takes {times:.1f} times the median: look at what else runs there"
    span, may, what, help_ = max(rules, key=lambda rule: shares[rule[0]] / rule[1])
    if shares[span] < may:
        if mfu is not None and mfu < STARVED and config.train.precision in ("bf16", "fp16"):
            return (
                f"the GPU reaches {mfu:.1%} of its peak, and may be waiting for Python: "
                f"{_less_python(config)}"
            )
        spans = ("windows", "forward", "backward", "optimizer", "step")
        computing = sum(shares[name] for name in spans)
        return f"computing {computing:.0%} of the time: nothing else holds it up"
    return f"{what} {shares[span]:.0%} of the time: {help_}"


def _faster_decoding(config: Config, cores: int, within_canvas: bool, cuda: bool) -> str:
    """Return what makes a run wait less for data; arguments as for `verdict`."""
    data = config.data
    if 0 < data.workers < cores:
        return f"data.workers={cores}"
    if data.pipeline == "resident":  # it only crops
        return "more cores for each rank"
    if not within_canvas and data.canvas == 256:  # the size that `prepare` stores
        return "prepare the images without --keep, so that they need no resizing at each step"
    if cuda and data.pipeline == "torch":
        return "data.pipeline=dali decodes on the GPU"
    return "more cores for each rank, or a smaller model.crop"


def _fewer_bytes(config: Config) -> str:
    """Return what makes sums over ranks take less time."""
    if config.layout.compress_gradients or config.layout.kind == "sharded_fc":
        return "a larger train.batch, or layout.kind=sharded_fc"
    return "layout.compress_gradients=true halves the bytes"


def _less_python(config: Config) -> str:
    """Return what makes a GPU wait less for Python."""
    if config.data.pipeline == "torch":
        return "data.pipeline=dali, whose threads do not need Python's lock"
    if config.train.execution != "graph":
        return "train.execution=graph, or a larger train.batch"
    return "a larger train.batch"
