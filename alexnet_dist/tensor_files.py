"""Read and write whole tensors in safetensors files, whose shapes can be read before any row."""

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alexnet_dist.errors import CheckpointError, cannot_be_read
from alexnet_dist.files import MOST_HEADER, opened, written_aside

Shape = tuple[int, ...]
_FLOATS = {"F64", "F32", "F16", "BF16"}


class TensorFile:
    """A safetensors file of whole tensors, whose rows can be read. Its str() is its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with opened(path) as file:  # safe_open reports every failure as "No such file"
                header = int.from_bytes(file.read(8), "little")
            if header > MOST_HEADER:
                raise ValueError(f"a header of {header:,} bytes, more than {MOST_HEADER:,}")
            self._file = safe_open(path, framework="pt")
        except OSError as error:
            raise CheckpointError(cannot_be_read(path, error)) from error
        except (ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error

    def __str__(self) -> str:
        return str(self.path)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def shapes(self) -> dict[str, Shape]:
        """Return each tensor's whole shape, from the header; raise CheckpointError unless all are
        floating point."""
        slices = {name: self._file.get_slice(name) for name in self.keys()}
        for name, tensor in slices.items():
            if tensor.get_dtype() not in _FLOATS:
                raise CheckpointError(
                    f"{self.path}: {name} holds {tensor.get_dtype()}, but a network's tensors "
                    "hold floating-point numbers"
                )
        return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors."""
        return {name: self.rows(name, slice(None)) for name in self.keys()}

    def rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows (dim 0) of a tensor, or a scalar."""
        try:
            tensor = self._file.get_slice(name)
            return tensor[rows] if tensor.get_shape() else self._file.get_tensor(name)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: no tensor {name!r}: {error}") from error


def misfit(there: Mapping[str, Shape], here: Mapping[str, Shape]) -> str | None:
    """Describe the first tensor whose name or shape differs, beginning with its name; None where
    all agree.

    Args:
        there, here: whole shapes by name.
    """
    for name in (*here, *sorted({*there} - {*here})):
        if there.get(name) != here.get(name):
            found, wanted = (list(of[name]) if name in of else "not" for of in (there, here))
            return f"{name} is {found} there, but {wanted} here"
    return None


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file durably, with the mode that the umask gives to any new file, where
    safetensors itself would set 0600.

    Raises OSError or SafetensorError.
    """
    with written_aside(path) as aside:
        mode = aside.stat().st_mode  # from a new file: the umask cannot be read without setting it
        save_file(dict(tensors), aside, metadata)
        if aside.stat().st_mode != mode:  # some file systems have one mode only, and refuse chmod
            aside.chmod(stat.S_IMODE(mode))
