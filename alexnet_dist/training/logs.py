"""What a run logs: `log`, how ranks format it, its first lines, and the file of damaged samples."""

import json
import logging
import shlex
from pathlib import Path

import torch

from alexnet_dist.config.from_data import NO_SPLIT
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import counted, printable
from alexnet_dist.files import appended
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.training.tolerance import warn_if_unwritable

log = logging.getLogger("alexnet_dist")


def configure_logging(topology: Topology) -> None:
    """Log at INFO on rank 0, and at WARNING with a prefix of rank and column on the others."""
    name = "" if topology.is_rank_0 else f"[r{topology.global_rank} c{topology.column}] "
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable(f"{name}%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    log.setLevel(logging.INFO if topology.is_rank_0 else logging.WARNING)


def opening(
    config: Config, topology: Topology, step: int, last_step: int, samples: int, decoding: str
) -> str:
    """Return what is logged before the first step.

    Args:
        step: step at which the run continues; 0: it begins.
        samples: number of training images.
        decoding: what decodes them.
    """
    begins = f"continues at step {step} of {last_step}" if step else "begins"
    parts, replica = config.train.micro_batches, config.train.batch // topology.replicas
    decoded = max(map(len, topology.shares(range(config.train.batch))))
    repeated = unscored = ""
    if config.train.batch > samples:
        repeated = (
            f"train.batch={config.train.batch}: more than the {samples} training images, so that a "
            "step takes some of them several times: lower it\n"
        )
    if config.data.eval_split == NO_SPLIT:
        unscored = f"data.eval_split={NO_SPLIT}: no evaluation; the last checkpoint is kept"
        if config.schedule.kind == "plateau":
            unscored += ", and the rate of schedule.kind=plateau never drops"
        unscored += "; data.hold_out=0.1 would set a tenth of the images apart to evaluate on\n"
    return (
        f"{config.folder} {begins}: {counted(last_step, 'step')}, "
        f"{counted(config.model.columns, 'column')} on {counted(topology.world_size, 'process')}, "
        f"{topology.device.type} ({counted(torch.get_num_threads(), 'thread')} each), "
        f"{config.train.precision}\n"
        f"batch {config.train.batch} in all, {replica} per replica, in "
        f"{counted(parts, 'micro-batch')} of {replica // parts}; each rank decodes {decoded}\n"
        f"{counted(samples, 'training image')} of {config.data.path}, decoded by {decoding}\n"
        f"{repeated}{unscored}{watch(config)}"
    )


def watch(config: Config) -> str:
    """Return the line that says how to watch a run in TensorBoard."""
    return f"watch: tensorboard --logdir {shlex.quote(config.output_dir)} --host localhost"


class _Printable(logging.Formatter):
    """Escapes control characters, which a name in a data set or a path may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _JsonLines(logging.Handler):
    """Appends each record to a file, as a line of quarantine.jsonl."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        line = json.dumps({"time": record.created, "reason": record.getMessage()})
        with warn_if_unwritable(self._path), appended(self._path) as file:
            file.write(f"{line}\n".encode())


def quarantine(path: Path) -> logging.Handler:
    """Return a handler, already added, that appends each damaged sample that the data pipeline
    reports to quarantine.jsonl; the file is made with its first line."""
    handler = _JsonLines(path)
    logging.getLogger("alexnet_dist.data").addHandler(handler)
    return handler
