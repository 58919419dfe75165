"""Every layout over NCCL, on as few GPUs as there are, gives the numbers of one process.

The laws are those of tests/test_layouts.py, which checks them over gloo.
"""

from pathlib import Path

import pytest
import shared
import torch
from conftest import on_ranks
from shared import SHARED
from test_layouts import (
    assert_same_run,
    config_of,
    handed_on,
    on,
    poisoned,
    resumed,
    states_of,
    trajectories,
    updates,
    ways,
)

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat

pytestmark = shared.marks


def by(config: Config, execution: str, *more: str) -> Config:
    return load_config([flat(config), f"train.execution={execution}", *more])


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (2, "columns"), (2, "replicas"), (2, "sharded_fc"), (3, "replicas"), (4, "replicas"),
        (4, "columns_x_replicas"), (4, "sharded_fc"),
    ],
)  # fmt: skip
def test_every_layout_follows_one_process(ranks: int, kind: str, packed: Path) -> None:
    """In float64, evaluations too, with each kind of execution, and by micro-batches."""
    config = config_of(packed, *SHARED, "train.precision=fp64")
    ((oracle,),) = on_ranks(1, trajectories, [by(config, "eager")])
    cases = [
        on(by(config, execution), kind, ranks, micro_batches)
        for execution, micro_batches in (("eager", 1), ("fused", 4), ("graph", 1))
    ]
    by_rank = on_ranks(ranks, trajectories, cases)
    for place in range(len(cases)):
        assert_same_run(by_rank[0][place], oracle, 1e-12)
        for other in by_rank[1:]:  # statistics and scores are alike on every rank
            assert other[place][0] == by_rank[0][place][0]
            assert other[place][3] == by_rank[0][place][3]


@pytest.mark.parametrize("pipeline", ["dali", "resident"])
def test_layouts_follow_one_process_with_each_loader(pipeline: str, packed: Path) -> None:
    config = config_of(packed, *SHARED, "train.precision=fp64", f"data.pipeline={pipeline}")
    ((oracle,),) = on_ranks(1, trajectories, [config])
    cases = [on(config, "columns", 2), on(config, "replicas", 2)]
    for ours in on_ranks(2, trajectories, cases)[0]:
        assert_same_run(ours, oracle, 1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_is_its_kernels_to_the_bit(precision: str, packed: Path) -> None:
    config = config_of(packed, *SHARED, f"train.precision={precision}")
    kinds = ("columns", "replicas", "sharded_fc")
    cases = [on(by(config, how), kind, 2) for kind in kinds for how in ("graph", "fused")]
    found = on_ranks(2, trajectories, cases)[0]
    for graph, fused in zip(found[::2], found[1::2], strict=True):
        assert graph[0] == fused[0]
        for mine, theirs in zip(graph[1:3], fused[1:3], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_update_by_zero_is_one_processes(
    ranks: int, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # float32 as on a CPU
    config = config_of(packed, *SHARED, "train.precision=fp32")
    (states,) = on_ranks(1, states_of, config)
    cases = [on(config, kind, ranks) for kind in ("zero1", "zero2")]
    for through, ours in on_ranks(ranks, updates, cases, states)[0]:
        assert all(torch.equal(through[0][name], states[0][0][name]) for name in states[0][0])
        for after, expected in zip(ours, states[1:], strict=True):
            for mine, theirs in zip(after, expected, strict=True):
                for name in theirs:
                    difference = (mine[name] - theirs[name]).abs().max()
                    assert difference <= 1e-4 * theirs[name].abs().max(), name


def test_every_layout_hands_on_to_the_next_what_hashes_equal(packed: Path, tmp_path: Path) -> None:
    config = config_of(packed, *SHARED, "train.precision=fp32")
    kinds = ("replicas", "zero1", "columns", "zero2", "sharded_fc", "replicas")
    chain = on_ranks(2, handed_on, [on(config, kind, 2) for kind in kinds], tmp_path)[0]
    for (_, saved), (loaded, _), kind in zip(chain, chain[1:], kinds[1:], strict=False):
        assert loaded == saved, f"into {kind}"
    assert len({tuple(saved) for _, saved in chain}) == len(kinds)


@pytest.mark.parametrize(
    ("ranks", "kinds", "optimizer"),
    [
        (2, ("columns",), "sgd"),
        (3, ("replicas", "zero1", "zero2"), "adam"),
        (4, ("replicas", "columns_x_replicas", "sharded_fc"), "sgd"),
    ],
)
def test_the_same_layout_resumed_is_identical_to_the_bit(
    ranks: int, kinds: tuple[str, ...], optimizer: str, packed: Path, tmp_path: Path
) -> None:
    """With several buckets of gradients, in float32."""
    wide = ["model.fc=[1024,512]", "train.precision=fp32", f"optimizer.kind={optimizer}"]
    config = config_of(packed, *SHARED, *wide)
    cases = [on(config, kind, ranks, 2) for kind in kinds]
    found = on_ranks(ranks, resumed, cases, tmp_path)[0]
    for kind, (whole, again) in zip(kinds, found, strict=True):
        for mine, theirs in zip(again, whole, strict=True):
            assert mine.keys() == theirs.keys()
            for name in theirs:
                assert torch.equal(mine[name], theirs[name]), f"{kind}: {name}"


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(packed: Path) -> None:
    kinds = ("replicas", "columns_x_replicas", "sharded_fc", "zero1", "zero2")
    config = config_of(packed, *SHARED, "train.precision=fp32")
    for outcomes in on_ranks(4, poisoned, [on(config, kind, 4, 2) for kind in kinds]):
        assert dict(zip(kinds, outcomes, strict=True)) == dict.fromkeys(kinds, (True, True))


def test_gradients_summed_in_bf16_stay_near_those_that_are_not(packed: Path) -> None:
    config = on(config_of(packed, *SHARED, "train.precision=fp32"), "replicas", 2)
    narrow_sums = load_config([flat(config), "layout.compress_gradients=true"])
    whole, narrow = on_ranks(2, ways, [config, narrow_sums])[0]
    assert narrow[0] == pytest.approx(whole[0], rel=1e-3)
    for mine, theirs, bound in zip(narrow[1:], whole[1:], (2**-8, 0.2), strict=True):
        for name, way in theirs.items():
            assert 0 < (mine[name] - way).norm() <= bound * way.norm(), name
