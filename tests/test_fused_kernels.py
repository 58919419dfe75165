"""The fused kernels against plain torch in float64: on a GPU if there is one, else by Triton's
interpreter, which truncates to bfloat16 where a GPU rounds."""

import io
import itertools
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, by_kernels, on_ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_dist.bench import sweep
from alexnet_dist.bench.sweep import Grid
from alexnet_dist.config.load import load_config
from alexnet_dist.engines.base import skip_flag
from alexnet_dist.network import philox
from alexnet_dist.network.kernels import pooled, pooled_backward
from alexnet_dist.network.kernels import units as units_module
from alexnet_dist.network.kernels.lanes import sum_rows
from alexnet_dist.network.kernels.maps import maps
from alexnet_dist.network.kernels.units import units
from alexnet_dist.network.kernels.update import sgd_update
from alexnet_dist.network.kernels.windows import fold
from alexnet_dist.parallel import environment

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
# A value is rounded once: cut off, it may lose a whole unit in the last place.
EPS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
THIRDS = [*itertools.product(EPS, range(3))]  # of all_maps, each a process on a GPU
# Functions here that launch kernels, besides all_maps.
OTHERS = (
    "same_places", "all_units", "sums", "swept", "updated", "judgements", "folded", "strangers",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each function here that launches kernels finds, by its name."""
    cache = tmp_path_factory.mktemp("triton")
    if not torch.cuda.is_available():
        return by_kernels(all_of_them, cache)
    # A core would compile for minutes: a process for each third of maps of each type, and one for
    # each function.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        shares = on_ranks(len(THIRDS) + len(OTHERS), a_share, fresh=True)
    found = {name: made for share in shares for name, made in share.items()}
    return found | {"all_maps": [case for share in shares for case in share.get("all_maps", [])]}


def all_of_them() -> dict[str, Any]:
    return {name: globals()[name]() for name in ("all_maps", *OTHERS)}


def a_share() -> dict[str, Any]:
    """What a rank finds by its share of the functions, each of which is of one process."""
    rank = int(os.environ.pop("RANK"))
    if rank < len(THIRDS):
        dtype, first = THIRDS[rank]
        return {"all_maps": all_maps([dtype], slice(first, None, 3))}
    name = OTHERS[rank - len(THIRDS)]
    return {name: globals()[name]()}


def plain_maps(
    x: Tensor, bias: Tensor | None, activation: str | None,
    lrn: tuple[int, float, float, float] | None, pool: tuple[int, int, bool] | None,
    activation_last: bool = False,
) -> Tensor:  # fmt: skip
    """What `maps` says, in torch's operators."""
    f: Callable[[Tensor], Tensor] = getattr(torch, activation) if activation else lambda a: a
    a = x if bias is None else x + bias[None, :, None, None]
    a = a if activation_last else f(a)
    if lrn:
        size, alpha, beta, k = lrn
        near = F.pad(a * a, (0, 0, 0, 0, size // 2, size // 2)).unfold(1, size, 1).sum(-1)
        a = a * (k + alpha * near) ** -beta
    if pool:
        a = F.max_pool2d(a, pool[0], pool[1], ceil_mode=pool[2])
    return f(a) if activation_last else a


def apart(ours: Tensor, wide: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours.cpu().double() - wide).abs().max() / wide.abs().max())


def leaves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x on the device, and in float64 on the CPU; both ask for a gradient."""
    return x.to(DEVICE, copy=True).requires_grad_(), x.to(torch.float64, copy=True).requires_grad_()


def compared(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], x: Tensor, bias: Tensor | None
) -> list[float]:
    """How far y, dx and db are from those of float64, in units of what their types allow."""
    leaf, wide = leaves(x)
    b, wide_b = (None, None) if bias is None else leaves(bias)
    y, reference = ours(leaf, b), plain(wide, wide_b)
    upper = torch.randn(y.shape).to(x.dtype)
    y.backward(upper.to(DEVICE))
    reference.backward(upper.double())
    assert (y.dtype, y.shape) == (x.dtype, reference.shape)
    pairs = [(y.detach(), reference.detach()), (leaf.grad, wide.grad)]
    found = [apart(mine, theirs) / EPS[x.dtype] for mine, theirs in pairs]
    if b is not None:
        assert b.grad.dtype == b.dtype
        found.append(
            apart(b.grad, wide_b.grad) / max(EPS[b.dtype], 2e-6 if b.dtype == torch.float32 else 0)
        )
    return found


PAPER, POOL = (5, 1e-2, 0.75, 2.0), (3, 2, False)
MAPS: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [  # n, channels, h, w; as `maps` takes them
    ((2, 12, 3, 3), (None, PAPER, None)),  # the normalisation alone
    ((2, 16, 7, 9), ("relu", PAPER, POOL)),
    ((1, 96, 5, 5), ("relu", PAPER, (3, 2, True))),
    ((1, 22, 8, 6), ("relu", (3, 1e-2, 0.5, 1.0), (3, 2, True))),
    ((1, 8, 9, 8), ("relu", (9, 1e-2, 1.0, 1.0), (2, 2, True))),
    ((2, 7, 6, 5), ("sigmoid", (9, 1e-2, 0.6, 2.0), (2, 2, False))),
    ((1, 3, 6, 7), ("tanh", (3, 1e-2, 0.75, 1.0), (3, 1, False))),
    ((2, 10, 8, 8), ("relu", (1, 1e-2, 0.75, 2.0), (2, 3, True))),
    ((1, 8, 11, 12), ("relu", None, (5, 2, True))),
    ((1, 6, 7, 7), (None, None, (3, 2, False))),
    ((3, 33, 3, 3), ("relu", PAPER, None)),
    ((1, 24, 5, 7), ("tanh", None, None)),
    ((2, 8, 5, 5), ("relu", PAPER, POOL, True)),
]


def all_maps(
    dtypes: Sequence[torch.dtype] = (*EPS,), cases: slice = slice(None)
) -> list[tuple[int, torch.dtype, list[float]]]:
    """By so few programs that a backward takes several steps in each, as with many pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled_backward, "PROGRAMS", 2)
        return list(_all_maps(dtypes, cases))


def _all_maps(
    dtypes: Sequence[torch.dtype], cases: slice
) -> Iterator[tuple[int, torch.dtype, list[float]]]:
    for case, (shape, of) in [*enumerate(MAPS)][cases]:
        for dtype in dtypes if case < 4 else [one for one in dtypes if one in list(EPS)[:3]]:
            torch.manual_seed(case)  # the same values by the interpreter and in each process
            # Smaller for tanh and sigmoid: of values that are 1 to float32, another is the largest.
            scale = 3 if of[0] in (None, "relu") else 1
            x = (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).to(memory_format=LAST)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            bias = None if of[0] is None else torch.randn(shape[1], dtype=wide)

            def ours(x: Tensor, b: Tensor | None, of: Any = of) -> Tensor:
                y = maps(x, b, *of)
                assert y.is_contiguous(memory_format=LAST)
                return y

            def plain(x: Tensor, b: Tensor | None, of: Any = of) -> Tensor:
                return plain_maps(x, b, *of)

            yield case, dtype, compared(ours, plain, x, bias)


def test_a_rank_of_the_tests_on_a_gpu_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions may ask for layouts of one process."""
    monkeypatch.setenv("WORLD_SIZE", f"{len(THIRDS) + len(OTHERS)}")
    monkeypatch.setitem(globals(), OTHERS[0], environment.place)
    monkeypatch.setenv("RANK", f"{len(THIRDS)}")
    assert a_share() == {OTHERS[0]: None}


def test_maps_are_the_formula(found: dict[str, Any]) -> None:
    of_maps = found["all_maps"]
    assert len(of_maps) == 3 * len(MAPS) + 4
    # Where the activation is last there are two roundings, and a slope from a rounded value.
    far = [(MAPS[case], dtype, of) for case, dtype, of in of_maps
           if max(of) > (3 if case == len(MAPS) - 1 else 1)]  # fmt: skip
    assert not far


def same_places() -> list[tuple[str, torch.dtype, bool]]:
    """Pooling of few values, and of NaN, to the bit as torch's."""
    torch.manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for activation in (None, "relu"):
            for pool in ((3, 2, False), (3, 1, True), (2, 2, True)):
                x = torch.randint(-2, 3, (1, 8, 7, 8)).to(dtype).to(memory_format=LAST)
                ours, plain = leaves(x)
                y = maps(ours, None, activation, None, pool)
                wanted = plain_maps(plain, None, activation, None, pool)
                upper = torch.randint(1, 9, y.shape).to(dtype)
                y.backward(upper.to(DEVICE))
                wanted.backward(upper.double())
                same = torch.equal(y.detach().cpu().double(), wanted.detach())
                found.append(
                    ("ties", dtype, same and torch.equal(ours.grad.cpu().double(), plain.grad))
                )
        x = torch.randn(1, 8, 9, 9).to(dtype).to(memory_format=LAST)
        x[0, 3, 4, 4] = x[0, 5, 2, 2] = x[0, 5, 2, 3] = float("nan")
        x[0, 6, 0, 0] = float("inf")
        for activation in (None, "relu"):
            y = maps(x.to(DEVICE), None, activation, None, (3, 2, False)).cpu()
            wanted = plain_maps(x.double(), None, activation, None, (3, 2, False))
            same = torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
            found.append(("NaN", dtype, same and bool(y.isnan().any())))
    return found


def test_pooling_takes_the_first_of_equals_and_keeps_nan(found: dict[str, Any]) -> None:
    assert len(found["same_places"]) == 2 * 8
    assert [case for case in found["same_places"] if not case[2]] == []


def sums() -> list[tuple[tuple[int, int], torch.dtype, float]]:
    torch.manual_seed(0)
    found = []
    for shape in ((2112, 48), (16, 300), (1, 5), (513, 7), (3, 0)):
        for dtype in (torch.float32, torch.float64):
            parts = torch.randn(shape, dtype=dtype)
            ours = sum_rows(parts.to(DEVICE))
            assert (ours.dtype, ours.shape) == (dtype, shape[1:])
            far = apart(ours, parts.double().sum(0)) if len(ours) else 0.0
            found.append((shape, dtype, far / EPS[dtype]))
    return found


def test_rows_of_partial_sums_are_summed(found: dict[str, Any]) -> None:
    assert len(found["sums"]) == 10
    assert [case for case in found["sums"] if case[2] > 2] == []


SWEPT: dict[str, Grid] = {
    "conv1": {"pooled._AHEAD": (0, 3)},
    "conv1 backward": {"pooled_backward.PROGRAMS": (3, pooled_backward.PROGRAMS)},
    "conv3": {"maps._EACH": (0, 1, 4)},  # 0 is impossible
    "conv3 backward": {"maps._EACH": (1, 4)},
    "fc6": {"units._FOURS": (32, 64)},
    "fc6 backward": {"units._ROWS": (4, 8)},
    "fc6's update": {"update._BLOCK": (512, 1024), "update._WARPS": (8,)},
}


def swept() -> tuple[Any, str, int]:
    """On a GPU without compiling beforehand, which takes a process for each core."""
    small = ["model.conv=[4,4,4,4,4]", "model.columns=1", f"layout.device={DEVICE}"]
    config, printed = load_config([*TINY, *small, "layout.kind=one"]), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_compile", lambda *_: None)
        for constant in ("_ROWS", "_COLUMNS"):  # so that the interpreter is done sooner
            patch.setattr(pooled, constant, 1)
        found = sweep.sweep(config, [1], 1, printed, SWEPT)
    return found, printed.getvalue(), pooled._AHEAD


def test_a_sweep_tries_choices_and_marks_the_present_ones(found: dict[str, Any]) -> None:
    result, printed, ahead = found["swept"]
    assert ahead == pooled._AHEAD  # as before
    for name, grid in SWEPT.items():
        title = f"{name}, batch 1"
        assert result["ratios"][f"{title}: present / fastest"] >= 1
        lines = re.search(rf"^{title}: µs\n((?: .*\n)+)", printed, re.M)[1].splitlines()
        assert len(lines) == max(map(len, grid.values())) - (name == "conv3")
        times = [float(line.split()[0]) for line in lines]
        assert times == sorted(times)
        (present,) = (line for line in lines if line.endswith("<- present"))
        for constant in grid:
            value = getattr(*sweep._constant(constant))
            assert f"{constant} {value}" in present


def test_a_choice_may_differ_by_rounding_only() -> None:
    ones = torch.ones(3000, dtype=torch.bfloat16)
    assert sweep._alike(ones, ones * (1 + 2**-7))
    assert not sweep._alike(ones, ones * (1 + 2**-5))
    places = torch.zeros(3000, dtype=torch.uint8)
    other = places.clone()
    other[:2] = 1
    assert sweep._alike(places, other)
    assert not sweep._alike(places, other | 1)


def test_a_choice_that_cannot_be_compiled_ends_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as are asked for on GPUs only."""
    config = load_config([*TINY, "layout.kind=one", "train.batch=1"])
    names = ("conv1", "conv1 backward")  # whose inputs come from conv1's kernel
    choices = [sweep.Choice(name, 1, (("pooled._NOWHERE", 1),)) for name in names]
    with pytest.raises(AttributeError, match="_NOWHERE"):
        choices[0].call(lambda: ())
    monkeypatch.setattr(sweep, "cores", lambda: 1)
    sweep._compile([config], choices)


UNITS = [  # n, units, activation, first unit, drop, at_test
    (3, 36, "relu", 0, 0.5, True),
    (11, 37, "tanh", 18, 0.3, False),
    (2, 300, None, 5, 0.5, False),
    (9, 5, "sigmoid", 6, 0.1, True),
    (1, 8, "relu", 0, None, True),
]


def all_units() -> list[tuple[int, torch.dtype, list[float]]]:
    torch.manual_seed(0)
    found = []
    for case, (n, count, activation, first, drop, at_test) in enumerate(UNITS):
        seed, slots, step = 2**32 - 5, torch.arange(2 * n)[::2], torch.tensor(5)
        of = None
        if drop is not None:
            there = (slots.to(DEVICE), step.to(DEVICE))
            of = (*there, 6, first, seed, drop, at_test)

        def plain(
            x: Tensor, b: Tensor | None, c: Any = (activation, drop, at_test, slots, first)
        ) -> Tensor:
            activation, drop, at_test, slots, first = c
            z = x if b is None else x + b
            y = getattr(torch, activation)(z) if activation else z
            if drop is None:
                return y
            y = y * philox.dropout_mask(2**32 - 5, 5, 6, slots, first, x.shape[1], drop)
            return y if at_test else y / (1 - drop)

        def ours(x: Tensor, b: Tensor | None, c: Any = (activation, of)) -> Tensor:
            return units(x, b, *c)

        for dtype in EPS:
            x = torch.randn(n, count, dtype=torch.float64).to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            bias = None if activation is None else torch.randn(count, dtype=wide)
            found.append((case, dtype, compared(ours, plain, x, bias)))
    return found


def test_units_are_the_formula_with_the_bits_of_philox(found: dict[str, Any]) -> None:
    assert units_module._PURPOSE.value == philox.Purpose.DROPOUT
    of_units = found["all_units"]
    assert len(of_units) == 4 * len(UNITS)
    # Slopes of tanh and sigmoid are those of the rounded y, as torch's are.
    far = [
        (UNITS[case], dtype, of)
        for case, dtype, of in of_units
        if max(of[:2]) > 3 or (dtype in (torch.float32, torch.float64) and max(of) > 1)
    ]
    assert not far


def strangers() -> list[str]:
    """What is said of an activation that the kernels do not have."""
    x, said = torch.ones(2, 8, device=DEVICE), []
    for call in (
        lambda: units(x, x[0], "gelu"),
        lambda: maps(x.view(2, 8, 1, 1).to(memory_format=LAST), x[0], "gelu", None, None),
    ):
        try:
            call()
        except Exception:  # the compiler's, or the interpreter's
            said.append(traceback.format_exc())
    return said


def test_an_activation_without_kernel_is_an_error_not_the_identity(found: dict[str, Any]) -> None:
    assert len(found["strangers"]) == 2
    assert all("no kernel for this activation" in said for said in found["strangers"])


def updated() -> list[bool]:
    torch.manual_seed(0)
    found = []
    for wide, narrow, graded in (
        (torch.float32, torch.bfloat16, torch.bfloat16), (torch.float32, None, torch.float32),
        (torch.float32, torch.float16, torch.float32), (torch.float64, None, torch.float64),
    ):  # fmt: skip
        weight = torch.randn(7, 3, 5, 13, dtype=wide).to(memory_format=LAST)
        velocity, grad = torch.randn_like(weight), torch.randn_like(weight).to(graded)
        parameter = torch.nn.Parameter(weight.clone())
        torchs = torch.optim.SGD([parameter], lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
        torchs.state[parameter]["momentum_buffer"] = velocity.clone()
        parameter.grad = grad.to(wide)
        torchs.step()
        buffer = torchs.state[parameter]["momentum_buffer"]
        rates = torch.tensor([0.01, 5e-4, 0.9, 1 / 256], dtype=wide, device=DEVICE)
        ours, ours_v = weight.to(DEVICE, copy=True), velocity.to(DEVICE, copy=True)
        copy = None if narrow is None else torch.zeros_like(ours, dtype=narrow)
        nan = torch.full_like(ours, float("nan"), dtype=graded)
        sgd_update(ours, ours_v, nan, copy, rates, torch.ones((), device=DEVICE))
        found.append(torch.equal(ours.cpu(), weight) and torch.equal(ours_v.cpu(), velocity))
        sgd_update(ours, ours_v, 256 * grad.to(DEVICE), copy, rates, torch.zeros((), device=DEVICE))
        # A fused multiply-add rounds once where another makes two of it: one part in 2²³ of terms.
        bound = 8 * torch.finfo(wide).eps
        found.append(apart(ours, parameter.detach().double()) < bound)
        found.append(apart(ours_v, buffer.double()) < bound)
        if copy is not None:
            found.append(apart(copy, ours.cpu().double()) < EPS[narrow])
    return found


def judgements() -> list[tuple[list[float], list[float]]]:
    """Of steps' numbers, what the kernel makes and what operators do, and the flags."""
    inf, nan, found = float("inf"), float("nan"), []
    cases = [
        (3.5, 16.0, 0.01), (nan, 1.0, 1.0), (3.5, inf, 0.1), (3.5, nan, 2.0), (-inf, 1.0, 1.0),
        (3.5, 4.0, 0.0), (1e300, 1e300, 1e-300),
    ]  # fmt: skip
    for loss, squares, scale in cases:
        both = []
        for fused in (True, False):
            stats = torch.tensor([loss, 1, 2, 9, 4, squares], dtype=torch.float64, device=DEVICE)
            by = torch.tensor(scale, dtype=torch.float64, device=DEVICE)
            skip = skip_flag(stats, by, fused)
            assert (skip.dtype, skip.shape) == (torch.float32, ())
            both.append([*stats.nan_to_num(-1).tolist(), skip.item()])
        found.append((both[0], both[1]))
    return found


def test_what_is_not_finite_is_judged_by_a_kernel_as_by_operators(found: dict[str, Any]) -> None:
    judged_so = found["judgements"]
    assert [ours[-1] for ours, _ in judged_so] == [0, 1, 1, 1, 1, 0, 1]
    for ours, theirs in judged_so:
        assert ours == pytest.approx(theirs, rel=1e-15)


def test_the_update_is_torchs_and_none_where_skipped(found: dict[str, Any]) -> None:
    assert found["updated"] == [True] * 14


def folded() -> list[bool]:
    found = []
    for stride, padding, cells in (
        (4, 0, (3, 4)),
        (4, 2, (4, 4)),
        (2, 1, (7, 8)),
        (1, 0, (11, 13)),
    ):
        x = torch.randn(2, 3, 11, 13).to(memory_format=LAST)
        padded = F.pad(x, (padding, 20, padding, 20))
        wanted = [
            padded[:, :, dy : dy + stride * cells[0] : stride, dx : dx + stride * cells[1] : stride]
            for dy in range(stride)
            for dx in range(stride)
        ]
        ours = fold(x.to(DEVICE), stride, padding, *cells)
        found.append(torch.equal(ours.cpu(), torch.cat(wanted, 1)))
        found.append(ours.is_contiguous(memory_format=LAST))
    return found


def test_folded_images_are_cells_of_pixels(found: dict[str, Any]) -> None:
    assert found["folded"] == [True] * 8


def test_kernels_are_traced_without_values() -> None:
    """A plan's tensors only say that they are on a GPU."""
    lrn_pool = ("relu", *PAPER, *POOL)
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(4, 48, 55, 55, dtype=torch.bfloat16).to(memory_format=LAST)
        bias = torch.empty(48)
        y = maps(x, bias, "relu", PAPER, POOL)
        assert (y.shape, y.dtype, y.device.type) == ((4, 48, 27, 27), torch.bfloat16, "cuda")
        assert y.is_contiguous(memory_format=LAST)
        places = torch.empty_like(y, dtype=torch.uint8)
        dx, db = torch.ops.alexnet_dist.maps_backward(y, x, bias, places, *lrn_pool)
        assert (dx.shape, dx.dtype, db.shape, db.dtype) == (x.shape, x.dtype, (48,), torch.float32)
        flat, step = y.flatten(1), torch.zeros((), dtype=torch.int64)
        dropout = (torch.arange(4), step, 6, 0, 0, 0.5, True)
        z = units(flat, torch.empty(flat.shape[1]), "relu", dropout)
        assert (z.shape, z.dtype) == (flat.shape, torch.bfloat16)
        of = ("relu", None, None, 0, 0, 0, 0, 1.0)
        dx, db = torch.ops.alexnet_dist.units_backward(z, z, True, *of)
        assert (dx.shape, dx.dtype, db.shape, db.dtype) == (
            z.shape,
            z.dtype,
            z[0].shape,
            bias.dtype,
        )
        assert fold(torch.empty(2, 3, 227, 227), 4, 0, 57, 57).shape == (2, 48, 57, 57)
