"""The command `bench`, with its parts: measure, against references."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from alexnet_dist.cli.parser import (
    AddCommand,
    Run,
    add_json,
    add_share_gpu,
    at_least,
    commands_of,
    count,
    path,
    refuse,
)
from alexnet_dist.config.load import load_config
from alexnet_dist.files import as_json


def add(command: AddCommand) -> None:
    """Add `bench` with its parts, each a command of its own."""
    bench = command(
        "bench", None, "time one part of the program beside references, in turn",
        ("alexnet-dist bench step demo", "alexnet-dist bench layouts demo --ranks 2 --json"),
    )  # fmt: skip
    parts = commands_of(bench, "PART")

    def part(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        """Add a part with the options that all parts have."""
        sub = parts(name, run, help)
        sub.add_argument("--repeats", type=count, default=5, help="passes over each measurement")
        add_json(sub)
        return sub

    sub = part("data", bench_data, "decoding, against ImageFolder and the bare decoder")
    sub.add_argument("folder", type=path, help="folder of images to decode, [train/]CLASS/*")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    sub.add_argument("--images", type=count, default=2000, help="images per pass")
    sub.add_argument(
        "--differences", action="store_true",
        help="compare instead DALI's pixels with torchvision's, by kind of JPEG",
    )  # fmt: skip

    def part_of_a_run(name: str, help: str) -> argparse.ArgumentParser:
        """Add a part that takes a config."""
        sub = part(name, bench_config, help)
        sub.set_defaults(part=name)
        sub.add_argument("config", nargs="*", metavar="CONFIG", help="as for train")
        return sub

    sub = part_of_a_run("step", "a training step, against plain PyTorch and torchvision's alexnet")
    sub.add_argument(
        "--batch", type=count, nargs="+", default=[],
        help="batch sizes, instead of train.batch; fewer things are timed after the first",
    )  # fmt: skip
    sub.add_argument(
        "--best", action="store_true", help="time fewer things: ours, and the fastest reference"
    )
    sub.add_argument(
        "--kernels", action="store_true", help="show instead which kernels take a step's time"
    )
    sub = part_of_a_run(
        "maps", "bias, ReLU, normalisation and pooling of conv1's maps, against torch's"
    )
    sub.add_argument(
        "--sweep", type=count, nargs="+", metavar="BATCH",
        help="try instead, on a GPU, other block sizes and registers of all kernels, at these "
             "batch sizes",
    )  # fmt: skip
    sub = part_of_a_run(
        "layouts", "every layout on this host's ranks, against one process and replicas"
    )
    sub.add_argument("--ranks", type=count, default=2, help="number of ranks on this host")
    add_share_gpu(sub)
    part_of_a_run("checkpoint", "how long saving a checkpoint holds up the training loop")
    sub = part_of_a_run(
        "end-to-end",
        "training from packed data, against batches that are ready; ten views; start-up; memory",
    )
    sub.add_argument(
        "--steps",
        type=at_least(0),
        default=0,
        help="steps to run while watching memory; 0: not watched",
    )
    sub.add_argument(
        "--cold", action="store_true",
        help="on a GPU: time also a start for which no kernel has been compiled before",
    )  # fmt: skip


def bench_data(options: argparse.Namespace) -> int:
    """Time decoding, or compare decoders' pixels (`bench data`)."""
    from alexnet_dist.bench import data, decoders, table

    if options.differences:
        apart = decoders.bench_differences(options.folder, options.images, options.overrides)
        return _print(apart, decoders.lines, options)
    result = data.bench_data(options.folder, options.images, options.repeats, options.overrides)
    return _print(result, table, options)


def bench_config(options: argparse.Namespace) -> int:
    """Time the part that options.part names (`bench step`, `bench layouts`, …)."""
    shared = getattr(options, "shared", [])
    config = load_config(["layout.kind=one", *options.config, *shared])
    match options.part:
        case "step" if options.kernels:
            from alexnet_dist.bench.kernel_times import bench_kernels, kernel_lines

            others = {"--batch": options.batch, "--best": options.best}
            refuse(others, "beside --kernels; a step has train.batch=… images")
            return _print(bench_kernels(config, options.repeats), kernel_lines, options)
        case "step":
            from alexnet_dist.bench.step import bench_step

            result = bench_step(config, options.repeats, options.batch, options.best)
        case "maps" if options.sweep:
            from alexnet_dist.bench.sweep import sweep

            out = sys.stderr if options.json else sys.stdout
            found = sweep(config, options.sweep, options.repeats, out)
            if options.json:
                print(as_json(found))
            return 0
        case "maps":
            from alexnet_dist.bench.maps import bench_maps

            result = bench_maps(config, options.repeats)
        case "layouts":
            from alexnet_dist.bench.layouts import bench_layouts

            result = bench_layouts(config, options.ranks, options.repeats)
        case "end-to-end":
            from alexnet_dist.bench.end_to_end import bench_end_to_end

            result = bench_end_to_end(config, options.repeats, options.steps, options.cold)
        case _:
            from alexnet_dist.bench.checkpoint import bench_checkpoint

            result = bench_checkpoint(config, options.repeats)
    from alexnet_dist.bench import table

    return _print(result, table, options)


def _print(result: Any, as_text: Callable[[Any], str], options: argparse.Namespace) -> int:
    """Print what a benchmark measured, as JSON or as text; return the exit code."""
    print(as_json(result) if options.json else as_text(result))
    return 0
