"""The work of several columns at the same time, on a GPU that holds them all."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]


def at_once(functions: Sequence[Callable[..., Tensor]], columns: Sequence[Tensors]) -> list[Tensor]:
    """Apply each function to its column's tensors. On a GPU each column has a stream of its own, so
    that one fills the multiprocessors that another leaves idle; their backwards run side by side
    too, since autograd runs each on the stream of its forward.

    A tensor that is used on another stream than that of its memory is recorded, so that this memory
    is not reused too early.
    """
    if len(columns) == 1 or columns[0][0] is None or not columns[0][0].is_cuda:
        return [function(*given) for function, given in zip(functions, columns, strict=True)]
    main = torch.cuda.current_stream()
    begin = main.record_event()
    made = [functions[0](*columns[0])]
    for number in range(1, len(columns)):
        stream = _stream(main.device, number)
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            out = functions[number](*columns[number])
        main.wait_stream(stream)
        for tensor in columns[number]:
            if tensor is not None:
                tensor.record_stream(stream)
        out.record_stream(main)
        made.append(out)
    return made


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return the stream of a column after the first."""
    return torch.cuda.Stream(device)
