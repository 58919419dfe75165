"""Helpers for tests of ranks that share a GPU.

With REHEARSE=1 these tests run on the CPU over gloo, to check their own code without a GPU.
"""

import os

import pytest
import torch

from alexnet_dist.config.load import load_config
from alexnet_dist.parallel.device import share_problem

REHEARSED = "REHEARSE" in os.environ
# A run's first step builds kernels, TINY's in 40 s of a core, while its watchdog counts.
PATIENT = "layout.timeout_s=120"
SHARED = ["layout.device=cuda", "layout.share_gpu=true", "train.deterministic=true", PATIENT]
if REHEARSED:
    SHARED = ["layout.device=cpu"]

marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(share_problem(load_config(SHARED), 4)),
        reason="needs NCCL 2.30, or four CUDA devices",
    ),
]
