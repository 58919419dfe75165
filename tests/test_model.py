"""The network against plain torch, and its initial weights against the paper's."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_close
from oracle import grouped

from alexnet_dist.config.load import load_config
from alexnet_dist.engines.base import label_ranks
from alexnet_dist.errors import ConfigError
from alexnet_dist.network import precision
from alexnet_dist.network.layers import Conv
from alexnet_dist.network.model import AlexNet, Column
from alexnet_dist.partition import share


def test_forward_and_backward_are_those_of_plain_torch() -> None:
    model = AlexNet(load_config(TINY).model, dtype=torch.float64).eval()
    x = torch.randn(3, 3, 67, 67, dtype=torch.float64)
    ours, theirs = model(x), grouped(model, x, None, 0)
    assert_close(ours.detach(), theirs.detach(), 1e-13)
    weights = torch.randn_like(ours)
    losses = [(out * weights).sum() for out in (ours, theirs)]
    grads = [torch.autograd.grad(loss, model.parameters()) for loss in losses]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize(
    ("function", "x", "weight"),
    [(F.conv2d, (2, 8, 9, 9), (4, 8, 5, 5)), (F.linear, (6, 200), (12, 200))],
)
def test_a_cpu_without_bf16_multiplies_in_float32(
    function: Any, x: tuple[int, ...], weight: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies", lambda _: False)
    dtypes = []

    def multiply(*given: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function(*given)
        dtypes.append({tensor.dtype for tensor in (*given, out)})
        return out

    def results(given: list[torch.Tensor]) -> list[torch.Tensor]:
        out = precision.product(multiply, *given)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    narrow = [torch.randn(shape).bfloat16() for shape in (x, weight, weight[:1])]
    with torch.autocast("cpu", torch.bfloat16):  # as DeepSpeed does
        ours = results([one.clone().requires_grad_() for one in narrow])
    theirs = results([one.double().requires_grad_() for one in narrow])
    assert dtypes == [{torch.float32}, {torch.float64}]
    assert {one.dtype for one in ours} == {torch.bfloat16}
    for one, exact in zip(ours, theirs, strict=True):
        assert_close(one.detach().float(), exact.detach(), 2**-7 * exact.abs().max().item())


def test_no_exchange_keeps_columns_apart_until_fc8() -> None:
    """The released code's experiment 150: what one column sees changes no map of the other."""
    model = AlexNet(load_config([*TINY, "model.exchange=[fc8]"]).model, dtype=torch.float64).eval()
    seen: list[torch.Tensor] = []
    model.fc7.register_forward_hook(lambda m, i, o: seen.append(torch.cat(o, 1).detach()))
    x = torch.randn(2, 3, 67, 67, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model.conv1.weight[:4] += 1  # the first column's
    model(x)
    assert torch.equal(seen[0][:, 14:], seen[1][:, 14:])
    assert not torch.equal(seen[0][:, :14], seen[1][:, :14])


@pytest.mark.parametrize("kind", ["lrn", "spatial_norm"])
def test_squares_too_large_for_fp16_are_normalised(kind: str) -> None:
    layers = {"lrn": [], "spatial_norm": []} | {kind: ["conv1"]}
    overrides = [f"model.{norm}.layers={names}" for norm, names in layers.items()]
    column = Column(load_config(overrides).model, 0)
    maps = (300 * torch.randn(2, 8, 15, 15, generator=torch.Generator().manual_seed(0))).half()
    found = []
    for x in (maps.float(), maps):
        leaf = x.clone().requires_grad_()
        out = column.maps("conv1", leaf * 1)
        out.float().sum().backward()
        assert out.dtype == leaf.grad.dtype == x.dtype  # type: ignore[union-attr]
        found.append((out, leaf.grad))
    for wide, narrow in zip(*found, strict=True):
        assert (narrow - wide).norm() < 0.01 * wide.norm()


def test_variants_are_config() -> None:
    x = torch.randn(2, 3, 67, 67)
    base = AlexNet(load_config(TINY).model).eval()(x)
    for override in (
        "model.activation=tanh",
        "model.activation=sigmoid",
        "model.pool=[2,2]",
        "model.pool_before_lrn=true",
        "model.lrn.layers=[]",
        "model.lrn.alpha=[0.01,0.0001]",
        "model.activation_last=[conv1]",
        "model.pool_average=[conv2]",
        "model.spatial_norm.layers=[conv2]",
        "model.lrn.k=1.0",
        "model.lrn.alpha_over_size=true",
        "model.dropout_scaling=train",
        "model.exchange=[conv2,conv3,conv4,conv5,fc6,fc7,fc8]",
    ):
        logits = AlexNet(load_config([*TINY, override]).model).eval()(x)
        assert logits.shape == base.shape
        assert not torch.equal(logits, base), override


def test_dropout_drops_in_training_and_scales_at_test() -> None:
    config = load_config([*TINY, "model.dropout=0.25"]).model
    model = AlexNet(config, seed=5)
    x, slots = torch.randn(64, 3, 67, 67), torch.arange(64)
    seen: list[torch.Tensor] = []
    model.fc7.register_forward_pre_hook(lambda m, i: seen.append(i[0][0].detach()))
    for training in (True, False):
        model.train(training)(x, slots, 3)
    dropped, scaled = seen
    alive = scaled > 0
    assert abs((dropped[alive] == 0).double().mean() - 0.25) < 0.05
    kept = alive & (dropped > 0)
    assert_close(dropped[kept] * 0.75, scaled[kept], 1e-6)
    model.train()(x, slots, 3)
    assert torch.equal(seen[2], dropped)


@pytest.mark.parametrize(("overrides", "conv3", "biases"), [
    ([], 0.01, [0, 1, 0, 1, 1, 1, 1, 0]),
    (["model.init_std=[.01,.01,.03,.03,.03,.01,.01,.01]"], 0.03, [0, 1, 0, 1, 1, 1, 1, 0]),
    (["model.init_bias=0.5"], 0.01, [0.5] * 8),
    (["model.init=he"], np.sqrt(2 / (256 * 9)), [0] * 8),
])  # fmt: skip
def test_initial_weights_follow_their_preset(
    overrides: list[str], conv3: float, biases: list[float]
) -> None:
    model = AlexNet(load_config([*overrides, "model.fc=[64,64]"]).model)
    assert abs(model.conv3.weight.std() / conv3 - 1) < 0.01
    assert [layer.bias.unique().tolist() for layer in model.layers()] == [[b] for b in biases]


@pytest.mark.parametrize("column", [0, 1])
def test_a_column_starts_as_its_rows_of_the_whole(column: int) -> None:
    config = load_config([*TINY, "model.classes=5"]).model
    whole, part = AlexNet(config, 3), AlexNet(config, 3, columns_here=[column])
    for name, parameter in part.named_parameters():
        rows = part.get_submodule(name.split(".")[0]).rows
        assert torch.equal(parameter, whole.get_parameter(name)[rows])


def test_shares_are_even_and_cover_all() -> None:
    for count in range(12):
        for columns in (1, 2, 3):
            parts = [share(count, column, columns) for column in range(columns)]
            assert [i for part in parts for i in range(count)[part]] == list(range(count))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


def test_a_network_whose_maps_vanish_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.crop=67.*nothing is left"):
        AlexNet(load_config([*TINY, "model.pool=[5,3]"]).model)


def test_labels_are_ranked_with_ties_to_the_lower_class_and_nan_last() -> None:
    nan = float("nan")
    scores = torch.tensor([[1.0, 3, 2], [2, 2, 2], [2, 2, 2], [nan, nan, nan], [nan, 1, 0]])
    labels = torch.tensor([2, 0, 2, 0, 1])
    assert label_ranks(scores, labels).tolist() == [1, 0, 2, 3, 1]


def test_the_network_compiles_as_one_graph() -> None:
    config = load_config([*TINY, "layout.kind=one"])
    model, slots = AlexNet(config.model, config.seed), torch.arange(4)
    windows = torch.randn(4, 3, 67, 67).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in (3, 4):
        found = []
        for network in (model, compiled):
            logits = network(windows, slots, step)
            logits.square().sum().backward()
            found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
        for eager, one in zip(*found, strict=True):
            assert_close(one, eager, 1e-5 * eager.abs().max().item())


def test_state_that_no_checkpoint_would_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(layer: Conv, *args: Any) -> None:
        made(layer, *args)
        layer.register_buffer("running_mean", torch.zeros(1))

    made = Conv.__init__
    monkeypatch.setattr(Conv, "__init__", build)
    with pytest.raises(AssertionError, match="only parameters are saved"):
        AlexNet(load_config(TINY).model)
