"""`bench`: how fast parts of the program are, against references timed in the same run.

References and ours take turns, and medians of the passes are compared: a single time says as much
about the machine as about the program, so only the ratios are claims. Every part returns a
`Result`.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Required, TypedDict

from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel import device

log = logging.getLogger(__name__)


class Result(TypedDict, total=False):
    """What a part measured: the keys of its JSON.

    Attributes:
        ratios: the claims, each by what is divided by what.
        ceilings: figures that bound or explain them.
        machine: what it ran on.
        unit: of `runs`.
        runs: of each repeat, every pass's figure by name.
        recipe: the config's keys, where `plan --fit` reads them.
        losses: nats a sample, where equal work has equal losses.
        differences: grey levels between the pipelines' pixels.
        unseen: what the figures do not tell.
    """

    ratios: Required[dict[str, float]]
    ceilings: Required[dict[str, float]]
    machine: Required[dict[str, Any]]
    unit: Required[str]
    runs: Required[list[dict[str, float]]]
    recipe: dict[str, Any]
    losses: dict[str, float]
    differences: dict[str, float]
    unseen: str


Pass = Callable[[], float]  # runs one pass, and returns what it measured in the part's unit


def in_turn(
    passes: Mapping[str, Pass], repeats: int, optional: Iterable[str] = ()
) -> list[dict[str, float]]:
    """Run every pass `repeats` times in turn, so that a slow minute affects all of them.

    Args:
        optional: passes that are left out, with a warning, if their warm-up raises ConfigError.
    """
    warm: dict[str, Pass] = {}
    for name, run in passes.items():
        try:
            run()  # caches, workers, imports
        except ConfigError as error:
            if name not in optional:
                raise
            log.warning(f"{error}: left out")
        else:
            warm[name] = run
    return [{name: run() for name, run in warm.items()} for _ in range(repeats)]


def machine(workers: int) -> dict[str, Any]:
    """Return what the machine is, with the number of workers."""
    return {**device.machine(), "workers": workers}


def ratio(runs: Iterable[Mapping[str, float]], a: str, b: str) -> float:
    """Return the median over the repeats of one pass's figure divided by another's."""
    return statistics.median(run[a] / run[b] for run in runs)


def table(result: Result) -> str:
    """Return what a part measured as a text table."""
    names = result["runs"][0].keys()
    heading = f"{result['unit']}, median of {len(result['runs'])}"
    lines = [f"{heading:44}{'least':>10}{'most':>10}"]
    for name in names:
        values = [run[name] for run in result["runs"]]
        middle = f"{name:32}{statistics.median(values):12,.4g}"
        lines.append(f"{middle}{min(values):10,.4g}{max(values):10,.4g}")
    lines += ["", "ratios, medians of pairs"]
    lines += [f"{name:44}{value:8.3f}" for name, value in result["ratios"].items()]
    lines += ["", *(f"{name:44}{value:10,.2f}" for name, value in result["ceilings"].items())]
    if "losses" in result:
        lines += ["", "loss of a first step without dropout, nats"]
        lines += [f"{name:44}{value:10,.5f}" for name, value in result["losses"].items()]
    if "differences" in result:
        lines += ["", "torch and dali, grey levels apart"]
        lines += [f"{name:44}{value:10,.3f}" for name, value in result["differences"].items()]
    lines += ["", ", ".join(f"{key} {value}" for key, value in result["machine"].items())]
    if result.get("unseen"):
        lines.append(result["unseen"])
    return "\n".join(lines)
