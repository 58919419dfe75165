"""The 2012 AlexNet, trained as it was, in two columns on two devices, and as machines now allow.

    from alexnet_dist import AlexNet, evaluate, load_checkpoint, load_config, train

Each is imported when it is first asked for: a program hears signals before torch is loaded.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AlexNet", "evaluate", "load_checkpoint", "load_config", "train"]

if sys.version_info < (3, 11):  # noqa: UP036 (a checkout can be run by any Python)
    sys.exit(
        f"alexnet-dist: this is Python {sys.version.split()[0]}, and 3.11 or newer is needed: make "
        "the environment with it, python3.11 -m venv .venv, and install there"
    )

if TYPE_CHECKING:
    from alexnet_dist.config_files import load_config
    from alexnet_dist.evaluate import evaluate
    from alexnet_dist.model import AlexNet
    from alexnet_dist.train import train
    from alexnet_dist.trained import load_checkpoint


class _From:
    """An attribute of the package that is a module's attribute of the same name."""

    def __init__(self, module: str) -> None:
        self.module = f"{__name__}.{module}"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, package: ModuleType, kind: type) -> Any:
        return getattr(import_module(self.module), self.name)

    def __set__(self, package: ModuleType, value: object) -> None:
        """Importing train.py or evaluate.py sets the package's attribute to the module: ignored."""
        if not isinstance(value, ModuleType):
            raise AttributeError(f"{__name__}.{self.name} cannot be set: set it in {self.module}")


class _Package(ModuleType):
    AlexNet = _From("model")
    evaluate = _From("evaluate")
    load_checkpoint = _From("trained")
    load_config = _From("config_files")
    train = _From("train")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
