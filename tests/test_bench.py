"""bench: what it prints is whole, and a rank's index and order cost what they may."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import made
import pytest
import torch
from conftest import TINY, alexnet_dist, assert_close

from alexnet_dist import bench
from alexnet_dist.bench import end_to_end, step
from alexnet_dist.bench.data import index_cost
from alexnet_dist.bench.layouts import OnRank, bench_layouts
from alexnet_dist.bench.step import Eager, graphed, plain
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.cli.main import main
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.errors import ConfigError
from alexnet_dist.network.model import AlexNet
from alexnet_dist.parallel import spawn


def test_bench_data_times_all_pipelines_in_one_run(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 6, 2, (360, 264))
    few = ["data.workers=1", "train.batch=16", "layout.device=cpu"]
    result = alexnet_dist(
        "bench", "data", str(source), *few, "--images", "32", "--repeats", "1", "--json"
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == {"ratios", "ceilings", "differences", "machine", "unit", "runs"}
    assert found["differences"]["256: mean"] == found["differences"]["256: 99.9th percentile"] == 0
    assert 0 < found["differences"]["kept: mean"] < 0.5
    for kind in ("torch", "dali"):
        for ratio in ("256 / ImageFolder", "kept / ImageFolder", "decoded / bare decode",
                      "1,000,000 / 1,000 samples"):  # fmt: skip
            assert found["ratios"][f"{kind}, {ratio}"] > 0
    for kind in ("torch", "dali", "resident"):
        for ratio in ("256 / ImageFolder", "kept / ImageFolder", "beside Python / decoded"):
            assert found["ratios"][f"{kind}, {ratio}"] > 0
    assert found["ratios"]["dali, 256 / ImageFolder"] == (
        found["runs"][0]["dali, 256"] / found["runs"][0]["ImageFolder"]
    )


def test_bench_checkpoint_says_what_a_save_costs_the_loop() -> None:
    result = alexnet_dist("bench", "checkpoint", *TINY, "--repeats", "2", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == {"ratios", "ceilings", "machine", "unit", "runs"}
    lost = [run["lost to a save"] / (100 * run["step"]) for run in found["runs"]]
    assert found["ratios"] == {"lost to one save in 100 steps / those steps": sum(lost) / 2}
    assert found["ceilings"]["a checkpoint, MB"] > 0.05


def test_bench_end_to_end_trains_and_evaluates_from_shards(packed: Path) -> None:
    end_to_end = ["bench", "end-to-end", *TINY, f"data.path={packed}", "--repeats", "1", "--json"]
    result = alexnet_dist(*end_to_end, "--steps", "10")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    run = found["runs"][0]
    assert found["ratios"]["steps from shards / batch ready"] == (
        run["steps from shards"] / run["steps, batch ready"]
    )
    assert 0 < found["ceilings"]["start to first step, s"] < 60
    libraries = found["ceilings"]["resident of the libraries alone, MB"]
    assert found["ceilings"]["resident after 10 steps, MB"] > libraries > 100
    assert found["ratios"]["resident / planned and the libraries"] > 0.5


def test_bench_maps_holds_ours_against_torchs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "maps", *TINY, "--repeats", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for what in ("maps", "LRN"):
        assert found["ceilings"][f"{what}, largest difference of gradients"] < 1e-4
    run = found["runs"][0]
    assert found["ratios"]["LRN, plain, fp32 / LRN, ours, fp32"] == (
        run["LRN, plain, fp32"] / run["LRN, ours, fp32"]
    )
    assert found["ratios"]["ours, bf16 / a copy"] == (
        run["ours, bf16"] / run["a copy of the maps, bf16"]
    )


def test_the_reference_computes_what_our_network_does() -> None:
    config = load_config([*TINY, "layout.kind=one", "model.dropout=0", "model.lrn.alpha=0.05"])
    ours, reference = AlexNet(config.model, config.seed), Eager(config)
    reference.take(dict(ours.named_parameters()))
    batch = made_batch(config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = [ours(batch.windows, batch.ids), reference(batch.windows.contiguous())]
    assert_close(*logits, 1e-4 * float(logits[1].abs().max()))


@pytest.mark.parametrize("form", ["bf16", "bf16, compiled", "fp32, no TF32"])
def test_a_loop_as_most_write_it_computes_the_same_in_every_form(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(torch, "compile", lambda network: seen.append(network) or network)
    config = load_config([*TINY, "layout.kind=one", "model.dropout=0"])
    torch.manual_seed(0)
    network = Eager(config)
    weights = copy.deepcopy(network.state_dict())
    losses = []
    for how in (["fp32"], form.split(", ")):
        network.load_state_dict(weights)
        one = plain(network, config, how)
        losses.append([float(one()) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if "bf16" in form else 1e-6)
    assert losses[0][2] < losses[0][0]
    assert bool(seen) == ("compiled" in form)
    last = next(network.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert last == ("bf16" in form)


def test_a_graph_is_captured_once_after_steps_on_another_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            said.append("waits")

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextlib.contextmanager
    def entered(what: object) -> Iterator[None]:
        said.append(f"into {type(what).__name__}")
        yield
        said.append("out")

    for name, fake in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph),
                       ("stream", entered), ("graph", entered)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    work = graphed(lambda: said.append("step") or torch.tensor(2.0))
    assert [float(work()), float(work())] == [2, 2]
    warm = ["waits", "into Stream", *["step"] * 5, "out", "waits"]
    assert said == [*warm, "into Graph", "step", "out", "replay", "replay"]


def test_a_gpus_ratios_are_of_what_they_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, by contestants that say how long they took: by name, 8 ms and more."""
    made = []

    class Took:
        def __init__(self, name: str, config: Config, pieces: int) -> None:
            self.name, self.given, self.peak = name, [2.0**40], 3e9
            self.seconds = 0.001 * (len(name) + config.train.batch)
            made.append((config.train.batch, name, pieces))

        def __call__(self) -> float:
            if self.name == "eager, bf16, compiled":
                raise ConfigError("bench: failed")
            return self.seconds

        def close(self) -> None:
            pass

    monkeypatch.setattr(step, "_made", Took)
    monkeypatch.setattr(step, "_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config = load_config([*TINY, "layout.kind=one"])
    found = step.bench_step(config, 2, [128, 1024])
    best = "torchvision's alexnet, bf16, compiled, graph"
    for batch, at in ((128, ""), (1024, ", batch 1024")):
        mine, theirs = found["runs"][1][f"ours, bf16{at}"], found["runs"][1][f"{best}{at}"]
        assert mine == pytest.approx(0.001 * (batch + len("ours, bf16")))
        assert found["ratios"][f"ours, bf16 / {best}, by seconds{at}"] == mine / theirs
        assert found["ratios"][f"ours, bf16 / {best}{at}"] == theirs / mine
        assert found["ratios"][f"ours, bf16 / bf16 matrix product, by FLOP{at}"] > 0
        assert found["ratios"][f"ours, bf16, peak memory / planned{at}"] > 0
    run = found["runs"][0]
    exact = "eager, fp32, no TF32"
    assert found["ratios"][f"ours, fp32 / {exact}"] == run[exact] / run["ours, fp32"]
    assert found["ratios"]["ours, tf32 / eager, fp32"] == run["eager, fp32"] / run["ours, tf32"]
    assert {pieces for batch, _, pieces in made if batch == 1024} == {6}
    assert "ours, fp32, batch 1024" not in run
    assert "eager, bf16" in run
    assert "eager, bf16, compiled" not in run
    assert "left out" in caplog.text
    assert "MFU" in bench.table(found)


def test_a_steps_operators_add_up(capfd: pytest.CaptureFixture[str]) -> None:
    few = ["bench", "step", *TINY, "--kernels", "--repeats", "2"]
    assert main([*few, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    times = [us for _, us, _, _ in found["kernels"]]
    assert times == sorted(times, reverse=True)
    counted = {name: counts for name, _, _, counts in found["kernels"]}
    assert counted["aten::addmm"]
    assert counted["aten::convolution_backward"]
    assert not counted["aten::_fused_sgd_"]
    assert 0 < found["ratios"]["convolutions and products / all"] < 1
    assert main(few) == 0
    assert " × aten::convolution_backward\n" in capfd.readouterr().out


@pytest.mark.drill
def test_bench_step_and_layouts_print_their_ratios() -> None:
    few = ["layout.device=cpu", "--repeats", "1", "--json"]
    result = alexnet_dist("bench", "step", *TINY, *few)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["losses"]["ours, fp32"] == pytest.approx(found["losses"]["eager, fp32"], rel=1e-5)
    run = found["runs"][0]
    assert found["ratios"]["ours, fp32 / eager, fp32"] == run["eager, fp32"] / run["ours, fp32"]
    result = alexnet_dist("bench", "layouts", *TINY, *few)
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout)["runs"][0]
    assert {"one", "columns", "replicas", "sharded_fc", "zero1", "zero2"} <= run.keys()
    assert all(rate > 0 for rate in run.values())


def test_bench_layouts_leaves_out_what_a_config_cannot_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spawn, "call", lambda *_: [OnRank(1.0, 2_000_000, 0.0, 0.25)])
    found = bench_layouts(load_config([*TINY, "train.precision=fp64"]), 2, 1)
    timed = found["runs"][0].keys()
    assert {"one", "columns", "replicas", "sharded_fc"} <= timed
    assert not {"zero1", "zero2"} & timed
    assert found["ceilings"]["columns, MB sent a step"] == 2
    assert found["ceilings"]["replicas, collectives, % of a step"] == 25
    assert not found["unseen"]


def test_an_index_of_imagenets_size_is_ready_at_once_and_small() -> None:
    cost = index_cost(1_300_000, batch=128)
    assert cost["index, order of 1300000, MB"] < 100
    assert cost["index, order of 1300000, s"] < 3  # measured: a third of a second


def test_a_cold_start_finds_no_kernel_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str] | None] = []

    class Process:
        stderr = ("loading\n", "step 1/9\n")

        def __init__(self, command: list[str], env: dict[str, str] | None, **_: object) -> None:
            seen.append(env)

        def terminate(self) -> None:
            pass

        communicate = terminate

    monkeypatch.setattr(end_to_end.subprocess, "Popen", Process)
    config = load_config([*TINY, "layout.kind=one"])
    assert end_to_end._first_step(config) >= 0
    assert end_to_end._first_step(config, cold=True) >= 0
    warm, cold = seen
    assert warm is None
    assert cold is not None
    folders = {Path(cold[name]) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)
