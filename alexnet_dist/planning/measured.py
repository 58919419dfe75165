"""Steps that were measured on GPUs, and by what they correct the cost model.

`measured.jsonl` has them; `make docs` adds those of docs/gpu.jsonl, which `make gpu` writes.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from alexnet_dist.config.load import load_config
from alexnet_dist.planning.cost_model import predict
from alexnet_dist.planning.dry_run import plan
from alexnet_dist.planning.machines import Cluster, Machine, known
from alexnet_dist.planning.plan import Plan

STEPS = Path(__file__).with_name("measured.jsonl")
_NETWORK = "paper/alexnet-2012"  # of which all are


@dataclass(frozen=True)
class Step:
    """A training step of the paper's network on one GPU, its batch ready.

    Attributes:
        card: as torch calls it.
        execution: graph, fused or eager; `before`: by kernels of before these three, launched one
            by one, which corrects nothing.
        source: where this is from.
    """

    card: str
    batch: int
    precision: str
    execution: str
    ms: float
    commit: str
    source: str


def read_steps(path: Path = STEPS) -> list[Step]:
    """All that were measured, oldest first."""
    return [Step(**json.loads(line)) for line in path.read_text().splitlines()]


def correction(
    planned: Plan, kind: str, machine: Machine, steps: tuple[Step, ...] | None = None
) -> tuple[float, str]:
    """What computing a step takes ÷ what the model says, and where that is from; 1 where nothing
    like it was measured.

    Of a card's batches the two nearest count, by the logarithm of the batch; of a card that was not
    measured, those of one that was.
    """
    rank, precision = planned.of(kind), planned.recipe["train.precision"]
    ranks = 1 if kind == "alone" else planned.ranks
    found = [
        step for step in (read_steps() if steps is None else steps)
        if (step.precision, step.execution) == (precision, rank.execution) and known(step.card)
    ]  # fmt: skip
    if not machine.fused or not found:
        return 1.0, ""
    own = [step for step in found if known(step.card) == machine]
    taken = {step.batch: step for step in own or found[-1:]}  # the last of a batch counts
    batch = planned.batch / ranks
    below = max((b for b in taken if b <= batch), default=min(taken))
    above = min((b for b in taken if b >= batch), default=max(taken))
    ends = [math.log(_ratio(taken[b])) for b in (below, above)]
    share = math.log(batch / below) / math.log(above / below) if above > below else 0.0
    factor = math.exp(ends[0] + share * (ends[1] - ends[0]))
    if not own:
        return factor, f"not run; by a step on {found[-1].card}"
    same = ranks == 1 and below == above == batch and _is_papers(planned)
    return factor, "measured" if same else f"by steps measured of batch {_listed(taken)}"


def _listed(batches: dict[int, Step]) -> str:
    return ", ".join(map(str, sorted(batches)))


def _is_papers(planned: Plan) -> bool:
    recipe = _planned(planned.batch, planned.recipe["train.precision"], "graph").recipe
    keys = [key for key in recipe if key.startswith("model.") or key == "train.micro_batches"]
    return all(planned.recipe[key] == recipe[key] for key in keys)


def _ratio(step: Step) -> float:
    machine = known(step.card)
    assert machine is not None, step.card
    planned = _planned(step.batch, step.precision, step.execution)
    found = predict(planned, "one", Cluster(machine, 1))
    return step.ms * 1e-3 * found.training_images_per_s / step.batch


@functools.cache
def _planned(batch: int, precision: str, execution: str) -> Plan:
    own = [f"train.batch={batch}", f"train.precision={precision}", f"train.execution={execution}"]
    config = load_config([_NETWORK, "model.classes=1000", "layout.kind=one", *own])
    return plan(config, 1, gpu=True)
