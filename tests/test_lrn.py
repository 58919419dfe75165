"""Local response normalisation against the printed formula, forward and backward."""

from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from conftest import assert_close, on_ranks

from alexnet_dist.network.lrn import local_response_norm

CONSTANTS = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}


def printed_formula(maps: np.ndarray, size: int, alpha: float, beta: float, k: float) -> np.ndarray:
    """b_i = a_i / (k + α Σ_j a_j²)^β for j from max(0, i−n/2) to min(N−1, i+n/2)."""
    out = np.empty_like(maps)
    for i in range(maps.shape[1]):
        low, high = max(0, i - size // 2), min(maps.shape[1] - 1, i + size // 2)
        total = sum(maps[:, j] ** 2 for j in range(low, high + 1))
        out[:, i] = maps[:, i] / (k + alpha * total) ** beta
    return out


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_forward_is_the_printed_formula(scale: float) -> None:
    maps = torch.randn(2, 12, 3, 4, dtype=torch.float64) * scale
    ours = local_response_norm(maps, **CONSTANTS)
    assert_close(ours, printed_formula(maps.numpy(), **CONSTANTS), 1e-13 * scale)


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_backward_is_the_derivative(beta: float) -> None:
    maps = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)

    def norm(a: torch.Tensor) -> torch.Tensor:
        return local_response_norm(a, size=5, alpha=0.3, beta=beta, k=1.5)

    assert torch.autograd.gradcheck(norm, (maps,))


def test_a_divided_by_n_is_torchs_meaning() -> None:
    maps = torch.randn(2, 96, 5, 5, dtype=torch.float64) * 50
    reference = torch.nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)(maps)
    assert_close(local_response_norm(maps, 5, 1e-4 / 5, 0.75, 2.0), reference, 1e-12)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("size", [3, 5, 9])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_the_cpus_loop_is_the_formula(size: int, dtype: torch.dtype, bound: float) -> None:
    constants = CONSTANTS | {"size": size}
    maps = (torch.randn(3, 16, 7, 5) * 50).to(dtype).requires_grad_()  # not in channels_last
    wide = maps.detach().double().requires_grad_()
    upper = torch.randn(maps.shape).to(dtype)
    ours, reference = (local_response_norm(m, **constants) for m in (maps, wide))
    ours.backward(upper)
    reference.backward(upper.double())
    assert ours.dtype == maps.grad.dtype == dtype
    assert relative(ours, reference) < bound
    assert relative(maps.grad, wide.grad) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_where_it_is(dtype: torch.dtype, value: float) -> None:
    maps = torch.ones(1, 16, 2, 2, dtype=dtype)
    maps[0, 8, 1, 1] = value
    wrong = ~local_response_norm(maps, **CONSTANTS).isfinite()
    assert wrong[0, 8, 1, 1]
    wrong[0, 6:11, 1, 1] = False  # itself and its neighbours
    assert not wrong.any()


def test_bf16_is_near_float64() -> None:
    maps = (torch.randn(2, 96, 9, 9) * 30).bfloat16().requires_grad_()
    ours = local_response_norm(maps, **CONSTANTS)
    wide = maps.detach().double().requires_grad_()
    reference = local_response_norm(wide, **CONSTANTS)
    assert ours.dtype == torch.bfloat16
    assert ((ours - reference).abs() <= 2**-7 * reference.abs()).all()
    gradient = torch.randn_like(reference)
    ours.backward(gradient.bfloat16())
    reference.backward(gradient)
    assert_close(maps.grad.double(), wide.grad, 0.02)


def gradient(cache: str) -> bytes:
    numba.config.CACHE_DIR = cache
    torch.manual_seed(0)
    maps = (torch.randn(4, 96, 13, 13) * 30).contiguous(memory_format=torch.channels_last)
    leaf = maps.requires_grad_()
    local_response_norm(leaf, **CONSTANTS).backward(torch.randn(maps.shape))
    return leaf.grad.numpy().tobytes()


def test_the_loop_that_is_compiled_and_the_one_that_is_loaded_give_the_same_bits(
    tmp_path: Path,
) -> None:
    (compiled,) = on_ranks(1, gradient, str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))
    (loaded,) = on_ranks(1, gradient, str(tmp_path))
    assert compiled == loaded
