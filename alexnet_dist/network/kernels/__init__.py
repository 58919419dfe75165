"""Loops and kernels of ours, where torch's operators take too many passes over memory.

Which of a GPU's run is `train.execution`'s; without them the same run goes on by torch's operators.
"""

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from alexnet_dist.errors import COMPILER

log = logging.getLogger(__name__)


def fused(execution: str, device: torch.device) -> bool:
    """Whether what follows a product is done by a GPU's kernels; warns once where it could be and
    is not. Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, for tests."""
    if execution == "eager":
        return False
    if device.type == "cuda":
        return can_be_built()
    return device.type == "cpu" and interpreted()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def can_be_built() -> bool:
    """Whether Triton can build a GPU's kernels here; warns if not."""
    if lack := lacking():
        log.warning(
            f"no kernels for this GPU: {lack}; the same run goes on by torch's operators, at half "
            f"the speed or less: {COMPILER}, or set train.execution=eager"
        )
    return not lack


def lacking() -> str:
    """What Triton lacks to build kernels; nothing if "" is returned."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if compiler() is None:
        return "there is no C compiler"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if headers.exists() else f"there is no {headers}"


def compiler() -> str | None:
    """What Triton takes."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
