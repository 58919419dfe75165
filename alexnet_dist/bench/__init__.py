"""How fast it is, against references timed in the same run: medians of passes taken in turn.

A lone time says as much of the machine as of the program; only the ratios are claims. Every part
gives {"ratios", "ceilings", "machine", "unit", "runs"}, and what else it found.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from alexnet_dist.parallel import device

Pass = Callable[[], float]  # what is measured, in the part's unit, of one pass


def in_turn(passes: dict[str, Pass], repeats: int) -> list[dict[str, float]]:
    """Every pass `repeats` times, one after another, so that a slow minute is everyone's."""
    for run in passes.values():
        run()  # warm: caches, workers, imports
    return [{name: run() for name, run in passes.items()} for _ in range(repeats)]


def machine(workers: int) -> dict[str, Any]:
    return {**device.machine(), "workers": workers}


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def ratio(runs: Iterable[Mapping[str, float]], a: str, b: str) -> float:
    """The median over passes of what one gave, divided by what another did."""
    return median(run[a] / run[b] for run in runs)


def table(found: dict[str, Any]) -> str:
    """What `bench` found, for a reader."""
    names = found["runs"][0].keys()
    heading = f"{found['unit']}, median of {len(found['runs'])}"
    lines = [f"{heading:44}{'least':>10}{'most':>10}"]
    for name in names:
        values = [run[name] for run in found["runs"]]
        middle = f"{name:32}{median(values):12,.4g}"
        lines.append(f"{middle}{min(values):10,.4g}{max(values):10,.4g}")
    lines += ["", "ratios, medians of pairs"]
    lines += [f"{name:44}{value:8.3f}" for name, value in found["ratios"].items()]
    lines += ["", *(f"{name:44}{value:10,.2f}" for name, value in found["ceilings"].items())]
    if "losses" in found:
        lines += ["", "loss of a first step without dropout, nats"]
        lines += [f"{name:44}{value:10,.5f}" for name, value in found["losses"].items()]
    if "differences" in found:
        lines += ["", "torch and dali, grey levels apart"]
        lines += [f"{name:44}{value:10,.3f}" for name, value in found["differences"].items()]
    lines += ["", ", ".join(f"{key} {value}" for key, value in found["machine"].items())]
    lines += [found["unseen"]] if found.get("unseen") else []
    return "\n".join(lines)
