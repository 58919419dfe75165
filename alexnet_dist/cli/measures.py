"""The commands `bench`, `compare`, `plan` and `doctor`: measure, predict and check."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_dist.cli.parser import AddCommand, Run, add_json, commands_of, count, path, picture
from alexnet_dist.config.load import load_config
from alexnet_dist.errors import ConfigError, looked_in, printable

if TYPE_CHECKING:
    from alexnet_dist.bench import Result


def add(command: AddCommand) -> None:
    """Add these four commands to the parser."""
    _add_bench(command)

    sub = command(
        "compare", compare, "compare a config's layouts with one process, or runs with each other",
        (
            "alexnet-dist compare demo --layouts columns,replicas:2",
            "alexnet-dist compare demo --share-gpu                 # all of them on one GPU",
            "alexnet-dist compare runs/own runs/other",
        ),
    )  # fmt: skip
    sub.add_argument(
        "config",
        nargs="+",
        help="a config, as for train, whose layouts are compared; or two or more run folders",
    )
    sub.add_argument("--layouts", help="LAYOUT[:RANKS],… (default: all that this config allows)")
    sub.add_argument(
        "--steps",
        type=int,
        default=20,
        help="steps to train on each layout, 3 or more (default: 20)",
    )
    _add_share_gpu(sub)
    sub.add_argument(
        "--out",
        type=picture,
        default="compare.png",
        metavar="PNG",
        help="where to draw the runs' curves (default: compare.png)",
    )
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
    sub.add_argument(
        "--ranks",
        type=count,
        help="number of ranks (default: all of --gpus, or as many as train would start)",
    )
    sub.add_argument(
        "--machine",
        type=path,
        metavar="JSON",
        help="read this machine's numbers from a file that --fit wrote",
    )
    sub.add_argument(
        "--fit", type=path, nargs="+", metavar="JSON",
        help="fit this CPU's numbers to these outputs of `bench layouts --json`, and write them "
             "to --machine",
    )  # fmt: skip
    sub.add_argument(
        "--curve",
        type=picture,
        metavar="PNG",
        help="draw the scaling from 1 to 1,024 devices, with train.batch images on each",
    )
    add_json(sub)

    sub = command(
        "doctor", doctor, "check this machine: what it has, what a run would use, what to fix",
        ("alexnet-dist doctor demo",),
    )  # fmt: skip
    sub.add_argument("config", nargs="*", help="the config of a run, as for train")
    add_json(sub)


def _add_bench(command: AddCommand) -> None:
    """Add `bench` with its parts, each a command of its own."""
    bench = command(
        "bench", None, "measure one part of the program against references, all in one run",
        ("alexnet-dist bench step demo", "alexnet-dist bench layouts demo --ranks 2 --json"),
    )  # fmt: skip
    parts = commands_of(bench, "PART")

    def part(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        """Add a part with the options that all parts have."""
        sub = parts(name, run, help)
        sub.add_argument(
            "--repeats", type=count, default=5, help="passes over each measurement (default: 5)"
        )
        add_json(sub)
        return sub

    sub = part("data", bench_data, "decoding, against ImageFolder and the bare decoder")
    sub.add_argument("folder", type=path, help="folder of images to decode, as train/CLASS/*")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    sub.add_argument("--images", type=count, default=2000, help="images per pass (default: 2000)")
    sub.add_argument(
        "--differences", action="store_true",
        help="compare instead DALI's pixels with torchvision's, by kind of JPEG",
    )  # fmt: skip

    for name, help in (
        ("step", "a training step, against plain PyTorch and torchvision's alexnet"),
        ("maps", "bias, ReLU, normalisation and pooling of conv1's maps, against torch's"),
        ("layouts", "every layout on this host's ranks, against one process and replicas"),
        ("checkpoint", "how long saving a checkpoint holds up the training loop"),
        (
            "end-to-end",
            "training from packed data, against batches that are ready; ten views; start-up; "
            "memory",
        ),
    ):
        sub = part(name, bench_config, help)
        sub.set_defaults(part=name)
        sub.add_argument("config", nargs="*", metavar="CONFIG", help="as for train")
        if name == "step":
            sub.add_argument(
                "--batch",
                type=count,
                nargs="+",
                default=[],
                help="batch sizes, instead of train.batch; fewer things are timed after the first",
            )
            sub.add_argument("--kernels", action="store_true",
                             help="show instead which kernels take a step's time")  # fmt: skip
        if name == "layouts":
            sub.add_argument(
                "--ranks", type=count, default=2, help="number of ranks on this host (default: 2)"
            )
            _add_share_gpu(sub)
        if name == "end-to-end":
            sub.add_argument(
                "--steps",
                type=int,
                default=0,
                help="steps to run while watching memory (default: 0, not watched)",
            )


def _add_share_gpu(sub: argparse.ArgumentParser) -> None:
    """Add the option --share-gpu."""
    sub.add_argument(
        "--share-gpu", dest="shared", action="append_const", const="layout.share_gpu=true",
        default=[], help="set layout.share_gpu=true: ranks share the GPUs of this host",
    )  # fmt: skip


def bench_data(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Time decoding, or compare decoders' pixels (`bench data`)."""
    from alexnet_dist.bench import data, decoders

    if options.differences:
        apart = decoders.bench_differences(options.folder, options.images, options.overrides)
        print(json.dumps(apart) if options.json else decoders.lines(apart))
        return 0
    result = data.bench_data(options.folder, options.images, options.repeats, options.overrides)
    return _print_bench(result, options)


def bench_config(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Time the part that options.part names (`bench step`, `bench layouts`, …)."""
    shared = getattr(options, "shared", [])
    config = load_config(["layout.kind=one", *options.config, *shared])
    match options.part:
        case "step" if options.kernels:
            from alexnet_dist.bench.kernel_times import bench_kernels, kernel_lines

            times = bench_kernels(config, options.repeats)
            print(json.dumps(times) if options.json else kernel_lines(times))
            return 0
        case "step":
            from alexnet_dist.bench.step import bench_step

            result = bench_step(config, options.repeats, options.batch)
        case "maps":
            from alexnet_dist.bench.maps import bench_maps

            result = bench_maps(config, options.repeats)
        case "layouts":
            from alexnet_dist.bench.layouts import bench_layouts

            result = bench_layouts(config, options.ranks, options.repeats)
        case "end-to-end":
            from alexnet_dist.bench.end_to_end import bench_end_to_end

            result = bench_end_to_end(config, options.repeats, options.steps)
        case _:
            from alexnet_dist.bench.checkpoint import bench_checkpoint

            result = bench_checkpoint(config, options.repeats)
    return _print_bench(result, options)


def _print_bench(result: "Result", options: argparse.Namespace) -> int:
    """Print what a benchmark measured, as JSON or as a table."""
    from alexnet_dist import bench

    print(json.dumps(result) if options.json else bench.table(result))
    return 0


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Compare a config's layouts with one process, or several runs with each other; return 1 if a
    layout's numbers differ by more than they may."""
    if (folders := _runs_named(options.config)) is not None:
        from alexnet_dist.reporting.compare_runs import compare_runs

        comparison, text = compare_runs(folders, options.out)
        print(json.dumps(comparison) if options.json else text)
        return 0
    if options.steps < 3:
        raise ConfigError(f"--steps {options.steps}: must be 3 or more, because two warm up")
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
        print(json.dumps([vars(row) for row in rows]))
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


def plan(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Print what a run would need, and the time it would take."""
    config = load_config([_config_of(text) for text in options.config])
    from alexnet_dist.parallel import device, layouts
    from alexnet_dist.planning import dry_run, fitting, forecast, machines, scaling, text

    machine = fitting.fitted(options.fit) if options.fit else None
    if machine and options.machine:
        machines.write_machine(machine, options.machine)
    elif options.machine:
        machine = machines.read_machine(options.machine)
    named = options.gpus and machines.Cluster.of(options.gpus, machine)
    cluster = named or forecast.here(config, machine)
    if options.curve:
        if cluster is None:
            raise ConfigError(
                "--curve: this machine's GPUs are of a kind with no known figures: name a known "
                "kind by --gpus"
            )
        rows = scaling.curve(config, cluster)
        scaling.draw(rows, cluster, options.curve)
        print(json.dumps(rows) if options.json else "\n".join(scaling.lines(rows)))
        return 0

    # What a rank needs, and how fast it would be on the cluster, if that is known.
    would_start = named.total if named else layouts.ranks_wanted(config, device.gpus(config))
    ranks = options.ranks or would_start
    planned = (
        dry_run.plan_on(config, ranks, cluster.machine)
        if cluster
        else dry_run.plan(config, ranks, gpu=True)
    )
    predicted, why = (
        None,
        (
            "this machine's GPUs are of a kind with no known figures: name a known kind, as in "
            "--gpus h100:8"
        ),
    )
    try:
        predicted = forecast.forecast(planned, config, cluster) if cluster else None
    except ConfigError as error:
        if named:
            raise
        why = str(error)

    if options.json:
        print(json.dumps(planned.to_json() | (predicted.to_json() if predicted else {})))
        return 0
    lines = text.plan_lines(planned)
    if predicted:
        lines += text.forecast_lines(predicted, config.layout.kind)
    else:
        lines += ["", f"no prediction: {why}"]
    print("\n".join(lines))
    return 0


def _config_of(text: str) -> str:
    """Return the config of a run folder; other arguments as they are."""
    saved = path(text) / "config.json"
    return str(saved) if saved.is_file() else text


def doctor(options: argparse.Namespace, arguments: Sequence[str]) -> int:
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
        print(json.dumps({"sound": not broken, "findings": [vars(one) for one in findings]}))
    elif broken:
        print(f"a run would fail: fix {', '.join(broken)}")
    else:
        print("nothing here would prevent a run")
    return 1 if broken else 0
