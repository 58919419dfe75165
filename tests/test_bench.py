"""bench: what it prints is whole, and a rank's index and order cost what they may."""

import json
from pathlib import Path

import made
import pytest
import torch
from conftest import TINY, alexnet_dist, assert_close

from alexnet_dist.bench.data import index_cost
from alexnet_dist.bench.layouts import bench_layouts
from alexnet_dist.bench.step import Eager
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.network.model import AlexNet
from alexnet_dist.parallel import spawn


def test_bench_data_times_both_pipelines_in_one_run(tmp_path: Path) -> None:
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


def test_bench_lrn_holds_ours_against_torchs() -> None:
    result = alexnet_dist("bench", "lrn", *TINY, "--repeats", "1", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ceilings"]["largest difference of gradients"] < 1e-4
    assert found["ratios"]["nn.LocalResponseNorm, fp32 / ours, fp32"] > 0


def test_the_reference_computes_what_our_network_does() -> None:
    config = load_config([*TINY, "layout.kind=one", "model.dropout=0", "model.lrn.alpha=0.05"])
    ours, reference = AlexNet(config.model, config.seed), Eager(config)
    reference.take(dict(ours.named_parameters()))
    batch = made_batch(config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = [ours(batch.windows, batch.ids), reference(batch.windows.contiguous())]
    assert_close(*logits, 1e-4 * float(logits[1].abs().max()))


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
    monkeypatch.setattr(spawn, "call", lambda *_: [1.0])
    found = bench_layouts(load_config([*TINY, "train.precision=fp64"]), 2, 1)
    timed = found["runs"][0].keys()
    assert {"one", "columns", "replicas", "sharded_fc"} <= timed
    assert not {"zero1", "zero2"} & timed


def test_an_index_of_imagenets_size_is_ready_at_once_and_small() -> None:
    cost = index_cost(1_300_000, batch=128)
    assert cost["index, order of 1300000, MB"] < 100
    assert cost["index, order of 1300000, s"] < 3  # measured: a third of a second
