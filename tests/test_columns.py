"""Two columns in one process, and one in each of two, against the grouped network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, on_ranks
from oracle import by_groups

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines.make import train_batches
from alexnet_dist.engines.base import AT
from alexnet_dist.engines.make import make_engine
from alexnet_dist.evaluation.evaluate import evaluate_engine
from alexnet_dist.parallel.topology import connect

STEPS = 20
EVERYTHING_ON = [
    "train.precision=fp64",
    "data.lighting=0.5",
    "optimizer.weight_decay=0.01",
    "optimizer.bias_rate=2",
    "schedule.rate=0.02",
    "model.lrn.alpha=0.05",  # so that LRN matters on maps this small
    "train.epochs=3",
]

Trajectory = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def trajectory(config: Config, mutation: str = "") -> Trajectory:
    """Losses of 20 steps, then parameters and momenta, on this process's layout."""
    mutate(mutation)
    topology = connect(config)
    dataset = open_for(config)
    engine = make_engine(config, topology)
    losses = []
    for step, batch in enumerate(train_batches(config, topology, dataset, 0, STEPS)):
        losses.append(engine.train_step(batch, step, rate=0.02 * 0.9**step)[AT.loss].item())
    return losses, *engine.whole_tensors()


def mutate(name: str) -> None:
    """Break one thing that the comparison must notice."""
    from alexnet_dist.network import philox
    from alexnet_dist.parallel import columns

    match name:
        case "columns in the other order":
            gathered = columns.gathered
            columns.gathered = lambda *given: gathered(*given).flip(0)
        case "backward without its sum":
            original = torch.Tensor.sum

            def first_only(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                return tensor[0] if args == (0,) else original(tensor, *args, **kwargs)

            columns.torch.Tensor.sum = first_only
        case "other dropout masks":
            mask = philox.dropout_mask

            def shifted(seed: int, step: int, layer: int, slots: torch.Tensor, first: int,
                        *rest: Any) -> torch.Tensor:  # fmt: skip
                return mask(seed, step, layer, slots, 0, *rest)

            philox.dropout_mask = shifted


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory, packed: Any) -> tuple[Config, Trajectory]:
    config = load_config([*TINY, *EVERYTHING_ON, f"data.path={packed}", "layout.kind=one"])
    with by_groups():
        return config, trajectory(config)


def on_columns(config: Config) -> Config:
    return dataclasses.replace(config, layout=dataclasses.replace(config.layout, kind="columns"))


def assert_follows(ours: Trajectory, oracle: Trajectory) -> None:
    np.testing.assert_allclose(ours[0], oracle[0], rtol=1e-12)
    assert largest_difference(ours[1], oracle[1]) <= 1e-10
    assert largest_difference(ours[2], oracle[2]) <= 1e-10
    assert len(set(oracle[0])) == STEPS


def test_two_columns_equal_the_grouped_oracle(oracle: tuple[Config, Trajectory]) -> None:
    config, expected = oracle
    assert_follows(trajectory(config), expected)
    ours = on_ranks(2, trajectory, on_columns(config))
    assert_follows(ours[0], expected)
    assert ours[1][0] == ours[0][0]


VARIANTS = [
    [  # as in the released code, with a sixth convolution
        "model.conv=[8,12,16,16,8,8]", "model.kernel=[11,5,3,3,3,3]", "model.stride=[4,1,1,1,1,1]",
        "model.padding=[0,2,1,1,1,1]", "model.exchange=[conv3,fc7,fc8,fc9]", "model.round_up=true",
        "model.activation_last=[conv1]", "model.lrn.alpha=[0.05,0.02]", "model.crop=68",
        "model.spatial_norm.layers=[conv2]", "model.spatial_norm.alpha=0.5",
        "model.dropout_before=[fc7,fc8,fc9]",
    ],
    [  # columns apart, dropout also on what fc6 sees
        "model.exchange=[fc8]", "model.dropout_before=[fc6,fc7,fc8]", "model.pool_average=[conv2]",
        "model.pool_before_lrn=true", "model.dropout_scaling=train",
    ],
]  # fmt: skip


def trajectories(configs: list[Config]) -> list[Trajectory]:
    return [trajectory(config) for config in configs]


def test_variants_on_two_columns_equal_their_grouped_oracles(packed: Any) -> None:
    common = [*TINY, *EVERYTHING_ON, f"data.path={packed}", "layout.kind=one"]
    configs = [load_config([*common, *variant]) for variant in VARIANTS]
    ours = on_ranks(2, trajectories, [on_columns(config) for config in configs])[0]
    for config, apart in zip(configs, ours, strict=True):
        with by_groups():
            expected = trajectory(config)
        assert_follows(trajectory(config), expected)
        assert_follows(apart, expected)


@pytest.mark.parametrize(
    "mutation", ["columns in the other order", "backward without its sum", "other dropout masks"]
)
def test_the_comparison_notices(mutation: str, oracle: tuple[Config, Trajectory]) -> None:
    config, (losses, parameters, _) = oracle
    ours = on_ranks(2, trajectory, on_columns(config), mutation)
    assert largest_difference(ours[0][1], parameters) > 1e-6
    assert not np.allclose(ours[0][0], losses, rtol=1e-9)


def scores(config: Config, sizes: list[int]) -> Any:
    topology = connect(config)
    dataset = open_for(config)
    engine = make_engine(config, topology)
    found = []
    for size in sizes:
        batched = dataclasses.replace(config.evaluate, batch=size)
        resized = dataclasses.replace(config, evaluate=batched)
        found.append(evaluate_engine(engine, resized, dataset))
    return found


@pytest.mark.parametrize("views", [1, 10])
def test_every_sample_is_counted_once_on_any_ranks_and_batches(
    views: int, tiny: Callable[..., Config]
) -> None:
    config = tiny("train.precision=fp64", f"evaluate.views={views}", "layout.kind=one")
    sizes = [1, 2, 11, 22, 23, 40]  # 23 samples: last batches of 1, 1, 1, 1, 23 and 23
    one = scores(config, sizes)
    two = on_ranks(2, scores, on_columns(config), sizes)
    reference = one[0]
    assert reference.samples == 23
    for score in [*one, *two[0], *two[1]]:
        counts = (score.samples, score.correct1, score.correct5)
        assert counts == (reference.samples, reference.correct1, reference.correct5)
        assert score.loss == pytest.approx(reference.loss, rel=1e-12)
