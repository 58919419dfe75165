"""Steps measured on GPUs, and how they correct the cost model.

They are in `measured.jsonl`; `make docs` adds those of docs/gpu.jsonl, which `make gpu` writes.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import flat
from alexnet_dist.planning.cost_model import predict
from alexnet_dist.planning.dry_run import plan
from alexnet_dist.planning.machines import Cluster, Machine, known
from alexnet_dist.planning.plan import Plan

STEPS = Path(__file__).with_name("measured.jsonl")
_NETWORK = ("paper/alexnet-2012", "model.classes=1000")  # of every measured step


@dataclass(frozen=True)
class Step:
    """A measured training step of the paper's network on one GPU, without waiting for data.

    Attributes:
        card: the GPU by torch's name for it.
        execution: graph, fused or eager; "before": with older kernels, launched one by one; it
            corrects nothing.
        ms: milliseconds.
        source: where the figure comes from.
    """

    card: str
    batch: int
    precision: str
    execution: str
    ms: float
    commit: str
    source: str


def read_steps() -> list[Step]:
    """Read all measured steps, the oldest first."""
    return [Step(**json.loads(line)) for line in STEPS.read_text().splitlines()]


def correction(
    planned: Plan, kind: str, machine: Machine, steps: tuple[Step, ...] | None = None
) -> tuple[float, str]:
    """Return measured computing time divided by the model's, and where that comes from; 1 if
    nothing comparable was measured.

    Interpolates between the card's two nearest batches, by the logarithm of the batch; for a card
    that was not measured, takes another card's steps.
    """
    rank, precision = planned.of(kind), planned.recipe["train.precision"]
    ranks = planned.ranks_of(kind)
    comparable = [
        step for step in (read_steps() if steps is None else steps)
        if (step.precision, step.execution) == (precision, rank.execution) and known(step.card)
    ]  # fmt: skip
    if not machine.fused or not comparable:
        return 1.0, ""
    own = [step for step in comparable if known(step.card) == machine]
    taken = {step.batch: step for step in own or comparable[-1:]}  # of each batch, the newest
    batch = planned.batch / ranks
    below = max((b for b in taken if b <= batch), default=min(taken))
    above = min((b for b in taken if b >= batch), default=max(taken))
    ends = [math.log(_ratio(taken[b])) for b in (below, above)]
    factor = math.exp(np.interp(math.log(batch), np.log([below, above]), ends))
    if not own:
        return factor, f"not run; by a step on {comparable[-1].card}"
    same = ranks == 1 and below == above == batch and _is_papers(planned)
    batches = ", ".join(map(str, sorted(taken)))
    return factor, "measured" if same else f"by steps measured of batch {batches}"


def _is_papers(planned: Plan) -> bool:
    """Return whether a plan is of the paper's network, as the measured steps are."""
    recipe = flat(load_config(_NETWORK))
    keys = [key for key in recipe if key.startswith("model.") or key == "train.micro_batches"]
    return all(planned.recipe[key] == recipe[key] for key in keys)


def _ratio(step: Step) -> float:
    """Return a step's measured time divided by the model's."""
    machine = known(step.card)
    assert machine is not None, step.card
    planned = _planned(step.batch, step.precision, step.execution)
    predicted = predict(planned, "one", Cluster(machine, 1))
    return step.ms * 1e-3 * predicted.training_images_per_s / step.batch


@functools.cache
def _planned(batch: int, precision: str, execution: str) -> Plan:
    """Plan the paper's network on one GPU."""
    own = [f"train.batch={batch}", f"train.precision={precision}", f"train.execution={execution}"]
    config = load_config([*_NETWORK, "layout.kind=one", *own])
    return plan(config, 1, gpu=True)
