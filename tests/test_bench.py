"""`bench`: its output is complete, and reading a rank's index and order stays cheap."""

import contextlib
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import numpy as np
import pytest
import torch
from conftest import TINY, alexnet_dist, assert_close
from forks import Fork

from alexnet_dist import bench
from alexnet_dist.bench import checkpoint, contestants, decoders, end_to_end, references, step
from alexnet_dist.bench.kernel_times import grouped, kernel_lines
from alexnet_dist.bench.layouts import OnRank, bench_layouts
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.bench.trainers import Eager, compile_by, graphed, plain
from alexnet_dist.cli.main import main
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import open_dataset
from alexnet_dist.errors import CheckpointError, ConfigError
from alexnet_dist.network.flops import training_flops
from alexnet_dist.network.model import AlexNet
from alexnet_dist.parallel import spawn


def test_bench_data_times_all_pipelines_and_an_index_of_imagenets_size(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 6, 2, (360, 264))
    few = ["data.workers=1", "train.batch=16", "layout.device=cpu"]
    result = alexnet_dist(
        "bench", "data", str(source / "train"), *few, "--images", "32", "--repeats", "1", "--json"
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
        for ratio in ("256 / ImageFolder", "kept / ImageFolder", "beside Python / decoded",
                      "beside Python / beside a process"):  # fmt: skip
            assert found["ratios"][f"{kind}, {ratio}"] > 0
        assert 0 < found["ceilings"][f"{kind}, the loop's own time, µs a batch"] < 1e5
    assert found["ceilings"]["index, order of 1281167, MB"] < 100
    assert found["ceilings"]["index, order of 1281167, s"] < 3  # measured: a third of a second
    run = found["runs"][0]
    assert found["ratios"]["dali, decoded / bare DALI"] == run["dali, decoded"] / run["bare DALI"]
    at_once = run["dali, decoded 4 batches at once"]
    assert found["ratios"]["dali, decoded / 4 batches at once"] == run["dali, decoded"] / at_once
    assert not [name for name in run if "4 threads" in name]
    assert found["ratios"]["dali, 256 / ImageFolder"] == (
        found["runs"][0]["dali, 256"] / found["runs"][0]["ImageFolder"]
    )


def test_bench_data_says_how_far_apart_the_decoders_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = made.image_folder(tmp_path / "source", 2, 0, (360, 264))
    few = ["bench", "data", str(source), "--differences", "--images", "28", "layout.device=cpu"]
    assert main([*few, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    (means,) = found["runs"]
    for kind in decoders._KINDS:
        at_size = found["differences"][f"at size, {kind}"]
        assert {*at_size.values()} == {0}, "on a CPU both are libjpeg-turbo"
        resized = found["differences"][f"resized, {kind}"]
        assert 0 < resized["mean"] < 0.5
        assert resized["mean"] == means[f"resized, {kind}"]
        assert 1 <= resized["99.9th percentile"] <= resized["largest"]
        assert abs(resized["red"]) < 0.05
    assert means["resized, worst of all kinds: largest"] >= 1
    assert "resized, quality 90, grey" in decoders.lines(found)
    few[few.index("28")] = "1"  # fewer than there are kinds: one of each
    assert main(few) == 0
    assert "resized, quality 90, grey" in capfd.readouterr().out
    assert main(["bench", "data", str(tmp_path / "source" / "val"), "--differences"]) == 2
    assert "has no .jpg, .jpeg or .png" in capfd.readouterr().err


def test_the_bare_decoder_takes_what_prepare_stores(packed: Path) -> None:
    split = open_dataset(packed).splits["train"]  # PNGs, as of any small image that is no JPEG
    assert references.bare_decode(split, 2, 20)() > 0


def test_a_difference_has_its_sign_its_edges_and_its_tail() -> None:
    ours = np.full((2, 5, 4, 3), 100, np.uint8)
    theirs = ours.copy()
    theirs[0, 2, 1] = (90, 101, 100)  # inside
    theirs[1, 0, 0] = (107, 100, 100)  # on the edge
    whole = decoders.Difference.of(ours, theirs)
    parts = [decoders.Difference.of(ours[n : n + 1], theirs[n : n + 1]) for n in range(2)]
    assert (parts[0] + parts[1]).figures() == whole.figures()
    assert whole.figures() == {
        "mean": 18 / 120, "99.9th percentile": 10, "largest": 10, "mean on edges": 7 / (2 * 14 * 3),
        "red": (10 - 7) / 40, "green": -1 / 40, "blue": 0,
    }  # fmt: skip


def test_bench_checkpoint_says_what_a_save_costs_the_loop() -> None:
    result = alexnet_dist("bench", "checkpoint", *TINY, "--repeats", "2", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == {"ratios", "ceilings", "machine", "unit", "runs"}
    lost = [run["lost to a save"] / (100 * run["step"]) for run in found["runs"]]
    assert found["ratios"] == {"lost to one save in 100 steps / those steps": sum(lost) / 2}
    assert found["ceilings"]["a checkpoint, MB"] > 0.05


def test_bench_checkpoint_ends_when_a_checkpoint_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr(checkpoint.checkpoints, "save", full)
    with pytest.raises(CheckpointError, match="no space left"):
        checkpoint.bench_checkpoint(load_config([*TINY, "layout.kind=one"]), 1)


class ForkedPython:
    """In the place of a contestant's Popen: its program in a fork that has everything imported."""

    def __init__(self, command: list[str], env: dict[str, str], **pipes: Any) -> None:
        assert pipes["process_group"] == 0  # a terminal's Ctrl-C is not for it
        folder = Path(tempfile.mkdtemp())
        ends = [folder / "stdin", folder / "stdout"]
        for end in ends:
            os.mkfifo(end)
        self.errors = folder / "stderr"
        prints = (folder / "printed", self.errors)
        self._fork = Fork(run_program, command[2], *ends, prints=prints, environment=env)
        self.pid, self.kill = self._fork.pid, self._fork.kill
        self.stdin, self.stdout = ends[0].open("w"), ends[1].open()

    def communicate(self) -> None:
        self._fork.wait(30)
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()


def run_program(code: str, stdin: Path, stdout: Path) -> None:
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    os.dup2(os.open(stdout, os.O_WRONLY), 1)
    sys.stdin = os.fdopen(0)
    sys.modules["alexnet_dist.bench.of_tests"] = sys.modules[__name__]  # with a `contestant`
    exec(code, {})


def test_bench_end_to_end_trains_and_evaluates_from_shards(
    packed: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = SimpleNamespace(Popen=ForkedPython, PIPE=subprocess.PIPE)
    monkeypatch.setattr(contestants, "subprocess", forked)
    end_to_end = ["bench", "end-to-end", *TINY, f"data.path={packed}", "--repeats", "1", "--json"]
    assert main([*end_to_end, "--steps", "10"]) == 0
    found = json.loads(capfd.readouterr().out)
    run = found["runs"][0]
    assert found["ratios"]["steps from shards / batch ready"] == (
        run["steps from shards"] / run["steps, batch ready"]
    )
    assert found["ratios"]["steps from shards / the lesser of batch ready and windows alone"] == (
        run["steps from shards"] / min(run["steps, batch ready"], run["windows from shards"])
    )
    whole = found["ceilings"].pop("start to first step, s")
    stages = [took for name, took in found["ceilings"].items() if name.startswith("start to ")]
    assert len(stages) == 8
    assert 0.8 * whole < sum(stages) < whole + 0.1 < 60  # a process's start is known to 0.01 s
    libraries = found["ceilings"]["resident of the libraries alone, MB"]
    assert found["ceilings"]["resident after 10 steps, MB"] > libraries > 100
    assert found["ratios"]["resident / planned and the libraries"] > 0.5


@pytest.mark.parametrize(
    "other",
    [
        [],
        ["model.pool_before_lrn=true", "model.activation=tanh"],
        ["model.activation_last=[conv1]", "model.round_up=true", "model.crop=64"],
    ],
)
def test_bench_maps_holds_ours_against_torchs(
    capfd: pytest.CaptureFixture[str], other: list[str]
) -> None:
    assert main(["bench", "maps", *TINY, *other, "--repeats", "1", "--json"]) == 0
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


@pytest.mark.parametrize(
    "shipped", ["alexnet-2012", "alexnet-star-pretrain", "caffenet", "no-exchange", "released-code"]
)
def test_the_reference_computes_what_our_network_does(shipped: str) -> None:
    conv = "model.conv=[8,12,16,16,8" + (",8]" if "star" in shipped else "]")
    more = ["layout.kind=one", "model.dropout=0", "model.lrn.alpha=0.05"]
    tiny = load_config([f"paper/{shipped}", *TINY, *more, conv, "model.pool_average=[conv5]",
                        "model.activation=tanh"])  # fmt: skip
    ours, reference = AlexNet(tiny.model, tiny.seed), Eager(tiny)
    reference.take(dict(ours.named_parameters()))
    batch = made_batch(tiny, torch.device("cpu"), torch.float32)
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


def test_a_graph_is_captured_once_after_compiling_and_steps_on_another_stream(
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
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: said.append(name))
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: said.append("cublas"), raising=False
    )
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    chosen = []
    compile_by(lambda: chosen.append((cudnn.benchmark, cudnn.deterministic)))
    assert chosen == [(False, True)]  # its choice is not kept for the steps that are timed
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    assert said[:4] == ["waits", "into Stream", "out", "waits"]
    assert said[4:] == ["synchronize", "cublas", "empty_cache", "reset_peak_memory_stats"]
    said.clear()
    work = graphed(lambda: said.append("step") or torch.tensor(2.0))
    assert [float(work()), float(work())] == [2, 2]
    warm = ["waits", "into Stream", *["step"] * 5, "out", "waits"]
    assert said == [*warm, "into Graph", "step", "out", "replay", "replay"]


def test_a_gpus_ratios_are_of_what_they_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, by contestants that say how long they took: by name, 8 ms and more."""
    made, waited = [], []

    class Took:
        def __init__(self, name: str, config: Config, pieces: int) -> None:
            self.name, self.results, self.peak, self.passes = name, [2.0**40], 3e9, 0
            self.seconds = 0.001 * (len(name) + config.train.batch)
            made.append((config.train.batch, name, pieces, self))

        def wait(self) -> None:
            waited.append(self.name)

        def __call__(self) -> float:
            assert len(waited) == len(made)  # nothing is timed beside a start
            if self.name == "eager, bf16, compiled":
                raise ConfigError("bench: failed")
            self.passes += 1
            return self.seconds

        def close(self) -> None:
            pass

    monkeypatch.setattr(step, "_made", Took)
    monkeypatch.setattr(step, "device_of", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config = load_config([*TINY, "layout.kind=one"])
    found = step.bench_step(config, 2, [128, 1024])
    best = "torchvision's alexnet, bf16, compiled, graph"
    for batch, at in ((128, ""), (1024, ", batch 1024")):
        mine, theirs = found["runs"][1][f"ours, bf16{at}"], found["runs"][1][f"{best}{at}"]
        assert mine == pytest.approx(0.001 * (batch + len("ours, bf16")))
        assert found["ratios"][f"ours, bf16 / {best}, by seconds{at}"] == mine / theirs
        assert found["ratios"][f"ours, bf16 / {best}{at}"] == theirs / mine
        flop = training_flops(config) * batch  # as `plan` counts them
        product = 2.0**40 / found["runs"][1][f"matrix product, bf16{at}"]
        by_flop = found["ratios"][f"ours, bf16 / bf16 matrix product, by FLOP{at}"]
        assert by_flop == pytest.approx(flop / mine / product)
        assert found["ratios"][f"ours, bf16, peak memory / planned{at}"] > 0
    run = found["runs"][0]
    exact = "eager, fp32, no TF32"
    assert found["ratios"][f"ours, fp32 / {exact}"] == run[exact] / run["ours, fp32"]
    assert found["ratios"]["ours, tf32 / eager, fp32"] == run["eager, fp32"] / run["ours, tf32"]
    assert {pieces for batch, _, pieces, _ in made if batch == 1024} == {6}
    assert {one.passes for *_, one in made[len(step._LOSSES) :]} == {3, 0}  # a warm-up, and two
    assert "ours, fp32, batch 1024" not in run
    assert "eager, bf16" in run
    assert "eager, bf16, compiled" not in run
    assert "left out" in caplog.text
    assert "MFU" in bench.table(found)
    small = [*TINY, "layout.kind=one", "model.crop=55", "model.pool_after=[conv1]"]
    found = step.bench_step(load_config(small), 1)
    assert not any("torchvision" in name for name in found["runs"][0])
    assert "model.crop=55: torchvision's alexnet needs 63 pixels: left out" in caplog.text
    made.clear()
    waited.clear()
    best_only = step.bench_step(config, 1, [128, 1024], best=True)
    assert [batch for batch, *_ in made] == 4 * [128] + 4 * [1024]
    assert best_only["runs"][0].keys() < run.keys()


def contestant(name: str, config: Config) -> contestants.Work:
    """A contestant of this module, which says when it is made; one of them cannot be."""
    folder = Path(os.environ["CONTESTANTS"])
    (folder / f"{name} starts").touch()
    others = 2
    while name != "broken" and len([*folder.glob("* starts")]) < others:
        time.sleep(0.01)
    if name == "broken":
        raise ConfigError("no such thing")
    return lambda: 7.0


def test_contestants_start_together_and_one_that_cannot_start_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTESTANTS", str(tmp_path))
    monkeypatch.setattr(
        contestants, "subprocess", SimpleNamespace(Popen=ForkedPython, PIPE=subprocess.PIPE)
    )
    config = load_config([*TINY, "layout.kind=one"])
    names = ("one", "other", "broken")
    made = {name: contestants.Contestant("of_tests", name, config) for name in names}
    for one in made.values():
        one.wait()
    with pytest.raises(ConfigError, match="'broken' failed, and has reported why"):
        made["broken"]()
    runs = bench.in_turn({n: made[n] for n in ("one", "other")}, 2)
    assert all(run[name] >= 0 for run in runs for name in ("one", "other"))
    assert made["one"].results == [7, 7, 7]
    for one in [*made.values(), made["one"]]:
        one.close()


def test_a_steps_operators_add_up(capfd: pytest.CaptureFixture[str]) -> None:
    few = ["bench", "step", *TINY, "--kernels", "--repeats", "2"]
    assert main([*few, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    times = [us for _, us, _, _ in found["kernels"]]
    assert times == sorted(times, reverse=True)
    group = {name: of for name, _, _, of in found["kernels"]}
    assert group["aten::addmm"] == "products"
    assert group["aten::convolution_backward"] == "convolutions"
    assert group["aten::_fused_sgd_"] == "update"
    assert 0 < found["ratios"]["convolutions and products / all"] < 1
    assert main(few) == 0
    printed = capfd.readouterr().out
    assert "  convolutions               aten::convolution_backward\n" in printed
    assert re.search(r"convolutions and products are \d+% of the kernels' time", printed)


PROFILE = [  # names as profilers of GPUs print them, shortened; µs and calls a step; group
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", 400, 10,
     "convolutions"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128>(…)",
     350, 8, "convolutions"),
    ("sm90_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", 450, 10,
     "convolutions"),
    ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", 200, 9, "products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(…)", 5, 2, "products"),
    ("pooled_kernel", 60, 6, "passes over maps and units"),
    ("pooled_backward_kernel", 80, 6, "passes over maps and units"),
    ("maps_backward_kernel", 20, 4, "passes over maps and units"),
    ("units_kernel", 10, 3, "passes over maps and units"),
    ("ranks_kernel", 3, 1, "passes over maps and units"),
    ("fold_kernel", 20, 1, "passes over maps and units"),
    ("sgd_kernel", 290, 16, "update"),
    ("void at::native::multi_tensor_apply_kernel<…, FusedAdamMathFunctor<float, 4>…>", 1, 1,
     "update"),
    ("Memcpy DtoD (Device -> Device)", 12, 5, "copies"),
    ("Memset (Device)", 2, 3, "copies"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<…>", 8, 10, "copies"),
    ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, …>(…)", 6, 2, "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<double>…>", 3, 5,
     "copies"),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda…>", 5, 4,
     "copies"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 70, 3,
     "communication"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float…>>", 5, 2, "others"),
]  # fmt: skip


def test_kernels_of_a_made_up_profile_are_grouped() -> None:
    found = grouped([kernel[:3] for kernel in PROFILE], "cuda", elapsed=2500)
    assert {name: of for name, _, _, of in found["kernels"]} == {k[0]: k[3] for k in PROFILE}
    assert found["kernels"][0][1] == 450
    assert found["groups"]["update"] == (291, 17)
    assert found["ratios"]["convolutions and products / all"] == pytest.approx(1405 / 2000)
    assert found["ratios"]["convolutions and products / elapsed"] == pytest.approx(1405 / 2500)
    assert sum(found["ratios"][f"{name} / all"] for name in found["groups"]) == pytest.approx(1)
    printed = kernel_lines(found)
    assert (
        "convolutions and products are 70% of the kernels' time, and 56% of the step's" in printed
    )
    assert "       70     3.0   3.5%  communication\n" in printed


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


def test_a_cold_start_finds_no_kernel_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str] | None] = []

    class Process:
        stderr = ("loading\n", "step 1/9\n")

        def __init__(self, command: list[str], env: dict[str, str] | None, **_: object) -> None:
            seen.append(env)
            run = Path(command[-1]).parent / "run"
            run.mkdir()
            point = {"kind": "start", "step": 1, "total_s": 5.0, "stages_s": {"imports": 3.0}}
            (run / "metrics.jsonl").write_text(json.dumps(point) + "\n")

        def terminate(self) -> None:
            pass

        communicate = terminate

    monkeypatch.setattr(end_to_end.subprocess, "Popen", Process)
    config = load_config([*TINY, "layout.kind=one", "name=run"])
    found = end_to_end._first_step(config, "warm") | end_to_end._first_step(config, "cold", True)
    assert [*found] == ["warm, s", "warm: imports, s", "cold, s", "cold: imports, s"]
    assert found["cold, s"] >= 0
    assert found["cold: imports, s"] == 3
    warm, cold = seen
    assert warm is None
    assert cold is not None
    Process.stderr = ("loading\n", "alexnet-dist: no data\n")
    with pytest.raises(ConfigError, match="ended before its first step: alexnet-dist: no data"):
        end_to_end._first_step(config, "warm")
    folders = {Path(cold[name]) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)
