"""Speed from 1 to 1,024 devices, every layout; and a CPU's numbers from measured layouts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import ConfigError
from alexnet_dist.files import read_bytes
from alexnet_dist.planning.cost_model import Measured, bottleneck, fit, predict
from alexnet_dist.planning.dry_run import KINDS, plan, plan_on
from alexnet_dist.planning.machines import Cluster, Machine
from alexnet_dist.planning.measured import correction
from alexnet_dist.planning.plan import Misfit
from alexnet_dist.plotting import figure

_MOST = 1024


def curve(config: Config, at: Cluster, most: int = _MOST) -> list[dict[str, Any]]:
    """Each layout on 1, 2, 4 … devices, train.batch images on each device.

    Args:
        at: its nodes' size; how many there are is of no account.

    Returns:
        layout, ranks, images_per_s of training without decoding, efficiency (÷ ranks × one
        device's), and the bottleneck.
    """
    rows, base, ranks = [], 0.0, 1
    while ranks <= most:
        size = [f"train.batch={config.train.batch * ranks}", "layout.ranks=0"]
        planned = plan_on(load_config([flat(config), *size]), ranks, at.machine)
        nodes = -(-ranks // at.devices)
        there = Cluster(at.machine, min(at.devices, ranks), nodes)
        for kind in KINDS:
            if isinstance(planned.layouts[kind], Misfit):
                continue
            factor, _ = correction(planned, kind, at.machine)
            found = predict(planned, kind, there, factor=factor)
            speed = found.training_images_per_s
            base = base or speed
            rows.append({
                "layout": kind, "ranks": ranks, "images_per_s": speed,
                "efficiency": speed / ranks / base,
                "bottleneck": bottleneck({**found.parts_s, "decode": 0.0}, beside=True),
            })  # fmt: skip
        ranks *= 2
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The curves as a table of Markdown: images/s, and efficiency, a column a layout."""
    kinds = [kind for kind in KINDS if kind != "one" and any(r["layout"] == kind for r in rows)]
    text = [f"| devices | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for ranks in sorted({row["ranks"] for row in rows}):
        found = {row["layout"]: row for row in rows if row["ranks"] == ranks}
        cells = [
            f"{found[kind]['images_per_s']:,.0f} ({found[kind]['efficiency']:.0%})"
            if kind in found else "" for kind in kinds
        ]  # fmt: skip
        text.append(f"| {ranks} | {' | '.join(cells)} |")
    return text


def draw(rows: Sequence[dict[str, Any]], at: Cluster, path: Path) -> None:
    with figure(path, 1, 2, (12, 4.5)) as axes:
        speeds, shares = axes[0]
        for kind in KINDS:
            found = [row for row in rows if row["layout"] == kind]
            if kind == "one" or not found:
                continue
            ranks = [row["ranks"] for row in found]
            speeds.loglog(ranks, [row["images_per_s"] for row in found], "o-", label=kind)
            shares.semilogx(ranks, [100 * row["efficiency"] for row in found], "o-", label=kind)
        one = rows[0]["images_per_s"]
        speeds.loglog([1, _MOST], [one, one * _MOST], ":", color="grey", label="ideal")
        title = f"{at.machine.name}, {at.devices} a node"
        speeds.set(xlabel="devices", ylabel="images/s", title=title)
        shares.set(
            xlabel="devices", ylabel="efficiency, %", title="÷ devices × one", ylim=(0, None)
        )
        for axis in (speeds, shares):
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=8)


def fitted(paths: Sequence[Path]) -> Machine:
    """This CPU's numbers, from what `bench layouts --json` printed; raises ConfigError."""
    return fit([one for path in paths for one in read_bench(path)])


def read_bench(path: Path) -> list[Measured]:
    """The layouts that a file of `bench layouts --json` holds, by the fastest of their passes: what
    other programs took from a pass is not the machine's."""
    try:
        found = json.loads(read_bytes(path))
        config, cores = load_config([found["recipe"]]), int(found["machine"]["cores"])
        runs, ranks = found["runs"], int(found["ceilings"]["ranks"])
        gpu = found["machine"]["gpu"]
        speeds = {kind: max(run[kind] for run in runs) for kind in runs[0]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"--fit {path}: not what `bench layouts --json` prints: {error!r}"
        ) from error
    if gpu:
        raise ConfigError(f"--fit {path}: measured on {gpu}; only CPUs are fitted")
    planned = plan(config, ranks)
    return [
        Measured(planned, "alone" if kind == "one" else kind, cores, config.train.batch / speed)
        for kind, speed in speeds.items()
        if not (kind == "columns_x_replicas" and ranks == 2)  # columns, by another name
    ]
