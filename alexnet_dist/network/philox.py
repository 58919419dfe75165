"""Counter-based random numbers: every draw is a function of its key, not of a generator's state.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). NumPy and
torch give the same bits, because one piece of int64 arithmetic serves both; dropout masks on a GPU
are drawn by Triton, with the same bits. Uniforms and normals are computed in float64 on the host. A
rank computes only the part of a draw that it needs, and to resume a run only the step number is
needed.
"""

import hashlib
import math
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from torch import Tensor

from alexnet_dist.network import kernels
from alexnet_dist.network.kernels.numba_loops import parallel

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK = 65536

Words = TypeVar("Words", npt.NDArray[np.int64], Tensor)


class Purpose(IntEnum):
    """The second word of a key, which keeps draws for different purposes independent."""

    ORDER = 1
    WINDOW = 2  # crop and flip
    LIGHTING = 3
    DROPOUT = 4


_DROPOUT = int(Purpose.DROPOUT)


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Return four random 32-bit words for each counter.

    Args:
        counter: four int64 arrays or tensors that broadcast, values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 arrays of the broadcast shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two 32-bit words overflows int64, but its 64 bits are right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def integers(words: Words, limits: Words | int) -> Words:
    """Map 32-bit words to integers in [0, limit), by their high bits; limits up to 2**31."""
    return (words * limits) >> 32


def uniforms(words: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Map 32-bit words to float64 in (0, 1), never 0 or 1."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def normals(
    words: tuple[npt.NDArray[np.int64], ...],
) -> tuple[npt.NDArray[np.float64], ...]:
    """Map four uniform words to four independent standard normals (Box and Muller)."""
    u = [uniforms(word) for word in words]
    pairs: list[npt.NDArray[np.float64]] = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        length = np.sqrt(-2.0 * np.log(radius))
        pairs += [length * np.cos(math.tau * angle), length * np.sin(math.tau * angle)]
    return tuple(pairs)


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the order of an epoch's samples: a permutation of their ids, (count,) int64."""
    keys = np.empty(count, dtype=np.int64)
    for start in range(0, count, _BLOCK):  # keeps temporary memory small
        ids = np.arange(start, min(start + _BLOCK, count), dtype=np.int64)
        zero = np.zeros_like(ids)
        high, low, _, _ = philox((ids, zero + epoch, zero, zero), (seed, Purpose.ORDER))
        keys[ids] = (high << 31) ^ low
    return np.argsort(keys, kind="stable")


def dropout_mask(
    seed: int, step: int | Tensor, layer: int, slots: Tensor, first: int, count: int, drop: float
) -> Tensor:
    """Return which units are kept: (len(slots), count) bool, True with probability 1 − drop.

    Args:
        step: a tensor, () int64, if the step is captured as a CUDA graph.
        slots: (n,) int64, the samples' places in the global batch; on the device of the mask.
        first: index of the first unit among the layer's units over all columns.
    """
    threshold = round(drop * 2**32)
    if slots.is_cuda and kernels.can_be_built():
        from alexnet_dist.network.kernels.units import dropout_mask as by_kernel

        now = step if isinstance(step, Tensor) else torch.full((), step, device=slots.device)
        kept: Tensor = by_kernel(slots, now, layer, first, count, seed, threshold)
        return kept
    if slots.device.type == "cpu" and not torch.compiler.is_compiling():
        stay = torch.empty(len(slots), count, dtype=torch.bool)
        if type(slots) is Tensor:  # `plan` uses fake tensors, which have no values
            _masks(
                stay.numpy(), slots.contiguous().numpy(), first, int(step), layer, seed, threshold
            )
        return stay
    # Where torch compiles the network, and for a GPU that no kernel can be built for.
    start, end = first // 4, -(-(first + count) // 4)
    units = torch.arange(start, end, device=slots.device)[None, :]
    zero = torch.zeros_like(units)
    counter = (units, slots[:, None], zero + step, zero + layer)
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed, Purpose.DROPOUT))), dim=-1)
    stay = words >= threshold  # (n, blocks of four, 4)
    return stay.flatten(1)[:, first - 4 * start :][:, :count]


_philox: Any = njit(philox)  # the same arithmetic on scalars, compiled


@parallel
def _masks(
    stay: npt.NDArray[np.bool_], slots: npt.NDArray[np.int64], first: int, step: int, layer: int,
    seed: int, threshold: int,
) -> None:  # fmt: skip
    for row in prange(len(slots)):
        for block in range(first // 4, (first + stay.shape[1] + 3) // 4):
            words = _philox((block, slots[row], step, layer), (seed, _DROPOUT))
            for lane in range(4):
                unit = 4 * block + lane - first
                if 0 <= unit < stay.shape[1]:
                    stay[row, unit] = words[lane] >= threshold


def initial_weights(
    seed: int, name: str, shape: tuple[int, ...], rows: slice, std: float, dtype: torch.dtype
) -> Tensor:
    """Draw N(0, std) for some rows (dim 0) of a parameter, on the CPU.

    Each row has a counter of its own, so any slice equals that of the whole. For speed these use
    NumPy's compiled Philox 4x64 and ziggurat; they are rounded from float64 row by row.

    Args:
        name: the parameter's: conv1.weight, …
        shape: the whole parameter's.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    key = np.array([seed, int.from_bytes(digest, "little")], dtype=np.uint64)
    begin, end, _ = rows.indices(shape[0])
    values = torch.empty((end - begin, *shape[1:]), dtype=dtype, device="cpu")
    for row, out in enumerate(values.numpy(), start=begin):
        bits = np.random.Philox(key=key, counter=np.array([0, 0, 0, row], dtype=np.uint64))
        out[...] = np.random.Generator(bits).standard_normal(out.shape) * std
    return values
