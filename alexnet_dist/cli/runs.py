"""The commands `train`, `evaluate` and `configs`."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_dist.cli.parser import AddCommand, add_json, out, path
from alexnet_dist.config.load import IN_ONE_PROCESS, check_scored_with, load_config, shipped
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import CheckpointError, ConfigError, counted, printable
from alexnet_dist.files import as_json, check_trained, read_run
from alexnet_dist.parallel import environment
from alexnet_dist.training.metrics_file import accuracies

if TYPE_CHECKING:
    from alexnet_dist.evaluation.results import Evaluation, Score
    from alexnet_dist.training.loop import Outcome

_CLASSES = 10  # classes with the highest error, and pairs most often confused, that are printed


def add(command: AddCommand) -> None:
    """Add these three commands to the parser."""
    sub = command(
        "train", train, "train a run, or resume it",
        (
            "alexnet-dist train demo name=second seed=1 train.epochs=2",
            "alexnet-dist train demo name=one layout.kind=one      # all in one process",
            "alexnet-dist train demo mine.yaml data.path=data/mine # later ones override earlier "
            "ones",
        ),
    )  # fmt: skip
    sub.add_argument(
        "config", nargs="+", help="YAML files, names of shipped configs, and key=value"
    )

    sub = command(
        "evaluate", evaluate, "score a checkpoint, or the average of several",
        (
            "alexnet-dist evaluate runs/demo --views 10            # the paper's ten windows",
            "alexnet-dist evaluate runs/demo runs/second --json    # the average of two networks",
            "alexnet-dist evaluate runs/demo data.path=data/other",
        ),
    )  # fmt: skip
    sub.add_argument(
        "path",
        nargs="+",
        help="run folder (its best checkpoint), checkpoint, or key=value that a score depends on",
    )
    sub.add_argument(
        "--views", type=int, choices=(1, 10), help="windows per image (default: as in the run)"
    )
    sub.add_argument(
        "--predictions", type=out, metavar="NPZ", help="also write every prediction to this file"
    )
    add_json(sub)

    sub = command("configs", configs, "list the shipped configs", ("alexnet-dist configs",))
    add_json(sub)


def train(options: argparse.Namespace) -> int:
    """Train a run, or resume it; return the exit code of its ranks."""
    from alexnet_dist.parallel.stop_signals import StopSignals

    signals, parent = StopSignals(), os.getppid()  # handlers first: the imports take seconds
    config, is_rank = load_config(options.config), environment.place() is not None
    # Until there is something to save, a signal ends this process at once; a rank, in silence.
    signals.exit_message = "" if is_rank else f"{config.folder}: stopped before it began\n"
    if signals.exit_code is not None:
        print(signals.exit_message, end="", file=sys.stderr)
        return signals.exit_code
    if not is_rank:
        _check_sources(config)
    from alexnet_dist.parallel import device, layouts, spawn

    spawn.begin_start()
    wanted = layouts.ranks_wanted(config, device.gpus(config))
    if is_rank:
        spawn.leave_with_parent(parent)
    elif wanted > 1:
        layouts.check(config, wanted)
        if config.layout.share_gpu:
            from alexnet_dist.planning import shared_gpus

            shared_gpus.check(config, wanted)
        from alexnet_dist.training.run_folder import RunFolder

        typed = ["train", *options.config]
        return spawn.start(typed, wanted, config.folder, RunFolder(config).killed)

    from alexnet_dist.training import loop

    outcome = loop.train(config, signals)
    if outcome.is_rank_0:
        _print_end(config, outcome)
    return outcome.exit


def _print_end(config: Config, outcome: "Outcome") -> None:
    """Print how a run ended, and where its results are; draw its figures if it is done."""
    from alexnet_dist.checkpoint import store
    from alexnet_dist.reporting import figures
    from alexnet_dist.training.logs import watch
    from alexnet_dist.training.state import Progress
    from alexnet_dist.training.tolerance import WarnOnce

    if outcome.exit:
        print(
            f"{config.folder}: stopped at step {outcome.step}, saved; run the same command to "
            "resume"
        )
        return
    best = store.best(config.folder / "checkpoints")
    score = outcome.score
    words = _in_words(score, config.model.classes) if score else "not scored"
    print(f"{config.folder}: done, {counted(outcome.step, 'step')}; {words}")
    other = Progress.of(best.progress).score if score and best.step != outcome.step else None
    its = f": {_in_words(other, config.model.classes)}" if other else ""
    print(f"{'best' if score else 'last'} checkpoint: {best.path}{its}")
    with WarnOnce("drawing"):
        drawn, _ = figures.draw(config.folder)
        print(f"pictures: {', '.join(map(str, drawn))}")
    print(watch(config))
    if score and config.evaluate.views == 1 and config.ten_views_differ:
        print(f"next: alexnet-dist evaluate {shlex.quote(str(config.folder))} --views 10")


def _check_sources(config: Config) -> None:
    """Raise what is wrong with the data set or with train.init_from, before ranks are started and
    torch is imported, which takes seconds."""
    from alexnet_dist.data.dataset import open_for

    open_for(config)
    init_from = config.train.init_from
    if init_from != "none" and not read_run(config.folder):  # only a run's first start reads it
        try:
            check_trained(Path(init_from))
        except CheckpointError as error:
            raise CheckpointError(f"train.init_from={init_from!r}: {error}") from error


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate one checkpoint, or the average prediction of several."""
    overrides = [text for text in options.path if "=" in text]
    paths = [path(text) for text in options.path if "=" not in text]
    if not paths:
        raise ConfigError("evaluate: name a run folder or a checkpoint")
    check_scored_with(overrides, "evaluate")
    if options.views:
        overrides.append(f"evaluate.views={options.views}")
    from alexnet_dist.data.dataset import open_for

    for trained in paths:
        check_trained(trained)
        if (saved := trained / "config.json").is_file():
            open_for(load_config([saved, *IN_ONE_PROCESS, *overrides]), trained)
    from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
    from alexnet_dist.evaluation.results import save_score
    from alexnet_dist.parallel.topology import Topology
    from alexnet_dist.training.logs import configure_logging

    configure_logging(Topology())
    result = evaluate_checkpoints(paths, overrides, keep=options.predictions is not None)
    kept = save_score(result)
    if options.predictions:
        result.write(options.predictions)
    if options.json:
        print(as_json(result.report()))
        return 0
    _print_score(result)
    if kept:
        print(f"saved: {kept}")
    return 0


def _print_score(result: "Evaluation") -> None:
    """Print a score, with intervals, the worst classes and the most frequent mistakes."""
    names, report = " + ".join(str(one.path) for one in result.checkpoints), result.report()
    classes = len(report["classes"])
    print(f"{names}: {_in_words(result.score, classes)}")
    for top, name in accuracies(classes).items():
        low, high = report[f"{top}_interval"]
        print(f"{name} error {1 - report[top]:.2%}, "
              f"95 % of resamples between {1 - high:.2%} and {1 - low:.2%}")  # fmt: skip
    rows = [row for row in report["classes"] if row["samples"]]
    rows.sort(key=lambda row: row["right"] / row["samples"])
    for row in rows[:_CLASSES]:
        print(f"{1 - row['right'] / row['samples']:8.1%} of {row['samples']} wrong: "
              f"{printable(row['name'])}")  # fmt: skip
    for row in report["mistakes"][:_CLASSES]:
        of, taken_for = printable(row["of"]), printable(row["taken_for"])
        print(f"{row['samples']:8} {of} mistaken for {taken_for}")


def configs(options: argparse.Namespace) -> int:
    """Print the shipped configs, each with the first sentence of its file."""
    known = shipped()
    if options.json:
        print(as_json(known))
        return 0
    width = max(map(len, known))
    print("\n".join(f"{name:{width}}  {what}" for name, what in known.items()))
    return 0


def _in_words(score: "Score", classes: int) -> str:
    top5 = f"top-5 {score.top5:.2%} ({score.correct5}), " if "top5" in accuracies(classes) else ""
    top1 = f"top-1 {score.top1:.2%} ({score.correct1} of {score.samples} right)"
    return f"{top1}, {top5}loss {score.loss:.4f}"
