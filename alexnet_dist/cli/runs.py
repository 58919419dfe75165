"""train and evaluate."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_dist.cli.parser import AddCommand, add_json, out
from alexnet_dist.config.load import load_config
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel import environment

if TYPE_CHECKING:
    from alexnet_dist.evaluation.evaluate import Score

_CLASSES = 10  # of most errors, and mistakes, that are printed


def add(command: AddCommand) -> None:
    """Add these commands."""
    sub = command("train", train, "train, or continue, a run")
    sub.add_argument("config", nargs="+", help="YAML files, names of shipped ones, key=value")

    sub = command("evaluate", evaluate, "score checkpoints; several are averaged")
    sub.add_argument("path", nargs="+", help="run folder (its best), checkpoint, or key=value")
    sub.add_argument("--views", type=int, choices=(1, 10), help="windows an image")
    sub.add_argument("--predictions", type=out, metavar="NPZ", help="file to write them all to")
    add_json(sub)


def train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Train, or continue, a run; the code that its ranks left with."""
    from alexnet_dist.parallel.stop_signals import StopSignals

    signals, parent = StopSignals(), os.getppid()  # before seconds of imports
    config = load_config(options.config)
    from alexnet_dist.parallel import device, layouts, spawn

    wanted = layouts.ranks_wanted(config, device.gpus(config))
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
    from alexnet_dist.training import loop
    from alexnet_dist.training.run_folder import warn_if_unwritable

    outcome = loop.train(config, signals)
    if not outcome.leads:
        return outcome.exit
    if outcome.exit:
        print(f"{config.folder}: stopped at step {outcome.step}, saved; the same command continues")
        return outcome.exit
    best = store.best(config.folder / "checkpoints")
    score = outcome.score
    print(
        f"{config.folder}: done, {outcome.step} steps; {_words(score) if score else 'not scored'}"
    )
    print(f"{'best' if score else 'last'} checkpoint: {best.path}")
    with warn_if_unwritable(config.folder / "figures"):
        print(f"pictures: {', '.join(map(str, figures.draw(config.folder)))}")
    print(f"watch: tensorboard --logdir {config.output_dir} --host localhost")
    if score:
        print(f"next: alexnet-dist evaluate {config.folder} --views 10")
    return outcome.exit


def evaluate(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Score checkpoints; several are averaged."""
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


def _words(score: "Score") -> str:
    return (
        f"top-1 {score.top1:.2%} ({score.correct1} of {score.samples} right), "
        f"top-5 {score.top5:.2%} ({score.correct5}), loss {score.loss:.4f}"
    )
