"""The commands `compare`, `plan` and `doctor`: compare, predict and check."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_dist.cli.parser import (
    AddCommand,
    add_json,
    add_share_gpu,
    at_least,
    count,
    path,
    picture,
    refuse,
)
from alexnet_dist.config.load import load_config
from alexnet_dist.errors import ConfigError, looked_in, printable
from alexnet_dist.files import as_json

if TYPE_CHECKING:
    from alexnet_dist.config.schema import Config
    from alexnet_dist.planning.machines import Cluster, Machine

_STEPS = 20  # that compare trains on each layout
_UNKNOWN_GPU = (
    "this machine's GPUs are of a kind with no known figures: name a known kind, as in --gpus "
    "h100:8"
)


def add(command: AddCommand) -> None:
    """Add these commands to the parser."""
    sub = command(
        "compare", compare, "compare a config's layouts with one process, or runs with each other",
        (
            "alexnet-dist compare demo --layouts columns,replicas:2",
            "alexnet-dist compare demo --share-gpu                 # all of them on one GPU",
            "alexnet-dist compare runs/own runs/other",
        ),
    )  # fmt: skip
    sub.add_argument(
        "config", nargs="+", help="a config whose layouts are compared, or two or more run folders"
    )
    sub.add_argument("--layouts", help="LAYOUT[:RANKS],… (default: all that this config allows)")
    sub.add_argument(
        "--steps", type=at_least(3), default=_STEPS,
        help="steps to train on each layout, 3 or more, because two warm up",
    )  # fmt: skip
    add_share_gpu(sub)
    sub.add_argument(
        "--out", type=picture, metavar="PNG",
        help="where to draw the runs' curves (default: compare.png)",
    )  # fmt: skip
    add_json(sub, "list (layouts) or object (runs)")

    sub = command(
        "plan", plan, "predict what a run needs: memory, arithmetic, traffic, hours",
        (
            "alexnet-dist plan demo                                # on this machine",
            "alexnet-dist plan paper/alexnet-2012 --gpus h100:8 layout.kind=replicas",
        ),
    )  # fmt: skip
    sub.add_argument("config", nargs="+", help="a config, as for train, or a run folder")
    sub.add_argument(
        "--gpus",
        metavar="KIND:DEVICES[xNODES]",
        help="devices to predict for: h100:8x4, 8xh100, cpu:2 (default: this machine's)",
    )
    size = sub.add_mutually_exclusive_group()
    size.add_argument(
        "--ranks", type=count, help="ranks (default: all of --gpus, or as train would start)"
    )
    size.add_argument(
        "--curve", type=picture, metavar="PNG",
        help="draw the scaling from 1 to 1,024 devices, with train.batch images on each",
    )  # fmt: skip
    sub.add_argument(
        "--machine", type=path, metavar="JSON", help="a machine's numbers, as --fit wrote them"
    )
    sub.add_argument(
        "--fit", type=path, nargs="+", metavar="JSON",
        help="fit this CPU's numbers to these outputs of `bench layouts --json`, and write them "
             "to --machine",
    )  # fmt: skip
    add_json(sub)

    sub = command(
        "doctor", doctor, "check this machine: what it has, what a run would use, what to fix",
        ("alexnet-dist doctor demo",),
    )  # fmt: skip
    sub.add_argument("config", nargs="*", help="the config of a run, as for train")
    add_json(sub)


def compare(options: argparse.Namespace) -> int:
    """Compare a config's layouts with one process, or several runs with each other; return 1 if a
    layout's numbers differ by more than they may."""
    if (folders := _runs_named(options.config)) is not None:
        from alexnet_dist.reporting.compare_runs import compare_runs

        of_layouts = {"--layouts": options.layouts, "--steps": options.steps != _STEPS}
        refuse(of_layouts | {"--share-gpu": options.shared}, "on a comparison of run folders")
        comparison, text = compare_runs(folders, options.out or Path("compare.png"))
        print(as_json(comparison) if options.json else text)
        return 0
    refuse({"--out": options.out}, "on a comparison of layouts, which draws nothing")
    config = load_config([*options.config, *options.shared])
    from alexnet_dist.data.dataset import open_for

    open_for(config)  # raises a clear error if the data set cannot be used
    from alexnet_dist.planning import shared_gpus
    from alexnet_dist.reporting import compare_layouts

    rows, chosen = [], compare_layouts.chosen(config, options.layouts)
    table = sys.stderr if options.json else sys.stdout  # it grows by a row a layout, over minutes
    print(compare_layouts.HEADING, file=table, flush=True)
    for row, drift, floor in compare_layouts.compare(chosen, options.steps):
        rows.append(row)
        print(compare_layouts.line(row, drift, floor), file=table, flush=True)
    if options.json:
        print(as_json([vars(row) for row in rows]))
    elif unseen := shared_gpus.unseen(config, max(row.ranks for row in rows)):
        print(unseen)
    return 0 if all(row.holds for row in rows) else 1


def _runs_named(texts: Sequence[str]) -> list[Path] | None:
    """Return the run folders that the arguments name; None if none is a run folder, since the
    arguments are then a config whose layouts are compared.

    Raises ConfigError for a single run folder, or one beside anything else.
    """
    folders = [path(text) for text in texts]
    are = [(folder / "config.json").is_file() for folder in folders]
    if not any(are):
        return None
    if not all(are):
        other = texts[are.index(False)]
        raise ConfigError(
            f"compare {other}: not a run folder{looked_in(path(other))}, but others named are: "
            "name only run folders, or only a config"
        )
    if len(folders) < 2:
        raise ConfigError(f"compare {folders[0]}: name another run folder to compare it with")
    return folders


def plan(options: argparse.Namespace) -> int:
    """Print what a run would need, and the time it would take; or how it would scale."""
    config = load_config([_config_of(text) for text in options.config])
    from alexnet_dist.parallel import device, layouts
    from alexnet_dist.planning import dry_run, forecast, text
    from alexnet_dist.planning.machines import Cluster

    machine = _machine(options)
    named = options.gpus and Cluster.of(options.gpus, machine)
    cluster = named or forecast.here(config, machine)
    if options.curve:
        return _curve(options, config, cluster)

    # What a rank needs.
    would_start = named.total if named else layouts.ranks_wanted(config, device.gpus(config))
    ranks = options.ranks or would_start
    planned = (
        dry_run.plan_on(config, ranks, cluster.machine)
        if cluster
        else dry_run.plan(config, ranks, gpu=True)
    )

    # How fast it would be on the cluster, if that is known.
    predicted, why = None, _UNKNOWN_GPU
    try:
        predicted = forecast.forecast(planned, config, cluster) if cluster else None
    except ConfigError as error:
        if named:
            raise
        why = str(error)

    if options.json:
        print(as_json(asdict(planned) | (asdict(predicted) if predicted else {})))
        return 0
    lines = text.plan_lines(planned)
    if predicted:
        lines += text.forecast_lines(predicted, config.layout.kind)
    else:
        lines += ["", f"no prediction: {why}"]
    print("\n".join(lines))
    return 0


def _curve(options: argparse.Namespace, config: "Config", cluster: "Cluster | None") -> int:
    """Print, and draw, how a config would scale."""
    from alexnet_dist.planning import scaling

    if cluster is None:
        raise ConfigError(f"--curve: {_UNKNOWN_GPU}")
    rows = scaling.curve(config, cluster)
    scaling.draw(rows, cluster, options.curve)
    print(as_json(rows) if options.json else "\n".join(scaling.lines(rows)))
    if not options.json:
        print(f"curve: {options.curve}")
    return 0


def _machine(options: argparse.Namespace) -> "Machine | None":
    """Return the machine that --fit or --machine describes, None without them; write the former to
    the latter if both are given."""
    from alexnet_dist.planning import fitting, machines

    if not options.fit:
        return machines.read_machine(options.machine) if options.machine else None
    machine = fitting.fit([one for file in options.fit for one in fitting.read_bench(file)])
    if options.machine:
        machines.write_machine(machine, options.machine)
    return machine


def _config_of(text: str) -> str:
    """Return the config of a run folder; other arguments as they are."""
    saved = path(text) / "config.json"
    return str(saved) if saved.is_file() else text


def doctor(options: argparse.Namespace) -> int:
    """Print what this machine has and what would prevent a run; return 1 if something would."""
    config = load_config(options.config)
    from alexnet_dist.reporting.doctor import examine

    findings = []
    for one in examine(config, named=bool(options.config)):
        findings.append(one)
        if not options.json:
            mark = "✗" if one.broken else "!" if one.remedy else " "
            print(f"{mark} {one.what:20} {printable(one.found)}", flush=True)
            if one.remedy:
                print(f"{'':23}→ {printable(one.remedy)}")
    broken = [one.what for one in findings if one.broken]
    if options.json:
        print(as_json({"sound": not broken, "findings": [vars(one) for one in findings]}))
    elif broken:
        print(f"a run would fail: fix {', '.join(broken)}")
    else:
        print("nothing here would prevent a run")
    return 1 if broken else 0
