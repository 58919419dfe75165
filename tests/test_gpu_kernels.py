"""The GPU kernels against the CPU loops: on a GPU if there is one, else by Triton's interpreter."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, by_kernels

from alexnet_dist.config.load import load_config
from alexnet_dist.data.dataset import Statistics
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.engines.base import loss_and_counts
from alexnet_dist.network import philox
from alexnet_dist.network.kernels import scores, units, windows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each function here that launches kernels finds, by its name."""
    return by_kernels(all_of_them, tmp_path_factory.mktemp("triton"))


def all_of_them() -> dict[str, Any]:
    functions = (masks, same_windows, scores_apart)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_ROWS", 16)  # so that a small batch is summed in several parts
        return {function.__name__: function() for function in functions}


def masks() -> list[bool]:
    same = []
    slots = torch.tensor([0, 1, 5, 2**20])
    slots = torch.stack([slots, slots + 1], dim=1)[:, 0]  # strided, as a micro-batch's may be
    for first, count, seed, step in ((0, 36, 0, 0), (17, 301, 2**32 - 1, 1), (6, 5, 7, 2**31)):
        for drop in (0.5, 0.1):
            ours = units.dropout_mask(
                slots.to(DEVICE), torch.tensor(step, device=DEVICE), 6, first, count, seed,
                round(drop * 2**32),
            )  # fmt: skip
            assert ours.dtype == torch.bool
            cpus = philox.dropout_mask(seed, step, 6, slots, first, count, drop)
            same.append(torch.equal(ours.cpu(), cpus))
    return same


def test_masks_are_the_cpus_bits(found: dict[str, Any]) -> None:
    assert found["masks"] == [True] * 6


def same_windows() -> list[bool]:
    config = load_config([*TINY, "data.divide_by=[58.4,57.1,57.4]"])
    # As small as has several blocks, the last of them not full: each costs the interpreter.
    model, data = replace(config.model, crop=19), replace(config.data, canvas=23)
    config = replace(config, model=model, data=data)
    rng, n, canvas, crop = np.random.default_rng(0), 3, config.data.canvas, config.model.crop
    mean = (rng.random((canvas, canvas, 3)) * 255).astype(np.float32)
    statistics = Statistics(mean, mean.mean((0, 1)), np.ones(3), np.eye(3))
    # The interpreter cuts bfloat16 off where a GPU rounds.
    narrow = [torch.bfloat16] if DEVICE == "cuda" else []
    same = []
    for dtype, views in itertools.product([torch.float32, torch.float64, *narrow], (1, 3)):
        preprocess = Preprocess(config, statistics, torch.device("cpu"), dtype)
        side = crop if views == 1 else canvas
        patches = torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), np.uint8))
        corners = torch.from_numpy(rng.integers(0, canvas - crop + 1, (n, views, 2)))
        flips = torch.from_numpy(rng.integers(0, 2, (n, views)).astype(bool))
        light = torch.randn(n, 3).to(preprocess.mean.dtype)
        inside = torch.zeros_like(corners) if views == 1 else corners
        given = (patches, torch.randperm(n), inside, corners, flips, light)
        there = [t.to(DEVICE) for t in (*given, preprocess.mean, preprocess.divide_by)]
        ours = functools.partial(windows.windows, crop=crop, dtype=dtype)(*there)
        same.append(torch.equal(ours.cpu(), preprocess.by_loop(*given)))
    return same


def test_windows_are_the_cpus_bits(found: dict[str, Any]) -> None:
    assert len(found["same_windows"]) >= 4
    assert all(found["same_windows"])


def scores_apart() -> list[float]:
    """How far loss, counts and gradients are from torch's operators, each relative to its bound."""
    found, generator = [], torch.Generator().manual_seed(0)
    # The logarithm of the sum is rounded beside the largest score.
    bounds = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-7}
    for (dtype, bound), (n, classes) in itertools.product(
        bounds.items(), ((1, 2), (5, 7), (37, 10), (4, 1000))
    ):
        logits = (torch.randn(n, classes, generator=generator) * 9).to(dtype)
        logits[0] = logits[0, 0]  # a tie
        labels = torch.randint(classes, (n,), generator=generator)
        made = []
        for fused in (False, True):
            leaf = logits.to(DEVICE, copy=True).requires_grad_()
            loss, counts = loss_and_counts(leaf, labels.to(DEVICE), fused)
            (loss * 0.3).backward()
            assert leaf.grad is not None
            made.append((counts.cpu(), leaf.grad.double().cpu(), loss.detach().cpu()))
        (plain, plain_grad, loss), (ours, our_grad, our_loss) = made
        assert torch.equal(plain[1:], ours[1:]), (dtype, n, classes)
        assert our_loss.dtype == loss.dtype
        found.append(float((ours[0] - plain[0]).abs() / plain[0].abs() / min(bound, 1e-6)))
        found.append(float((our_grad - plain_grad).abs().max() / plain_grad.abs().max() / bound))
    logits = torch.randn(4, 9)
    logits[0, 3], logits[1, 0] = float("nan"), float("inf")
    labels = torch.tensor([3, 1, 2, 8])
    _, counts = loss_and_counts(logits.to(DEVICE), labels.to(DEVICE), True)
    expected = loss_and_counts(logits, labels)[1]
    assert counts.cpu().isnan().tolist() == expected.isnan().tolist() == [True, False, False]
    assert torch.equal(counts[1:].cpu(), expected[1:])
    return found


def test_scores_are_those_of_operators(found: dict[str, Any]) -> None:
    assert len(found["scores_apart"]) == 24
    assert max(found["scores_apart"]) <= 1
