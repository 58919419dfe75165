"""`plan --fit`: a CPU's figures, fitted to layouts that `bench layouts` measured on it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_dist.config.load import load_config
from alexnet_dist.errors import ConfigError
from alexnet_dist.files import json_object, read_bytes
from alexnet_dist.parallel.layouts import ZERO_STAGES
from alexnet_dist.planning.cost_model import collectives, quantities
from alexnet_dist.planning.dry_run import plan
from alexnet_dist.planning.machines import MACHINES, Machine
from alexnet_dist.planning.plan import Plan


@dataclass(frozen=True)
class Measured:
    """A measured step: its plan, its layout, the host's cores, and the seconds it took."""

    planned: Plan
    kind: str
    cores: int
    seconds: float


def fit(measured: Sequence[Measured]) -> Machine:
    """Fit a CPU's figures to measured steps: non-negative, with least absolute relative errors.

    Raises:
        ConfigError: too few layouts or batches.
    """
    from scipy.optimize import nnls  # takes half a second to import

    names = ("flops", "serial", "bytes", "sent", "hops", "steps", "zero")
    rows = [_row(one) for one in measured]
    if len(rows) <= len(names):
        raise ConfigError(
            f"--fit: {len(rows)} measured steps are too few to fit {len(names)} numbers: give "
            "several outputs of bench layouts, for different batches"
        )
    precision, *others = {one.planned.recipe["train.precision"]: 0 for one in measured}
    if others:
        raise ConfigError(
            f"--fit: steps in {precision} and {others[0]} cannot be fitted together: give outputs "
            "of bench layouts in one train.precision"
        )
    matrix = np.array([[row[name] / one.seconds for name in names]
                       for row, one in zip(rows, measured, strict=True)])  # fmt: skip
    scale = matrix.max(0).clip(1e-300)
    weights = np.ones(len(rows))
    for _ in range(30):  # reweighted towards least absolute errors, so that outliers count little
        solution, _ = nnls(matrix / scale * weights[:, None], weights)
        weights = 1 / np.sqrt(np.abs(matrix / scale @ solution - 1).clip(0.02))
    cost = dict(zip(names, solution / scale, strict=True))
    off = np.median(np.abs(matrix / scale @ solution - 1))
    return dataclasses.replace(
        MACHINES["cpu"],
        peak={precision: 1 / max(cost["flops"], 1e-18)},
        serial=cost["serial"] / max(cost["flops"], 1e-18),
        memory=1 / max(cost["bytes"], 1e-15),
        link=1 / max(cost["sent"], 1e-15),
        latency_s=cost["hops"],
        step_s=cost["steps"],
        zero_s=cost["zero"],
        source=f"fitted to {len(rows)} measured steps, half of them within {off:.0%}",
    )


def _row(one: Measured) -> dict[str, float]:
    """Return what a measured step counts of each of the fitted figures."""
    kind = one.kind
    counted = quantities(one.planned, kind, one.cores / one.planned.ranks_of(kind))
    sent = [call for call in collectives(one.planned, kind) if call.group > 1]
    return {
        "flops": counted["flops"],
        "serial": counted["serial"],
        "bytes": counted["map_bytes"] + counted["parameter_bytes"],
        "sent": sum(call.size for call in sent),
        "hops": sum(call.calls * call.hops for call in sent),
        "steps": 1.0,
        "zero": float(kind in ZERO_STAGES),
    }


def read_bench(path: Path) -> list[Measured]:
    """Read the layouts in the output of `bench layouts --json`, each at its fastest pass: slower
    ones were disturbed by other programs."""
    try:
        output = json_object(read_bytes(path))
        config, cores = load_config([output["recipe"]]), int(output["machine"]["cores"])
        runs, ranks = output["runs"], int(output["ceilings"]["ranks"])
        gpu = output["machine"]["gpu"]
        speeds = {kind: max(run[kind] for run in runs) for kind in runs[0]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"--fit {path}: is not what `bench layouts --json` prints: {error!r}"
        ) from error
    if gpu:
        raise ConfigError(f"--fit {path}: was measured on {gpu}, but only CPUs can be fitted")
    planned = plan(config, ranks)
    return [
        Measured(planned, kind, cores, config.train.batch / speed)
        for kind, speed in speeds.items()
        if not (kind == "columns_x_replicas" and ranks == 2)  # then it is the same as columns
    ]
