"""Our own CPU loops and GPU kernels, where torch's operators take too many passes over memory.

`train.execution` decides whether the GPU kernels are used; torch's operators take their place.
"""

import functools
import importlib.util
import inspect
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_dist.errors import COMPILER

log = logging.getLogger(__name__)


def custom_op(name: str, mutates_args: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """As torch.library.custom_op, whose operators import torch's compiler at their first call, to
    exempt themselves from it: a second of every start. Those made here do not."""

    def made(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(name, function, mutates_args=mutates_args)
        on_devices = operator._backend_fns
        on_devices |= {device: inspect.unwrap(run) for device, run in on_devices.items()}
        return operator

    return made


def fused(execution: str, device: torch.device) -> bool:
    """Whether the GPU kernels do what follows a product; warns once if Triton cannot build them.
    For tests, Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU."""
    if execution == "eager":
        return False
    if device.type == "cuda":
        return can_be_built()
    return device.type == "cpu" and interpreted()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def can_be_built() -> bool:
    """Whether Triton can build GPU kernels here; logs a warning if not."""
    if lack := lacking():
        log.warning(
            f"no kernels for this GPU: {lack}; the run uses torch's operators, at half the speed "
            f"or less: {COMPILER}, or set train.execution=eager"
        )
    return not lack


def lacking() -> str:
    """Return what Triton lacks to build kernels here; empty if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if compiler() is None:
        named = os.environ.get("CC")
        return "there is no C compiler" if named is None else f"CC={named!r} is no program"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if headers.exists() else f"there is no {headers}"


def compiler() -> str | None:
    """Return the C compiler that Triton would use: CC, or its own choice; None if there is none."""
    named = os.environ.get("CC")
    if named is not None:
        return named if shutil.which(named) else None
    return shutil.which("gcc") or shutil.which("clang")
