"""Images decoded once and kept: batches identical to the torch pipeline's, memory, the choice."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, alexnet_dist, as_overrides, on_ranks
from test_pipelines import assert_same, both, config_of, damaged_copy, decoded, training
from test_pipelines import stored as stored  # a fixture

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data import batch
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines import make, resident
from alexnet_dist.data.pipelines.make import (
    choose_pipeline,
    for_one_pass,
    make_pipeline,
    train_batches,
)
from alexnet_dist.data.pipelines.resident import (
    FreeMemory,
    ResidentPipeline,
    decode_to_memory,
)
from alexnet_dist.data.sampler import TrainSampler, evaluation_plan
from alexnet_dist.errors import MachineError
from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
from alexnet_dist.files import read_run
from alexnet_dist.parallel import device
from alexnet_dist.parallel.stop_signals import StopSignals, handlers_restored
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.planning.dry_run import plan
from alexnet_dist.training.loop import train
from alexnet_dist.training.metrics_file import TIMES, read_metrics

KINDS = ("torch", "resident")


def assert_equal(config: Config, get: Callable[[Config], Any]) -> None:
    """Every byte and fact of every batch."""
    seen = 0
    for (ours, mine), (theirs, other) in both(config, get, KINDS):
        assert torch.equal(ours.metadata, theirs.metadata)
        assert_same(mine, other)
        seen += len(ours.metadata)
    assert seen


@pytest.mark.parametrize("kind", ["256", "kept", "larger", "smaller"])
def test_training_and_evaluation_are_the_torch_pipelines_to_the_bit(
    stored: dict[str, Path], packed: Path, kind: str
) -> None:
    """Images at the canvas's size, of any, above it and below it."""
    if kind == "smaller":  # 28 × 28, grey
        config = config_of(packed, "model.classes=10", "data.eval_split=test")
    else:
        path = stored["kept" if kind == "kept" else "256"]
        small = ["model.crop=67", "data.canvas=72"] if kind == "larger" else []
        config = config_of(path, "data.lighting=0.5", *small)
    assert_equal(config, lambda c: training(c, 5))
    parts = [range(0, 4), range(4, 4), range(4, 11), range(11, 11)]
    for views in (1, 10):
        ten = dataclasses.replace(
            config, evaluate=dataclasses.replace(config.evaluate, views=views)
        )
        split = config.data.eval_split
        assert_equal(ten, lambda c, s=split: decoded(c, s, evaluation_plan(c, parts)))


def test_there_may_be_more_threads_than_images_to_decode(packed: Path) -> None:
    workers = ["data.workers=40", "model.classes=10", "data.eval_split=test"]
    config = config_of(packed, *workers)
    assert_equal(config, lambda c: decoded(c, "test", evaluation_plan(c, [range(23)])))


def test_what_stands_in_for_damaged_samples_is_the_same_and_named_each_time(
    stored: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(damaged_copy(stored, tmp_path, [4, 5, 35], "train"))
    assert_equal(config, lambda c: training(c, 8))
    said = [r.getMessage() for r in caplog.records if "is read instead" in r.getMessage()]
    assert len(said) >= 6
    half = len(said) // 2
    assert sorted(said[:half]) == sorted(said[half:])


def test_from_the_hosts_memory_threads_cut_the_torch_pipelines_patches(
    stored: dict[str, Path], tmp_path: Path
) -> None:
    """As for a GPU whose own memory is too small."""
    root = damaged_copy(stored, tmp_path, [4, 5], "train")
    for views, split in ((1, "train"), (10, "val"), (1, "val")):
        config = config_of(root, "data.pipeline=resident", f"evaluate.views={views}")
        dataset = open_for(config)
        pipeline = make_pipeline(config, Topology(), dataset, split)
        assert isinstance(pipeline, ResidentPipeline)
        if split == "train":
            plan = list(TrainSampler(config, 36, dataset.statistics).plan(0, 4, range(10)))
        else:
            plan = list(evaluation_plan(config, [range(0, 7), range(7, 7), range(7, 15)]))
        here = list(pipeline.batches(plan))
        (held,) = dataset.resident.values()
        for ours, cut in zip(here, pipeline._from_host(held, plan), strict=True):
            assert ours.resident
            assert not cut.resident
            assert ours.patches is held.images
            assert torch.equal(ours.metadata, cut.metadata)
            assert_same(ours.batch(), cut.batch())
        pipeline.close()


def test_a_split_is_decoded_once_whoever_asks(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []
    decode = resident.Decoder.__call__
    monkeypatch.setattr(
        resident.Decoder, "__call__", lambda *a: times.extend(a[1].tolist()) or decode(*a)
    )
    config = load_config([*TINY, f"data.path={packed}", "data.pipeline=resident"])
    dataset = open_for(config)
    for _ in range(3):
        pipeline = make_pipeline(config, Topology(), dataset, "test")
        assert len(list(pipeline.batches(evaluation_plan(config, [range(0, 23)])))) == 1
        pipeline.close()
    assert sorted(times) == list(range(23))
    assert not dataclasses.replace(dataset, splits=dataset.splits).resident, "of these bytes alone"


def batches_of(config: Config) -> list[Any]:
    """A rank's batches of an epoch."""
    topology, dataset = connect(config), open_for(config)
    found = train_batches(config, topology, dataset, 0, 5)
    return [(batch.windows, batch.labels, batch.ids) for batch in (f.batch() for f in found)]


@pytest.mark.parametrize(("kind", "ranks"), [("columns", 2), ("replicas", 3)])
def test_ranks_hold_what_each_sees_in_time(packed: Path, kind: str, ranks: int) -> None:
    own = [*TINY, f"data.path={packed}", f"layout.kind={kind}", "train.batch=12",
           f"layout.ranks={ranks}"]  # fmt: skip
    ours, theirs = (
        on_ranks(ranks, batches_of, load_config([*own, f"data.pipeline={pipeline}"]))
        for pipeline in KINDS
    )
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert all(map(torch.equal, a, b))


def test_a_run_on_either_is_the_same_run(tiny: Callable[..., Config]) -> None:
    """Evaluations too, whose split is decoded once."""
    metrics = []
    for pipeline in KINDS:
        config = tiny(
            f"data.pipeline={pipeline}", f"name={pipeline}", "log.every_steps=1", "train.epochs=3",
            "layout.kind=columns", "evaluate.every_epochs=1", "train.precision=fp32",
        )  # fmt: skip
        result = alexnet_dist("train", *as_overrides(config))
        assert result.returncode == 0, result.stderr
        assert f"by data.pipeline={pipeline} (set)" in result.stderr
        metrics.append([p for p in read_metrics(config.folder) if p["kind"] not in TIMES])
    assert (
        "train and test: 0.00 GB of decoded images per rank, in the host's memory" in result.stderr
    )
    assert metrics[0] == metrics[1]
    assert sum(point["kind"] == "eval" for point in metrics[0]) == 3
    # Looked at once, its images are decoded as they come.
    score = evaluate_checkpoints([config.folder]).score
    assert score.correct1 == metrics[1][-1]["correct1"]


# --- stopping


class Stops:
    """A signal that is agreed on at one of the polls."""

    def __init__(self, at: int) -> None:
        self.polls, self.at = 0, at

    def poll(self, topology: Topology) -> int:
        self.polls += 1
        return int(self.polls >= self.at)


def test_a_signal_ends_decoding_and_what_was_decoded_is_not_kept(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_CHUNK", 10 * 3 * 72**2)  # parts of ten images
    seen = []
    decode = resident.Decoder.__call__
    monkeypatch.setattr(
        resident.Decoder, "__call__", lambda *a: seen.extend(a[1].tolist()) or decode(*a)
    )
    config = tiny("data.pipeline=resident")
    dataset = open_for(config)
    signals: Any = Stops(3)
    decode_to_memory(config, Topology(), dataset, ["train", "test"], signals)
    assert sorted(seen) == [*range(20)]
    assert not dataset.resident
    signals = Stops(100)
    decode_to_memory(config, Topology(), dataset, ["train", "test"], signals)
    assert len(dataset.resident) == 2
    assert signals.polls == 6 + 3  # of 60 and 23 images


def test_ranks_of_unequal_cores_meet_equally_often_while_they_decode(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_CHUNK", 2 * 3 * 72**2)  # parts of two images
    config = tiny("data.pipeline=resident", "data.workers=0")
    met = []
    for cores in (1, 5):
        signals: Any = Stops(1000)
        decode_to_memory(config, Topology(cores=cores), open_for(config), ["test"], signals)
        met.append(signals.polls)
    assert met == [12, 12]  # of 23 images


def test_a_run_that_is_stopped_as_it_decodes_leaves_at_once(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the signal's exit code, and nothing trained; it begins when it is started again."""
    config = tiny("data.pipeline=resident", "layout.kind=one", "train.epochs=1")
    with handlers_restored():
        signals = StopSignals()
        poll = signals.poll

        def stopped(topology: Topology) -> int:
            signals.flag = 1
            return poll(topology)

        monkeypatch.setattr(signals, "poll", stopped)
        monkeypatch.setattr(resident.Decoder, "__call__", lambda *_: pytest.fail("decoded"))
        outcome = train(config, signals)
    assert (outcome.exit, outcome.step) == (75, 0)
    assert read_run(config.folder)["state"] == "stopped"
    monkeypatch.undo()
    with handlers_restored():
        assert train(config, StopSignals()).exit == 0


def test_from_the_hosts_memory_a_gpu_is_given_pinned_batches(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config([*TINY, f"data.path={packed}", "data.pipeline=resident"])
    dataset = open_for(config)
    monkeypatch.setattr(FreeMemory, "of", classmethod(lambda cls, *_: cls(0, 1e12)))
    pinned, empty = [], torch.empty

    def allocated(*size: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*size, **how)

    decode_to_memory(config, ON_GPU, dataset, ["test"])
    monkeypatch.setattr(resident.torch, "empty", allocated)
    for module in (batch, resident):
        monkeypatch.setattr(module, "to_device", lambda tensor, device: tensor)
    finish: Any = None
    found = resident.ResidentPipeline(config, ON_GPU, dataset, "test", finish, 2)
    parts = [range(0, 7), range(7, 23)]
    assert [len(p.patches) for p in found.batches(evaluation_plan(config, parts))] == [7, 16]
    found.close()
    assert pinned == [True, True]


# --- memory


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """As if so many bytes of this host were free beside the network."""
    monkeypatch.setattr(resident, "_network_bytes", lambda *_: 0.0)
    monkeypatch.setattr(resident, "free_host_memory", lambda: size)


def test_images_that_do_not_fit_are_one_error_before_any_is_decoded(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("data.pipeline=resident")
    dataset = open_for(config)
    size = resident.decoded_bytes(config, dataset, ["train", "test"])
    assert size == 83 * 72 * 72 * 3
    monkeypatch.setattr(resident, "_decode_all", lambda *_: pytest.fail("decoded"))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    free(monkeypatch, 2 * size - 1)
    message = (
        r"data\.pipeline=resident: the decoded images \(60 of 'train' and 23 of 'test'\) take 0\."
        r"00 GB per rank at data\.canvas=72, but 0\.00 GB of the host's memory are free for each: "
        r"set data\.pipeline=torch, which gives the same"
    )
    with pytest.raises(MachineError, match=message):
        decode_to_memory(config, Topology(), dataset, ["train", "test"])


ON_GPU = Topology(device=torch.device("cuda", 0))  # which is not there


def on_gpu(monkeypatch: pytest.MonkeyPatch, device: float, host: float, dali: str = "") -> None:
    """As if a GPU had so many bytes free beside the network, and its host so many."""
    monkeypatch.setattr(FreeMemory, "of", classmethod(lambda cls, *_: cls(device, host)))

    def check(index: int | None) -> None:
        assert index == 0
        if dali:
            raise RuntimeError(dali)

    monkeypatch.setattr(make, "check_dali", check)


@pytest.mark.parametrize(
    ("device", "host", "where"), [(2.0, 2.0, "cuda:0"), (0.9, 1.1, "cpu"), (0.9, 0.9, "neither")]
)
def test_images_lie_on_the_gpu_else_in_the_hosts_memory(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, device: float, host: float,
    where: str,
) -> None:  # fmt: skip
    config = tiny("data.pipeline=resident")
    dataset = open_for(config)
    size = resident.decoded_bytes(config, dataset, ["train"])
    on_gpu(monkeypatch, device * size, host * size)
    places = []
    monkeypatch.setattr(resident, "_decode_all", lambda *a: places.append(str(a[3])))
    if where == "neither":
        with pytest.raises(MachineError, match="free on the GPU beside the network, and"):
            decode_to_memory(config, ON_GPU, dataset, ["train"])
    else:
        decode_to_memory(config, ON_GPU, dataset, ["train", "train"])
        assert places == [where]


@pytest.mark.parametrize(
    "more",
    [
        ["demo"],
        ["paper/alexnet-2012"],
        ["paper/alexnet-2012", "train.precision=fp32", "train.micro_batches=4"],
        [*TINY, "optimizer.kind=adam"],
    ],
)
def test_what_is_left_for_the_network_is_more_than_its_plan(more: Sequence[str]) -> None:
    config = load_config([*more, "layout.kind=one", "layout.ranks=0"])
    planned = plan(config, 1).of("one").memory["peak"]
    assert planned < resident._network_bytes(config, Topology()) < 10 * planned + 2**30


# --- the choice


@pytest.mark.parametrize(
    ("device", "dali", "kind", "why"),
    [
        (2.1, "", "resident", r"decoded images would take 0\.00 GB per rank, of 0\.00 GB free$"),
        (1.9, "", "dali", "free$"),
        (1.9, "no driver", "torch", "free, and DALI cannot decode there: no driver$"),
    ],
)
def test_auto_on_a_gpu_takes_what_fits(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, device: float, dali: str,
    kind: str, why: str,
) -> None:  # fmt: skip
    config = tiny("data.pipeline=auto")
    dataset = open_for(config)
    size = resident.decoded_bytes(config, dataset, ["train", "test"])
    on_gpu(monkeypatch, device * size, 1e12, dali)
    found, said = choose_pipeline(config, ON_GPU, dataset)
    assert found == dataclasses.replace(
        config, data=dataclasses.replace(config.data, pipeline=kind)
    )
    assert re.search(why, said)
    assert choose_pipeline(found, ON_GPU, dataset) == (found, "set")
    assert for_one_pass(found).data.pipeline == kind.replace("resident", "torch")


def test_a_run_keeps_the_pipeline_that_it_began_with(tiny: Callable[..., Config]) -> None:
    def start(*more: str) -> str:
        config = tiny("train.epochs=1", "layout.kind=one", "name=kept", *more)
        result = alexnet_dist("train", *as_overrides(config))
        assert result.returncode == 0, result.stderr
        return result.stderr

    def recorded() -> str:
        return json.loads((tiny("name=kept").folder / "config.json").read_text())["data"][
            "pipeline"
        ]

    began = start("data.pipeline=auto")
    assert "by data.pipeline=torch (auto: on a CPU)" in began
    assert recorded() == "torch"
    assert "by data.pipeline=dali (set)" in start("data.pipeline=dali")
    assert recorded() == "dali"
    assert "by data.pipeline=dali (as before)" in start("data.pipeline=auto")
    assert recorded() == "dali"


def test_a_control_groups_limit_is_the_memory_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either version, on any level; cached files count as free."""
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    for root, total, (most, used) in (
        (tmp_path, "", ("memory.max", "memory.current")),
        (tmp_path / "memory", "total_", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ):
        for group, bound in (("", "max"), ("job", "9000"), ("job/step", "max")):
            folder = root / group
            folder.mkdir(parents=True, exist_ok=True)
            (folder / most).write_text(f"{bound}\n")
            (folder / used).write_text("5000\n")
            counts = f"anon 7\n{total}active_file 300\n{total}inactive_file 40\n"
            (folder / "memory.stat").write_text(counts)
    read = Path.read_text
    for told in ("0::/job/step\n", "4:memory:/job/step\n1:cpu:/other\n"):
        monkeypatch.setattr(
            Path, "read_text",
            lambda path, told=told: told if path == Path("/proc/self/cgroup") else read(path),
        )  # fmt: skip
        assert device.free_host_memory() == 9000 - 5000 + 340
