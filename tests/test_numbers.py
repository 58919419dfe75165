"""Non-finite numbers: ranks agree, nothing is applied or saved, and the cause is named."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conftest import TINY, as_overrides, in_a_fork, on_ranks
from safetensors.torch import load_file

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch, Decoded
from alexnet_dist.engines.base import Engine
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ReplicasDiffer
from alexnet_dist.files import read_run
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel import replicas
from alexnet_dist.parallel.replicas import check_replicas
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.partition import share
from alexnet_dist.training import loop
from alexnet_dist.training.metrics_file import read_metrics


def config_of(kind: str) -> Config:
    return load_config([*TINY, "train.batch=12", "train.precision=fp32", f"layout.kind={kind}"])


def batch_of(config: Config, topology: Topology) -> Batch:
    """This replica's part of the same twelve samples on every layout."""
    side, dtype = config.model.crop, DTYPES[config.train.precision]
    generator = torch.Generator().manual_seed(0)
    windows = torch.rand(12, 3, side, side, dtype=dtype, generator=generator)
    ids = torch.arange(12)[share(12, topology.replica, topology.replicas)]
    n = len(ids)
    return Batch(windows[ids], ids % 10, ids, torch.zeros(n, 3), torch.zeros(n).bool())


def network(engine: Engine) -> torch.nn.Module:
    found: torch.nn.Module = getattr(engine, "model", None) or engine.engine.module  # type: ignore[attr-defined]
    return found


def poisoned_steps(kinds: Sequence[str]) -> list[tuple[list[list[float]], bool, bool]]:
    """For each layout: a step whose gradient is infinite on the last rank though no loss is, and a
    step that is well; the numbers of both, and whether weights and momenta had changed after each.
    """
    found = []
    for kind in kinds:
        config = config_of(kind)
        topology = connect(config)
        engine = make_engine(config, topology)
        batch, stats, changed = batch_of(config, topology), [], []
        before = engine.whole_tensors()
        bad = network(engine).get_parameter("conv2.weight")
        last = topology.global_rank == topology.world_size - 1
        hook = bad.register_hook(lambda grad, by=float("inf") if last else 1.0: grad * by)
        for _ in range(2):
            stats.append(engine.train_step(batch, 0, 0.01).tolist())
            hook.remove()
            pairs = zip(before, engine.whole_tensors(), strict=True)
            changed.append(any(not torch.equal(a[n], b[n]) for a, b in pairs for n in a))
        found.append((stats, *changed))
    return found


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (2, ["columns", "replicas", "sharded_fc", "zero1", "zero2"]),
        pytest.param(4, ["columns_x_replicas"], marks=pytest.mark.drill),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none(
    ranks: int, kinds: list[str], norm: float
) -> None:
    """And the norm is the whole network's on every layout."""
    everywhere = on_ranks(ranks, poisoned_steps, kinds)
    for number, kind in enumerate(kinds):
        for rank, found in enumerate(everywhere):
            (bad, good), changed, changed_then = found[number]
            assert bad[3] == 1, (kind, rank)
            assert bad[0] == pytest.approx(everywhere[0][number][0][0][0])
            assert not torch.tensor(bad[5]).isfinite(), (kind, rank)
            assert not changed, (kind, rank)
            assert good[3] == 0
            assert good[5] == pytest.approx(norm, rel=1e-4), (kind, rank)
            assert changed_then == (rank == 0), (kind, rank)  # rank 0 holds whole tensors


@pytest.fixture(scope="module")
def norm() -> float:
    """Of one process, from torch's own reckoning."""
    config = config_of("one")
    engine = make_engine(config, Topology())
    kept: list[torch.Tensor] = []

    def keep(rate: float, skip: torch.Tensor) -> None:
        kept.extend(parameter.grad.flatten() / rate for parameter in network(engine).parameters())

    engine.optimizer.step = keep  # type: ignore[attr-defined]
    engine.train_step(batch_of(config, Topology()), 0, 0.01)
    return float(torch.cat(kept).double().norm())


def flipped(kinds: Sequence[str]) -> list[list[str]]:
    """What is said of a sound network, and of one bit flipped on rank 2, for each layout."""
    said = []
    for kind in kinds:
        config = config_of(kind)
        topology = connect(config)
        engine = make_engine(config, topology)
        engine.train_step(batch_of(config, topology), 0, 0.01)
        check_replicas(engine.replicated(), topology, step=7)
        if topology.global_rank == 2:
            weight = network(engine).get_parameter("conv3.weight").detach()
            weight.view(torch.int32)[5, 1, 1, 1] ^= 1
        try:
            check_replicas(engine.replicated(), topology, step=7)
            said.append("nothing")
        except ReplicasDiffer as error:
            said.append(str(error))
    return said


def test_a_flipped_bit_is_found_and_named() -> None:
    kinds = ["replicas", "sharded_fc", "zero2", "columns_x_replicas"]
    named = ["rank 2", "rank 2", "rank 2", "rank 0 and 2"]  # of two replicas, either may be wrong
    for said in on_ranks(4, flipped, kinds):
        for sentence, who in zip(said, named, strict=True):
            assert f"step 7: replicas are no longer bitwise equal: conv3.weight of {who}. " in (
                sentence
            )


def test_replicas_are_compared_every_so_often_and_before_every_save(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, ends, sound = [], threading.Event(), checkpoints.save

    def differ(tensors: object, topology: Topology, step: int) -> None:
        compared.append(step)
        if step == 10:
            ends.set()
            raise ReplicasDiffer("step 10")

    def slow(*args: Any) -> Path:
        ends.wait(60)  # what is being written as a run fails is still written
        return sound(*args)

    monkeypatch.setattr(loop, "check_replicas", differ)
    monkeypatch.setattr(checkpoints, "save", slow)
    config = tiny("layout.kind=one", "train.epochs=2", "checkpoint.every_steps=5",
                  "train.compare_replicas_every=4", "data.eval_split=none")  # fmt: skip
    with pytest.raises(ReplicasDiffer, match="step 10"):
        loop.train(config)
    assert compared == [4, 5, 8, 10]
    assert [checkpoints.step_of(p) for p in checkpoints.steps(config.folder / "checkpoints")] == [5]


def test_bits_of_a_view_from_an_odd_place_are_summed() -> None:
    """ZeRO's parameters are views of one long tensor."""
    whole = torch.arange(7, dtype=torch.float32)
    before = replicas.sum_of_bits(whole[1:5])
    whole[2] = 2.5
    assert replicas.sum_of_bits(whole[1:5]) != before


def with_poison(at: set[int], arguments: list[str]) -> None:
    """Run a command whose batches at some steps hold a NaN, as their lighting."""
    sound = TorchEngine.train_step

    def train_step(
        engine: TorchEngine, batch: Decoded, step: int, rate: float, *more: Any
    ) -> torch.Tensor:
        if step in at:
            batch.metadata[0, 3] = float("nan")
        return sound(engine, batch, step, rate, *more)

    TorchEngine.train_step = train_step  # type: ignore[method-assign]
    forks.run(arguments)


def test_steps_that_are_not_finite_are_left_out_as_often_as_the_config_allows(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    one = ["layout.kind=one", "train.epochs=2", "checkpoint.every_steps=5", "log.every_steps=1"]
    config = tiny(*one, "name=poisoned", "train.max_skipped=1", "train.precision=fp32")

    train = ["train", *as_overrides(config)]
    stopped = in_a_fork(with_poison, {3, 8}, train)
    assert stopped.returncode == 1
    assert "step 4: the loss is nan and the gradient norm nan: this update was skipped" in (
        stopped.stderr
    )
    assert "skipped 1 of train.max_skipped=1" in stopped.stderr
    assert "step 9: the loss is nan" in stopped.stderr
    assert "1 skipped before, train.max_skipped=1. Lower schedule.rate" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    folder = config.folder
    kept = load_file(folder / "not_finite" / "step-00000009-rank-0.safetensors")
    assert len(kept["ids"]) == 8
    assert kept["windows"][0, 0, 0, 0].isnan()
    assert [checkpoints.step_of(p) for p in checkpoints.steps(folder / "checkpoints")] == [5, 8]
    assert read_run(folder)["state"] == "failed"
    more = ["train.max_skipped=2", "log.every_steps=5"]
    resumed = in_a_fork(with_poison, {10}, ["train", *as_overrides(config), *more])
    assert resumed.returncode == 0, resumed.stderr
    points = [point for point in read_metrics(folder) if point["kind"] == "train"]
    assert [point["skipped"] for point in points] == [0] * 3 + [1] * 6 + [2]
    assert [point["step"] for point in points if point["loss"] != point["loss"]] == [4], (
        "a skipped step is none of those that a point is the mean of"
    )
    assert (
        TorchEngine.train_step.__module__ == "alexnet_dist.engines.ddp"
    )  # this process is not patched
