"""Local response normalisation against the printed formula, forward and backward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, on_ranks

from alexnet_dist.network.lrn import local_response_norm

CONSTANTS = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}


def printed_formula(
    maps: np.ndarray, columns: int, size: int, alpha: float, beta: float, k: float
) -> np.ndarray:
    """b_i = a_i / (k + α Σ_j a_j²)^β for j from max(0, i−n/2) to min(N−1, i+n/2), a column each."""
    out = np.empty_like(maps)
    per_column = maps.shape[1] // columns
    for i in range(maps.shape[1]):
        first = i // per_column * per_column
        low, high = max(first, i - size // 2), min(first + per_column - 1, i + size // 2)
        total = sum(maps[:, j] ** 2 for j in range(low, high + 1))
        out[:, i] = maps[:, i] / (k + alpha * total) ** beta
    return out


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_forward_is_the_printed_formula(columns: int, scale: float) -> None:
    maps = torch.randn(2, 12, 3, 4, dtype=torch.float64) * scale
    ours = local_response_norm(maps, columns, **CONSTANTS)
    assert_close(ours, printed_formula(maps.numpy(), columns, **CONSTANTS), 1e-13 * scale)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_backward_is_the_derivative(columns: int, beta: float) -> None:
    maps = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)

    def norm(a: torch.Tensor) -> torch.Tensor:
        return local_response_norm(a, columns, size=5, alpha=0.3, beta=beta, k=1.5)

    assert torch.autograd.gradcheck(norm, (maps,))


def test_a_divided_by_n_is_torchs_meaning() -> None:
    maps = torch.randn(2, 96, 5, 5, dtype=torch.float64) * 50
    reference = torch.nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)(maps)
    assert_close(local_response_norm(maps, 1, 5, 1e-4 / 5, 0.75, 2.0), reference, 1e-12)


def test_columns_change_exactly_the_maps_at_their_border() -> None:
    maps = torch.randn(1, 96, 4, 4, dtype=torch.float64) * 50
    one, two = (local_response_norm(maps, columns, **CONSTANTS) for columns in (1, 2))
    changed = (one != two).flatten(2).any(2)[0].nonzero().flatten().tolist()
    assert changed == [46, 47, 48, 49]


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize(("columns", "size"), [(1, 5), (2, 5), (2, 3), (1, 9)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_the_cpus_loop_is_the_formula(
    columns: int, size: int, dtype: torch.dtype, bound: float
) -> None:
    constants = CONSTANTS | {"size": size}
    maps = (torch.randn(3, 16, 7, 5) * 50).to(dtype).requires_grad_()  # not in channels_last
    wide = maps.detach().double().requires_grad_()
    upper = torch.randn(maps.shape).to(dtype)
    ours, reference = (local_response_norm(m, columns, **constants) for m in (maps, wide))
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
    wrong = ~local_response_norm(maps, 1, **CONSTANTS).isfinite()
    assert wrong[0, 8, 1, 1]
    wrong[0, 6:11, 1, 1] = False  # itself and its neighbours
    assert not wrong.any()


def test_bf16_is_near_float64() -> None:
    maps = (torch.randn(2, 96, 9, 9) * 30).bfloat16().requires_grad_()
    ours = local_response_norm(maps, 2, **CONSTANTS)
    wide = maps.detach().double().requires_grad_()
    reference = local_response_norm(wide, 2, **CONSTANTS)
    assert ours.dtype == torch.bfloat16
    assert ((ours - reference).abs() <= 2**-7 * reference.abs()).all()
    gradient = torch.randn_like(reference)
    ours.backward(gradient.bfloat16())
    reference.backward(gradient)
    assert_close(maps.grad.double(), wide.grad, 0.02)


def gradient() -> bytes:
    torch.manual_seed(0)
    maps = (torch.randn(4, 96, 13, 13) * 30).contiguous(memory_format=torch.channels_last)
    leaf = maps.requires_grad_()
    local_response_norm(leaf, 2, **CONSTANTS).backward(torch.randn(maps.shape))
    return leaf.grad.numpy().tobytes()


def test_the_loop_that_is_compiled_and_the_one_that_is_loaded_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (compiled,) = on_ranks(1, gradient)
    assert list(tmp_path.rglob("*.nbc"))
    (loaded,) = on_ranks(1, gradient)
    assert compiled == loaded
