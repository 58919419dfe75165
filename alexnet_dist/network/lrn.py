"""Local response normalisation across adjacent maps (paper §3.3), forward and backward.

b = a · d^−β with d = k + α Σ a², summed over n adjacent maps. Here the sum is a product with a
banded matrix of ones, which in channels_last reads each pixel's maps once. On a CPU, in bf16 and
float32 and with the paper's β of ¾, `lrn_cpu` does it all in one pass; on a GPU `kernels.maps`
does, fused with bias, activation and pooling.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_dist.config.schema import LrnConfig
from alexnet_dist.network.kernels import lrn_cpu


def band(maps: Tensor, size: int) -> Tensor:
    """Return the banded matrix, (channels, channels), with ones where two maps are neighbours.

    Args:
        maps: (n, channels, h, w).
        size: number of maps that are summed, odd.
    """
    index = torch.arange(maps.shape[1], device=maps.device)
    return ((index[:, None] - index[None, :]).abs() <= size // 2).to(maps.dtype)


def constants_of(config: LrnConfig, layer: str) -> tuple[int, float, float, float] | None:
    """Return (n, α, β, k) for a layer; None if it is not among `config.layers`."""
    if layer not in config.layers:
        return None
    return config.size, alpha_of(config, layer), config.beta, config.k


def alpha_of(config: LrnConfig, layer: str) -> float:
    """Return the factor of the sum of squares for a layer that is among `config.layers`."""
    alpha = config.alpha[config.layers.index(layer) if len(config.alpha) > 1 else 0]
    return alpha / config.size if config.alpha_over_size else alpha


def local_response_norm(maps: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Normalise a column's maps, each over `size` adjacent ones.

    Args:
        maps: (n, channels, h, w); kept in channels_last.
        size: n, odd.
        alpha: the factor of the sum of squares; pass α / n where α is to be divided by n.
    """
    if torch.compiler.is_exporting():  # with operators that every export format has
        near = band(maps, size)
        sums = F.conv2d(maps * maps, near[:, :, None, None])
        return maps * (k + alpha * sums).pow(-beta)
    if maps.dtype == torch.float16:  # in which squares may be too large
        return local_response_norm(maps.float(), size, alpha, beta, k).half()
    return _LocalResponseNorm.apply(maps, size, alpha, beta, k)  # type: ignore[no-any-return]


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.save_for_backward(maps)
        ctx.constants = (size, alpha, beta, k)
        if _on_cpu(maps, beta):
            return lrn_cpu.forward(maps, size, alpha, k)
        near = band(maps, size)
        a = _rows(maps)
        return _maps((a * _power(_denominator(a, near, alpha, k), beta)).to(a.dtype), maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (maps,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.constants
        if _on_cpu(maps, beta):
            out = lrn_cpu.backward(maps, grads[0], size, alpha, k)
            return out, None, None, None, None
        near = band(maps, size)
        a, g = _rows(maps), _rows(grads[0])
        # db_i/da_j = [i=j] d_i^−β − 2αβ a_i a_j d_i^(−β−1), where i and j are neighbours
        d = _denominator(a, near, alpha, k)
        scaled = g * _power(d, beta)
        crossed = (scaled * a / d).to(a.dtype) @ near
        out = scaled.addcmul_(a, crossed, value=-2 * alpha * beta).to(a.dtype)
        return _maps(out, maps), None, None, None, None


def _on_cpu(maps: Tensor, beta: float) -> bool:
    """Whether the CPU loop can compute this."""
    values = type(maps) is Tensor  # not a fake tensor, as `plan` uses
    return values and lrn_cpu.fits(maps, beta) and not torch.compiler.is_compiling()


def _denominator(a: Tensor, near: Tensor, alpha: float, k: float) -> Tensor:
    """Return d = k + α Σ a², at least in float32: in bf16 the sum would be lost beside k."""
    squares = (a * a) @ near
    if squares.dtype == torch.bfloat16:
        squares = squares.float()
    return squares.mul_(alpha).add_(k)


def _power(d: Tensor, beta: float) -> Tensor:
    """Return d^−β; for the paper's ¾ with two square roots, many times faster than `pow`."""
    if beta != 0.75:
        return d.pow(-beta)
    root = d.rsqrt()
    return root.sqrt().mul_(root)


def _rows(maps: Tensor) -> Tensor:
    """(n, channels, h, w) to (pixels, channels)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """(pixels, channels) to (n, channels, h, w), in channels_last."""
    n, channels, h, w = like.shape
    return rows.view(n, h, w, channels).permute(0, 3, 1, 2)
