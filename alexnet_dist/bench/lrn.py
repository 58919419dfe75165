"""Local response normalisation, forward and backward, beside nn.LocalResponseNorm."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_dist.bench import Pass, in_turn, machine, ratio
from alexnet_dist.config.schema import Config
from alexnet_dist.network.lrn import alpha_of, local_response_norm
from alexnet_dist.parallel.topology import connect


def bench_lrn(config: Config, repeats: int) -> dict[str, Any]:
    """On a column's maps of conv1's size (batch, 48, 55, 55 for the paper's network): ours in bf16
    and fp32, torch's in fp32, and a copy of the maps.

    Returns:
        ratios (medians of pairs), the largest difference between fp32's gradients relative to the
        largest, machine, and every pass's seconds.
    """
    device, lrn = connect(config).device, config.model.lrn
    side = (config.model.crop - config.model.kernel[0]) // config.model.stride[0] + 1
    shape = (config.train.batch, config.model.conv[0] // config.model.columns, side, side)
    alpha = alpha_of(lrn, "conv1") if "conv1" in lrn.layers else 1e-4
    torchs = nn.LocalResponseNorm(lrn.size, alpha * lrn.size, lrn.beta, lrn.k)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator).relu_().mul_(30).to(device)
    upper = torch.randn(shape, generator=generator).to(device)
    last = torch.channels_last
    narrow, narrow_upper = (t.bfloat16().contiguous(memory_format=last) for t in (maps, upper))
    wide, wide_upper = (t.contiguous(memory_format=last) for t in (maps, upper))

    def ours(x: Tensor) -> Tensor:
        return local_response_norm(x, lrn.size, alpha, lrn.beta, lrn.k)

    passes: dict[str, Pass] = {
        "ours, bf16": _timed(ours, narrow, narrow_upper),
        "ours, fp32": _timed(ours, wide, wide_upper),
        "nn.LocalResponseNorm, fp32": _timed(torchs, maps, upper),
        "a copy of the maps, bf16": _copied(narrow),
        "a copy of the maps, fp32": _copied(wide),
    }
    difference = _gradient(ours, wide, wide_upper) - _gradient(torchs, maps, upper)
    runs = in_turn(passes, repeats)

    reference = "nn.LocalResponseNorm, fp32"

    return {
        "ratios": {
            f"{reference} / ours, bf16": ratio(runs, reference, "ours, bf16"),
            f"{reference} / ours, fp32": ratio(runs, reference, "ours, fp32"),
            "ours, bf16 / a copy": ratio(runs, "ours, bf16", "a copy of the maps, bf16"),
            "ours, fp32 / a copy": ratio(runs, "ours, fp32", "a copy of the maps, fp32"),
        },
        "ceilings": {"largest difference of gradients": float(difference.abs().max())},
        "machine": machine(config.data.workers),
        "unit": "seconds",
        "runs": runs,
    }  # fmt: skip


def _gradient(norm: Any, maps: Tensor, upper: Tensor) -> Tensor:
    leaf = maps.detach().requires_grad_()
    norm(leaf).backward(upper)
    assert leaf.grad is not None
    return leaf.grad


def _timed(norm: Any, maps: Tensor, upper: Tensor) -> Pass:
    def run() -> float:
        begin = time.perf_counter()
        _gradient(norm, maps, upper)
        _wait(maps)
        return time.perf_counter() - begin

    return run


def _copied(maps: Tensor) -> Pass:
    out = torch.empty_like(maps)

    def run() -> float:
        begin = time.perf_counter()
        out.copy_(maps)
        _wait(maps)
        return time.perf_counter() - begin

    return run


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
