"""`bench maps --sweep`: block sizes, warps and registers of the kernels, tried at a network's own
shapes. Each is a constant of a kernel's module, where what is fastest can then be written."""

import contextlib
import functools
import itertools
import logging
import multiprocessing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TextIO

import torch
from torch import Tensor

from alexnet_dist.bench import Pass, Result, in_turn, machine
from alexnet_dist.bench.trainers import timed
from alexnet_dist.config.load import load_config, overridden
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.errors import ConfigError
from alexnet_dist.network import kernels
from alexnet_dist.network.lrn import alpha_of
from alexnet_dist.network.shapes import final_side, map_sides
from alexnet_dist.parallel.device import cores
from alexnet_dist.parallel.topology import connect

log = logging.getLogger(__name__)

# How far results of a choice may be from the present ones, relative to the largest: a compiler may
# fuse a product and a sum, or not, and sums are split differently.
_BOUNDS = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
_PLACES_APART = 1e-3  # the share of maxima that may be found at other places, of nearly equals

_Work = Callable[[], Sequence[Tensor]]  # launches a kernel, and returns its results
Grid = Mapping[str, Sequence[int]]  # values to try, by constant: MODULE.NAME
_POOLED: Grid = {"pooled._ROWS": (2, 3, 5, 9), "pooled._COLUMNS": (1, 2, 3),
                 "pooled._AHEAD": (0, 3), "pooled.REGISTERS": (96, 128)}  # fmt: skip
_BACKWARD: Grid = {"pooled_backward.PROGRAMS": (1056, 1584, 2112, 4224),
                   "pooled_backward._EARLY": (0, 1, 2),
                   "pooled_backward.REGISTERS": (128, 168)}  # fmt: skip
GRIDS: dict[str, Grid] = {
    "conv1": _POOLED,
    "conv1 backward": _BACKWARD,
    "conv2": {**_POOLED, "pooled._ROWS": (3, 5), "pooled._COLUMNS": (2, 3)},
    "conv2 backward": _BACKWARD,
    "conv3": {"maps._EACH": (1, 2, 4, 8)},
    "conv3 backward": {"maps._EACH": (1, 2, 4), "pooled_backward.PROGRAMS": (1056, 2112, 4224)},
    "fc6": {"units._FOURS": (32, 64, 128, 256), "units._WARPS": (1, 2, 4)},
    "fc6 backward": {"units._FOURS": (32, 64, 128), "units._WARPS": (1, 2, 4),
                     "units._ROWS": (4, 8, 16)},
    "fc6's update": {"update._BLOCK": (512, 1024, 2048, 4096), "update._WARPS": (4, 8)},
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Values of constants for one of GRIDS' kernels, at one batch size."""

    kernel: str
    batch: int
    values: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values)

    @property
    def title(self) -> str:
        return f"{self.kernel}, batch {self.batch}"

    @property
    def is_present(self) -> bool:
        """Whether these are the values that the modules have."""
        return all(getattr(*_constant(name)) == value for name, value in self.values)

    def call(self, work: _Work) -> Sequence[Tensor]:
        """Launch a kernel with these values."""
        kept = [(_constant(name), getattr(*_constant(name))) for name, _ in self.values]
        try:
            for name, value in self.values:
                setattr(*_constant(name), value)
            return work()
        finally:
            for constant, value in kept:
                setattr(*constant, value)


def _constant(name: str) -> tuple[ModuleType, str]:
    """Return the module of a constant, and its name there."""
    module, _, constant = name.partition(".")
    return import_module(f"alexnet_dist.network.kernels.{module}"), constant


def sweep(
    config: Config, batches: Sequence[int], repeats: int, out: TextIO,
    grids: Mapping[str, Grid] = GRIDS,
) -> Result:  # fmt: skip
    """Time every choice of the grids' values on a GPU, for the maps and units of all columns, and
    print each kernel's choices, the fastest first.

    Choices whose results differ from those of the present values are left out, with a warning, as
    are those that cannot be compiled.

    Args:
        batches: batch sizes.
        out: where the choices are printed.

    Returns:
        ratios of times (present / fastest, of their shortest passes), and the seconds of both.
    """
    device = connect(config).device
    if not kernels.fused(config.train.execution, device):
        raise ConfigError("bench maps --sweep: needs a GPU for which Triton can build kernels")
    configs = [overridden(config, f"train.batch={batch}") for batch in batches]
    choices = [Choice(name, one.train.batch, values) for one in configs
               for name, grid in grids.items() for values in _product(grid)]  # fmt: skip
    if device.type == "cuda":
        _compile(configs, choices)
    result: Result = {"ratios": {}, "ceilings": {}, "machine": machine(config.data.workers),
                      "unit": "seconds", "runs": [{} for _ in range(repeats)]}  # fmt: skip
    for one, name in itertools.product(configs, grids):
        mine = [c for c in choices if (c.kernel, c.batch) == (name, one.train.batch)]
        found = _timed(mine, _works(one, name, device), device, repeats)
        if not found:
            raise ConfigError(f"bench maps --sweep: no choice for {name} could be launched")
        _add(result, found)
        print(*_lines(found), sep="\n", file=out, flush=True)
    return result


def _product(grid: Grid) -> Iterator[tuple[tuple[str, int], ...]]:
    for values in itertools.product(*grid.values()):
        yield tuple(zip(grid, values, strict=True))


def _compile(configs: Sequence[Config], choices: Sequence[Choice]) -> None:
    """Compile the choices into Triton's cache, with a process for each core."""
    # The forwards first, as every process needs one to try a backward; batch after batch, which
    # share most kernels; else mixed, as some take long.
    order = sorted(choices, key=lambda c: (
        "backward" in c.kernel, c.batch, zlib.crc32(f"{c.kernel}, {c}".encode())
    ))  # fmt: skip
    by_batch = {config.train.batch: flat(config) for config in configs}
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_one, [by_batch[choice.batch] for choice in order], order))


def _compile_one(settings: dict[str, object], choice: Choice) -> None:
    """Compile a choice, if that is possible."""
    config = load_config([settings])
    with contextlib.suppress(Exception):  # which is reported when it is timed
        choice.call(_works(config, choice.kernel, connect(config).device)[0])


def _timed(
    choices: Sequence[Choice], works: Sequence[_Work], device: torch.device, repeats: int
) -> list[tuple[Choice, list[float]]]:
    """Return the choices with the seconds of each pass, the fastest first."""
    wanted, passes = [result.clone() for result in works[0]()], dict[str, Pass]()
    for choice in choices:
        try:
            made = choice.call(works[0])
        except Exception as error:  # Triton has many
            log.warning(f"{choice.title}, {choice}: {type(error).__name__}: {error}: left out")
            continue
        if not all(itertools.starmap(_alike, zip(made, wanted, strict=True))):
            log.warning(f"{choice.title}, {choice}: its results differ: left out")
            continue
        for result in made:
            result.fill_(1)  # so that what the next one does not write is seen

        def work(choice: Choice = choice) -> Tensor:
            return [choice.call(one)[0] for one in works][-1]

        passes[str(choice)] = timed(work, device)
    runs = in_turn(passes, repeats)
    found = [(c, [run[str(c)] for run in runs]) for c in choices if str(c) in passes]
    return sorted(found, key=lambda pair: min(pair[1]))


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two results are equal but for rounding."""
    if not one.is_floating_point():
        return bool((one != other).sum() <= _PLACES_APART * one.numel())
    apart = (one.float() - other.float()).abs().max()
    return bool(apart <= _BOUNDS[one.dtype] * other.float().abs().max())


_Found = Sequence[tuple[Choice, list[float]]]  # a kernel's choices, and the seconds of each pass


def _lines(found: _Found) -> Iterator[str]:
    """Yield a kernel's choices with their times, the fastest first."""
    yield f"\n{found[0][0].title}: µs"
    for choice, seconds in found:
        yield f"{1e6 * min(seconds):10.1f}  {choice}{'   <- present' * choice.is_present}"


def _add(result: Result, found: _Found) -> None:
    """Add a kernel's fastest choice, and the present one, to the result."""
    for choice, seconds in found:
        if choice.is_present:
            part = f"{choice.title}: present / fastest"
            result["ratios"][part] = min(seconds) / min(found[0][1])
        if choice.is_present or choice is found[0][0]:
            name = f"{choice.title}: {choice}{' (present)' * choice.is_present}"
            for run, each in zip(result["runs"], seconds, strict=True):
                run[name] = each


def _works(config: Config, name: str, device: torch.device) -> list[_Work]:
    """Return what launches a kernel, for each column, on noise in bf16; it returns its results."""
    columns = range(config.model.columns)
    if name == "fc6's update":
        return [_update_of(config, column, device) for column in columns]
    layer, _, backward = name.partition(" ")
    if layer == "fc6":
        return [_units_of(config, column, bool(backward), device) for column in columns]
    return [_maps_of(config, layer, column, bool(backward), device) for column in columns]


def _maps_of(
    config: Config, layer: str, column: int, backward: bool, device: torch.device
) -> _Work:
    """As `_works`, for what follows a convolution."""
    from alexnet_dist.network.kernels.maps import maps_backward, maps_forward

    model, place = config.model, config.model.conv_names.index(layer)
    side, _ = map_sides(model)[place]
    shape = (config.train.batch, model.conv[place] // model.columns, side, side)
    x, bias = _noise(shape, column, device), torch.zeros(shape[1], device=device)
    lrn = model.lrn
    normalise = (0, 0.0, 0.0, 0.0)
    if layer in lrn.layers:
        normalise = (lrn.size, alpha_of(lrn, layer), lrn.beta, lrn.k)
    pool = (*model.pool, model.round_up) if layer in model.pool_after else (1, 1, False)
    settings = (model.activation, *normalise, *pool)
    if not backward:
        return functools.partial(maps_forward, x, bias, *settings)
    y, places = maps_forward(x, bias, *settings)
    upper = _noise(tuple(y.shape), column + 7, device)
    return functools.partial(maps_backward, upper, x, bias, places, *settings)


def _units_of(config: Config, column: int, backward: bool, device: torch.device) -> _Work:
    """As `_works`, for what follows the first fully-connected layer's product."""
    from alexnet_dist.network.kernels.units import units_backward, units_forward

    n, model = config.train.batch, config.model
    count = model.fc[0] // model.columns
    x, bias = _noise((n, count), column, device), torch.zeros(count, device=device)
    slots, step = torch.arange(n, device=device), torch.zeros((), dtype=torch.int64, device=device)
    drawn = (slots, step, 6, column * count, config.seed, round(model.dropout * 2**32), 1.0)

    def forward() -> Sequence[Tensor]:
        return (units_forward(x, bias, model.activation, *drawn),)

    if not backward:
        return forward
    upper, (y,) = _noise((n, count), column + 7, device), forward()
    return functools.partial(units_backward, upper, y, True, model.activation, *drawn)


def _update_of(config: Config, column: int, device: torch.device) -> _Work:
    """As `_works`, for the update of fc6's weights."""
    from alexnet_dist.network.kernels.update import sgd_update

    model = config.model
    shape = (model.fc[0] // model.columns, model.conv[-1] * final_side(model) ** 2)
    narrow = _noise(shape, column, device)
    weight, velocity, grad = narrow.float(), torch.zeros(shape, device=device), narrow * 0.5
    rates, skip = torch.tensor([0.0, 5e-4, 0.0, 1.0], device=device), torch.zeros((), device=device)

    def update() -> Sequence[Tensor]:  # without momentum, so that each call does the same
        sgd_update(weight, velocity, grad, narrow, rates, skip)
        return velocity, narrow

    return update


def _noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return noise in bf16, channels_last if it is maps; the same in every process."""
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(shape, generator=generator, device=device) * 30
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return noise.to(torch.bfloat16).contiguous(memory_format=layout)
