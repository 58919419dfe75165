"""What strangers' files, other users and a full home must not do."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest

from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.missing import not_packed
from alexnet_dist.network.kernels.numba_loops import compiled

ROOT = Path(__file__).parent.parent


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


def _as_it_loads(module: str, happens: str, *arguments: str) -> tuple[int, str]:
    """How the program ends where something happens as it imports a module: exit code, stderr."""
    code = f"""
import os, runpy, sys, time
class Interrupted:
    def find_spec(self, name, *_):
        if name == {module!r}:
            {happens}
sys.meta_path.insert(0, Interrupted())
runpy.run_module("alexnet_dist", run_name="__main__")
"""
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


def test_an_interrupt_while_the_program_loads_is_no_traceback() -> None:
    assert _as_it_loads("omegaconf", "raise KeyboardInterrupt") == (130, "")


@pytest.mark.parametrize(("number", "code"), [(2, 130), (10, 75), (15, 143)])
def test_a_signal_while_torch_loads_ends_a_start_at_once(
    number: int, code: int, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(flat(tiny("name=early"))))
    arrives = f"os.kill(os.getpid(), {number}), time.sleep(99)"
    said = f"{tmp_path}/runs/early: stopped before it began\n"
    assert _as_it_loads("torch", arrives, "train", str(config)) == (code, said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rank", [True, False])
def test_no_librarys_clean_up_changes_how_a_rank_ends(rank: bool, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    env |= {"RANK": "0", "WORLD_SIZE": "1"} if rank else {}
    command = [sys.executable, "-m", "alexnet_dist", "configs"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == (0 if rank else -signal.SIGABRT)
    assert "paper/alexnet-2012" in ended.stdout
