"""What docs/results.py trains: networks and recipes, seed by seed; and how recipes are chosen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HE = ("model.init=he", "data.divide_by=[8,8,8]")
RECIPES = {
    "as printed, rate 0.01": (),
    "He's, rate 0.01": HE,
    "He's, rate 0.02": (*HE, "schedule.rate=0.02"),
}


def rates(*values: float) -> dict[str, tuple[str, ...]]:
    """Return candidates that differ in their learning rate."""
    return {f"rate {value:g}": (f"schedule.rate={value:g}",) for value in values}


@dataclass(frozen=True)
class Variant:
    """One network and recipe, trained with several seeds.

    Attributes:
        sources: configs and keys; those in `last` override what was chosen.
        told: its description in the table.
        candidates: recipes to choose from, by name; `brief` has the keys that shorten them.
        recipe: the variant whose chosen recipe this one uses; by default its own.
        by_training: whether recipes are judged by the epochs to 25 % training error.
        begins: the row whose network it starts from.
        speed: expected images/s, until one is measured.
        together: number of rows of a part that run at once, if networks are too small for a GPU.
        average: whether to average all seeds as well.
    """

    part: str
    name: str
    told: str
    sources: tuple[str, ...]
    seeds: int = 3
    last: tuple[str, ...] = ()
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    brief: tuple[str, ...] = ()
    recipe: str = ""
    by_training: bool = False
    begins: str = ""
    speed: float = 20_000
    together: int = 1
    average: bool = False


def _fig1(unit: str, told: str, epochs: int, *values: float, released: bool = False) -> Variant:
    """Return a variant of figure 1.

    Args:
        released: whether its initial weights are those of the released code's layers-18pct.cfg, for
            grey levels of 0–255.
    """
    keys: tuple[str, ...] = (f"train.epochs={epochs}", "data.eval_split=none", "log.every_steps=39",
            "checkpoint.every_steps=100000")  # fmt: skip
    if released:
        told += ", the released code's weights"
        keys += ("data.divide_by=[1,1,1]", "model.init=paper",
                 "model.init_std=[0.0001,0.01,0.01,0.01]")  # fmt: skip
    return Variant(
        "fig1", f"fig1-{unit}" + "-released" * released, told, (f"paper/fig1-{unit}", *keys),
        candidates=rates(*values), brief=(f"train.epochs={min(epochs, 20)}",), by_training=True,
        speed=60_000, together=4,
    )  # fmt: skip


def _four(name: str, told: str, *keys: str) -> Variant:
    """Return a variant of the four-layer CIFAR-10 network."""
    return Variant(
        "lrn", name, told, ("results/cifar10-four-layers", *keys),
        candidates=rates(0.0003, 0.001, 0.003, 0.01), brief=("train.epochs=40",),
        speed=60_000, together=4,
    )  # fmt: skip


def _review(name: str, told: str, config: str) -> Variant:
    """Return a variant that repeats another program's recipe."""
    # float32 as there, with TF32 in convolutions: torch's default, and therefore the notebook's.
    own = "data.path=data/cifar10", "data.eval_split=test", "train.precision=tf32"
    return Variant("review", name, told, (config, *own), speed=6_000)


def _ablation(name: str, told: str, *sources: str) -> Variant:
    """Return a variant that leaves one part of the network out."""
    given = (*sources[:1], "results/tiny-imagenet", *sources[1:])
    short, whose = ("train.epochs=12",), "tiny-imagenet"
    return Variant("ablations", f"ablation-{name}", told, given, last=short, recipe=whose)


_STAR = "paper/alexnet-star-pretrain"
VARIANTS = (
    Variant("tiny-imagenet", "tiny-imagenet", "the paper's network", ("results/tiny-imagenet",), 5,
            candidates=RECIPES, brief=("train.epochs=8",), average=True),
    _fig1("relu", "ReLU", 10, 0.001, 0.003, 0.01, 0.03, 0.1),
    _fig1("tanh", "tanh", 20, 0.001, 0.003, 0.01, 0.03, 0.1),
    _fig1("sigmoid", "logistic", 40, 0.01, 0.03, 0.1, 0.3),
    _fig1("relu", "ReLU", 10, 0.0003, 0.001, 0.003, 0.01, released=True),
    _fig1("tanh", "tanh", 40, 0.0003, 0.001, 0.003, 0.01, 0.03, released=True),
    Variant("cifar10", "cifar10", "the paper's network", ("results/cifar10",),
            candidates=RECIPES, brief=("train.epochs=10",)),
    Variant("imagenette", "imagenette", "the paper's network", ("results/imagenette",),
            candidates=RECIPES, brief=("train.epochs=100",)),
    Variant("imagenette", "imagenette-pretrain", "sixth convolution, on Tiny ImageNet",
            (_STAR, "results/tiny-imagenet"), 1, recipe="tiny-imagenet"),
    Variant("imagenette", "imagenette-star", "sixth convolution, from random weights",
            (_STAR, "results/imagenette"), recipe="imagenette"),
    Variant("imagenette", "imagenette-finetuned", "sixth convolution, from Tiny ImageNet's",
            (_STAR, "results/imagenette"), recipe="tiny-imagenet", begins="imagenette-pretrain-0",
            last=("schedule.rate=0.002", "train.epochs=60", "train.init_new=[fc9]")),
    _four("cifar10-four-layers", "four layers with LRN"),
    _four("cifar10-four-layers-no-lrn", "four layers without LRN", "model.lrn.layers=[]"),
    Variant("fashion-mnist", "fashion-mnist", "the paper's network",
            ("results/fashion-mnist-227", "layout.kind=one", "layout.ranks=0", "data.canvas=240",
             "train.batch=128", "train.epochs=30", "checkpoint.every_steps=100000"),
            candidates=rates(0.01, 0.02, 0.04), brief=("train.epochs=6",)),
    _review("review-mended", "the notebook, mended", "paper/review-cifar10"),
    _review("review-as-written", "the notebook as written", "paper/review-cifar10-as-written"),
    _ablation("none", "the paper's network"),
    _ablation("one-column", "one column of half the width", "paper/one-column"),
    _ablation("no-lrn", "no normalisation", "paper/no-lrn"),
    _ablation("no-overlap", "pooling without overlap", "paper/no-overlap"),
    _ablation("no-exchange", "no exchange before fc8", "paper/no-exchange"),
    _ablation("no-lighting", "no lighting", "paper/no-lighting"),
    _ablation("no-dropout", "no dropout", "paper/alexnet-2012", "model.dropout=0"),
)  # fmt: skip
BY_NAME = {variant.name: variant for variant in VARIANTS}
PARTS = tuple(dict.fromkeys(variant.part for variant in VARIANTS))


@dataclass(frozen=True)
class Row:
    """One training run, or the average of several networks; its name is the run's.

    Attributes:
        candidate: the candidate of the variant's recipe that this row judges.
        of: rows whose networks are averaged.
    """

    name: str
    variant: Variant
    seed: int = 0
    candidate: str = ""
    of: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows whose networks this one averages or begins from."""
        return (*self.of, *filter(None, [self.variant.begins]))


def planned(parts: Sequence[str], small: bool = False) -> list[Row]:
    """Return the rows of some parts: those by which recipes are chosen first, then seed by seed, so
    that there is something of each part if time runs out."""
    own = [variant for variant in VARIANTS if variant.part in parts]
    recipes = {variant.recipe or variant.name for variant in own}
    rows = [
        Row(f"{variant.name}-choose-{number}", variant, candidate=candidate)
        for variant in VARIANTS if variant.name in recipes
        for number, candidate in enumerate(variant.candidates)
    ]  # fmt: skip
    for variant in own:
        seeds = 1 + variant.average if small else variant.seeds
        names = tuple(f"{variant.name}-{seed}" for seed in range(seeds))
        rows += [Row(name, variant, seed) for seed, name in enumerate(names)]
        if variant.average:
            rows.append(Row(f"{variant.name}-average", variant, seeds - 1, of=names))
    return sorted(rows, key=lambda row: (row.seed, PARTS.index(row.variant.part),
                                         not row.candidate))  # fmt: skip


def succeeded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the ledger's rows that did not fail, by name."""
    return {row["row"]: row for row in rows if "failed" not in row}


def chosen(variant: Variant, done: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...] | None:
    """Return the keys of a variant's best candidate; None until all candidates are trained."""
    source = BY_NAME[variant.recipe or variant.name]
    judged = [done.get(f"{source.name}-choose-{n}") for n in range(len(source.candidates))]
    if not judged:
        return ()
    if any(row is None for row in judged):
        return None
    best = max(range(len(judged)), key=lambda n: merit(source, judged[n] or {}))
    return [*source.candidates.values()][best]


def merit(variant: Variant, row: Mapping[str, Any]) -> tuple[float, ...]:
    """Return a candidate's merit; larger is better."""
    if "diverged" in row:
        return (-math.inf, -math.inf)
    if variant.by_training:
        epochs = row["epochs_to"]["25"]
        return (-math.inf if epochs is None else -epochs, -row["training_error"])
    return (row["scores"]["1"]["top1"],)
