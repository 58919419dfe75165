"""Layouts: how replicas and columns are laid out on ranks, and how many ranks each needs.

| `layout.kind` | ranks | what |
|---|---|---|
| one | 1 | all columns in one process |
| columns | 2 | the paper's: a process for each column |
| replicas | N | a whole network on each rank, gradients summed (DDP) |
| columns_x_replicas | 2N | replicas of two column ranks each |
| zero1, zero2 | N | replicas whose optimiser state (zero2: and gradients) is split (DeepSpeed) |
| sharded_fc | N | convolutions as replicas, fc6 … fc8 split over all ranks (Krizhevsky 2014, (a)) |
"""

import dataclasses
import math
from typing import Any

from alexnet_dist.config.rules import check_combinations
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import ConfigError, counted

SPLIT_IN_COLUMNS = ("columns", "columns_x_replicas")
ZERO_STAGES = {"zero1": 1, "zero2": 2}


def columns_of(config: Config) -> int:
    """Return the number of ranks per replica: one per column, or 1 if a rank holds all."""
    return config.model.columns if config.layout.kind in SPLIT_IN_COLUMNS else 1


def ranks_wanted(config: Config, gpus: int) -> int:
    """Return how many ranks to start if no launcher did: `layout.ranks`, or the most that the GPUs
    and the layout allow, or the fewest that the layout needs."""
    if config.layout.ranks or config.layout.kind == "one":
        return config.layout.ranks or 1
    least = 4 if config.layout.kind == "columns_x_replicas" else 2
    most = 2 if config.layout.kind == "columns" else gpus
    fitting = (ranks for ranks in range(most, least, -1) if not problem(config, ranks))
    return next(fitting, least)


def check(config: Config, ranks: int) -> None:
    """Raise ConfigError if the layout or the global batch does not fit this number of ranks."""
    if wrong := problem(config, ranks):
        raise ConfigError(wrong)


def problem(config: Config, ranks: int) -> str:
    """Return why the layout does not fit this number of ranks, and what would; empty if it fits."""
    return _ranks_problem(config, ranks) or _batch_problem(config, ranks // columns_of(config))


def misfit(config: Config, ranks: int) -> tuple[str, str] | None:
    """Return how many ranks the layout takes, and which would fit these; None if it fits."""
    if not (takes := _takes(config.layout.kind, ranks)):
        return None
    pairs = "columns" if ranks == 2 else "columns_x_replicas"
    kinds = ("replicas", "zero1", "zero2", "sharded_fc", "one", pairs)
    fitting = [kind for kind in kinds if not _takes(kind, ranks) and _permits(config, kind, ranks)]
    return takes, f"on {ranks}, {', '.join(fitting) or 'no layout of this config'} would fit"


def _takes(kind: str, ranks: int) -> str:
    """Return how many ranks a layout takes; empty if it can have so many."""
    takes, fits = {
        "one": ("1 rank", ranks == 1),
        "columns": ("2 ranks", ranks == 2),
        "columns_x_replicas": ("an even number of ranks", ranks % 2 == 0),
        "replicas": ("any number of ranks", True),
    }.get(kind, ("2 or more ranks", ranks >= 2))
    return "" if fits else takes


def _permits(config: Config, kind: Any, ranks: int) -> bool:
    """Whether the rest of a config permits a layout on so many ranks, which it can have."""
    other = dataclasses.replace(config.layout, kind=kind, ranks=ranks)
    laid_out = dataclasses.replace(config, layout=other)
    try:
        check_combinations(laid_out, dict.fromkeys(flat(laid_out), ""))
    except ConfigError:
        return False
    return not problem(laid_out, ranks)


def _ranks_problem(config: Config, ranks: int) -> str:
    model, kind = config.model, config.layout.kind
    if wrong := misfit(config, ranks):
        takes, fit = wrong
        if config.layout.ranks == ranks:
            return f"layout.ranks={ranks}: layout.kind={kind} takes {takes}; {fit}"
        return f"layout.kind={kind} takes {takes}, but the launcher started {ranks}; {fit}"
    if config.layout.ranks not in (0, ranks):
        return (
            f"layout.ranks={config.layout.ranks}: the launcher started {ranks} (WORLD_SIZE): set "
            "layout.ranks=0 to use as many as it starts"
        )
    if kind == "sharded_fc" and (any(width % ranks for width in model.fc) or model.classes < ranks):
        both = [n for n in range(2, model.classes + 1) if not any(width % n for width in model.fc)]
        remedy = f"only over {_some(both)}" if both else "nor over others: set layout.kind=replicas"
        return (
            f"layout.kind=sharded_fc: model.fc={list(model.fc)} and model.classes="
            f"{model.classes} cannot be split over {ranks} ranks, {remedy}"
        )
    return ""


def _batch_problem(config: Config, replicas: int) -> str:
    batch, parts = config.train.batch, config.train.micro_batches
    if batch % (replicas * parts) == 0:
        return ""
    lower = batch // (replicas * parts) * replicas * parts
    near = " or ".join(str(b) for b in (lower, lower + replicas * parts) if b)
    parted = divisors(batch // replicas) if batch % replicas == 0 else []
    return (
        f"train.batch={batch}: must be divisible by {counted(replicas, 'replica')} × "
        f"train.micro_batches={parts}: use a batch of {near}, or "
        f"{_some(divisors(batch // parts))} replicas"
        + (f", or train.micro_batches of {_some(parted)}" if parted else "")
    )


def check_columns_meet(nodes: list[int], columns: int) -> None:
    """Raise ConfigError if the columns of a replica are on different nodes.

    Args:
        nodes: the node of each rank.
    """
    pairs = [nodes[first : first + columns] for first in range(0, len(nodes), columns)]
    if any(len(set(pair)) > 1 for pair in pairs):
        raise ConfigError(
            f"layout.kind: Slurm placed ranks 0, 1, … on nodes {', '.join(map(str, nodes))}, but "
            f"the columns of a replica must share a node: ask for --ntasks-per-node={columns} or a "
            "multiple of it, and --distribution=block"
        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (" …" if len(numbers) > 12 else "")
