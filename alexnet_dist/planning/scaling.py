"""Speed of every layout on 1 to 1,024 devices: a table and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_dist.config.load import overridden
from alexnet_dist.config.schema import Config
from alexnet_dist.planning.cost_model import bottleneck, predict
from alexnet_dist.planning.dry_run import KINDS, plan_on
from alexnet_dist.planning.machines import Cluster
from alexnet_dist.planning.measured import correction
from alexnet_dist.planning.plan import Misfit
from alexnet_dist.plotting import figure

_MOST = 1024


def curve(config: Config, cluster: Cluster, most: int = _MOST) -> list[dict[str, Any]]:
    """Predict each layout on 1, 2, 4 … devices with train.batch images on each.

    Args:
        cluster: the kind of devices, and how many a node has; its number of nodes does not matter.

    Returns:
        Rows of layout, ranks, images_per_s of training without decoding, efficiency (images/s
        divided by ranks times one device's), and the bottleneck.
    """
    rows, base, ranks = [], 0.0, 1
    while ranks <= most:
        size = [f"train.batch={config.train.batch * ranks}", "layout.ranks=0"]
        planned = plan_on(overridden(config, *size), ranks, cluster.machine)
        nodes = -(-ranks // cluster.devices)
        there = Cluster(cluster.machine, min(cluster.devices, ranks), nodes)
        for kind in KINDS:
            if isinstance(planned.layouts[kind], Misfit) or planned.ranks_of(kind) < ranks:
                continue
            factor, _ = correction(planned, kind, cluster.machine)
            prediction = predict(planned, kind, there, factor=factor)
            speed = prediction.training_images_per_s
            base = base or speed
            rows.append({
                "layout": kind, "ranks": ranks, "images_per_s": speed,
                "efficiency": speed / ranks / base,
                "bottleneck": bottleneck({**prediction.parts_s, "decode": 0.0}, beside=True),
            })  # fmt: skip
        ranks *= 2
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the curves as a Markdown table: images/s and efficiency, a column for each layout."""
    kinds = [kind for kind in KINDS if kind != "one" and any(r["layout"] == kind for r in rows)]
    text = [f"| devices | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for ranks in sorted({row["ranks"] for row in rows}):
        by_kind = {row["layout"]: row for row in rows if row["ranks"] == ranks}
        cells = [
            f"{by_kind[kind]['images_per_s']:,.0f} ({by_kind[kind]['efficiency']:.0%})"
            if kind in by_kind else "" for kind in kinds
        ]  # fmt: skip
        text.append(f"| {ranks} | {' | '.join(cells)} |")
    return text


def draw(rows: Sequence[dict[str, Any]], cluster: Cluster, path: Path) -> None:
    """Draw the curves."""
    with figure(path, 1, 2, (12, 4.5)) as axes:
        speeds, shares = axes[0]
        for place, kind in enumerate(KINDS):
            own = [row for row in rows if row["layout"] == kind]
            if kind == "one" or not own:
                continue
            ranks = [row["ranks"] for row in own]
            width = 1.0 + 5 * (len(KINDS) - 1 - place) / len(KINDS)  # where lines meet, all show
            style = {"label": kind, "lw": width, "markersize": width + 3}
            speeds.loglog(ranks, [row["images_per_s"] for row in own], "o-", **style)
            shares.semilogx(ranks, [100 * row["efficiency"] for row in own], "o-", **style)
        one = rows[0]["images_per_s"]
        speeds.loglog([1, _MOST], [one, one * _MOST], ":", color="grey", label="ideal")
        title = f"{cluster.machine.name}, {cluster.devices} a node"
        speeds.set(xlabel="devices", ylabel="images/s", title=title)
        shares.set(
            xlabel="devices", ylabel="efficiency, %", ylim=(0, None),
            title="images/s ÷ (devices × one device's)",
        )  # fmt: skip
        for axis in (speeds, shares):
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=8)
