"""The bytes that a rank sends, counted where torch.distributed dispatches its collectives.

Counts what the algorithms that send least would send: for t bytes over g ranks, 2·t·(g−1)/g for an
all-reduce, t·(g−1)/g for an all-gather (t: all parts together) and an all-to-all. Rings, as in
NCCL, do so; gloo and trees may send more.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

_OPS = torch.ops.c10d
# Each collective's name, argument indices of its tensors and its group, and multiple of t·(g−1)/g.
_SENT = {
    _OPS.allreduce_.default: ("all-reduce", 0, 1, 2),
    _OPS._allgather_base_.default: ("all-gather", 0, 2, 1),
    _OPS.allgather_.default: ("all-gather", 0, 2, 1),
    _OPS.alltoall_base_.default: ("all-to-all", 0, 2, 1),
    _OPS._reduce_scatter_base_.default: ("reduce-scatter", 1, 2, 1),
    _OPS.reduce_.default: ("reduce", 0, 1, 1),
    _OPS.broadcast_.default: ("broadcast", 0, 1, 1),
}


class Traffic(TorchDispatchMode):
    """A context manager that counts the collectives called inside it.

    Attributes:
        sent: bytes sent, by collective; fractions, since tensors need not divide evenly.
        calls: number of calls, by collective.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def bytes(self) -> dict[str, int]:
        """Return the bytes that this rank sent, by collective."""
        return {name: round(sent) for name, sent in self.sent.items() if sent}

    def total(self) -> int:
        return round(sum(self.sent.values()))

    def count_replay(self) -> None:
        """Add these counts once more to the counters now active: a CUDA graph was replayed."""
        for around in _get_current_dispatch_mode_stack():
            if isinstance(around, Traffic):
                around.sent.update(self.sent)
                around.calls.update(self.calls)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _SENT:
            name, tensors, group, times = _SENT[func]
            ranks = ProcessGroup.unbox(args[group]).size()
            sent = Fraction(times * _bytes(args[tensors]) * (ranks - 1), ranks)
            self.sent[name] += sent  # type: ignore[assignment]
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(inner) for inner in tensors)
