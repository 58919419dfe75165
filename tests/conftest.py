"""Shared fixtures: a tiny network and data set, and real processes to run them in."""

import contextlib
import faulthandler
import getpass
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# OpenMP reads it as torch loads. Workers share cores: a thread that spins for the others keeps from
# its core what it waits for.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import cycles
import forks
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from forks import Fork
from made import write_idx
from processes import temporary_files_in
from torch.distributed import distributed_c10d

from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.engines.graph import release_graphs

# Small, and awkward: odd shares of units, so that a column does not begin at a multiple of four.
TINY = [
    "model.classes=10",
    "model.crop=67",
    "model.conv=[8,12,16,16,8]",
    "model.fc=[36,28]",
    "model.init=he",
    "data.canvas=72",
    "data.eval_split=test",
    "data.divide_by=[60,60,60]",
    "data.workers=2",
    "layout.device=cpu",
    "layout.threads=1",
    "layout.timeout_s=60",
    "schedule.kind=polynomial",
    "train.batch=8",
    "evaluate.batch=10",
    "log.histograms_every_steps=0",
    "log.pictures=false",
    "log.embedding=0",
]


# Begun before the others, so that none of them is left to one worker at the end.
LONG = (
    "watchdog", "run", "plan", "layouts", "kernels_compile", "open_ports", "compare", "bench",
    "prepare", "docs", "fused_kernels", "execution", "wheel", "pipelines", "errors", "cost", "api",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Remove what test runs that were killed have left, after an hour; pytest waits three days."""
    if hasattr(config, "workerinput"):
        return
    for lock in Path(tempfile.gettempdir()).glob(f"pytest-of-{getpass.getuser()}/*/.lock"):
        with contextlib.suppress(OSError, ValueError):
            old = time.time() - lock.stat().st_mtime > 3600
            if old and not psutil.pid_exists(int(lock.read_text())):
                shutil.rmtree(lock.parent, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    cycles.look()


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Those of tests, and of processes that they kill, go where pytest removes them; but what torch
    has compiled is kept for later runs."""
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    folder = tmp_path_factory.mktemp("tmp")
    with temporary_files_in(folder):
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def of_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that meets others in a test's own process tells it their network, for good."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed data set of 60 training and 23 test images; not to be changed."""
    root = tmp_path_factory.mktemp("packed")
    prepare("fashion_mnist", write_idx(root / "idx", 60, 23), root / "data", Options(workers=1))
    return root / "data"


@pytest.fixture
def tiny(packed: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes tiny configs: tiny("train.batch=4", …)."""

    def make(*overrides: str) -> Config:
        places = [f"data.path={packed}", f"output_dir={tmp_path / 'runs'}"]
        return load_config([*TINY, *places, *overrides])

    return make


def on_ranks(
    count: int, function: Callable[..., Any], *args: Any, fresh: bool = False
) -> list[Any]:
    """What a test module's function returns in each of `count` real processes joined over gloo."""
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as held:
        # Held until the end, so that nothing else is given the port before rank 0 listens there.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        said, returned = Path(folder) / "said", [Path(folder) / str(rank) for rank in range(count)]
        ranks = [
            Fork(
                _on_rank, call, returned[rank],
                prints=(said, said),
                environment=os.environ
                | {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                fresh=fresh,
            )
            for rank in range(count)
        ]  # fmt: skip
        try:
            codes = [rank.wait(timeout=600) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0] * count, f"ranks ended with {codes}:\n{said.read_text()}"
        return [pickle.loads(path.read_bytes()) for path in returned]


def by_kernels(function: Callable[[], dict[str, Any]], cache: Path) -> dict[str, Any]:
    """What a function that launches kernels returns, on a GPU or by Triton's interpreter.

    Args:
        cache: where Triton keeps what it compiles.
    """
    if not torch.cuda.is_available():
        return dict(interpreted(function))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        (found,) = on_ranks(1, function, fresh=True)
    return dict(found)


def interpreted(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns that launches kernels, by Triton's interpreter: it can be asked for
    only in a new process, and imports for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        (found,) = on_ranks(1, _interpreted, function, args, fresh=True)
    return found


def with_small_tiles(function: Callable[..., Any], *args: Any) -> Any:
    """What a function that launches kernels returns, sooner: the interpreter takes its time for
    each operation, however many lanes it is of. Other tests are of the tiles that are shipped."""
    from alexnet_dist.network.kernels import lanes, pooled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled, "_ROWS", 1)
        patch.setattr(pooled, "_COLUMNS", 1)
        patch.setattr(lanes, "WARP", 128)
        return function(*args)


def _interpreted(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from interpreter import quicken

    from alexnet_dist.network import precision

    precision.cpu_multiplies = lambda _: True  # as the GPU that it stands for
    quicken()
    return function(*args)


def _on_rank(call: bytes, returned: Path) -> None:
    """The function in a rank; what it returns goes to a file."""
    cycles.look()  # a new Python has just imported this module

    def refuse(*_: Any) -> None:
        raise AssertionError("ranks exchange no pickles, DeepSpeed's neither")

    for name in distributed_c10d.__all__:
        if "object" in name:
            setattr(distributed_c10d, name, refuse)
            setattr(dist, name, refuse)
    # A rank that hangs says where; on a GPU, while others can still be run.
    faulthandler.dump_traceback_later(150 if torch.cuda.is_available() else 570, exit=True, file=2)
    function, args = pickle.loads(call)
    returned.write_bytes(pickle.dumps(function(*args)))
    release_graphs()
    if dist.is_initialized():
        dist.destroy_process_group()


def alexnet_dist(
    *arguments: str, fresh: bool = False, **where: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would; `fresh` by a Python that has imported nothing yet."""
    if not fresh:
        return in_a_fork(forks.run, arguments, **where)
    command = [sys.executable, "-m", "alexnet_dist", *arguments]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, **where
    )


def in_a_fork(
    function: Callable[..., object], *args: Any, **where: Any
) -> subprocess.CompletedProcess[str]:
    """Call a module's function in a process that has imported everything.

    Args:
        where: as of Fork: `cwd`, `environment`.
    """
    with tempfile.TemporaryDirectory() as folder:
        prints = Path(folder) / "output", Path(folder) / "errors"
        process = Fork(function, *args, prints=prints, **where)
        try:
            code = process.wait(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(args, code, *(path.read_text() for path in prints))


def as_overrides(config: Config) -> Sequence[str]:
    """Arguments that make this config again."""
    from alexnet_dist.config.schema import flat

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")

    return [f"{key}={text(value)}" for key, value in flat(config).items()]


def assert_checkpoints_near(ours: Path, theirs: Path, bound: float) -> None:
    """The newest checkpoints of two runs are of one step, and their parameters and optimiser's
    tensors within a bound, relative to a tensor's largest value."""
    mine, other = (
        checkpoints.verify(checkpoints.steps(run / "checkpoints")[-1]) for run in (ours, theirs)
    )
    assert mine.step == other.step
    for here, there in (
        (mine.parameters().tensors(), other.parameters().tensors()),
        (mine.optimizer().tensors(), other.optimizer().tensors()),
    ):
        assert here.keys() == there.keys()
        for name, tensor in there.items():
            assert (here[name] - tensor).abs().max() <= bound * tensor.abs().max(), name


def assert_close(ours: Any, reference: Any, bound: float) -> None:
    """Largest absolute difference at most `bound`."""
    difference = np.abs(np.asarray(ours) - np.asarray(reference)).max()
    assert difference <= bound, f"differs by {difference}"
