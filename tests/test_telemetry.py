"""What a run reports: where its time went, and its metrics, read back from TensorBoard."""

import dataclasses
import gzip
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import TINY, alexnet_dist, as_overrides
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from alexnet_dist import timing
from alexnet_dist.checkpoint import store as checkpoints
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines.torch_pipeline import TorchPipeline
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.optimizer import Schedule
from alexnet_dist.errors import in_hours
from alexnet_dist.evaluation.evaluate import evaluate_engine
from alexnet_dist.evaluation.features import features_and_logits
from alexnet_dist.parallel.device import peak_flops
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.timing import SPANS, Timeline
from alexnet_dist.training import metrics_file
from alexnet_dist.training.bottleneck import verdict
from alexnet_dist.training.logs import opening, quarantine, watch
from alexnet_dist.training.loop import train
from alexnet_dist.training.metrics_file import TIMES, read_metrics
from alexnet_dist.training.run_folder import RunFolder
from alexnet_dist.training.telemetry import Telemetry
from alexnet_dist.training.tensorboard import Board

DOCUMENTED = Path(__file__).parent.parent / "docs" / "tensorboard.md"
CONVOLUTIONS = ["model.fc=[]", "model.dropout_before=[]", "model.exchange=[conv3,fc6]",
                "model.pool_after=[conv1,conv2]"]  # fmt: skip
DRILLED = ("replicas", "sharded_fc", "zero1")
WATCHED = ["log.every_steps=1", "log.histograms_every_steps=4", "log.pictures=true",
           "log.embedding=9", "train.epochs=1", "train.precision=fp32"]  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds go by."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_time_counts_for_the_innermost_span(clock: Callable[[float], None]) -> None:
    line = Timeline()
    line.start(cuda=False)
    for _ in range(2):
        with line.span("data"):
            clock(1)
        with line.span("backward"):
            clock(4)
            with line.span("exchange"):
                clock(2)
            clock(8)
            line.enter("all_reduce")  # to the end of the backward
            clock(16)
        line.step()
    with line.span("evaluate"):
        clock(32)
        with line.span("exchange"):  # no exchange of a step's
            clock(64)
    clock(0.5)
    took = line.take()
    assert took.seconds == {
        "data": 2, "backward": 24, "exchange": 4, "all_reduce": 32, "evaluate": 96, "other": 0.5,
    }  # fmt: skip
    assert took.steps == [31, 31]
    assert (took.total, took.training, took.own) == (158.5, 62.5, 26.5)
    assert sum(took.shares().values()) == pytest.approx(1)
    clock(3)
    line.step()
    assert line.take().steps == [3.5]  # what was open when times were taken is not lost


def test_a_graphs_time_is_shared_out_as_its_last_replay_was(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Event:
        def __init__(self, **kind: bool) -> None:
            assert kind == {"enable_timing": True, "external": True}

        def record(self) -> None:
            self.at = timing.time.perf_counter()

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    line = Timeline()

    def spans() -> None:
        with line.span("forward"), line.span("exchange"):
            pass
        with line.span("optimizer"):
            pass

    with line.captured(wanted=True) as none:
        spans()
    assert none == []  # not started
    line.start(cuda=False)
    with line.span("step"), line.captured(wanted=True) as marks:
        spans()
    assert [name for _, name in marks] == [
        "other", "forward", "exchange", "forward", "other", "optimizer", "other", "other"
    ]  # fmt: skip

    def replay(*seconds: float) -> None:
        with line.span("step"):
            for (event, _), after in zip(marks, [*seconds, 0], strict=True):
                event.record()
                clock(after)
            line.replayed(marks)

    replay(0, 9, 0, 0, 0, 0, 0)
    replay(1, 2, 4, 8, 0, 3, 0)
    assert line.take().seconds == {
        "step": 27 / 18, "forward": 27 * 10 / 18, "exchange": 27 * 4 / 18, "optimizer": 27 * 3 / 18,
        "other": 0,
    }  # fmt: skip
    with line.span("step"):
        clock(5)
    assert line.take().seconds == {"step": 5, "other": 0}  # what was not replayed is not shared out


def test_a_span_that_fails_is_closed_and_none_costs_before_the_start(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Timeline()
    with monkeypatch.context() as without_a_clock, line.span("data"):
        without_a_clock.delattr(timing.time, "perf_counter")
        line.enter("forward")
        line.step()
    line.start(cuda=False)

    def fail() -> None:
        with line.span("forward"):
            line.enter("exchange")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock(1)
    assert line.take().seconds["other"] == 1


def board_of(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "histograms": 0})
    board.Reload()
    return board


def tags_of(folder: Path) -> set[str]:
    found = board_of(folder).Tags()
    texts = {tag.removesuffix("/text_summary") for tag in found["tensors"]}
    return {*found["scalars"], *found["images"], *found["histograms"], *texts} - {
        "custom_scalars__config__"
    }


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_among_five_classes_nothing_is_shown_of_the_first_five(
    tiny: Callable[..., Config], classes: int, shown: bool
) -> None:
    config = tiny("layout.kind=one")
    dataset = open_for(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, classes=classes))
    config.folder.mkdir(parents=True)
    board = Board(config, Schedule.of(config, 60), Topology(), dataset, 0)
    scores = {"step": 1, "loss": 1.0, "top1": 0.5, "top5": 1.0}
    for row in metrics_file.rows([{"kind": k, **scores} for k in ("train", "eval")], classes):
        assert ("train/top5" in row or "eval/top5" in row) == shown
        board.scalars(1, row)
    board.close(finished=True)
    tags = tags_of(config.folder)
    assert {"train/loss", "train/top1", "Error/train_top1"} <= tags
    assert any("top5" in tag for tag in tags) == shown
    (events,) = config.folder.glob("events.*")
    assert (b"top5" in events.read_bytes()) == shown  # of its charts and HPARAMS too


@pytest.fixture(scope="module")
def watched(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that writes all there is; its folder is not to be changed."""
    places = [f"data.path={packed}", f"output_dir={tmp_path_factory.mktemp('runs')}"]
    config = load_config([*TINY, *places, *WATCHED, "layout.kind=one", "profile.steps=[2,3]"])
    assert train(config).exit == 0
    return config


def test_a_run_writes_the_tags_that_are_documented(watched: Config) -> None:
    config = watched
    text = DOCUMENTED.read_text().replace("SPLIT", "test")
    table = re.findall(r"^\| `([\w/, `]+)` \|", text, re.M)
    patterns = [tag for row in table for tag in re.split(r"`, `", row)]
    cuda = {"speed/mfu", "memory/device_gb"}
    parameters = [f"{layer}.{kind}" for layer in config.model.layer_names
                  for kind in ("weight", "bias")]  # fmt: skip
    meant: set[str] = set()
    for pattern in patterns:
        named = [pattern.replace("PARAMETER", p) for p in parameters]
        meant |= {*named} if "PARAMETER" in pattern else {pattern}
    assert tags_of(config.folder) == meant - cuda
    assert {f"time/{span}" for span in SPANS} <= meant

    points = {kind: [p for p in read_metrics(config.folder) if p["kind"] == kind]
              for kind in ("train", "eval", "speed")}  # fmt: skip
    board = board_of(config.folder)
    for kind, own in points.items():
        for point in own:
            for key, value in point.items():
                tags = {f"{key}/{k}": v for k, v in value.items()} if key in (
                    "time", "memory") else {f"{kind}/{key}": value}  # fmt: skip
                for tag, number in tags.items():
                    if tag in meant:
                        steps = {s.step: s.value for s in board.Scalars(tag)}
                        assert steps[point["step"]] == pytest.approx(number, nan_ok=True)
    for point in points["speed"]:
        assert sum(point["time"].values()) == pytest.approx(1)
        assert 0 < point["ranks"]["own_s"][0] <= 1 / point["images_per_s"] * 8 * 1.001
        assert "% of the time: " in point["verdict"]
        assert 0 < point["goodput"] <= 1


def test_the_start_is_written_in_stages_and_its_step_is_no_measure_of_speed(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However long the first batch and the first step take."""
    step, batches = TorchEngine.train_step, TorchPipeline.batches
    slow = iter([1.0])

    def train_step(self: TorchEngine, *args: Any) -> torch.Tensor:
        time.sleep(next(slow, 0))
        return step(self, *args)

    def decoded(self: TorchPipeline, plan: Any) -> Iterator[Any]:
        time.sleep(0.5)
        yield from batches(self, plan)

    monkeypatch.setattr(TorchEngine, "train_step", train_step)
    monkeypatch.setattr(TorchPipeline, "batches", decoded)
    config = tiny("layout.kind=one", "log.every_steps=3", "train.epochs=1")
    assert train(config).exit == 0
    start, train_point, speed, *_ = read_metrics(config.folder)
    assert [(p["kind"], p["step"]) for p in (start, train_point, speed)] == [
        ("start", 1), ("train", 3), ("speed", 3)
    ]  # fmt: skip
    stages = start["stages_s"]
    assert [*stages] == ["imports", "device", "data set", "decoder", "network", "logs",
                         "first batch", "first step"]  # fmt: skip
    assert sum(stages.values()) == pytest.approx(start["total_s"])
    assert (stages["first batch"] > 0.5, stages["first step"] > 1) == (True, True)
    said = rf"^first step after {start['total_s']:.1f} s: .*first batch \d.*, first step [1-9]"
    assert re.search(said, capsys.readouterr().err, re.M)
    waited_s = speed["time"]["data"] * 2 * 8 / speed["images_per_s"]
    assert waited_s < 0.5
    assert speed["images_per_s"] > 3 * 8 / 1.5  # three steps' images in all the time slept
    assert speed["images_per_s"] * speed["ranks"]["own_s"][0] == pytest.approx(2 * 8)


def test_a_start_whose_stages_are_all_short_is_said_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of a second run in one Python."""
    where = "alexnet_dist.training.telemetry"
    took = Mock(total=0.02, seconds={"evaluate": 0.0, "data": 0.01})
    monkeypatch.setattr(f"{where}.TIMELINE", Mock(take=lambda: took))
    monkeypatch.setattr(f"{where}.START", Mock(stages=dict.fromkeys(("data set", "network"), 0.04)))
    said: list[str] = []
    monkeypatch.setattr(f"{where}.say", said.append)
    Telemetry._started(Mock(), 1)
    assert said == ["first step after 0.1 s"]


def test_a_start_counts_from_the_command_that_was_typed(tiny: Callable[..., Config]) -> None:
    config = tiny("layout.kind=replicas", "layout.ranks=2", "log.every_steps=1", "train.epochs=0.3")
    before = timing.now()
    result = alexnet_dist("train", *as_overrides(config))
    assert result.returncode == 0, result.stderr
    start, first, second, *_ = read_metrics(config.folder)
    assert 0 < start["total_s"] < timing.now() - before
    assert next(iter(start["stages_s"])) == "launch"
    assert (start["step"], first["kind"], second["kind"]) == (1, "train", "train")
    line = next(line for line in result.stderr.splitlines() if "step 1/2" in line)
    assert line.endswith(f"rate {first['rate']:.2e}"), "its speed is not known"
    assert re.search(r"step 2/2  ETA 0:00:00 .* images/s ", result.stderr)
    age = timing.now() - timing.process_began()
    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


def test_a_run_without_evaluations_is_marked_as_ended_too(tiny: Callable[..., Config]) -> None:
    config = tiny(*WATCHED, "layout.kind=one", "data.eval_split=none", "name=unscored")
    assert train(config).exit == 0
    tag = "_hparams_/session_end_info"
    content = board_of(config.folder).SummaryMetadata(tag).plugin_data.content
    assert HParamsPluginData.FromString(content).session_end_info.status == 1


def test_what_is_drawn_is_there(watched: Config) -> None:
    config, board = watched, board_of(watched.folder)
    for tag in ("kernels/conv1", "answers/test", "confusion/test"):
        (image,) = board.Images(tag)
        assert image.encoded_image_string.startswith(b"\x89PNG")
        assert image.width > 60
    for tag in ("weights/conv1.weight", "gradients/fc8.bias"):
        assert [h.step for h in board.Histograms(tag)] == [4, 8]
        counts = board.Histograms(tag)[0].histogram_value
        assert counts.num == (8 * 3 * 11 * 11 if "conv1" in tag else 10)
    planned = {s.step: s.value for s in board.Scalars("schedule/rate")}
    used = {s.step: s.value for s in board.Scalars("train/rate")}
    assert {step: planned[step] for step in used} == pytest.approx(used)

    data = [
        HParamsPluginData.FromString(board.SummaryMetadata(tag).plugin_data.content)
        for tag in ("_hparams_/session_start_info", "_hparams_/session_end_info")
    ]
    assert data[0].session_start_info.hparams["train.batch"].number_value == 8
    told = data[0].session_start_info.hparams
    assert told["layout.kind"].string_value == "one"
    assert data[1].session_end_info.status == 1

    embedded = config.folder / "00008" / "seen_by_fc8"
    rows = [line.split("\t") for line in (embedded / "tensors.tsv").read_text().splitlines()]
    assert (len(rows), len(rows[0])) == (9, 28)
    assert len((embedded / "metadata.tsv").read_text().splitlines()) == 9
    assert "00008/seen_by_fc8/tensors.tsv" in (config.folder / "projector_config.pbtxt").read_text()
    trace = json.loads(gzip.decompress((config.folder / "trace-2-3.json.gz").read_bytes()))
    convolutions = [e for e in trace["traceEvents"] if e.get("name") == "aten::convolution"]
    assert len(convolutions) == 2 * 5 * 2  # steps, layers, columns
    (_,) = (tag for tag in board.Tags()["tensors"] if tag == "profile/text_summary")


def test_watching_changes_nothing_and_none_is_written_unasked(
    watched: Config, tiny: Callable[..., Config]
) -> None:
    """Weights, momenta and metrics to the bit."""
    plain = tiny("layout.kind=one", "log.every_steps=1", "train.epochs=1", "train.precision=fp32")
    assert train(plain).exit == 0
    ends = []
    for config in (watched, plain):
        last = checkpoints.verify(checkpoints.steps(config.folder / "checkpoints")[-1])
        points = [p for p in read_metrics(config.folder) if p["kind"] not in TIMES]
        ends.append((last.manifest["files"], last.progress, points))
    assert ends[0] == ends[1]
    groups = {tag.partition("/")[0] for tag in tags_of(config.folder)}
    assert not groups & {"weights", "gradients", "gradient_norm", "answers", "confusion", "profile"}
    assert not list(config.folder.glob("0*"))


@pytest.mark.parametrize(
    "kind", ["columns", *(pytest.param(k, marks=pytest.mark.drill) for k in DRILLED)]
)
def test_two_ranks_show_what_one_process_shows(kind: str, tiny: Callable[..., Config]) -> None:
    """Norms and histograms of whole gradients, pictures and the projector."""
    precise = [*WATCHED, f"train.precision={'fp32' if kind == 'zero1' else 'fp64'}"]
    one = tiny(*precise, "layout.kind=one", "name=one")
    assert train(one).exit == 0
    two = tiny(*precise, f"layout.kind={kind}", "layout.ranks=2", "name=two")
    result = alexnet_dist("train", *as_overrides(two))
    assert result.returncode == 0, result.stderr
    assert re.search(r"^time: \w+ \d+%, .*; .+: ", result.stderr, re.M)
    ours, theirs = board_of(two.folder), board_of(one.folder)
    hidden = {t for t in tags_of(one.folder) if kind == "zero1" and t.startswith("gradient")}
    assert tags_of(two.folder) == tags_of(one.folder) - hidden
    if hidden:
        return
    norms = [tag for tag in ours.Tags()["scalars"] if tag.startswith("gradient_norm/")]
    assert len(norms) == 16
    found: dict[str, list[Any]] = {}
    for tag in norms:
        found[tag] = [s.value for s in ours.Scalars(tag)]
        assert found[tag] == pytest.approx([s.value for s in theirs.Scalars(tag)], rel=1e-5)
    total = sum(values[0] ** 2 for values in found.values()) ** 0.5
    step_4 = {s.step: s.value for s in ours.Scalars("train/gradient_norm")}[4]
    assert total == pytest.approx(step_4, rel=1e-5)
    for tag in ("weights/fc6.weight", "gradients/fc6.weight"):
        mine, other = (b.Histograms(tag)[0].histogram_value for b in (ours, theirs))
        assert (mine.num, mine.bucket) == (other.num, other.bucket)
    for tag in ("kernels/conv1", "confusion/test"):
        assert (
            ours.Images(tag)[0].encoded_image_string == theirs.Images(tag)[0].encoded_image_string
        )
    point = next(p for p in read_metrics(two.folder) if p["kind"] == "speed")
    assert len(point["ranks"]["step_p95_s"]) == 2
    assert point["time"]["all_reduce" if kind == "replicas" else "exchange"] > 0


@pytest.mark.parametrize(("network", "last", "units"), [([], "fc8", 28), (CONVOLUTIONS, "fc6", 72)])
def test_confusion_and_features_are_those_of_the_evaluation(
    tiny: Callable[..., Config], network: list[str], last: str, units: int
) -> None:
    config = tiny("layout.kind=one", "train.precision=fp32", "evaluate.views=10", *network)
    engine, dataset = TorchEngine(config, Topology()), open_for(config)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    score = evaluate_engine(engine, config, dataset, confusion=confusion)
    assert score is not None
    assert (int(confusion.sum()), int(confusion.trace())) == (score.samples, score.correct1)
    samples = range(0, 23, 2)
    features, logits = features_and_logits(engine, config, dataset, "test", samples)
    assert (features.shape, logits.shape) == ((12, units), (12, 10))
    weight, bias = (engine.model.get_parameter(f"{last}.{name}") for name in ("weight", "bias"))
    assert torch.allclose(torch.nn.functional.linear(features, weight, bias), logits, atol=1e-5)


CALM = dict.fromkeys(SPANS, 0.0)


@pytest.mark.parametrize(
    ("shares", "more", "facts", "said"),
    [
        ({"forward": 0.3, "backward": 0.6}, [], (8, True, False),
         r"^computing 90% of the time: nothing else holds it up$"),
        ({"data": 0.41}, ["data.workers=2"], (8, True, False),
         r"^waiting for data 41% of the time: data\.workers=8$"),
        ({"data": 0.41}, [], (8, False, False), "prepare the images without --keep"),
        ({"data": 0.41}, ["data.pipeline=torch"], (8, True, True),
         r"data\.pipeline=dali decodes on the GPU"),
        ({"data": 0.41}, ["data.pipeline=resident"], (8, False, True), "more cores for each rank$"),
        ({"data": 0.41}, ["data.pipeline=dali"], (8, True, True), "more cores for each rank"),
        ({"data": 0.2, "exchange": 0.7}, [], (8, True, False), "^exchanging between columns 70%"),
        ({"all_reduce": 0.5}, ["layout.kind=replicas"], (8, True, True), "compress_gradients=true"),
        ({"all_reduce": 0.5}, ["layout.kind=replicas", "layout.compress_gradients=true"],
         (8, True, True), r"a larger train\.batch"),
        ({"evaluate": 0.5}, ["evaluate.every_epochs=0.5"], (8, True, True), "every_epochs=1$"),
        ({"checkpoint": 0.3}, ["checkpoint.every_steps=10"], (8, True, True), "every_steps=20$"),
        ({"log": 0.3}, ["log.every_steps=1"], (8, True, True), r"log\.every_steps=2"),
        ({"other": 0.5}, [], (8, True, True), r"^waiting for Python 50%.*: a larger train\.batch$"),
        ({"other": 0.5}, ["train.micro_batches=2"], (8, True, True), r"fewer train\.micro_batches"),
    ],
)  # fmt: skip
def test_a_verdict_says_what_to_do(
    shares: dict[str, float], more: list[str], facts: tuple[int, bool, bool], said: str
) -> None:
    assert re.search(said, verdict(CALM | shares, (1.1, 0), load_config(more), *facts))


@pytest.mark.parametrize(
    ("mfu", "more", "said"),
    [
        (0.2, [], "^computing 90%"),
        (0.013, ["data.pipeline=torch"], r"^the GPU reaches 1\.3% .* data\.pipeline=dali"),
        (0.013, ["data.pipeline=dali", "train.execution=fused"], r"train\.execution=graph"),
        (0.013, ["data.pipeline=dali"], r": a larger train\.batch$"),
        (0.013, ["data.pipeline=dali", "layout.kind=zero1"], r": a larger train\.batch$"),
        (0.013, ["train.precision=fp32"], "^computing 90%"),
    ],
)
def test_a_starved_gpu_is_told(mfu: float, more: list[str], said: str) -> None:
    shares = CALM | {"forward": 0.5, "backward": 0.4}
    assert re.search(said, verdict(shares, (1.0, 0), load_config(more), 8, True, True, mfu))


def test_a_slow_rank_comes_first_but_not_before_data() -> None:
    facts = load_config([]), 8, True, True
    said = verdict(CALM | {"exchange": 0.6}, (1.64, 3), *facts)
    assert said == "rank 3 takes 1.6 times the median: look at what else runs there"
    assert verdict(CALM | {"data": 0.2}, (1.64, 3), *facts).startswith("waiting for data 20%")
    assert verdict(CALM | {"evaluate": 0.7}, (1.64, 3), *facts).startswith("evaluating 70%")


def test_a_gpus_peak_is_found_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA GeForce GTX 580") is None


def test_the_command_to_watch_a_run_can_be_pasted(tiny: Callable[..., Config]) -> None:
    assert watch(tiny("output_dir=my runs")).endswith("--logdir 'my runs' --host localhost")


def test_a_run_of_more_than_a_year_says_so() -> None:
    assert in_hours(400 * 24 * 3600 + 3 * 60 + 7) == "9600:03:07"
    assert in_hours(0.9) == "0:00:00"


def test_goodput_is_what_counts_of_all_the_time(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tiny())
    assert folder.goodput() != folder.goodput()  # this process does not hold it
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    folder.take()
    now += 50
    folder.running(0, 100)
    now += 20
    folder.saved(7)
    now += 30
    assert folder.goodput() == pytest.approx(0.5)


def test_a_damaged_sample_that_cannot_be_listed_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "quarantine.jsonl"
    handler, pipeline = quarantine(path), logging.getLogger("alexnet_dist.data.split")
    try:
        path.mkdir()
        pipeline.warning("sample 4")
        path.rmdir()
        pipeline.warning("sample 20")
    finally:
        logging.getLogger("alexnet_dist.data").removeHandler(handler)
    assert f"NOT WRITTEN, but the run continues: {path}: " in caplog.text
    assert json.loads(path.read_text())["reason"] == "sample 20"


def test_a_batch_of_more_than_all_images_is_told() -> None:
    config, told = load_config([*TINY, "train.batch=16"]), "train.batch=16: more than the 15 train"
    assert told in opening(config, Topology(), 0, 1, 15, "torch")
    assert told not in opening(config, Topology(), 0, 1, 16, "torch")
