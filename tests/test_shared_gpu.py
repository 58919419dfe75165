"""Ranks that share a GPU (layout.share_gpu), as far as it can be tested without one."""

import ctypes
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import on_ranks

from alexnet_dist.bench.layouts import OnRank
from alexnet_dist.cli.main import main
from alexnet_dist.config.load import IN_ONE_PROCESS, load_config
from alexnet_dist.config.schema import Config, fingerprint, flat
from alexnet_dist.errors import ConfigError
from alexnet_dist.parallel import device, spawn
from alexnet_dist.parallel.device import (
    free_gpu_memory,
    memory_share,
    nccl_version,
    own_device,
    ranks_per_gpu,
    share_problem,
)
from alexnet_dist.parallel.environment import Place
from alexnet_dist.parallel.stop_signals import handlers_restored
from alexnet_dist.parallel.topology import connect
from alexnet_dist.planning import dry_run, shared_gpus
from alexnet_dist.reporting import compare_layouts, doctor
from alexnet_dist.reporting.compare_layouts import Row

Patch = pytest.MonkeyPatch
Tiny = Callable[..., Config]
SHARED = ("layout.device=auto", "layout.share_gpu=true")
GB = 10**9
VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"


@contextmanager
def with_gpus(
    count: int, memory: int = 80 * GB, nccl: tuple[int, ...] = (2, 30, 7)
) -> Iterator[dict[int, float]]:
    """This process sees so many GPUs, and an NCCL of this version; what share of each one's memory
    a rank takes is kept."""
    bounds: dict[int, float] = {}

    def bound(fraction: float, device: torch.device) -> None:
        bounds[device.index] = fraction

    about = SimpleNamespace(total_memory=memory, name="NVIDIA H100 80GB HBM3")
    with Patch.context() as patch:
        patch.setenv(VARIABLE, "")  # what a test sets is undone
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", bound)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda *_: about.name)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: about)
        patch.setattr(device, "nccl_version", lambda: nccl)
        yield bounds


@pytest.mark.parametrize(
    ("gpus", "ranks", "taken", "each"),
    [
        (1, 2, [0, 0], 2),
        (1, 4, [0, 0, 0, 0], 4),
        (2, 3, [0, 0, 1], 2),
        (2, 4, [0, 0, 1, 1], 2),  # a replica's columns on one
        (3, 4, [0, 0, 1, 2], 2),
        (4, 2, [0, 1], 1),  # enough: each its own
    ],
)
def test_ranks_are_divided_over_the_gpus_and_their_memory(
    gpus: int, ranks: int, taken: list[int], each: int, tiny: Tiny
) -> None:
    config = tiny(*SHARED)
    with with_gpus(gpus) as bounds:
        places = [Place(rank, ranks, rank, ranks) for rank in range(ranks)]
        assert [own_device(config, place).index for place in places] == taken
        assert ranks_per_gpu(config, ranks) == each
        assert os.environ[VARIABLE] == "1"
    share = (80 * GB // each - GB) / (80 * GB)
    assert bounds == ({} if each == 1 else dict.fromkeys(taken, pytest.approx(share)))


def test_a_slurm_task_that_sees_its_own_gpu_alone_shares_it_with_nobody(tiny: Tiny) -> None:
    with with_gpus(1):
        assert own_device(tiny(*SHARED), Place(1, 2, 1, 2, 0, (2,), 2)).index == 0
        assert os.environ[VARIABLE] == "1"  # other nodes' ranks may share: NCCL asks all


def test_a_share_leaves_room_for_what_is_no_tensor() -> None:
    assert memory_share(80 * GB, 2) == 39 * GB
    assert memory_share(80 * GB, 4) == 19 * GB
    assert memory_share(6 * GB, 4) == 0.75 * GB  # never nothing


def test_what_a_rank_may_still_take_is_of_its_share(monkeypatch: Patch) -> None:
    of_gpu, mine = torch.device("cuda", 0), {"fraction": 1.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: mine["fraction"]
    )
    assert free_gpu_memory(of_gpu) == 70 * GB
    mine["fraction"] = 0.25
    assert free_gpu_memory(of_gpu) == 17 * GB


@pytest.mark.parametrize(
    ("gpus", "nccl", "ranks", "said"),
    [
        (0, (2, 30, 7), 2, "this machine has no GPU to share: set layout.share_gpu=false to"),
        (1, (2, 29, 2), 2, r"2 ranks but only 1 GPU, and NCCL 2\.29\.2 cannot give a "
         r"GPU to several ranks: install torch 2\.14, whose NCCL 2\.30 can"),
        (1, (), 2, "and NCCL is missing, which cannot give"),
        (2, (2, 27, 5), 2, ""),  # nothing is shared
        (1, (2, 27, 5), 1, ""),
        (1, (2, 30, 3), 4, ""),
        (1, (3, 0, 0), 4, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_a_line_with_its_remedy(
    gpus: int, nccl: tuple[int, ...], ranks: int, said: str, tiny: Tiny
) -> None:
    with with_gpus(gpus, nccl=nccl):
        assert not share_problem(tiny("layout.device=auto"), ranks)  # not asked for
        if not said:
            assert not share_problem(tiny(*SHARED), ranks)
            assert own_device(tiny(*SHARED), Place(0, ranks, 0, ranks)).type == "cuda"
            return
        with pytest.raises(ConfigError, match=said):
            own_device(tiny(*SHARED), Place(0, ranks, 0, ranks))
        with pytest.raises(ConfigError, match=said):
            shared_gpus.check(tiny(*SHARED), ranks)


def test_the_version_is_the_loaded_nccls(monkeypatch: Patch) -> None:
    def loaded(code: int) -> Callable[..., object]:
        def get_version(found: object) -> None:
            found._obj.value = code  # type: ignore[attr-defined]

        return lambda *_, **__: SimpleNamespace(ncclGetVersion=get_version)

    monkeypatch.setattr(ctypes, "CDLL", loaded(23007))
    assert nccl_version() == (2, 30, 7)

    def not_loaded(*_: object, **__: object) -> None:
        raise OSError("libnccl.so.2: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", not_loaded)
    monkeypatch.setattr(device.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert nccl_version() == (2, 27, 5)
    monkeypatch.setattr(device.dist, "is_nccl_available", lambda: False)
    assert nccl_version() == ()


def test_a_rank_that_needs_more_than_its_share_is_refused_before_it_starts(tiny: Tiny) -> None:
    config = tiny(*SHARED, "layout.kind=replicas", "model.fc=[1024,1024]")
    need = dry_run.needed(config, 2)
    assert need > 4 * 4 * 1024 * 1024  # weights, gradients, momenta, a bucket
    with with_gpus(1, memory=2 * (GB + need) + 2):
        shared_gpus.check(config, 2)
        shared_gpus.check(tiny("layout.device=auto"), 64)
    with with_gpus(1, memory=2 * need):
        with pytest.raises(ConfigError) as refused:
            shared_gpus.check(config, 2)
        said = str(refused.value)
        assert f"a rank of layout.kind=replicas needs about {need / 1e9:.1f} GB" in said
        assert f"2 ranks on NVIDIA H100 80GB HBM3 (0 GB) have {need / 2e9:.1f} GB each: ra" in said
    with with_gpus(2, memory=2 * need):
        shared_gpus.check(config, 2)  # each has its own


def test_it_is_no_part_of_what_defines_a_run(tiny: Tiny) -> None:
    assert fingerprint(tiny(*SHARED)) == fingerprint(tiny())
    assert not load_config([flat(tiny(*SHARED)), *IN_ONE_PROCESS]).layout.share_gpu
    with pytest.raises(ConfigError, match=r"share_gpu=True: layout\.device=cpu uses no GPU"):
        tiny("layout.device=cpu", "layout.share_gpu=true")


def variable_of(config: Config) -> tuple[str, str]:
    """What NCCL is told, and on which device, in a rank that joined others over gloo."""
    with with_gpus(1), Patch.context() as patch:
        patch.setattr("alexnet_dist.parallel.topology.dist.is_initialized", lambda: True)
        patch.setattr("alexnet_dist.parallel.topology._group", lambda *_: None)
        patch.setattr("alexnet_dist.parallel.topology.PrefixStore", lambda *_: None)
        patch.setattr("alexnet_dist.parallel.topology._get_default_store", lambda: None)
        topology = connect(config)
        return os.environ[VARIABLE], str(topology.device)


def test_launched_ranks_tell_nccl_before_it_starts(tiny: Tiny) -> None:
    found = on_ranks(2, variable_of, tiny(*SHARED, "layout.kind=columns"))
    assert found == [("1", "cuda:0")] * 2


@pytest.mark.parametrize("command", ["train", "compare", "bench layouts"])
def test_without_a_gpu_each_command_says_one_line(
    command: str, tiny: Tiny, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = flat(tiny("layout.device=auto"))
    keys = ["layout.device=auto", f"data.path={config['data.path']}", "layout.kind=columns"]
    keys += [f"output_dir={config['output_dir']}"]
    share = ["layout.share_gpu=true"] if command == "train" else ["--share-gpu"]
    with handlers_restored():
        assert main([*command.split(), "demo", *keys, *share]) == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1
    assert "layout.share_gpu=true: this machine has no GPU to share" in said.err
    assert not tiny().folder.exists()


def test_layouts_are_compared_on_the_gpu_that_they_share(tiny: Tiny, monkeypatch: Patch) -> None:
    monkeypatch.setattr(dry_run, "needed", lambda config, ranks: GB)
    with with_gpus(1):
        found = compare_layouts.chosen(tiny(*SHARED), "columns:2,replicas:4")
        assert [one.layout.device for one in found] == ["auto"] * 3
        assert [ranks_per_gpu(one, one.layout.ranks) for one in found] == [1, 2, 4]
        said = shared_gpus.unseen(found[-1], 4)
        assert "of NVIDIA H100 80GB HBM3, which up to 4 ranks share" in said
        assert "`alexnet-dist plan CONFIG --gpus h100:4`" in said
        assert not shared_gpus.unseen(found[0], 1)
    with with_gpus(1, memory=10**6), pytest.raises(ConfigError, match="fp64, but 2 ranks on"):
        compare_layouts.chosen(tiny(*SHARED), "columns:2")


def test_images_per_s_are_said_to_be_of_a_shared_gpu(
    tiny: Tiny, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("one", 1, 2.3, 0, 1e-12, True, 900, 0, 1),
            Row("columns", 2, 2.3, 1e-15, 1e-12, True, 500, 9, 2)]  # fmt: skip
    monkeypatch.setattr(compare_layouts, "compare", lambda *_: [(row, None, None) for row in rows])
    monkeypatch.setattr(dry_run, "needed", lambda config, ranks: GB)
    keys = [f"data.path={flat(tiny())['data.path']}", "--share-gpu"]
    with with_gpus(1):
        assert main(["compare", "demo", *keys]) == 0
        *_, last = capfd.readouterr().out.splitlines()
        assert last.startswith(
            "images/s are those of NVIDIA H100 80GB HBM3, which up to 2 ranks share"
        )
        assert main(["compare", "demo", *keys, "--json"]) == 0
        assert [row["ranks_per_gpu"] for row in json.loads(capfd.readouterr().out)] == [1, 2]
        monkeypatch.setattr(spawn, "call", lambda *_: [OnRank(1.0, 2_000_000, 150.0, 0.25)])
        assert main(["bench", "layouts", "demo", "--share-gpu", "--repeats", "1"]) == 0
        printed = capfd.readouterr().out
    assert "up to 2 ranks share" in printed.splitlines()[-1]
    assert re.search(r"^columns, kernels a step +150\.00$", printed, re.M)
    assert re.search(r"^columns, MB sent a step +2\.00$", printed, re.M)
    assert re.search(r"^zero1, collectives, % of a step +25\.00$", printed, re.M)


def test_doctor_tells_what_would_be_shared_and_why_it_cannot_be(tiny: Tiny) -> None:
    config = tiny(*SHARED, "layout.kind=columns_x_replicas")
    with with_gpus(1):
        first, *_, backends = doctor._layout(config)
        assert first.found.startswith(
            "columns_x_replicas: 4 processes on a GPU for up to 4 of them, over NCCL (1 GPU "
            "here, shared)"
        )
        assert not first.remedy
        assert "nccl" in backends.found
    with with_gpus(1, nccl=(2, 27, 5)):
        (only,) = doctor._layout(config)
        assert only.broken
        assert "NCCL 2.27.5 cannot give a GPU to several" in only.remedy
    with with_gpus(1):
        first, *_ = doctor._layout(tiny("layout.device=auto"))
        assert first.remedy.endswith("layout.share_gpu=true")
