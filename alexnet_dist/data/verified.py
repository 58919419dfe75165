"""Files named in dataset.json: each must lie in the folder, with the recorded size and hash."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_dist.errors import DatasetError, cannot_be_read
from alexnet_dist.files import opened, sha256


def path_of(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Return the path of a file in dataset.json; raise DatasetError unless it is inside the folder
    and has the recorded size.

    Args:
        entry: the file's `file`, `size` and `sha256`, as dataset.json has them.
    """
    name = str(entry["file"])
    if not re.fullmatch(r"([A-Za-z0-9_-]+/)?[A-Za-z0-9_-]+\.(tar|npy)", name):
        raise DatasetError(f"{folder / 'dataset.json'}: names a file that it may not, {name!r}")
    path = folder / name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}): prepare the data set again"
        ) from error
    if size != entry["size"]:
        raise DatasetError(
            f"{path}: {size} bytes, but dataset.json says {entry['size']}: prepare the data set "
            "again"
        )
    return path


def check_hash(path: Path, expected: str) -> None:
    """Raise DatasetError where the SHA-256 of a file is not the expected one, or cannot be read."""
    try:
        found = sha256(path)
    except OSError as error:
        raise DatasetError(cannot_be_read(path, error)) from error
    if found != expected:
        raise DatasetError(
            f"{path}: SHA-256 {found[:12]}…, but dataset.json says {str(expected)[:12]}…: it was "
            "changed or damaged; prepare the data set again"
        )


def load_array(folder: Path, entry: Mapping[str, Any], dtype: np.dtype[Any], dims: int) -> Any:
    """Return the array of this dtype and number of dimensions in a .npy file of dataset.json.

    It is read whole: a memory map of a truncated file would end the process by SIGBUS.
    """
    path = path_of(folder, entry)
    check_hash(path, entry["sha256"])
    try:
        array = read_array(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} is not an array: {error}") from error
    if array.dtype == dtype and array.ndim == dims:
        return array
    raise DatasetError(f"{path}: {array.dtype} in {array.ndim} dimensions, but must be {dtype}")


def read_array(path: Path) -> npt.NDArray[Any]:
    """Return the array that np.save wrote; raise ValueError for any other file, OSError as usual.

    Unlike np.load, it allocates no more than the file holds and never runs a pickle.
    """
    try:
        with opened(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not version 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                raise ValueError(f"{dtype} in {len(shape)} dimensions")
            values = np.fromfile(file, dtype)
            return values.reshape(shape, order="F" if fortran else "C")
    except OSError:
        raise
    except Exception as error:  # a hostile header can fail in any way
        raise ValueError(repr(error)) from error
