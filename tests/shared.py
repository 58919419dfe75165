"""What tests of ranks that share a GPU have in common.

REHEARSE=1 runs them on the CPU over gloo: their own code, where there is no GPU.
"""

import os

import pytest
import torch

from alexnet_dist.config.load import load_config
from alexnet_dist.parallel.device import share_problem

REHEARSED = "REHEARSE" in os.environ
SHARED = ["layout.device=cuda", "layout.share_gpu=true", "train.deterministic=true"]
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
