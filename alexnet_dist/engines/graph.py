"""A training step as one CUDA graph, which launches a step's hundred kernels with one call.

Launched one by one, the kernels take the CPU longer than they take the GPU. NCCL's collectives are
kernels too, and become part of the graph. This has consequences:

- torch's process groups do not watch the collectives of a graph. A rank that waits for another
  forever does so where it reads a step's statistics, and `training.watchdog` ends it.
- Graphs and single collectives may alternate on one communicator (NCCL_GRAPH_MIXING_SUPPORT).
- NCCL waits forever when it destroys a communicator that a graph still holds: `release_graphs`
  must be called before.
- A replay runs no Python: `Traffic` is told what each replay sends, and times inside a step come
  from CUDA events in the graph.
"""

import atexit
import contextlib
import logging
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_dist.compat import abandon_capture
from alexnet_dist.data.batch import StepInput
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.timing import TIMELINE

log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parent.parent

Step = Callable[[StepInput, Tensor, Tensor], Tensor]  # (…, step number, rate) to `StepStats`


def captures(execution: str, device: torch.device) -> bool:
    """Whether steps are captured as graphs: on GPUs only, whose ranks communicate over NCCL."""
    return execution == "graph" and device.type == "cuda"


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the GPU work inside on this stream: after all earlier work of the current stream, and
    before all later. None: run it on the current stream."""
    if stream is None:
        yield
        return
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)  # not after an error, where it may still be capturing


class CapturedStep:
    """A step captured with one batch and replayed with others; the results equal uncaptured ones.

    What changes from step to step (samples, step number, learning rate) is copied into the graph's
    own tensors. If the capture fails, that is logged as a warning, and `graph` is None.

    Args:
        step: makes a step from tensors on the device; must not synchronise, nor branch on values.
            All ranks that communicate must capture theirs at the same time.
        state: all tensors that a step changes; the constructor leaves their values unchanged.
        stream: the stream of the capture, on which autograd's earlier state was made too.
        warm_up: number of steps before the capture. They compile kernels, connect ranks and make
            one-time allocations, none of which can be captured.
    """

    def __init__(
        self, step: Step, state: Sequence[Tensor], batch: StepInput, stream: torch.cuda.Stream,
        warm_up: int,
    ) -> None:  # fmt: skip
        self.graph: torch.cuda.CUDAGraph | None = None
        self.traffic = Traffic()
        copies = {name: tensor.clone() for name, tensor in batch.changing().items()}
        now = torch.zeros((), dtype=torch.int64, device=state[0].device)
        own: StepInput = replace(batch, **copies)  # type: ignore[type-var]
        self.inputs = own, now, now.double()
        # Warm up; the last step counts what a replay will send. The copies must keep no node of
        # autograd: a weight's gradient is added up on the stream where its node was made.
        kept = [tensor.detach().clone() for tensor in state]
        with on_stream(stream):
            for left in reversed(range(warm_up)):
                with contextlib.nullcontext() if left else self.traffic:
                    step(*self.inputs)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # Other threads copy and allocate meanwhile, which must not invalidate the capture.
            with (
                on_stream(stream),
                torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
                TIMELINE.captured(bool(self.traffic.sent)) as self.marks,
            ):
                self.stats = step(*self.inputs)
            self.graph = graph
            _CAPTURED.add(self)
        except RuntimeError as error:
            _warn(error)
            abandon_capture(now.device, pool)
        # Undo what the warm-up changed.
        with torch.no_grad():
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)

    def __call__(self, batch: StepInput, step: int, rate: float) -> Tensor:
        assert self.graph is not None
        with TIMELINE.span("step"):
            own, now, at = self.inputs
            theirs = batch.changing()
            for name, tensor in own.changing().items():
                tensor.copy_(theirs[name])
            now.fill_(step)
            at.fill_(rate)
            self.graph.replay()
            self.traffic.count_replay()
            TIMELINE.replayed(self.marks)
            return self.stats.clone()


_CAPTURED: weakref.WeakSet[CapturedStep] = weakref.WeakSet()


@atexit.register
def release_graphs() -> None:
    """Release this process's captured steps, so that its communicators can be destroyed."""
    for step in _CAPTURED:
        if step.graph is not None:
            step.graph.reset()
            step.graph = None


class _WithoutHooks(nn.Module):
    """A module without the hooks that were registered on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Tensor) -> Tensor:
        made: Tensor = type(self.module).forward(self.module, *given)
        return made


def capture_forward(module: nn.Module, stream: torch.cuda.Stream, *example: Tensor) -> None:
    """Replace a module's training forward and backward by CUDA graphs, for an engine whose own part
    of a step cannot be captured; warn if that fails.

    Not for several backwards per step: each overwrites the gradients of the one before.

    Args:
        stream: the stream of the capture, on which autograd's earlier state was made too.
        example: inputs of the shapes and dtypes that all later calls have. Parameters must not
            move in memory.
    """
    torch.cuda.graph.default_capture_stream = stream
    plain, pool = module.forward, torch.cuda.graph_pool_handle()
    module.train()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves another
            graphs = torch.cuda.make_graphed_callables(_WithoutHooks(module), example, pool=pool)
    except RuntimeError as error:
        _warn(error)
        abandon_capture(example[0].device, pool)
        return

    def forward(*given: Tensor) -> Any:
        return graphs(*given) if module.training else plain(*given)

    module.forward = forward


def _warn(error: RuntimeError) -> None:
    """Log why and where a capture failed: its first error, not those of ending a broken capture."""
    first, inner = error, error.__context__
    while inner is not None:
        first, inner = inner if isinstance(inner, RuntimeError) else first, inner.__context__
    frames = traceback.extract_tb(first.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    log.warning(
        "the step could not be captured as a CUDA graph, so its kernels are launched one by one: "
        f"{' '.join(str(first).split())}{where}; train.execution=fused does not try"
    )
