"""What only a GPU can show; skipped without one."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from conftest import TINY, alexnet_dist, as_overrides, on_ranks
from shared import PATIENT
from small_runs import final_state
from test_layouts import assert_same_run, config_of, trajectories
from test_run import ALONE, RUN, Started, start

from alexnet_dist.bench.decoders import bench_differences
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.dataset import open_for
from alexnet_dist.data.pipelines import resident
from alexnet_dist.data.pipelines.dali_pipeline import check_dali, gpu_decoders
from alexnet_dist.data.pipelines.make import make_pipeline, train_batches
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.data.sampler import TrainSampler, evaluation_plan
from alexnet_dist.engines.base import on_host
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.make import make_engine
from alexnet_dist.network import philox
from alexnet_dist.network.lrn import local_response_norm
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.training.metrics_file import read_metrics

__all__ = ["start"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_dropout_masks_are_the_cpus_bits() -> None:
    slots = torch.arange(64)
    on_cpu = philox.dropout_mask(3, 5, 6, slots, 17, 300, 0.5)
    assert torch.equal(philox.dropout_mask(3, 5, 6, slots.cuda(), 17, 300, 0.5).cpu(), on_cpu)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_normalisation_is_the_cpus(dtype: torch.dtype, bound: float) -> None:
    maps, upper = torch.randn(2, 4, 96, 27, 27, dtype=dtype) * 50
    found = []
    for device in ("cpu", "cuda"):
        leaf = maps.to(device, copy=True).requires_grad_()
        ours = local_response_norm(leaf, size=5, alpha=1e-4, beta=0.75, k=2.0)
        ours.backward(upper.to(device))
        assert leaf.grad is not None
        found.append([ours.detach().cpu(), leaf.grad.cpu()])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=bound, atol=bound * 50)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_products_of_float32_are_exact_unless_tf32_is_asked_for(precision: str) -> None:
    """Under bf16: of what autocast leaves alone."""
    on_gpu = ["layout.kind=one", "layout.device=cuda", f"train.precision={precision}"]
    connect(load_config([*TINY, *on_gpu]))
    a, b = (torch.randn(64, 64, 16, 16, device="cuda") for _ in range(2))
    convolved = torch.nn.functional.conv2d(a, b[:, :, :3, :3])
    multiplied = a.flatten(1) @ b.flatten(1).T
    exact = torch.nn.functional.conv2d(a.double(), b[:, :, :3, :3].double())
    assert (convolved - exact).norm() / exact.norm() < (1e-3 if precision == "tf32" else 1e-5)
    exact = a.double().flatten(1) @ b.double().flatten(1).T
    error = (multiplied - exact).norm() / exact.norm()
    assert 5e-5 < error < 1e-3 if precision == "tf32" else error < 1e-5


GPU = ["layout.device=cuda", "train.deterministic=true", PATIENT]


@pytest.mark.parametrize(
    "how", ["micro_batches=1", "micro_batches=4", "execution=fused", "execution=eager"]
)
def test_twenty_steps_and_an_evaluation_are_the_cpus(packed: Path, how: str) -> None:
    double = "train.precision=fp64"
    (oracle,) = trajectories([config_of(packed, double)])
    ((ours,),) = on_ranks(1, trajectories, [config_of(packed, double, *GPU, f"train.{how}")])
    assert_same_run(ours, oracle, 1e-9)


def wait_for_nothing(config: Config) -> int:
    """Steps during which anything that waits for the device is an error."""
    topology, dataset = connect(config), open_for(config)
    engine, steps = make_engine(config, topology), 0
    for batch in train_batches(config, topology, dataset, 0, 8):
        stats = on_host(engine.train_step(batch, steps, 0.001))
        steps += 1
        if steps == 3:  # all is loaded and allocated
            torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    assert not stats().failed
    return steps


@pytest.mark.parametrize("pipeline", ["torch", "dali", "resident"])
@pytest.mark.parametrize("execution", ["graph", "fused", "eager"])
def test_a_step_does_not_wait_for_the_gpu(packed: Path, pipeline: str, execution: str) -> None:
    how = [f"data.pipeline={pipeline}", f"train.execution={execution}", "train.precision=bf16"]
    assert on_ranks(1, wait_for_nothing, config_of(packed, "layout.device=cuda", *how)) == [8]


def test_a_stopped_run_on_a_gpu_ends_as_if_it_never_was(
    tiny: Callable[..., Config], start: Callable[..., Started]
) -> None:
    """To the bit, in bf16; and it tells of the device what a CPU has not."""

    def arguments(name: str) -> list[str]:
        return ["train", *as_overrides(tiny(*RUN, ALONE, *GPU, f"name={name}"))]

    whole = alexnet_dist(*arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    stopped = start(arguments("stopped"))
    runs = tiny().folder.parent
    stopped.wait_for_step(runs / "stopped", 3)
    stopped.process.send_signal(signal.SIGUSR1)
    code, output = stopped.end()
    assert code == 75, output
    again = alexnet_dist(*arguments("stopped"))
    assert again.returncode == 0, again.stderr
    assert "continues at step" in again.stderr
    assert final_state(runs / "stopped") == final_state(runs / "whole")
    last = [point for point in read_metrics(runs / "whole") if point["kind"] == "speed"][-1]
    assert last["memory"]["device_gb"] > 0
    assert sum(last["time"].values()) == pytest.approx(1)
    assert last["time"]["step"] > 0  # one CUDA graph


WAYS = {
    "graph": [], "micro-batches": ["train.micro_batches=2"], "lars": ["optimizer.kind=lars"],
    "adam": ["optimizer.kind=adam"], "fp32": ["train.precision=fp32"],
    "histograms": ["log.histograms_every_steps=3"], "tanh": ["model.activation=tanh"],
}  # fmt: skip


def steps_by_each(config: Config, overrides: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """All that six steps make by each kind of execution; gradients are kept of some."""
    found, batch = {}, None
    for execution in ("graph", "fused", "graph again"):
        how = f"train.execution={execution.partition(' ')[0]}"
        one = load_config([flat(config), *overrides, how])
        topology = connect(one)
        engine, batch = make_engine(one, topology), batch or made_batch(one, topology.device)
        assert isinstance(engine, TorchEngine)
        made = {}
        for step in range(6):
            rate = 0.001 * (step + 1)
            made[f"numbers/{step}"] = engine.train_step(batch, step, rate, step % 3 == 2).cpu()
        gradients = {f"gradient/{name}": grad.cpu() for name, grad in engine.gradients.items()}
        parameters, optimizer = engine.whole_tensors()
        found[execution] = made | gradients | parameters | optimizer
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_is_its_kernels_to_the_bit(packed: Path, way: str) -> None:
    """Of the paper's network in bf16: its first step too, and when it is made a second time."""
    config = load_config(["layout.kind=one", "train.batch=32", "train.deterministic=true"])
    (found,) = on_ranks(1, steps_by_each, config, WAYS[way])
    for name, value in found["fused"].items():
        assert torch.equal(found["graph"][name], value), name
        assert torch.equal(found["graph again"][name], value), name
    assert found["graph"]["numbers/5"][3] == 0


def test_a_step_that_is_not_finite_changes_nothing(packed: Path) -> None:
    config = load_config(["layout.kind=one", "train.batch=8"])
    ((before, numbers, after),) = on_ranks(1, spoiled, config)
    assert numbers[3] == 1
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def spoiled(config: Config) -> tuple[dict[str, torch.Tensor], torch.Tensor, Any]:
    """State before a step whose windows hold a NaN, its numbers, and the state after it."""
    topology = connect(config)
    engine, batch = make_engine(config, topology), made_batch(config, topology.device)
    engine.train_step(batch, 0, 0.001)
    before = {n: t.clone() for part in engine.whole_tensors() for n, t in part.items()}
    batch.windows[0, 0, 0, 0] = float("nan")
    numbers = engine.train_step(batch, 1, 0.001).cpu()
    return before, numbers, {n: t for part in engine.whole_tensors() for n, t in part.items()}


@pytest.mark.parametrize("fits", [True, False])
def test_resident_images_give_the_cpus_batch(
    packed: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """To the bit, from the GPU's memory and, where they do not fit there, from the host's."""
    if not fits:
        monkeypatch.setattr(resident.FreeMemory, "of", classmethod(lambda cls, *_: cls(0, 1e12)))
    for views in (1, 10):
        found = []
        for kind, device in (("torch", torch.device("cpu")), ("resident", torch.device("cuda", 0))):
            config = load_config([*TINY, f"data.path={packed}", "layout.kind=one",
                                  "train.precision=fp32", f"evaluate.views={views}",
                                  f"data.pipeline={kind}"])  # fmt: skip
            dataset, topology = open_for(config), Topology(device=device)
            batches = []
            for split, plan in (
                ("train", TrainSampler(config, 60, dataset.statistics).plan(0, 9, range(8))),
                ("test", evaluation_plan(config, [range(0, 7), range(7, 7), range(7, 23)])),
            ):
                pipeline = make_pipeline(config, topology, dataset, split)
                batches += [p.batch() for p in pipeline.batches(plan)]
                pipeline.close()
            found.append(batches)
            for held in dataset.resident.values():
                assert held.images.device.type == ("cuda" if fits else "cpu")
        for cpu, gpu in zip(*found, strict=True):
            assert gpu.windows.device.type == "cuda"
            for field in ("windows", "labels", "ids", "lighting", "damaged"):
                assert torch.equal(getattr(gpu, field).cpu(), getattr(cpu, field)), field


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("keep", [False, True])
def test_dali_on_the_gpu_gives_the_cpus_batch(tmp_path: Path, keep: bool, views: int) -> None:
    """Decoded by nvJPEG: within half a grey level in the mean; drawn and finished alike. A later
    batch is larger than the first."""
    prepare("folder", made.image_folder(tmp_path / "source", 8, 6, (360, 264)), tmp_path / "data",
            Options(keep=keep))  # fmt: skip
    shared = [*TINY, "model.classes=3", "model.crop=227", "data.canvas=256", "data.eval_split=val",
              f"data.path={tmp_path / 'data'}", "layout.kind=one", "train.precision=fp32",
              f"evaluate.views={views}"]  # fmt: skip
    found = []
    for kind, device in (("torch", "cpu"), ("torch", "cuda"), ("dali", "cuda")):
        config = load_config([*shared, f"data.pipeline={kind}"])
        dataset = open_for(config)
        topology = Topology(
            device=torch.device(device, 0) if device == "cuda" else torch.device(device)
        )
        pipeline = make_pipeline(config, topology, dataset, "val")
        plan = evaluation_plan(config, [range(0, 3), range(3, 3), range(3, 14), range(14, 18)])
        found.append([part.batch() for part in pipeline.batches(plan)])
        pipeline.close()
    for cpu, torch_gpu, dali_gpu in zip(*found, strict=True):
        assert dali_gpu.windows.device.type == torch_gpu.windows.device.type == "cuda"
        assert torch.equal(torch_gpu.windows.cpu(), cpu.windows)
        assert torch.equal(dali_gpu.ids.cpu(), cpu.ids)
        difference = (dali_gpu.windows.cpu() - cpu.windows).abs() * 60  # divide_by of TINY
        if len(difference):
            assert difference.mean() <= (0.7 if keep else 0.5)
            assert difference.flatten().sort().values[int(0.999 * difference.numel())] <= 4


def test_dali_on_the_gpu_decodes_every_kind_of_jpeg_within_bounds(tmp_path: Path) -> None:
    source = made.image_folder(tmp_path / "source", 8, 0, (360, 264))
    found = bench_differences(source, 224, ["layout.device=cuda"])["differences"]
    for kind, apart in found.items():
        assert apart["99.9th percentile"] <= 4, kind
        if kind.startswith("at size"):
            assert apart["mean"] <= 0.5, kind
            assert max(abs(apart[colour]) for colour in ("red", "green", "blue")) <= 0.05, kind
        else:
            assert apart["mean"] <= 0.7, kind


def test_the_gpus_own_decoders_work_here() -> None:
    found = gpu_decoders(torch.cuda.current_device())
    assert found.hardware or found.cores, found.lack
    assert check_dali(torch.cuda.current_device()) == f"{found}"
