"""The command `predict`: classify image files with a trained network."""

import argparse
import contextlib
import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from alexnet_dist.cli.parser import AddCommand, count, out, path, picture
from alexnet_dist.errors import ConfigError, printable
from alexnet_dist.files import as_json, written_aside

if TYPE_CHECKING:
    from alexnet_dist.checkpoint.store import Checkpoint
    from alexnet_dist.evaluation.load import Trained
    from alexnet_dist.evaluation.predict import Prediction


def add(command: AddCommand) -> None:
    """Add `predict` to the parser."""
    examples = (
        "alexnet-dist predict runs/demo boot.png",
        "alexnet-dist predict runs/demo holiday/ --views 10 --out holiday.csv",
        "alexnet-dist predict runs/demo boot.png --picture boot-explained.png",
    )
    sub = command("predict", predict, "classify image files with a trained network", examples)
    sub.add_argument(
        "checkpoint", type=path, help="run folder (its best checkpoint), or a checkpoint"
    )
    sub.add_argument(
        "image", nargs="+", type=path, help="an image file, or a folder with images at any depth"
    )
    sub.add_argument(
        "--views", type=int, choices=(1, 10), help="windows per image (default: as in the run)"
    )
    sub.add_argument(
        "--top", type=count, default=5, help="number of likeliest classes to give per image"
    )
    sub.add_argument(
        "--data", type=path, metavar="FOLDER", help="the network's packed data set, if it has moved"
    )
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV, one row per image")
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument(
        "--out", type=table, metavar="FILE", help="write to NAME.csv or NAME.json instead"
    )
    sub.add_argument(
        "--picture", type=picture, metavar="PNG",
        help="for a single image: draw it, its answers, and what each column makes of it, layer "
             "by layer",
    )  # fmt: skip


def table(text: str) -> Path:
    """Parse the path of a CSV or JSON file that can be written (an argparse type)."""
    if not text.endswith((".csv", ".json")):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a table to write, NAME.csv or NAME.json"
        )
    return out(text)


def predict(options: argparse.Namespace) -> int:
    """Print or write the likeliest classes of image files; return 1 if some could not be read."""
    from alexnet_dist.evaluation.load import load_checkpoint
    from alexnet_dist.evaluation.predict import images_in
    from alexnet_dist.parallel.device import cores

    paths, others = images_in(options.image)
    passed_over = f"; other files, or links to folders, skipped: {others}" if others else ""
    if not paths:
        raise ConfigError(
            f"{options.image[0]}: no images in it{passed_over}: name image files, or another folder"
        )
    if options.picture and len(paths) > 1:
        raise ConfigError(
            f"--picture {options.picture}: draws a single image, but {len(paths)} were named: "
            "name one"
        )
    trained = load_checkpoint(options.checkpoint, options.data)
    _take_device(trained)
    quiet = options.csv or options.json or options.out
    refused: list[Prediction] = []
    hidden = len(paths) <= trained.config.evaluate.batch or (not quiet and sys.stdout.isatty())
    made = _watched(trained.predictions(paths, options.views, cores()), len(paths), hidden, refused)
    kept = list(made) if options.picture else made
    views = options.views or trained.config.evaluate.views
    with _file(options.out) as file:
        if not quiet:
            _as_text(kept, options.top, file)
        elif options.csv or (options.out and options.out.suffix == ".csv"):
            _as_csv(kept, min(options.top, len(trained.classes)), file)
        else:
            _as_json(kept, options.top, trained.checkpoint, views, file)
    if options.picture and not refused:
        (prediction,) = kept
        trained.draw(prediction, options.picture)
        print(f"picture: {options.picture}", file=sys.stderr if quiet else sys.stdout)
    if len(paths) > 1 or options.out or others:
        written = f", written to {options.out}" if options.out else ""
        bad = f"; {len(refused)} could not be read (named above)" if refused else ""
        counted = f"{len(paths) - len(refused)} of {len(paths)} images classified"
        print(f"{counted}{written}{bad}{passed_over}", file=sys.stderr)
    return 1 if refused else 0


def _watched(
    predictions: Iterable["Prediction"], total: int, hidden: bool, refused: list["Prediction"]
) -> Iterator["Prediction"]:
    """Yield predictions as they are made, beside a progress bar; images that cannot be read are
    reported at once, and added to `refused`.

    Args:
        hidden: whether to do without the bar.
    """
    from alexnet_dist.progress import progress_bar

    with progress_bar(
        "predicting", total=total, unit=" images", leave=False, disable=hidden
    ) as bar:
        for prediction in predictions:
            bar.update()
            if prediction.refused:
                refused.append(prediction)
                with bar.external_write_mode(sys.stderr):
                    why = printable(f"{prediction.path}: {prediction.refused}")
                    print(f"alexnet-dist: {why}", file=sys.stderr)
            yield prediction


def _take_device(trained: "Trained") -> None:
    """Move the network to a GPU if this machine has one: its config says where it was trained, not
    where it is used."""
    from alexnet_dist.config.load import overridden
    from alexnet_dist.parallel.topology import connect

    device = "cpu" if trained.config.layout.device == "cpu" else "auto"
    here = {"layout.device": device, "layout.threads": 0}
    trained.model.to(connect(overridden(trained.config, here)).device)


@contextlib.contextmanager
def _file(out: Path | None) -> Iterator[IO[str]]:
    """Open what is written to: standard output, or a file that replaces `out` once it is complete;
    as on standard output, bytes of file names that are not valid text are escaped."""
    if out is None:
        yield sys.stdout
        return
    with (
        written_aside(out) as aside,
        aside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


def _as_text(predictions: Iterable["Prediction"], top: int, file: IO[str]) -> None:
    """Write each image's name and its `top` likeliest classes, one a line."""
    for prediction in predictions:
        if not prediction.refused:
            print(printable(str(prediction.path)), file=file)
            for name, share in prediction.top(top):
                print(f"{share:8.1%}  {printable(name)}", file=file, flush=True)


def _as_csv(predictions: Iterable["Prediction"], top: int, file: IO[str]) -> None:
    """Write a row for each image: its name, `top` pairs of class and probability, why refused."""
    rows = csv.writer(file, lineterminator="\n")
    heads = [f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability")]
    rows.writerow(["image", *heads, "refused"])
    for prediction in predictions:
        cells = [cell for name, share in prediction.top(top) for cell in (name, f"{share:.6g}")]
        cells += [""] * (2 * top - len(cells))
        row = [str(prediction.path), *cells, prediction.refused]
        rows.writerow(map(printable, row) if file.isatty() else row)
        file.flush()


def _as_json(
    predictions: Iterable["Prediction"], top: int, checkpoint: "Checkpoint", views: int,
    file: IO[str],
) -> None:  # fmt: skip
    """Write one JSON object with all images."""
    images = []
    for prediction in predictions:
        answers = [{"class": n, "probability": p} for n, p in prediction.top(top)]
        found = {"refused": prediction.refused} if prediction.refused else {"answers": answers}
        images.append({"image": str(prediction.path), **found})
    about = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "views": views}
    print(as_json(about | {"images": images}), file=file)
