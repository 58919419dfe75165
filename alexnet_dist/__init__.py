"""The 2012 AlexNet, trained in two columns on two devices as in the paper, or on other layouts.

    from alexnet_dist import AlexNet, evaluate, load_checkpoint, load_config, train

Each of these is imported on first use, so that a program can handle signals before torch is loaded.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["AlexNet", "evaluate", "load_checkpoint", "load_config", "train"]

if sys.version_info < (3, 11):  # noqa: UP036 (a checkout can be run by any Python)
    sys.exit(
        f"alexnet-dist: this is Python {sys.version.split()[0]}, but it needs 3.11 or newer: make "
        "the environment with that, python3.11 -m venv .venv, and install there"
    )

if TYPE_CHECKING:
    from alexnet_dist.config.load import load_config
    from alexnet_dist.evaluation.evaluate import evaluate
    from alexnet_dist.evaluation.load import load_checkpoint
    from alexnet_dist.network.model import AlexNet
    from alexnet_dist.training.loop import train

_HOMES = {
    "AlexNet": "network.model",
    "evaluate": "evaluation.evaluate",
    "load_checkpoint": "evaluation.load",
    "load_config": "config.load",
    "train": "training.loop",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
