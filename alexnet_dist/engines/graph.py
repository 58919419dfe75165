"""A training step as one CUDA graph: a GPU is given a step's hundred kernels by one call.

Launched one by one they take a CPU longer than they take a GPU. NCCL's exchanges are kernels as
well, and become part of the graph. What that means for who waits for them:

- torch's process groups look after no exchange of a graph. A rank that waits for another for good
  does so where it reads a step's numbers, and `training.watchdog` ends it.
- Graphs and single exchanges may use the same communicators in turn (NCCL_GRAPH_MIXING_SUPPORT).
- NCCL ends no communicator that a graph holds, and waits for good: `release` comes first.
- Python does not run again: `Traffic` is told what each replay sends, and time inside a step is
  told by events of the graph.
"""

import atexit
import contextlib
import logging
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_dist.compat import abandon_capture
from alexnet_dist.data.batch import Batch
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.timing import TIMELINE

log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parent.parent

Step = Callable[[Batch, Tensor, Tensor], Tensor]  # of a batch, step number and rate: its numbers


def captures(execution: str, device: torch.device) -> bool:
    """Whether steps are captured: on GPUs, whose ranks exchange over NCCL."""
    return execution == "graph" and device.type == "cuda"


@contextlib.contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What happens inside goes to this stream, after what the current one was given before and
    before what it is given later; to the current one where `stream` is None."""
    if stream is None:
        yield
        return
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)  # not after an error, where it may still be capturing


class CapturedStep:
    """A step that was captured at one batch and is replayed at others, with equal results.

    What changes from step to step (the batch, the step's number, the rate) is copied into tensors
    of the graph's own. Where the capture fails, that is warned of, and `graph` is None.

    Args:
        step: makes a step of what lies on the device; waits for nothing, and decides nothing by
            values. All ranks that exchange capture theirs at the same time.
        state: all tensors that a step changes; here nothing does.
        stream: for the capture, and for all that came before it and is kept by autograd.
        warm_up: steps before the capture: they compile kernels, connect ranks and make what is
            made once, which a capture cannot hold.
    """

    def __init__(
        self, step: Step, state: Sequence[Tensor], batch: Batch, stream: torch.cuda.Stream,
        warm_up: int,
    ) -> None:  # fmt: skip
        self.graph: torch.cuda.CUDAGraph | None = None
        self.traffic = Traffic()
        copies = {f.name: getattr(batch, f.name).clone() for f in fields(batch)}
        now = torch.zeros((), dtype=torch.int64, device=batch.windows.device)
        self.given = replace(batch, **copies), now, now.double()
        kept = [tensor.clone() for tensor in state]
        with beside(stream):
            for left in reversed(range(warm_up)):
                with contextlib.nullcontext() if left else self.traffic:
                    step(*self.given)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # Other threads copy and allocate meanwhile, which must not end the capture.
            with (
                beside(stream),
                torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
                TIMELINE.captured(bool(self.traffic.sent)) as self.marks,
            ):
                self.numbers = step(*self.given)
            self.graph = graph
            _CAPTURED.add(self)
        except RuntimeError as error:
            _warn(error)
            abandon_capture(now.device, pool)
        with torch.no_grad():
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)

    def __call__(self, batch: Batch, step: int, rate: float) -> Tensor:
        assert self.graph is not None
        with TIMELINE.span("step"):
            given, now, at = self.given
            for field in fields(batch):
                getattr(given, field.name).copy_(getattr(batch, field.name))
            now.fill_(step)
            at.fill_(rate)
            self.graph.replay()
            self.traffic.again()
            TIMELINE.replayed(self.marks)
            return self.numbers.clone()


_CAPTURED: weakref.WeakSet[CapturedStep] = weakref.WeakSet()


@atexit.register
def release() -> None:
    """Give up all captured steps of this process, for it to leave the other ranks."""
    for step in _CAPTURED:
        if step.graph is not None:
            step.graph.reset()
            step.graph = None


class _Bare(nn.Module):
    """A module less the hooks that were set on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Tensor) -> Tensor:
        made: Tensor = type(self.module).forward(self.module, *given)
        return made


def capture_forward(module: nn.Module, *example: Tensor) -> None:
    """Make a module's forward in training a CUDA graph, and its backward another, for an engine
    whose own part cannot be captured; warns where that fails.

    A second backward would write where the gradients of the first one are.

    Args:
        example: what it is always given, as these are; parameters stay where they lie.
    """
    plain, pool = module.forward, torch.cuda.graph_pool_handle()
    module.train()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails leaves another
            graphs = torch.cuda.make_graphed_callables(_Bare(module), example, pool=pool)
    except RuntimeError as error:
        _warn(error)
        abandon_capture(example[0].device, pool)
        return

    def forward(*given: Tensor) -> Any:
        return graphs(*given) if module.training else plain(*given)

    module.forward = forward


def _warn(error: RuntimeError) -> None:
    """Tell why and where a capture failed: those of ending a broken one come after its error."""
    first, inner = error, error.__context__
    while inner is not None:
        first, inner = inner if isinstance(inner, RuntimeError) else first, inner.__context__
    frames = traceback.extract_tb(first.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    log.warning(
        "the step could not be captured as a CUDA graph, and is launched kernel by kernel: "
        f"{' '.join(str(first).split())}{where}; train.execution=fused does without"
    )
