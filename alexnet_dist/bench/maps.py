"""`bench maps`: bias, ReLU, normalisation and pooling of conv1's maps, forward and backward, beside
plain PyTorch and beside a copy of the maps; and normalisation alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.bench import Pass, Result, in_turn, machine, ratio
from alexnet_dist.bench.trainers import timed
from alexnet_dist.config.schema import Config
from alexnet_dist.network import kernels
from alexnet_dist.network.lrn import alpha_of, local_response_norm
from alexnet_dist.network.model import Column
from alexnet_dist.network.shapes import map_sides
from alexnet_dist.parallel.topology import connect

_Made = Callable[[Tensor, Tensor], Tensor]  # makes maps from a column's maps and its biases


def bench_maps(config: Config, repeats: int) -> Result:
    """Time ours in bf16 and fp32, torch's modules in fp32, and a copy of the maps, on a batch of
    maps as conv1 makes them, a tensor for each column: (batch, 48, 55, 55) in the paper's network.

    Returns:
        ratios of times (medians of pairs), ceilings (largest differences of gradients in fp32,
        relative to the largest gradient), machine, and every pass's seconds.
    """
    device, model = connect(config).device, config.model
    (side, _), *_ = map_sides(model)
    shape = (config.train.batch, model.conv[0] // model.columns, side, side)
    generator = torch.Generator().manual_seed(0)
    made = [(torch.randn(shape, generator=generator) * 30).to(device) for _ in range(model.columns)]
    biases = torch.randn(shape[1], generator=generator).to(device)
    ours, plain, our_lrn, plain_lrn = _makers(config, device)
    passes: dict[str, Pass] = {
        "plain, fp32": _timed(plain, made, biases),
        "LRN, plain, fp32": _timed(plain_lrn, made, biases),
    }
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        narrow = [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in made]
        passes |= {
            f"ours, {precision}": _timed(ours, narrow, biases),
            f"LRN, ours, {precision}": _timed(our_lrn, narrow, biases),
            f"a copy of the maps, {precision}": _copied(narrow),
        }
    differences = {}
    for name, one, other in (("maps", ours, plain), ("LRN", our_lrn, plain_lrn)):
        pairs = zip(_gradients(one, made[0], biases), _gradients(other, made[0], biases),
                    strict=True)  # fmt: skip
        differences[f"{name}, largest difference of gradients"] = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in pairs
        )
    runs = in_turn(passes, repeats)

    ratios = {}
    for kind in ("", "LRN, "):
        for precision in ("bf16", "fp32"):
            mine, theirs = f"{kind}ours, {precision}", f"{kind}plain, fp32"
            ratios[f"{theirs} / {mine}"] = ratio(runs, theirs, mine)
            ratios[f"{mine} / a copy"] = ratio(runs, mine, f"a copy of the maps, {precision}")
    return {
        "ratios": ratios,
        "ceilings": differences,
        "machine": machine(config.data.workers),
        "unit": "seconds",
        "runs": runs,
    }


def _makers(config: Config, device: torch.device) -> tuple[_Made, _Made, _Made, _Made]:
    """Return what makes maps from those of conv1: ours and torch's, and either LRN alone."""
    model = config.model
    column, lrn = Column(model, 0), model.lrn
    alpha = alpha_of(lrn, "conv1") if "conv1" in lrn.layers else 1e-4
    torchs = nn.LocalResponseNorm(lrn.size, alpha * lrn.size, lrn.beta, lrn.k)
    normal = torchs if "conv1" in lrn.layers else nn.Identity()
    pool = nn.MaxPool2d(model.pool[0], model.pool[1], ceil_mode=model.round_up)
    layers: list[Any] = [pool, normal] if model.pool_before_lrn else [normal, pool]
    activation = getattr(F, model.activation)
    layers.insert(2 if "conv1" in model.activation_last else 0, activation)

    fused = kernels.fused(config.train.execution, device)

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        if fused:
            return column.maps("conv1", x, bias)
        return column.maps("conv1", x + bias[:, None, None].to(x.dtype))

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        made = x + bias[:, None, None]
        for layer in layers:
            made = layer(made)
        return made

    def our_lrn(x: Tensor, bias: Tensor) -> Tensor:
        if fused:
            from alexnet_dist.network.kernels.maps import maps

            return maps(x, None, None, (lrn.size, alpha, lrn.beta, lrn.k))
        return local_response_norm(x, lrn.size, alpha, lrn.beta, lrn.k)

    def plain_lrn(x: Tensor, bias: Tensor) -> Tensor:
        normalised: Tensor = torchs(x)
        return normalised

    return ours, plain, our_lrn, plain_lrn


def _gradients(
    make: _Made, maps: Tensor, biases: Tensor, upper: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients of the maps, and of the biases if they are used, given the gradient of
    the result (by default noise)."""
    leaves = [maps.detach().requires_grad_(), biases.detach().requires_grad_()]
    out = make(*leaves)
    out.backward(_upper(out) if upper is None else upper)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def _upper(out: Tensor) -> Tensor:
    """Return noise of a tensor's shape, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out.device, out.dtype)


def _timed(make: _Made, maps: list[Tensor], biases: Tensor) -> Pass:
    """Return a pass over every column's maps, forward and backward."""
    with torch.no_grad():
        out = make(maps[0], biases)
    upper = torch.empty_like(out).copy_(_upper(out))

    def work() -> Tensor:
        return [_gradients(make, x, biases, upper) for x in maps][-1][0]

    return timed(work, maps[0].device)


def _copied(maps: list[Tensor]) -> Pass:
    """Return a pass that copies the maps."""
    outs = [torch.empty_like(x) for x in maps]

    def work() -> Tensor:
        return [out.copy_(x) for x, out in zip(maps, outs, strict=True)][-1]

    return timed(work, maps[0].device)
