"""A batch's loss and top-1 and top-5 counts in two small kernels, the gradient in one, and in one
the check that a step's loss and gradient are finite.

torch's operators would be about thirty launches, each of which takes longer than its work.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_dist.network.kernels import custom_op
from alexnet_dist.network.kernels.lanes import sum_dtype, upcast

_WARPS = 4
_ROWS = 1024  # at most, of a batch that are summed at once


def loss_and_counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `engines.base.loss_and_counts`: return the summed cross-entropy, and (3,) float64: it,
    and the top-1 and top-5 counts.

    Args:
        logits: (n, classes).
        labels: (n,) int64.
    """
    loss, counts = _Scored.apply(logits, labels)
    return loss, counts


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, counts, log_sums = scores_forward(logits, labels)
        ctx.save_for_backward(logits, labels, log_sums)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)  # do not make zeros for the counts
        return loss, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scores_backward(grads[0], *ctx.saved_tensors), None


@custom_op("alexnet_dist::scores", mutates_args=())
def scores_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, (); the counts, (3,); and each row's log-sum-exp, (n,)."""
    logits, labels, (n, classes) = logits.contiguous(), labels.contiguous(), logits.shape
    dtype = sum_dtype(logits.dtype)
    log_sums, losses = logits.new_empty(n, dtype=dtype), logits.new_empty(n, dtype=dtype)
    ranks = labels.new_empty(n)
    block = triton.next_power_of_2(classes)
    ranks_kernel[(n,)](logits, labels, losses, ranks, log_sums, classes, block, num_warps=_WARPS)
    loss, counts = logits.new_empty((), dtype=dtype), logits.new_empty(3, dtype=torch.float64)
    rows = min(_ROWS, triton.next_power_of_2(n))
    counts_kernel[(1,)](losses, ranks, loss, counts, n, rows, num_warps=_WARPS)
    return loss, counts, log_sums


@custom_op("alexnet_dist::scores_backward", mutates_args=())
def scores_backward(grad: Tensor, logits: Tensor, labels: Tensor, log_sums: Tensor) -> Tensor:
    """Return the gradient of the logits, given the loss's, ()."""
    logits, labels, (n, classes) = logits.contiguous(), labels.contiguous(), logits.shape
    out, block = torch.empty_like(logits), triton.next_power_of_2(classes)
    scores_backward_kernel[(n,)](
        grad, logits, labels, log_sums, out, classes, block, num_warps=_WARPS
    )
    return out


@custom_op("alexnet_dist::skip_flag", mutates_args=("stats",))
def skip_flag(stats: Tensor, scale: Tensor) -> Tensor:
    """As `engines.base.skip_flag`; stats and scale are float64."""
    skip = torch.empty((), dtype=torch.float32, device=stats.device)
    skip_flag_kernel[(1,)](stats, scale, skip, num_warps=1)
    return skip


@skip_flag.register_fake
def _(stats: Tensor, scale: Tensor) -> Tensor:
    return stats.new_empty((), dtype=torch.float32)


@scores_forward.register_fake
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n = sum_dtype(logits.dtype), len(logits)
    counts = logits.new_empty(3, dtype=torch.float64)
    return logits.new_empty((), dtype=dtype), counts, logits.new_empty(n, dtype=dtype)


@scores_backward.register_fake
def _(grad: Tensor, logits: Tensor, labels: Tensor, log_sums: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


@triton.jit(do_not_specialize=["classes"])
def ranks_kernel(logits, labels, losses, ranks, log_sums, classes, block: tl.constexpr):
    """Compute a row's loss, log Σ exp(s) − s_label, and how many classes rank before its label: of
    equal scores those with a lower index, and scores that are NaN."""
    row, index = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    here, label = index < classes, tl.load(labels + row)
    scores = upcast(tl.load(logits + row * classes + index, mask=here, other=float("-inf")))
    own = upcast(tl.load(logits + row * classes + label))
    before = ((scores <= own) == 0) | ((scores == own) & (index < label))
    most = tl.max(scores, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    log_sum = most + tl.log(tl.sum(tl.where(here, tl.exp(scores - most), 0.0), 0))
    tl.store(losses + row, log_sum - own)
    tl.store(ranks + row, tl.sum((before & here).to(tl.int64), 0))
    tl.store(log_sums + row, log_sum)


@triton.jit
def counts_kernel(losses, ranks, loss, counts, n: tl.constexpr, rows: tl.constexpr):
    """Sums over a batch, in a fixed order."""
    total = tl.zeros((rows,), losses.dtype.element_ty)
    first, among = tl.zeros((rows,), tl.int64), tl.zeros((rows,), tl.int64)
    for start in range(0, n, rows):
        at = start + tl.arange(0, rows)
        rank = tl.load(ranks + at, mask=at < n, other=5)
        total += tl.load(losses + at, mask=at < n, other=0.0)
        first += (rank < 1).to(tl.int64)
        among += (rank < 5).to(tl.int64)
    whole = tl.sum(total, 0)
    tl.store(loss, whole)
    tl.store(counts, whole.to(tl.float64))
    tl.store(counts + 1, tl.sum(first, 0).to(tl.float64))
    tl.store(counts + 2, tl.sum(among, 0).to(tl.float64))


@triton.jit(do_not_specialize=["classes"])
def scores_backward_kernel(grad, logits, labels, log_sums, out, classes, block: tl.constexpr):
    """(softmax(s) − [i = label]) · grad: reads s and writes its gradient, once each."""
    row, index = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    here, label = index < classes, tl.load(labels + row)
    scores = upcast(tl.load(logits + row * classes + index, mask=here, other=0.0))
    share = tl.exp(scores - tl.load(log_sums + row)) - tl.where(index == label, 1.0, 0.0)
    value = share * tl.load(grad)
    tl.store(out + row * classes + index, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def skip_flag_kernel(stats, scale, skip):
    """Complete a handful of numbers in one launch instead of fourteen."""
    by = tl.load(scale)
    norm = tl.sqrt(tl.load(stats + 5)) / tl.where(by == 0, 1.0, by)
    bad = (tl.abs(tl.load(stats) + norm) < float("inf")) == 0
    tl.store(stats + 3, bad.to(tl.float64))
    tl.store(stats + 5, norm)
    tl.store(skip, bad.to(tl.float32))
