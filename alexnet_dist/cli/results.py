"""The commands `figures`, `report`, `export` and `import`: what is made of a trained run."""

import argparse

from alexnet_dist.cli.parser import AddCommand, out, path
from alexnet_dist.config.load import check_scored_with
from alexnet_dist.errors import ConfigError, looked_in
from alexnet_dist.files import check_trained, is_there


def add(command: AddCommand) -> None:
    """Add these four commands to the parser."""
    sub = command("figures", figures, "draw a run's kernels and learning curves",
                  ("alexnet-dist figures runs/demo --fig4",))  # fmt: skip
    sub.add_argument("run_folder", type=path, help="run folder")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, for --fig4")
    sub.add_argument(
        "--fig4",
        action="store_true",
        help="also draw the paper's Figure 4: answers and nearest training images (reads all of "
        "them once)",
    )

    sub = command(
        "report", report, "write one HTML page with the results of runs beside the paper's",
        ("alexnet-dist report runs/* --out report.html",),
    )  # fmt: skip
    sub.add_argument(
        "run_folder", type=path, nargs="*", help="run folders; anything else is skipped"
    )
    sub.add_argument("--out", type=out, default="report.html", metavar="HTML", help="file to write")

    sub = command(
        "export", export, "write a run's weights in another program's format",
        ("alexnet-dist export runs/demo demo.onnx --format onnx",),
    )  # fmt: skip
    sub.add_argument(
        "checkpoint", type=path, help="run folder (its best checkpoint), or a checkpoint"
    )
    sub.add_argument("out", type=out, help="file to write")
    kinds = ["safetensors", "torchvision", "caffe", "onnx"]
    sub.add_argument("--format", choices=kinds, required=True)
    sub.add_argument(
        "--data", type=path, metavar="FOLDER", help="onnx: its packed data set, if that has moved"
    )

    sub = command(
        "import", import_, "make a checkpoint from another program's weights",
        ("alexnet-dist import alex.pth runs/theirs paper/torchvision-2014 --format torchvision",),
    )  # fmt: skip
    sub.add_argument("file", type=path, help="file of its weights")
    sub.add_argument("out", type=path, help="run folder to create")
    sub.add_argument(
        "config", nargs="+", help="config of the network that the weights belong to, as for train"
    )
    sub.add_argument("--format", choices=kinds[:3], required=True)
    sub.add_argument("--mean", type=path, help="caffe: its mean image, a .binaryproto")


def figures(options: argparse.Namespace) -> int:
    """Draw a run's kernels and curves, and with --fig4 the paper's Fig. 4."""
    check_trained(options.run_folder)
    check_scored_with(options.overrides, "figures")
    if options.overrides and not options.fig4:
        raise ConfigError(f"figures {options.overrides[0]}: keys change --fig4 only: add it")
    from alexnet_dist.reporting import figures as draws

    drawn, colour = draws.draw(options.run_folder)
    print("colour in conv1's kernels, a share of their energy (grey 0, noise 0.667):")
    for column, value in enumerate(colour, start=1):
        print(f"column {column}: {value:.3f}")
    if options.fig4:
        drawn += draws.draw_fig4(options.run_folder, options.overrides)
    print("\n".join(map(str, drawn)))
    return 0


def report(options: argparse.Namespace) -> int:
    """Write one HTML page of the results of several runs."""
    from alexnet_dist.reporting.report import report as write

    for folder in options.run_folder:
        if not is_there(folder):
            raise ConfigError(f"report {folder}: there is no such run folder{looked_in(folder)}")
    print(write(options.run_folder, options.out))
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a run's weights in another program's format."""
    check_trained(options.checkpoint)
    from alexnet_dist.formats.convert import export_weights

    print(export_weights(options.format, options.checkpoint, options.out, options.data))
    return 0


def import_(options: argparse.Namespace) -> int:
    """Make a checkpoint from another program's weights."""
    from alexnet_dist.formats.convert import import_weights

    how = options.file, options.out, options.config, options.mean
    print(f"{import_weights(options.format, *how)}: use it with train.init_from or evaluate")
    return 0
