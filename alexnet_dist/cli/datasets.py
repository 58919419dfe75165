"""The commands `prepare` and `inspect`: make a packed data set, and look into it."""

import argparse
import os

from alexnet_dist.cli.parser import AddCommand, add_json, at_least, part, path, picture
from alexnet_dist.data.prepare import MODULES
from alexnet_dist.errors import DatasetError, printable
from alexnet_dist.files import as_json


def add(command: AddCommand) -> None:
    """Add `prepare` and `inspect` to the parser."""
    sub = command(
        "prepare", prepare, "pack a source of images into a data set to train on",
        (
            "alexnet-dist prepare folder my-images data/mine       # train/CLASS/*, val/CLASS/*",
            "alexnet-dist prepare folder my-images data/mine --validation 0.1    # CLASS/*",
            "alexnet-dist prepare fashion_mnist configs/fashion-mnist-sample data/demo",
            "alexnet-dist prepare imagenet ilsvrc2012 data/imagenet --workers 16",
        ),
    )  # fmt: skip
    sub.add_argument(
        "source", type=_source, choices=[*MODULES], metavar="SOURCE",
        help=f"one of {', '.join(MODULES)}",
    )  # fmt: skip
    sub.add_argument(
        "path", type=path, nargs="?",
        help="folder or archive that holds the source's files (fashion_mnist: by default "
             "Debian's package)",
    )  # fmt: skip
    sub.add_argument("out", type=path, help="folder to create")
    sub.add_argument(
        "--keep", action="store_true", help="keep own sizes; else large images become 256 × 256"
    )
    sub.add_argument(
        "--max-bad",
        type=float,
        metavar="SHARE",
        help="share of images that may be refused (default: 0.001, or up to 3 images of a small "
        "source)",
    )
    sub.add_argument(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes; 0: one for each core",
    )
    sub.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="write only every Nth shard from the Ith; the command without --part writes the "
        "rest, and merges",
    )
    sub.add_argument(
        "--validation", type=float, default=0.0, metavar="SHARE",
        help="share to validate on, of cifar10's test images or a folder's training images",
    )  # fmt: skip

    sub = command(
        "inspect", inspect, "verify a packed data set, and show what is in it",
        ("alexnet-dist inspect data/mine", "alexnet-dist inspect data/mine --quick --json"),
    )  # fmt: skip
    sub.add_argument("data", type=path, help="folder made by prepare")
    extent = sub.add_mutually_exclusive_group()
    extent.add_argument(
        "--sheet", type=picture, help="PNG to draw samples in (default: DATA/contact-sheet.png)"
    )
    extent.add_argument(
        "--quick", action="store_true", help="check only sizes and some images, draw nothing"
    )
    add_json(sub)


def _source(text: str) -> str:
    """Parse SOURCE; refuse a path, which comes after it."""
    if text not in MODULES and os.path.exists(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is a path: name its kind before it, as in prepare folder {text} OUT"
        )
    return text


def prepare(options: argparse.Namespace) -> int:
    """Turn a source of images into a packed data set."""
    from alexnet_dist.data.prepare import prepare as data

    how = data.Options(
        options.keep, options.max_bad, options.workers, options.part, options.validation
    )
    print(data.prepare(options.source, options.path, options.out, how))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Verify a packed data set, print a summary, and draw samples of it."""
    from alexnet_dist.data.dataset import open_dataset

    if not (options.data / "dataset.json").exists():
        open_dataset(options.data)  # raises a clear error, before seconds of importing torch
    sheet = options.sheet or options.data / "contact-sheet.png"
    if not (options.quick or os.access(sheet.parent, os.W_OK)):  # else said after hours
        raise DatasetError(f"{sheet} cannot be written: name another file by --sheet")
    from alexnet_dist.data import inspect as data

    summary = data.inspect(options.data, None if options.quick else sheet)
    if options.json:
        print(as_json(summary))
    else:
        for what, finding in summary.items():
            rows = finding.items() if isinstance(finding, dict) else ()
            shown = ", ".join(f"{k} {v}" for k, v in rows) or finding
            print(printable(f"{what:22}{shown}"))
    return 0
