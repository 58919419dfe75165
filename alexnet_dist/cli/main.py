"""The command line: parse, call, print."""

import argparse
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from alexnet_dist.errors import ConfigError, in_words, printable
from alexnet_dist.parallel import environment
from alexnet_dist.parallel.stop_signals import EXITS, FLAGS

try:
    from alexnet_dist.config.load import load_config
except ImportError as error:  # a Python in which nothing was installed
    sys.exit(f"alexnet-dist: {in_words(error) or error}")

if TYPE_CHECKING:
    from alexnet_dist.evaluation.evaluate import Score

# How long one of torch's threads spins for the others before it sleeps. By default milliseconds, in
# which, where cores are shared, it keeps from its core the one it waits for. OpenMP reads it as it
# loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    if sys.platform != "linux":
        sys.exit(f"alexnet-dist: this is {sys.platform}, and it runs on Linux: use a container")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    here, own = None, os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:  # not in a forked child
            raise _Stopped(signal.Signals(number))

    for number in {*FLAGS} - {signal.SIGINT}:  # outside a run, which has its own handlers
        signal.signal(number, stop)
    try:
        here = environment.place()
        return int(options.run(options, arguments))
    except KeyboardInterrupt as stopped:
        number = stopped.number if isinstance(stopped, _Stopped) else signal.SIGINT
        print("alexnet-dist: interrupted; the same command goes on", file=sys.stderr)
        code = EXITS[FLAGS[number]]
    except Exception as error:
        code = _say(error, here.rank if here else 0)
    if here:
        os._exit(code)  # leave fast: peers and their threads may never answer again
    return code


def _say(error: Exception, rank: int) -> int:
    """In a line where it is known what to do, else with its traceback; the exit code."""
    said = in_words(error)
    if said is None:
        print(f"[r{rank}] {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    if said.on_every_rank and rank:
        time.sleep(1)  # rank 0 says it, and is ended as soon as another has left
    else:
        which = f"alexnet-dist [r{rank}]" if rank else "alexnet-dist"
        print(f"{which}: {printable(str(said))}", file=sys.stderr, flush=True)
    return said.exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments: -" in message:
            message += "; a config's keys are written key=value, as in train.batch=64"
        super().error(message)


class _Stopped(KeyboardInterrupt):
    """A signal that asks a command to stop."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="alexnet-dist",
        description="Train the 2012 AlexNet, its two columns on two devices, or as you like it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command("train", _train, "train, or continue, a run")
    sub.add_argument("config", nargs="+", help="YAML files, names of shipped ones, key=value")

    sub = command("evaluate", _evaluate, "score checkpoints; several are averaged")
    sub.add_argument("path", nargs="+", help="run folder (its best), checkpoint, or key=value")
    sub.add_argument("--views", type=int, choices=(1, 10), help="windows an image")
    sub.add_argument("--predictions", type=_out, metavar="NPZ", help="file to write them all to")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("prepare", _prepare, "turn a source of images into a packed data set")
    sub.add_argument("source", choices=("imagenet", "folder", "cifar10", "fashion_mnist"))
    sub.add_argument(
        "path", type=Path, nargs="?", help="folder of the source's files; fashion_mnist: Debian's"
    )
    sub.add_argument("out", type=Path, help="folder to make")
    sub.add_argument("--keep", action="store_true", help="images keep their size; else 256 × 256")
    sub.add_argument(
        "--max-bad", type=float, default=0.001, metavar="SHARE", help="images that may be refused"
    )
    sub.add_argument("--workers", type=int, default=0, help="processes; 0: the cores")
    sub.add_argument(
        "--part", type=_part, metavar="I/N", help="every Nth shard; without it: the rest, and merge"
    )

    sub.add_argument(
        "--validation", type=float, default=0.0, metavar="SHARE",
        help="cifar10: of the test images, a stratified share to validate on",
    )  # fmt: skip

    sub = command("inspect", _inspect, "verify a packed data set, and show what is in it")
    sub.add_argument("data", type=Path, help="folder that prepare made")
    sub.add_argument(
        "--sheet", type=_picture, help="PNG to draw samples in; DATA/contact-sheet.png"
    )
    sub.add_argument("--quick", action="store_true", help="sizes, and some images; nothing drawn")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("bench", None, "time a part of it against references, in one run")
    parts = sub.add_subparsers(required=True, metavar="PART")

    def part(name: str, run: object, help: str) -> argparse.ArgumentParser:
        sub = parts.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--repeats", type=_count, default=5, help="passes of each")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    sub = part("data", _bench_data, "decoding, beside ImageFolder and the bare decoder")
    sub.add_argument("folder", type=Path, help="images to time on: train/CLASS/*")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    sub.add_argument("--images", type=_count, default=2000, help="of a pass")

    for name, help in (
        ("step", "a training step, beside plain PyTorch and torchvision's alexnet"),
        ("lrn", "local response normalisation, beside nn.LocalResponseNorm"),
        ("layouts", "every layout on this host's ranks, beside one process and replicas"),
        ("checkpoint", "what a save costs the loop"),
        ("end-to-end", "training from data.path beside ready batches; ten views; start; memory"),
    ):
        sub = part(name, _bench_config, help)
        sub.set_defaults(part=name)
        sub.add_argument("config", nargs="*", metavar="CONFIG", help="as for train")
        if name == "layouts":
            sub.add_argument("--ranks", type=_count, default=2, help="on this host")
        if name == "end-to-end":
            sub.add_argument("--steps", type=int, default=0, help="to watch memory over")

    sub = command("compare", _compare, "hold layouts against one process, on this machine")
    sub.add_argument("config", nargs="+", help="YAML files, names of shipped ones, key=value")
    sub.add_argument("--layouts", help="LAYOUT[:RANKS],…; all that this config can have")
    sub.add_argument("--steps", type=int, default=20, help="optimiser steps, 3 or more")
    sub.add_argument("--json", action="store_true", help="print one JSON list")

    sub = command("plan", _plan, "what a run would take: memory, arithmetic, traffic, hours")
    sub.add_argument("config", nargs="+", help="as for train, or a run folder")
    sub.add_argument("--gpus", metavar="KIND:DEVICES[xNODES]", help="h100:8x4, cpu:2; else here")
    sub.add_argument("--ranks", type=_count, help="ranks; all of --gpus, or as many as would start")
    sub.add_argument("--machine", type=Path, metavar="JSON", help="numbers that --fit wrote")
    sub.add_argument(
        "--fit", type=Path, nargs="+", metavar="JSON",
        help="of bench layouts --json: fit this CPU's numbers to them, write them to --machine",
    )  # fmt: skip
    sub.add_argument(
        "--curve", type=_picture, metavar="PNG", help="draw 1 to 1,024 devices, train.batch on each"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("figures", _figures, "draw a run's kernels and curves")
    sub.add_argument("run_folder", type=Path)
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    sub.add_argument(
        "--fig4", action="store_true", help="also answers and nearest training images: one pass"
    )

    sub = command("report", _report, "one HTML page: the paper's results and the runs' beside them")
    sub.add_argument("run_folder", type=Path, nargs="*", help="of runs; others are passed over")
    sub.add_argument("--out", type=_out, default=Path("report.html"))

    sub = command("export", _export, "write a run's weights as another program reads them")
    sub.add_argument("checkpoint", type=Path, help="run folder (its best) or checkpoint")
    sub.add_argument("out", type=_out, help="file to write")
    kinds = ["safetensors", "torchvision", "caffe", "onnx"]
    sub.add_argument("--format", choices=kinds, required=True)

    sub = command("import", _import, "make a checkpoint of another program's weights")
    sub.add_argument("file", type=Path)
    sub.add_argument("out", type=Path, help="run folder to make")
    sub.add_argument("config", nargs="+", help="of the network they are for, as for train")
    sub.add_argument("--format", choices=kinds[:3], required=True)
    sub.add_argument("--mean", type=Path, help="caffe: its mean image, .binaryproto")

    sub = command("doctor", _doctor, "what is here, what a run would use, and what to mend")
    sub.add_argument("config", nargs="*", help="of the run, as for train")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.parallel.stop_signals import StopSignals

    signals, parent = StopSignals(), os.getppid()  # before seconds of imports
    config = load_config(options.config)
    from alexnet_dist.parallel import layouts, spawn, topology

    wanted = layouts.ranks_wanted(config, topology.gpus(config))
    if environment.place():
        spawn.leave_with_parent(parent)
        signals.last_words = ""  # ranks that wait for one another never poll
        if signals.exit_code is not None:
            return signals.exit_code
    elif wanted > 1:
        layouts.check(config, wanted)
        signals.last_words = f"{config.folder}: stopped before it began\n"
        if signals.exit_code is None:
            return spawn.start(arguments, wanted, config.folder)
        print(signals.last_words, end="", file=sys.stderr)
        return signals.exit_code

    from alexnet_dist.checkpoint import store
    from alexnet_dist.reporting import figures
    from alexnet_dist.training.loop import train
    from alexnet_dist.training.run_folder import warn_if_unwritable

    outcome = train(config, signals)
    if not outcome.leads:
        return outcome.exit
    if outcome.score is None:
        print(f"{config.folder}: stopped at step {outcome.step}, saved; the same command continues")
        return outcome.exit
    best = store.best(config.folder / "checkpoints")
    print(f"{config.folder}: done, {outcome.step} steps; {_words(outcome.score)}")
    print(f"best checkpoint: {best.path}")
    with warn_if_unwritable(config.folder / "figures"):
        print(f"pictures: {', '.join(map(str, figures.draw(config.folder)))}")
    print(f"watch: tensorboard --logdir {config.output_dir} --host localhost")
    print(f"next: alexnet-dist evaluate {config.folder} --views 10")
    return outcome.exit


def _evaluate(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints

    overrides = [text for text in options.path if "=" in text]
    paths = [Path(text) for text in options.path if "=" not in text]
    if not paths:
        raise ConfigError("evaluate: name a run folder or a checkpoint")
    if options.views:
        overrides.append(f"evaluate.views={options.views}")
    found = evaluate_checkpoints(paths, overrides)
    if options.predictions:
        found.write(options.predictions)
    if options.json:
        print(json.dumps(found.report()))
        return 0
    names = " + ".join(str(checkpoint.path) for checkpoint in found.checkpoints)
    print(f"{names}: {_words(found.score)}")
    report = found.report()
    for top in ("top1", "top5"):
        low, high = report[f"{top}_interval"]
        print(f"{top.replace('top', 'top-')} error {1 - report[top]:.2%}, "
              f"95 % of resamples between {1 - high:.2%} and {1 - low:.2%}")  # fmt: skip
    rows = [row for row in report["classes"] if row["samples"]]
    rows.sort(key=lambda row: row["right"] / row["samples"])
    for row in rows[:_CLASSES]:
        print(f"{1 - row['right'] / row['samples']:8.1%} wrong of {row['samples']} {row['name']}")
    for row in report["mistakes"][:_CLASSES]:
        print(f"{row['samples']:8} {row['of']} taken for {row['taken_for']}")
    return 0


_CLASSES = 10  # of most errors, and mistakes, that are printed


def _words(score: "Score") -> str:
    return (
        f"top-1 {score.top1:.2%} ({score.correct1} of {score.samples} right), "
        f"top-5 {score.top5:.2%} ({score.correct5}), loss {score.loss:.4f}"
    )


def _prepare(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.data.prepare.prepare import Options, prepare

    how = Options(options.keep, options.max_bad, options.workers, options.part, options.validation)
    print(prepare(options.source, options.path, options.out, how))
    return 0


def _count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, 1 or more")
    return int(text)


def _out(text: str) -> Path:
    """A file that can be made: known before the work that ends in it."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        why = "is a folder" if path.is_dir() else f"no folder {path.parent} that you may write in"
        raise argparse.ArgumentTypeError(f"{text!r}: {why}: name a file to write")
    return path


def _picture(text: str) -> Path:
    """A PNG that can be made."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: a picture to write, NAME.png")
    return _out(text)


def _part(text: str) -> tuple[int, int]:
    """i/n, as in --part 2/8."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, as in 2/8, the second of eight")
    return int(found[1]), int(found[2])


def _inspect(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.data.inspect import inspect

    sheet = options.sheet or options.data / "contact-sheet.png"
    found = inspect(options.data, None if options.quick else sheet)
    if options.json:
        print(json.dumps(found))
    else:
        for what, finding in found.items():
            rows = finding.items() if isinstance(finding, dict) else ()
            print(f"{what:22}{', '.join(f'{k} {v}' for k, v in rows) or finding}")
    return 0


def _bench_data(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.bench import data

    found = data.bench_data(options.folder, options.images, options.repeats, options.overrides)
    return _bench(found, options)


def _bench_config(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    config = load_config(["layout.kind=one", *options.config])
    match options.part:
        case "step":
            from alexnet_dist.bench.step import bench_step as bench
        case "lrn":
            from alexnet_dist.bench.lrn import bench_lrn as bench
        case "layouts":
            from alexnet_dist.bench.layouts import bench_layouts

            return _bench(bench_layouts(config, options.ranks, options.repeats), options)
        case "end-to-end":
            from alexnet_dist.bench.end_to_end import bench_end_to_end

            return _bench(bench_end_to_end(config, options.repeats, options.steps), options)
        case _:
            from alexnet_dist.bench.checkpoint import bench_checkpoint as bench
    return _bench(bench(config, options.repeats), options)


def _bench(found: dict[str, Any], options: argparse.Namespace) -> int:
    from alexnet_dist import bench

    print(json.dumps(found) if options.json else bench.table(found))
    return 0


def _compare(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.data.dataset import open_for
    from alexnet_dist.reporting import compare_layouts

    if options.steps < 3:
        raise ConfigError(f"--steps {options.steps}: 3 or more: two warm up")
    config = load_config(options.config)
    open_for(config)  # or one clear error
    rows = []
    if not options.json:
        print(compare_layouts.HEADING)
    for row, drift, floor in compare_layouts.compare(config, options.layouts, options.steps):
        rows.append(row)
        if not options.json:
            print(compare_layouts.line(row, drift, floor), flush=True)
    if options.json:
        print(json.dumps([vars(row) for row in rows]))
    return 0 if all(row.holds for row in rows) else 1


def _plan(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.parallel import layouts, topology
    from alexnet_dist.planning import cost_model, dry_run, forecast, scaling

    config = load_config(forecast.sources(options.config))
    machine = scaling.fitted(options.fit) if options.fit else None
    if machine and options.machine:
        cost_model.write_machine(machine, options.machine)
    elif options.machine:
        machine = cost_model.read_machine(options.machine)
    named = options.gpus and cost_model.Cluster.of(options.gpus, machine)
    at = named or forecast.here(config, machine)
    if options.curve:
        if at is None:
            raise ConfigError("--curve: nothing is known of these GPUs: say --gpus")
        rows = scaling.curve(config, at)
        scaling.draw(rows, at, options.curve)
        print(json.dumps(rows) if options.json else "\n".join(scaling.lines(rows)))
        return 0
    wanted = named.total if named else layouts.ranks_wanted(config, topology.gpus(config))
    planned = dry_run.plan(config, options.ranks or wanted)
    told, why = {}, "nothing is known of these GPUs: say --gpus, as in --gpus h100:8"
    try:
        told = forecast.forecast(planned, config, at) if at else {}
    except ConfigError as error:
        if named:
            raise
        why = str(error)
    if options.json:
        print(json.dumps(planned | told))
        return 0
    text = dry_run.lines(planned)
    text += forecast.lines(told, config.layout.kind) if told else ["", f"no prediction: {why}"]
    print("\n".join(text))
    return 0


def _figures(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.reporting import figures

    drawn = figures.draw(options.run_folder)
    for column, value in enumerate(figures.colour(options.run_folder), start=1):
        print(f"column {column}: {value:.3f} of its kernels' energy is colour")
    if options.fig4:
        drawn += figures.draw_answers(options.run_folder, options.overrides)
    print("\n".join(map(str, drawn)))
    return 0


def _report(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.reporting.report import report

    print(report(options.run_folder, options.out))
    return 0


def _export(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.formats.convert import export_weights

    print(export_weights(options.format, options.checkpoint, options.out))
    return 0


def _import(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.formats.convert import import_weights

    how = options.file, options.out, options.config, options.mean
    print(f"{import_weights(options.format, *how)}: use it by train.init_from or evaluate")
    return 0


def _doctor(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from alexnet_dist.reporting import doctor

    findings = []
    for one in doctor.examine(load_config(options.config), named=bool(options.config)):
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
        print(f"a run would fail: mend {', '.join(broken)}")
    else:
        print("nothing here stands in a run's way")
    return 1 if broken else 0
