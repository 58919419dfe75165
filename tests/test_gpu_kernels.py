"""The GPU's kernels against the CPU's loops: on a GPU where there is one, else by Triton's
interpreter."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Statistics
from alexnet_dist.data.preprocess import Finish
from alexnet_dist.network import lrn, philox
from alexnet_dist.network.kernels import gpu
from alexnet_dist.network.lrn import local_response_norm
from alexnet_dist.network.model import AlexNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def normalised(dtype: torch.dtype) -> list[float]:
    """How far the kernels are from the formula in float64, forward and backward."""
    found = []
    for size in (3, 5, 9):
        maps, upper = (torch.randn(3, 22, 7, 5) * 50).to(dtype), torch.randn(3, 22, 7, 5).to(dtype)
        leaf = maps.double().requires_grad_()
        reference = local_response_norm(leaf, size, 1e-4, 0.75, 2.0)
        reference.backward(upper.double())
        constants = (size, 1e-4, 2.0)
        ours = gpu.lrn(maps.to(DEVICE), *constants)
        grad = gpu.lrn_backward(maps.to(DEVICE), upper.to(DEVICE), *constants)
        assert ours.dtype == grad.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        for mine, wide in ((ours, reference.detach()), (grad, leaf.grad)):
            found.append(float((mine.cpu() - wide).abs().max() / wide.abs().max()))
    return found


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_normalisation_is_the_formula(dtype: torch.dtype, bound: float) -> None:
    (found,) = on_ranks(1, normalised, dtype, fresh=True)
    assert len(found) == 6
    assert max(found) < bound


def compiled() -> list[float]:
    """As `normalised`, by torch.compile, where local_response_norm takes this for a GPU."""
    lrn.on_gpu = lambda maps, beta: maps.dtype == torch.float32
    maps, upper = torch.randn(2, 2, 22, 7, 5, device=DEVICE) * 50
    norm = torch.compile(local_response_norm, fullgraph=True, backend="aot_eager")
    found = []
    for dtype, function in ((torch.float32, norm), (torch.float64, local_response_norm)):
        leaf = maps.to(dtype, copy=True).requires_grad_()
        ours = function(leaf, 5, 1e-4, 0.75, 2.0)
        ours.backward(upper.to(dtype))
        found.append((ours.detach(), leaf.grad))
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True)]


def test_a_compiled_network_normalises_by_these_kernels() -> None:
    ((forward, backward),) = on_ranks(1, compiled, fresh=True)
    assert 0 < max(forward, backward) < 1e-6


def masks() -> list[bool]:
    same = []
    slots = torch.tensor([0, 1, 5, 2**20])
    slots = torch.stack([slots, slots + 1], dim=1)[:, 0]  # strided, as a micro-batch's may be
    for first, count, seed, step in ((0, 36, 0, 0), (17, 301, 2**32 - 1, 1), (6, 5, 7, 2**31)):
        for drop in (0.5, 0.1):
            ours = gpu.dropout_mask(
                slots.to(DEVICE), torch.tensor(step, device=DEVICE), 6, first, count, seed,
                int(philox.Purpose.DROPOUT), round(drop * 2**32),
            )  # fmt: skip
            assert ours.dtype == torch.bool
            cpus = philox.dropout_mask(seed, step, 6, slots, first, count, drop)
            same.append(torch.equal(ours.cpu(), cpus))
    return same


def test_masks_are_the_cpus_bits() -> None:
    assert on_ranks(1, masks, fresh=True) == [[True] * 6]


def same_windows(config: Config) -> list[bool]:
    rng, n, canvas, crop = np.random.default_rng(0), 3, config.data.canvas, config.model.crop
    mean = (rng.random((canvas, canvas, 3)) * 255).astype(np.float32)
    statistics = Statistics(mean, mean.mean((0, 1)), np.ones(3), np.eye(3))
    # The interpreter cuts bfloat16 off where a GPU rounds.
    narrow = [torch.bfloat16] if DEVICE == "cuda" else []
    same = []
    for dtype, views in itertools.product([torch.float32, torch.float64, *narrow], (1, 3)):
        finish = Finish(config, statistics, torch.device("cpu"), dtype)
        side = crop if views == 1 else canvas
        patches = torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), np.uint8))
        corners = torch.from_numpy(rng.integers(0, canvas - crop + 1, (n, views, 2)))
        flips = torch.from_numpy(rng.integers(0, 2, (n, views)).astype(bool))
        light = torch.randn(n, 3).to(finish.mean.dtype)
        inside = torch.zeros_like(corners) if views == 1 else corners
        given = (patches, inside, corners, flips, light)
        ours = gpu.windows(
            *(t.to(DEVICE) for t in (*given, finish.mean, finish.divide_by)), crop, dtype
        )
        same.append(torch.equal(ours.cpu(), finish.by_loop(*given)))
    return same


def test_windows_are_the_cpus_bits() -> None:
    config = load_config([*TINY, "model.crop=67", "data.divide_by=[58.4,57.1,57.4]"])
    (same,) = on_ranks(1, same_windows, config, fresh=True)
    assert len(same) >= 4
    assert all(same)


def test_the_network_of_a_gpu_is_one_graph_with_these_kernels() -> None:
    """Traced with tensors that only say that they are on a GPU."""
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(), torch.device("cuda"):
        model = AlexNet(load_config([]).model, drawn=False)
        x = torch.empty(4, 3, 227, 227).contiguous(memory_format=torch.channels_last)
        step = torch.zeros((), dtype=torch.int64)
        logits = torch.compile(model, fullgraph=True, backend=kept)(x, torch.arange(4), step)
    assert (logits.shape, logits.device.type) == ((4, 1000), "cuda")
    (graph,) = graphs
    called = Counter(str(node.target) for node in graph.graph.nodes)
    assert called["alexnet_dist.dropout_mask.default"] == 4  # two columns, before fc7 and fc8
    inner = [str(n.target) for m in graph.modules() if isinstance(m, torch.fx.GraphModule)
             for n in m.graph.nodes]  # fmt: skip
    assert inner.count("alexnet_dist.lrn.default") == 4  # two columns, after conv1 and conv2
    assert inner.count("alexnet_dist.lrn_backward.default") == 4
