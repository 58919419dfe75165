"""What strangers' files, other users and a full home must not do."""

import resource
from pathlib import Path

import numba
import numpy as np
import pytest

from alexnet_dist.data.missing import not_packed
from alexnet_dist.network.kernels.numba_loops import compiled


def _double(values: np.ndarray) -> None:
    values *= 2


def test_loops_whose_cache_cannot_be_written_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    loop, values = compiled(_double), np.ones(3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        loop(values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert values.tolist() == [2, 2, 2]


def test_a_command_to_copy_holds_a_folder_as_one_word() -> None:
    said = str(not_packed(Path("my data; $(id)")))
    assert "`alexnet-dist prepare SOURCE PATH 'my data; $(id)'`" in said
