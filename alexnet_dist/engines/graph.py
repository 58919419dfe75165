"""A training step as one CUDA graph: a GPU is given a step's hundred kernels by one call.

Launched one by one they take a CPU longer than they take a GPU.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from alexnet_dist.data.batch import Batch
from alexnet_dist.timing import TIMELINE

log = logging.getLogger(__name__)
# Steps before the capture, whose changes are undone: they compile kernels and make what is made
# once, which a capture cannot hold.
_WARM_UP = 2

Step = Callable[[Batch, Tensor, Tensor], Tensor]  # of a batch, step number and rate: its numbers


class CapturedStep:
    """A step, captured at its first batch and replayed from then on, with equal results.

    What changes from step to step (the batch, the step's number, the rate) is copied into tensors
    of the graph's own. A step that cannot be captured is warned of once, and made as it is.

    Args:
        step: makes a step of what lies on the device; waits for nothing, and decides nothing by
            values.
        state: all tensors that a step changes.
    """

    def __init__(self, step: Step, state: Callable[[], Sequence[Tensor]]) -> None:
        self.step, self.state = step, state
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: tuple[Batch, Tensor, Tensor] | None = None
        self.numbers: Tensor | None = None

    def __call__(self, batch: Batch, step: int, rate: float) -> Tensor:
        with TIMELINE.span("step"):
            if self.given is None:
                device = batch.windows.device
                copies = {f.name: getattr(batch, f.name).clone() for f in fields(batch)}
                now = torch.zeros((), dtype=torch.int64, device=device)
                self.given = replace(batch, **copies), now, now.double()
                self._fill(batch, step, rate)
                self._capture()
            self._fill(batch, step, rate)
            if self.graph is None:
                return self.step(*self.given)
            self.graph.replay()
            assert self.numbers is not None
            return self.numbers.clone()

    def _fill(self, batch: Batch, step: int, rate: float) -> None:
        assert self.given is not None
        given, now, at = self.given
        for field in fields(batch):
            getattr(given, field.name).copy_(getattr(batch, field.name))
        now.fill_(step)
        at.fill_(rate)

    def _capture(self) -> None:
        assert self.given is not None
        kept = [tensor.clone() for tensor in self.state()]
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                self.step(*self.given)
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads copy and allocate meanwhile, which must not end the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.numbers = self.step(*self.given)
            self.graph = graph
        except RuntimeError as error:
            log.warning(
                "the step could not be captured as a CUDA graph, and is launched kernel by kernel: "
                f"{' '.join(str(error).split())}; train.execution=fused does without"
            )
        with torch.no_grad():
            for tensor, value in zip(self.state(), kept, strict=True):
                tensor.copy_(value)
