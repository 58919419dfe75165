"""`bench step --kernels`: what a training step spends its time on, kernel by kernel."""

import re
import time
from collections.abc import Sequence
from typing import Any

import torch

from alexnet_dist.bench import machine
from alexnet_dist.bench.contestants import Work
from alexnet_dist.bench.trainers import WARM_UP, device_of, ours
from alexnet_dist.config.schema import Config

# What a GPU's kernel or a CPU's operator belongs to: the first group whose pattern matches it.
_GROUPS = {
    "communication": {"cuda": r"(?i)nccl", "cpu": r"c10d::|gloo:"},
    "copies": {
        "cuda": r"(?i)^mem(cpy|set)|copy|nchwToNhwc|nhwcToNchw|CatArray|FillFunctor",
        "cpu": r"::(_to_)?copy_?$|::cat$|::fill_$|::zero_$|::clone$|::contiguous$|mkldnn_reorder",
    },
    "update": {"cuda": r"\bsgd_kernel|FusedSgd|FusedAdam", "cpu": r"::_fused_(sgd|adam)"},
    "convolutions": {"cuda": r"fprop|dgrad|wgrad|convolve|(?i:conv2d)", "cpu": r"convolution"},
    "products": {
        "cuda": r"gemm|gemv|xmma|cutlass|nvjet|splitK",
        "cpu": r"::(add)?mm$|::bmm$|linear",
    },
    "passes over maps and units": {
        "cuda": r"\b((pooled|maps|units|scores)(_backward)?|ranks|counts|fold|masks|windows"
        r"|sum_rows)_kernel",
        "cpu": r"^alexnet_dist::|LocalResponseNorm|relu|clamp_min|threshold_backward|max_pool|nll_|"
        r"softmax",
    },
}
_ARITHMETIC = ("convolutions", "products")
_SHOWN = 40  # costliest kernels, one to a line


def grouped(
    kernels: Sequence[tuple[str, float, float]], kind: str, elapsed: float
) -> dict[str, Any]:
    """Add up the kernels of a step by group.

    Args:
        kernels: name, µs and calls of each, a step.
        kind: `cuda` or `cpu`.
        elapsed: µs from the start of a step to the next.

    Returns:
        kernels (name, µs, calls, group of each, the costliest first), groups (µs and calls of
        each), and ratios: shares of all kernels' time, and of the elapsed time.
    """
    rows = sorted(((*kernel, _group(kernel[0], kind)) for kernel in kernels), key=lambda r: -r[1])
    whole = sum(us for _, us, _, _ in rows)
    groups = {
        name: (sum(us for _, us, _, of in rows if of == name),
               sum(calls for _, _, calls, of in rows if of == name))
        for name in (*_GROUPS, "others")
    }  # fmt: skip
    arithmetic = sum(groups[name][0] for name in _ARITHMETIC)
    ratios = {"convolutions and products / all": arithmetic / whole}
    ratios |= {f"{name} / all": us / whole for name, (us, _) in groups.items()}
    ratios |= {
        "convolutions and products / elapsed": arithmetic / elapsed,
        "all / elapsed": whole / elapsed,
    }
    return {"kernels": rows, "groups": groups, "elapsed": elapsed, "ratios": ratios}


def _group(name: str, kind: str) -> str:
    """Return the group of a kernel or operator."""
    groups = (group for group, of in _GROUPS.items() if re.search(of[kind], name))
    return next(groups, "others")


def bench_kernels(config: Config, steps: int) -> dict[str, Any]:
    """Return what a training step of ours, in train.precision, spends its time on: a GPU's kernels
    or a CPU's operators, as `grouped` returns them, with machine and unit."""
    kind = device_of(config).type
    work = ours(config)
    for _ in range(WARM_UP):
        float(work())  # waits for the result
    begin = time.perf_counter()
    for _ in range(steps):
        loss = work()
    float(loss)
    elapsed = (time.perf_counter() - begin) / steps * 1e6
    return grouped(profiled(work, steps, kind), kind, elapsed) | {
        "machine": machine(config.data.workers),
        "unit": "µs a step",
    }


def profiled(work: Work, steps: int, kind: str) -> list[tuple[str, float, float]]:
    """Return a GPU's kernels, or a CPU's operators, with µs and calls of each a step."""
    watched = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=watched if kind == "cuda" else watched[:1]) as profiler:
        for _ in range(steps):
            loss = work()
        float(loss)
    time = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    return [
        (event.key, getattr(event, time) / steps, event.count / steps)
        for event in profiler.key_averages()
        if event.device_type.name.lower() == kind and getattr(event, time) > 0
        and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip


def kernel_lines(result: dict[str, Any]) -> str:
    """Return what `bench_kernels` found as text."""
    kernels, ratios = result["kernels"], result["ratios"]
    lines = [f"{'µs a step':>10}{'calls':>8}{'share':>7}"]
    lines += [f"{us:10,.0f}{calls:8,.1f}{ratios[f'{name} / all']:7.1%}  {name}"
              for name, (us, calls) in result["groups"].items() if calls]  # fmt: skip
    whole = sum(us for _, us, _, _ in kernels)
    lines += [
        f"{whole:10,.0f}{sum(calls for _, _, calls, _ in kernels):8,.1f}{1:7.1%}  all",
        f"{result['elapsed']:10,.0f}{'':15}  elapsed, without the profiler",
        "",
        "convolutions and products are "
        f"{ratios['convolutions and products / all']:.0%} of the kernels' time, and "
        f"{ratios['convolutions and products / elapsed']:.0%} of the step's",
        "",
        f"{'µs a step':>10}{'calls':>8}",
    ]
    lines += [f"{us:10,.0f}{calls:8,.1f}  {group:27}{name[:90]}"
              for name, us, calls, group in kernels[:_SHOWN]]  # fmt: skip
    rest = kernels[_SHOWN:]
    lines += [f"{sum(us for _, us, _, _ in rest):10,.0f}{'':10}{len(rest)} more"] if rest else []
    return "\n".join(lines)
