"""The pipelines give the same bytes, windows and run; also when data is damaged during a run."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import made
import numpy as np
import psutil
import pytest
import torch
from conftest import TINY, alexnet_dist, as_overrides, on_ranks
from test_data import flip
from torch import Tensor

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.batch import Batch, Decoded
from alexnet_dist.data.dataset import open_dataset, open_for
from alexnet_dist.data.pipelines import dali_pipeline, torch_pipeline
from alexnet_dist.data.pipelines.dali_pipeline import DaliPipeline
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.data.sampler import TrainSampler, evaluation_plan
from alexnet_dist.errors import DatasetError
from alexnet_dist.evaluation.evaluate import evaluate_checkpoints
from alexnet_dist.files import read_run
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.training.metrics_file import read_metrics

PIPELINES = ("torch", "dali", "resident")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same colour photographs as stored: at 256 × 256, and as they came."""
    root = tmp_path_factory.mktemp("stored")
    source = made.image_folder(root / "source", 12, 5, (360, 264))
    found = {}
    for name, keep in (("256", False), ("kept", True)):
        prepare("folder", source, root / name, Options(keep=keep))
        found[name] = root / name
    return found


def config_of(path: Path, *overrides: str) -> Config:
    """A small network on full canvases of these photographs."""
    ours = ["model.classes=3", "model.crop=227", "data.canvas=256", "data.eval_split=val"]
    places = [f"data.path={path}", "layout.kind=one", "train.precision=fp32", "train.batch=10"]
    return load_config([*TINY, *ours, *places, *overrides])


def decoded(config: Config, split: str, plan: Any) -> list[tuple[Decoded, Batch]]:
    pipeline = make_pipeline(config, Topology(), open_for(config), split)
    found = [(d, d.batch()) for d in pipeline.batches(plan)]
    pipeline.close()
    return found


def training(config: Config, steps: int, slots: range = range(10)) -> list[tuple[Decoded, Batch]]:
    dataset = open_for(config)
    sampler = TrainSampler(config, len(dataset.splits["train"]), dataset.statistics)
    return decoded(config, "train", sampler.plan(0, steps, slots))


def both(
    config: Config, get: Callable[[Config], Any], kinds: Sequence[str] = ("torch", "dali")
) -> Iterator[Any]:
    ours = [load_config([flat(config), f"data.pipeline={kind}"]).data for kind in kinds]
    found = [get(dataclasses.replace(config, data=data)) for data in ours]
    assert len(found[0]) == len(found[1])
    return zip(*found, strict=True)


def assert_same(ours: Batch, theirs: Batch) -> None:
    for field in ("ids", "labels", "lighting", "damaged", "windows"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


def assert_near(ours: Decoded, theirs: Decoded) -> None:
    """Mean difference of at most half a grey level, 99.9th percentile at most 4."""
    difference = (ours.patches.float() - theirs.patches.float()).abs().flatten()
    if len(difference):
        assert difference.mean() <= 0.5
        assert difference.sort().values[int(0.999 * len(difference))] <= 4
    assert torch.equal(ours.metadata, theirs.metadata)


def test_both_pipelines_give_the_same_pixels_where_stored_at_canvas_size(
    stored: dict[str, Path],
) -> None:
    config = config_of(stored["256"], "data.lighting=0.5")
    for (_, ours), (_, theirs) in both(config, lambda c: training(c, 8)):
        assert_same(ours, theirs)
        assert ours.windows.shape == (10, 3, 227, 227)
        assert ours.windows.is_contiguous(memory_format=torch.channels_last)


def test_both_pipelines_agree_within_bounds_where_images_are_resized(
    stored: dict[str, Path], packed: Path
) -> None:
    photographs = config_of(stored["kept"])
    small = config_of(stored["kept"], "model.crop=67", "data.canvas=72")
    fashion = config_of(packed, "model.classes=10", "data.eval_split=test")
    for config in (photographs, small, fashion):
        for (ours, _), (theirs, _) in both(config, lambda c: training(c, 4)):
            assert_near(ours, theirs)
            assert ours.patches.float().std() > 20


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("kind", ["256", "kept"])
def test_evaluation_takes_batches_of_any_size(
    stored: dict[str, Path], views: int, kind: str
) -> None:
    config = config_of(stored[kind], f"evaluate.views={views}")
    parts = [range(0, 3), range(3, 3), range(3, 9), range(9, 11), range(11, 15), range(15, 15)]
    found = both(config, lambda c: decoded(c, "val", evaluation_plan(c, parts)))
    for part, ((ours, mine), (theirs, other)) in zip(parts, found, strict=True):
        assert mine.windows.shape == (len(part) * views, 3, 227, 227)
        assert mine.ids.tolist() == list(part)
        if kind == "256":
            assert_same(mine, other)
        else:
            assert_near(ours, theirs)


@pytest.mark.parametrize("kind", PIPELINES)
def test_batches_do_not_depend_on_workers_prefetch_or_ranks(
    stored: dict[str, Path], kind: str
) -> None:
    config = config_of(stored["256"], f"data.pipeline={kind}", "data.workers=1", "data.prefetch=1")
    other = config_of(stored["256"], f"data.pipeline={kind}", "data.workers=3", "data.prefetch=5")
    whole, again = training(config, 7), training(other, 7)
    left, right = training(other, 7, range(3)), training(config, 7, range(3, 10))
    for (_, one), (_, two), (_, a), (_, b) in zip(whole, again, left, right, strict=True):
        assert_same(one, two)
        assert torch.equal(one.windows, torch.cat([a.windows, b.windows]))


def by_gathers(
    preprocess: Preprocess,
    patches: Tensor,
    places: Tensor,
    inside: Tensor,
    corners: Tensor,
    flips: Tensor,
    light: Tensor,
) -> Tensor:
    """Windows by torch's operators."""

    def cut(images: Tensor, corners: Tensor) -> Tensor:
        along = torch.arange(preprocess.crop)
        rows = corners[..., :1] + along  # (n, v, crop)
        columns = corners[..., 1:] + torch.where(flips[..., None], along.flip(0), along)
        n = torch.arange(len(images))[:, None, None, None]
        return images[n, rows[..., :, None], columns[..., None, :]]

    x = cut(patches[places], inside).to(preprocess.mean.dtype)
    x -= cut(preprocess.mean.expand(len(x), -1, -1, -1), corners)
    return ((x + light[:, None, None, None]) / preprocess.divide_by).to(preprocess.dtype)


def test_windows_are_those_by_torchs_operators(stored: dict[str, Path]) -> None:
    config = config_of(stored["256"], "data.divide_by=[60,50,40]")
    statistics = open_dataset(stored["256"]).statistics
    generator = torch.Generator().manual_seed(0)
    held = torch.tensor([4, 0, 0, 2, 3])
    for views, side, places in ((1, 227, None), (10, 256, None), (1, 256, held), (10, 256, held)):
        patches = torch.randint(0, 256, (5, side, side, 3), generator=generator).byte()
        corners = torch.randint(0, 30, (5, views, 2), generator=generator)
        flips = torch.rand(5, views, generator=generator) < 0.5
        lighting = torch.randn(5, 3, generator=generator)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for subtract in ("mean_image", "mean_rgb", "nothing"):
                data = dataclasses.replace(config.data, subtract=subtract)
                preprocess = Preprocess(
                    dataclasses.replace(config, data=data), statistics, torch.device("cpu"), dtype
                )
                given = patches, corners, flips, lighting, places
                by_loop = preprocess(*given)
                preprocess.by_loop = functools.partial(by_gathers, preprocess)  # type: ignore[method-assign]
                assert torch.equal(preprocess(*given), by_loop)


def test_without_torchscript_batches_are_the_same(
    stored: dict[str, Path], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [config_of(stored[kind], "data.pipeline=torch") for kind in ("256", "kept")]
    configs.append(config_of(packed, "data.pipeline=torch", "model.classes=10",
                             "data.eval_split=test"))  # fmt: skip
    before = [training(config, 3) for config in configs]
    assert isinstance(torch_pipeline._compiled(), torch.jit.ScriptFunction)
    monkeypatch.delattr(torch.jit, "script")
    torch_pipeline._compiled.cache_clear()
    after = [training(config, 3) for config in configs]
    assert torch_pipeline._compiled() is torch_pipeline._decode
    torch_pipeline._compiled.cache_clear()
    for ours, theirs in zip(before, after, strict=True):
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            assert_same(one, other)


# --- DALI on a GPU, where there is none


def operators(config: Config, monkeypatch: pytest.MonkeyPatch, hardware: bool) -> list[str]:
    """The operators of the graph that a GPU would be given, as DALI writes them."""
    decoders = dali_pipeline.GpuDecoders(hardware, cores=True)
    monkeypatch.setattr(dali_pipeline, "gpu_decoders", lambda device: decoders)
    split = open_dataset(Path(config.data.path)).splits["train"]
    preprocess: Any = None
    pipeline = DaliPipeline(config, split, torch.device("cuda", 0), preprocess, 2)
    graph = pipeline.graph(iter(()), 4, config.model.crop)
    pipeline.close()
    graph._build_graph()  # as far as it goes without a GPU
    return [f"{op.spec}" for op in graph._ops]


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("kind", ["256", "kept"])
def test_a_gpu_decodes_whole_images_by_its_own_decoder_where_it_has_one(
    stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, hardware: bool
) -> None:
    found = operators(config_of(stored[kind]), monkeypatch, hardware)
    names = [re.findall(r"OpSpec for (\w+)", op)[0] for op in found]
    chain = [name for name in names if name != "ExternalSource"]
    assert chain == ["decoders__Image", *["Resize"] * (kind == "kept"), "Slice"]
    decoder = found[names.index("decoders__Image")]
    assert "device: mixed" in decoder
    assert "jpeg_fancy_upsampling: True" in decoder
    assert f"hw_decoder_load: {0.9 if hardware else 0:f}" in decoder
    for name in chain[1:]:
        assert "device: gpu" in found[names.index(name)]


class Codec:
    """nvImageCodec, as on a GPU some of whose decoders work."""

    def __init__(self, works: dict[str, bool | Exception]) -> None:
        self.works, self.asked = works, list[Any]()
        self.BackendKind = type("BackendKind", (), {name: name for name in works})

    def Backend(self, kind: str) -> str:
        return kind

    def Decoder(self, device_id: int, backends: list[str], **how: object) -> "Codec":
        self.asked.append((device_id, backends))
        return self

    def decode(self, encoded: bytes) -> object:
        assert encoded[:2] == b"\xff\xd8"
        does = self.works[self.asked[-1][1][0]]
        if isinstance(does, Exception):
            raise does
        return object() if does else None


@pytest.mark.parametrize(
    ("hardware", "cores", "said"),
    [
        (True, True, "on the GPU, by its JPEG decoder and its CUDA cores"),
        (False, True, "on the GPU, by its CUDA cores"),
        (
            RuntimeError("no driver"),
            RuntimeError("no\ndriver"),
            "on the CPU, although there is a GPU",
        ),
    ],
)
def test_what_decodes_on_a_gpu_is_found_out_and_a_fall_back_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hardware: Any, cores: Any,
    said: str,
) -> None:  # fmt: skip
    codec = Codec({"HW_GPU_ONLY": hardware, "HYBRID_CPU_GPU": cores, "GPU_ONLY": False})
    monkeypatch.setattr("nvidia.nvimgcodec", codec, raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", codec)
    dali_pipeline.gpu_decoders.cache_clear()
    found = [dali_pipeline.gpu_decoders(3) for _ in range(2)]
    dali_pipeline.gpu_decoders.cache_clear()
    assert f"{found[1]}" == said
    assert codec.asked == [
        (3, ["HW_GPU_ONLY"]), (3, ["HYBRID_CPU_GPU", "GPU_ONLY"])
    ]  # fmt: skip
    warned = [record.getMessage() for record in caplog.records]
    if cores is True:
        assert not warned
        assert found[0].lack == ""
    else:
        assert len(warned) == 1
        assert (
            "decoded on the CPU, because none of the GPU's decoders can be used (no driver)"
            in warned[0]
        )


# --- whole runs


def run(config: Config, *more: str) -> Any:
    return alexnet_dist("train", *as_overrides(config), *more)


@pytest.mark.parametrize("kind", ["256", pytest.param("kept", marks=pytest.mark.drill)])
def test_a_run_on_either_pipeline_is_the_same_run(
    stored: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    losses = []
    for pipeline in ("torch", "dali"):
        config = config_of(
            stored[kind], f"data.pipeline={pipeline}", f"name={pipeline}", "log.every_steps=1",
            f"output_dir={tmp_path}", f"train.epochs={120 / 36}", "schedule.rate=0.001",
        )  # fmt: skip
        result = run(config)
        assert result.returncode == 0, result.stderr
        points = read_metrics(tmp_path / pipeline)
        losses.append([point["loss"] for point in points if point["kind"] == "train"])
    assert len(losses[0]) == len({*losses[0]}) == 12
    if kind == "256":
        assert losses[0] == losses[1]
    else:
        np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)


@pytest.mark.parametrize(
    ("source", "pipeline"),
    [
        ("imagenet", "torch"),
        ("cifar10", "dali"),
        pytest.param("imagenet", "dali", marks=pytest.mark.drill),
        pytest.param("cifar10", "torch", marks=pytest.mark.drill),
    ],
)
def test_two_epochs_on_two_columns_of_the_real_formats(
    tmp_path: Path, source: str, pipeline: str
) -> None:
    if source == "imagenet":
        made.imagenet(tmp_path / "source", 10, 6)
        ours = ["model.classes=4", "data.eval_split=val"]
    else:
        made.cifar10(tmp_path / "source", 8, 6)
        ours = ["model.classes=10", "data.eval_split=test"]
    prepare(source, tmp_path / "source", tmp_path / "data")
    places = [f"data.path={tmp_path / 'data'}", f"output_dir={tmp_path}", f"name={pipeline}"]
    layout = ["layout.kind=columns", f"data.pipeline={pipeline}", "train.epochs=2"]
    result = alexnet_dist("train", *as_overrides(load_config([*TINY, *ours, *places, *layout])))
    assert result.returncode == 0, result.stderr
    assert "of 6 right" in result.stdout
    assert read_run(tmp_path / pipeline)["state"] == "finished"


def damaged_copy(stored: dict[str, Path], tmp_path: Path, samples: list[int], split: str) -> Path:
    root = tmp_path / "data"
    shutil.copytree(stored["256"], root)
    index = open_dataset(root).splits[split].index
    for sample in samples:
        flip(f"{split}/shard-00000.tar", int(index["offset"][sample]) + 500)(root)
    return root


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_damaged_sample_is_named_and_the_next_whole_one_stands_in(
    stored: dict[str, Path], tmp_path: Path, pipeline: str
) -> None:
    root = damaged_copy(stored, tmp_path, [4, 5, 35], "train")
    ours = [f"data.pipeline={pipeline}", "data.max_damaged=0.1", "data.verify_hashes=false"]
    whole = training(config_of(stored["256"], *ours), 8)
    found = training(config_of(root, *ours), 8)
    stands_in = {4: 6, 5: 6, 35: 0}
    for (_, before), (_, after) in zip(whole, found, strict=True):
        ids = [stands_in.get(i, i) for i in before.ids.tolist()]
        assert after.ids.tolist() == ids
        assert after.damaged.tolist() == [i in stands_in for i in before.ids.tolist()]
        assert torch.equal(after.windows[~after.damaged], before.windows[~after.damaged])
        assert torch.equal(after.lighting, before.lighting)


@pytest.mark.parametrize(
    ("pipeline", "kind"), [("torch", "columns"), ("dali", "one"), ("resident", "columns")]
)
def test_a_run_bears_so_much_damage_and_stops_past_it(
    stored: dict[str, Path], tmp_path: Path, pipeline: str, kind: str
) -> None:
    root = damaged_copy(stored, tmp_path, [4, 20], "train")
    config = config_of(
        root, f"data.pipeline={pipeline}", "data.verify_hashes=false", "log.every_steps=1",
        f"layout.kind={kind}", "train.epochs=2", "model.crop=67", "data.canvas=72",
        f"output_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    stopped = run(config, "name=stopped")
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    message = r"data\.max_damaged=0\.001: [12] of the 36 samples of split 'train' in .* are damaged"
    assert len(re.findall(message, stopped.stderr)) == 1, stopped.stderr  # not by each rank
    assert read_run(tmp_path / "runs" / "stopped")["state"] == "failed"

    borne = run(config, "name=borne", "data.max_damaged=0.06")
    assert borne.returncode == 0, borne.stderr
    assert "sample 4 of split 'train' (offset" in borne.stderr
    assert "does not match its checksum: sample 5 is read instead" in borne.stderr
    points = read_metrics(tmp_path / "runs" / "borne")
    per_step = [point["damaged"] for point in points if point["kind"] == "train"]
    assert per_step == [0, 0, 1, 2, 0, 1, 2], "counted anew in each epoch, of 3.6 steps"
    lines = (tmp_path / "runs" / "borne" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert "sample 20 of split 'train'" in " ".join(json.loads(line)["reason"] for line in lines)


def test_evaluation_leaves_damaged_samples_out(stored: dict[str, Path], tmp_path: Path) -> None:
    root = damaged_copy(stored, tmp_path, [3, 7, 9], "val")
    config = config_of(
        root, "data.verify_hashes=false", "train.epochs=1", "data.max_damaged=0.2", "name=a",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    result = run(config)
    assert result.returncode == 0, result.stderr
    assert "of 12 right" in result.stdout
    score = evaluate_checkpoints([tmp_path / "a", tmp_path / "a"]).score
    assert score.samples == 12
    refused = run(config, "name=b", "data.max_damaged=0.1")
    assert refused.returncode == 1
    assert "3 of the 15 samples of split 'val'" in refused.stderr


@pytest.mark.parametrize(
    ("pipeline", "how"), [("torch", "truncated"), ("dali", "truncated"), ("dali", "gone")]
)
def test_a_shard_lost_under_a_running_job_stops_it_with_the_reason(
    stored: dict[str, Path], tmp_path: Path, pipeline: str, how: str
) -> None:
    from test_run import Started

    root = tmp_path / "data"
    shutil.copytree(stored["256"], root)
    config = config_of(
        root, f"data.pipeline={pipeline}", "train.epochs=2000", "evaluate.every_epochs=2000",
        "log.every_steps=1", f"output_dir={tmp_path}", "name=lost", "model.crop=67",
        "data.canvas=72", "checkpoint.every_steps=100000",
    )  # fmt: skip
    started = Started(["train", *as_overrides(config)])
    started.wait_for_step(tmp_path / "lost", 5)
    shard = root / "train" / "shard-00000.tar"
    if how == "gone":  # a job that opened it keeps it; it is missed at the next start
        shard.unlink()
        started.process.send_signal(signal.SIGUSR1)
        assert started.end()[0] == 75
        started = Started(["train", *as_overrides(config)])
    else:
        os.truncate(shard, shard.stat().st_size // 2)
    code, output = started.end()
    assert code == 1
    expected = "shard-00000.tar cannot be read" if how == "gone" else "samples of split 'train' in"
    assert expected in output
    assert "Traceback" not in output


def test_what_decodes_as_nothing_is_named(stored: dict[str, Path], tmp_path: Path) -> None:
    """Bytes that are as they were packed, by other hands than ours, and no image."""
    import zlib

    dataset = open_dataset(stored["256"])
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"no image at all, though its checksum is right")
    split = dataset.splits["train"]
    index = split.index[:4].copy()
    index["offset"], index["size"] = 0, shard.stat().st_size
    index["crc32"] = zlib.crc32(shard.read_bytes())
    bad = dataclasses.replace(split, shards=(shard,), index=index)
    for kind in PIPELINES:
        config = config_of(stored["256"], f"data.pipeline={kind}", "train.batch=4")
        ours = dataclasses.replace(dataset, splits={"train": bad})
        pipeline = make_pipeline(config, Topology(), ours, "train")
        plan = TrainSampler(config, 4, dataset.statistics).plan(0, 2, range(4))
        with pytest.raises(ValueError, match=r"sample .*cannot be decoded, although its bytes are"):
            list(pipeline.batches(plan))
        pipeline.close()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_image_larger_than_its_index_says_is_not_decoded(
    stored: dict[str, Path], tmp_path: Path, pipeline: str
) -> None:
    """Its checksum fits. It is named, counted, and another is read instead, as for any damage."""
    import zlib

    dataset = open_dataset(stored["256"])
    split = dataset.splits["train"]
    index, bomb = split.index.copy(), made.png_of(30_000, 30_000)
    (tmp_path / "shard.tar").write_bytes(bomb)
    for sample, size in ((2, 256), (5, 30_000)):  # the second index agrees with its header
        index[sample] = (1, 0, len(bomb), 0, zlib.crc32(bomb), size, size)
    bad = dataclasses.replace(split, shards=(*split.shards, tmp_path / "shard.tar"), index=index)
    with pytest.raises(DatasetError, match=r"sample 2 .*header says 30000 × 30000 .* 256 × 256"):
        bad.read(2)
    config = config_of(stored["256"], f"data.pipeline={pipeline}", "train.batch=36")
    ours = dataclasses.replace(dataset, splits={"train": bad})
    found = make_pipeline(config, Topology(), ours, "train")
    plan = TrainSampler(config, 36, dataset.statistics).plan(0, 1, range(36))
    (batch,) = [part.batch() for part in found.batches(plan)]
    found.close()
    assert batch.damaged.sum() == 2
    assert not {2, 5} & set(batch.ids.tolist())


def test_both_pipelines_cut_very_long_images_before_they_resize(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 2, 1)
    for size in ((65_535, 1), (1, 30_001), (700, 10)):
        image = made.encoded(made.photograph(sum(size), *size), "PNG")
        (source / "train/ant" / f"{size[0]}.png").write_bytes(image)
    prepare("folder", source, tmp_path / "data", Options(workers=1, keep=True))
    config = config_of(tmp_path / "data", "model.classes=3", "train.batch=9")
    for ours, theirs in both(config, lambda config: training(config, 2, range(9))):
        assert_near(ours[0], theirs[0])


def resident_after_epochs(path: str, pipeline: str) -> list[int]:
    """Bytes resident after each of six passes over 600 windows."""
    config = config_of(Path(path), f"data.pipeline={pipeline}")
    dataset = open_for(config)
    sampler = TrainSampler(config, 36, dataset.statistics)
    found = make_pipeline(config, Topology(), dataset, "train")
    sizes = []
    for step, part in enumerate(found.batches(sampler.plan(0, 361, range(10)))):
        part.batch()
        if step % 60 == 0:
            sizes.append(psutil.Process().memory_info().rss)
    found.close()
    return sizes


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_memory_is_steady(stored: dict[str, Path], pipeline: str) -> None:
    (sizes,) = on_ranks(1, resident_after_epochs, str(stored["256"]), pipeline)
    assert len(sizes) == 7
    growth = max(sizes[2:]) - sizes[1]
    assert growth < 24 * 2**20, [size // 2**20 for size in sizes]
