"""`plan` against published figures, closed formulas, and what real processes send and allocate."""

import dataclasses
import gc
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, alexnet_dist, interpreted, on_ranks, with_small_tiles
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch, Decoded
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.network.shapes import final_side, map_sides
from alexnet_dist.parallel.topology import connect
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.planning import dry_run, fake
from alexnet_dist.planning.dry_run import needed, plan
from alexnet_dist.planning.plan import Misfit
from alexnet_dist.planning.text import plan_lines

CPU = torch.device("cpu")
SIZES = {"fp64": 8, "fp32": 4, "bf16": 2}


def test_the_papers_network_is_the_papers() -> None:
    result = alexnet_dist("plan", "base", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert sum(found["parameters"].values()) == 60_965_224
    assert sum(found["forward_flops_per_image"].values()) / 2e6 == pytest.approx(724, abs=0.6)
    assert found["training_flops_per_image"] / 1e9 == pytest.approx(4.14, abs=0.006)
    assert (found["layout"], found["ranks"]) == ("columns", 2)
    assert found["layouts"]["columns"]["batch_per_replica"] == 128
    assert found["layouts"]["columns"]["parameters"] == 60_965_224 // 2
    assert found["layouts"]["one"]["batch_per_replica"] == 128
    assert found["layouts"]["one"]["parameters"] == 60_965_224


def test_a_plan_is_read_by_people() -> None:
    result = alexnet_dist("plan", "demo", "layout.kind=replicas", "--ranks", "4")
    assert result.returncode == 0, result.stderr
    for word in ("conv1", "GFLOP", "columns_x_replicas", "all-reduce", "activations", "peak"):
        assert word in result.stdout
    assert "launcher" not in result.stdout  # none was there
    unpredicted = alexnet_dist("plan", "demo", "train.precision=fp64")
    assert unpredicted.returncode == 0, unpredicted.stderr
    assert "no prediction: train.precision=fp64: no speed is known for" in unpredicted.stdout


def formula(config: Config, ranks: int) -> dict[str, int]:
    """Bytes a rank sends in a step, as docs/design.md has them."""
    model, kind = config.model, config.layout.kind
    e, w = SIZES[config.train.precision], 8 if config.train.precision == "fp64" else 4
    columns = 2 if kind.startswith("columns") else 1
    replicas = ranks // columns
    batch, n, classes = config.train.batch, config.train.batch // replicas, model.classes
    side = final_side(model)
    flat = model.conv[4] * side**2
    pool2 = ((((model.crop - 11) // 4 + 1 - 3) // 2 + 1) - 3) // 2 + 1
    of_replica = 6 * 8  # the step's numbers

    def parameters(parts: int, names: Sequence[str]) -> int:
        return sum(size for name, size in layers(config, parts).items() if name[:-1] in names)

    sent: dict[str, float] = {}
    if columns == 2:
        seen = model.conv[1] * pool2**2 + flat + sum(model.fc)
        decoded = n * (3 * model.crop**2 + 9 * 8)
        joined = e * n * (seen + 2 * -(-classes // 2))
        sent = {"all-gather": (decoded + joined) / 2, "all-to-all": e * n * seen / 2}
        sent["all-reduce"] = 8  # the norm of the gradient
    if kind in ("replicas", "columns_x_replicas"):
        wide = 2 if config.layout.compress_gradients else w
        gradients = wide * parameters(columns, ("conv", "fc")) + of_replica
        sent["all-reduce"] = sent.get("all-reduce", 0) + 2 * gradients * (replicas - 1) / replicas
    if kind == "sharded_fc":
        share = (ranks - 1) / ranks
        seen = e * batch * (flat + sum(model.fc))
        logits = e * batch * ranks * -(-classes // ranks)
        sent = {
            "all-gather": (seen + logits + 8 * batch) * share,
            "all-to-all": seen * share,
            "all-reduce": 2 * (w * parameters(1, ("conv",)) + 16) * share,
        }
    if kind in ("zero1", "zero2"):
        share, all_sizes = (ranks - 1) / ranks, layers(config, 1)
        rounds = config.train.micro_batches if kind == "zero2" else 1
        weights, biases = (sum(all_sizes.values()) - bias_count(config), bias_count(config))
        padded = sum(-(-size // (2 * ranks)) * 2 * ranks for size in (weights, biases))
        wide = 2 if config.layout.compress_gradients else 4
        gradients = rounds * wide * (weights + biases) + of_replica
        sent = {"all-reduce": 2 * gradients * share, "all-gather": 4 * padded * share}
    return {name: round(size) for name, size in sent.items() if size}


def layers(config: Config, parts: int) -> dict[str, int]:
    """Parameters of the first of `parts` columns, by layer."""
    from alexnet_dist.network.model import AlexNet

    columns_here = [0] if parts == 2 else None
    model = AlexNet(config.model, columns_here=columns_here, init_weights=False)
    return {x.name: x.weight.numel() + x.bias.numel() for x in model.layers()}


def bias_count(config: Config) -> int:
    return sum(config.model.conv) + sum(config.model.fc) + config.model.classes


def config_of(kind: str, *overrides: str) -> Config:
    tiny = [*TINY, "train.batch=48", "model.classes=6", f"layout.kind={kind}"]
    return load_config([*tiny, *overrides])


CASES = [
    (2, "columns", ["train.precision=bf16"]),
    (2, "columns", ["train.precision=fp64", "train.micro_batches=4"]),
    (2, "replicas", ["train.precision=fp32"]),
    (2, "replicas", ["layout.compress_gradients=true", "train.micro_batches=4"]),
    (2, "sharded_fc", ["train.precision=fp32", "train.micro_batches=2"]),
    (2, "zero1", ["train.precision=fp32", "train.micro_batches=4"]),
    (2, "zero2", ["train.precision=fp32", "train.micro_batches=4"]),
    (2, "zero1", ["train.precision=bf16", "layout.compress_gradients=true"]),
    (2, "zero2", ["train.precision=fp32", "layout.compress_gradients=true"]),
    (4, "columns_x_replicas", ["train.precision=fp32"]),
    (4, "sharded_fc", ["train.precision=bf16"]),
    (4, "replicas", ["train.precision=fp64"]),
]


def sent(configs: Sequence[Config]) -> list[dict[str, int]]:
    """For each config: what this rank sends in its second step, by collective."""
    found = []
    for config in configs:
        topology = connect(config)
        engine = make_engine(config, topology)
        counts = [len(part) for part in topology.shares(range(config.train.batch))]
        n, side = counts[topology.column], config.model.crop
        patches = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8)
        metadata = torch.zeros(n, 9, dtype=torch.float64)
        metadata[:, 0] = torch.arange(n) % 6
        dtype = DTYPES[config.train.precision]
        part = Decoded(patches, metadata, lambda p, *_, dtype=dtype: p.movedim(-1, 1).to(dtype))
        for step in range(2):
            with Traffic() as traffic:
                engine.train_step(part.joined(counts, topology.column_group), step, 0.01)
        found.append(traffic.bytes())
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.drill)])
def test_real_processes_send_what_was_planned_to_the_byte(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "KINDS", ("one",))  # and each config's own, of all that are
    monkeypatch.setattr(dry_run, "_whole_batch", lambda *_: None)  # which sends nothing
    configs = [config_of(kind, *more) for count, kind, more in CASES if count == ranks]
    for config, measured in zip(configs, on_ranks(ranks, sent, configs)[0], strict=True):
        kind = config.layout.kind
        planned = dict(plan(config, ranks).of(kind).bytes)
        assert planned.pop("total") == sum(measured.values()), kind
        assert planned == measured == formula(config, ranks), kind


@pytest.mark.parametrize("ranks", [8, 1024])
def test_worlds_of_any_size_are_planned_by_the_same_formulas(ranks: int) -> None:
    wide = ["train.batch=2048", "model.fc=[2048,1024]", "model.classes=1024"]
    found = plan(config_of("replicas", *wide), ranks)
    for kind in ("replicas", "columns_x_replicas", "sharded_fc", "zero1", "zero2"):
        planned = {name: size for name, size in found.of(kind).bytes.items() if name != "total"}
        expected = formula(config_of(kind, *wide), ranks)
        assert planned == pytest.approx(expected, abs=1), kind


def test_a_layout_that_does_not_fit_says_what_does() -> None:
    planned = plan(config_of("columns"), 3)
    columns = planned.layouts["columns"]
    assert isinstance(columns, Misfit)
    assert columns.problem == "takes 2 ranks; on 3, replicas, zero1, zero2 would fit"
    assert planned.of("replicas").bytes["total"] > 0
    assert any("on 3, replicas" in line for line in plan_lines(planned))
    alone = plan(config_of("one", "model.columns=1", "model.exchange=[]"), 2).layouts["columns"]
    assert isinstance(alone, Misfit)
    assert alone.problem.startswith("layout.kind='columns': a network of model.columns=1 cannot")


def peak_of_two_steps(overrides: list[str]) -> int:
    """Bytes by which memory grew at its peak, over what a small network has taken before."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def two_steps(config: Config) -> None:
        engine, batch = make_engine(config, connect(config)), made_batch(config, CPU)
        for step in range(2):
            engine.train_step(batch, step, 0.01)

    small = ["model.conv=[8,8,8,8,8]", "model.fc=[8,8]", "train.batch=2"]
    two_steps(load_config([*overrides, *small]))  # what libraries take by themselves
    before = status("VmRSS")
    two_steps(load_config(overrides))
    return status("VmHWM") - before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_peak_memory_is_within_a_fifth_of_the_plan(precision: str) -> None:
    """The paper's network on one process."""
    overrides = ["layout.kind=one", "train.batch=64", f"train.precision={precision}"]
    (measured,) = on_ranks(1, peak_of_two_steps, [*overrides, "layout.device=cpu"])
    planned = plan(load_config(overrides), 1).of("one").memory["peak"]
    assert measured == pytest.approx(planned, rel=0.2)


# --- of a GPU, whose kernels Triton's interpreter runs here


SMALL = [*TINY, "model.conv=[4,6,4,4,4]", "model.fc=[12,12]", "train.batch=2", "data.path=none",
         "layout.kind=one"]  # fmt: skip
GPU_CASES = [
    [*SMALL, "train.precision=bf16"],
    [*SMALL, "train.precision=fp32", "train.micro_batches=2", "optimizer.kind=adam"],
]


class Watched(TorchEngine):
    """One whose step a MemTracker can follow, which knows one forward of a module at a time."""

    memory: MemTracker | None

    def gradient_sync(self, now: bool) -> AbstractContextManager[object]:
        assert self.memory is not None
        self.memory.reset_mod_stats()
        return nullcontext()


class AtKernels(TorchDispatchMode):
    """Notes how many bytes of tensors there are after each kernel of ours, since the first."""

    def __init__(self, memory: MemTracker) -> None:
        super().__init__()
        self.memory, self.alive = memory, list[tuple[str, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.namespace == "alexnet_dist":
            gc.collect()  # the interpreter leaves cycles
            now = self.memory.get_tracker_snapshot("current")[CPU]["Total"]
            self.alive.append((func._schema.name, now))
        return made

    def since_the_first(self) -> list[tuple[str, int]]:
        return [(name, now - self.alive[0][1]) for name, now in self.alive]


def stepped(engine: Any, batch: Batch) -> list[tuple[str, int]]:
    """A step, and what there was after each kernel."""
    engine.memory = memory = MemTracker()
    given = [getattr(batch, field.name) for field in dataclasses.fields(Batch)]
    narrow = (engine.optimizer.narrow or {}).values()
    memory.track_external(engine.model, engine.optimizer.optimizer, *given, *narrow)
    seen = AtKernels(memory)
    gc.freeze()  # what there was before is not looked through each time
    with memory, seen:
        engine.train_step(batch, 0, 0.01)
    gc.unfreeze()
    return seen.since_the_first()


def kept_for_backward(configs: list[list[str]]) -> tuple[list[list[tuple[str, int]]], int]:
    """What really is there after each kernel of a step, and how many bytes autograd keeps of the
    first network's forward until its backward, parameters and windows left out."""
    found, kept = [], dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for overrides in configs:
        config = load_config(overrides)
        engine = Watched(config, connect(config))
        assert engine.fused
        batch = made_batch(config, CPU)
        found.append(stepped(engine, batch))
        if not kept:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                logits = engine.model.train()(batch.windows, torch.arange(config.train.batch), 0)
            assert logits.requires_grad
            narrow = (engine.optimizer.narrow or {}).values()
            for tensor in (*engine.model.parameters(), *narrow, batch.windows):
                kept.pop(tensor.untyped_storage().data_ptr(), None)
    return found, sum(kept.values())


def planned_at_kernels(config: Config) -> list[tuple[str, int]]:
    """What `plan` finds after each kernel, of shapes alone."""
    with fake.pretended(1), FakeTensorMode(allow_non_fake_inputs=True):
        topology = fake.fake_topology(config, 1)
        engine = fake.PlannedEngine(config, topology, init_weights=False)
        engine.fuse(narrows=True)
        part, counts = fake.fake_decoded(config, topology)
        return stepped(engine, part.joined(counts, None).batch())


def saved_by_formula(config: Config) -> int:
    """Bytes that a forward by the kernels must keep: what each layer made or saw, a byte for each
    pooled value, and conv1's weights as they are folded."""
    model, n, e = config.model, config.train.batch, SIZES[config.train.precision]
    kept, seen, side = 0, 0, model.crop
    for place, (made, pooled) in enumerate(map_sides(model), start=1):
        name, maps = f"conv{place}", model.conv[place - 1]
        if place == 1:  # folded: each square of 4 × 4 pixels is a pixel of 48 maps
            kept += e * n * 48 * (made + 2) ** 2 + e * maps * 48 * 3**2
        elif name in model.exchange:  # a copy, where both columns' lie side by side
            kept += e * n * seen * side**2
        kept += e * n * maps * made**2
        if name in model.pool_after:
            kept += n * maps * pooled**2
        if place < 5 and f"conv{place + 1}" not in model.exchange:
            kept += e * n * maps * pooled**2  # what the next convolution sees
        seen, side = maps, pooled
    # fc6 sees both columns' side by side; the others what the one before made, half of it zero.
    return kept + e * n * (seen * side**2 + sum(model.fc) + model.classes)


@pytest.mark.kernels
def test_a_step_by_kernels_keeps_and_takes_what_was_planned() -> None:
    """To the byte: real tensors by the interpreter, beside shapes alone, beside a formula."""
    found, kept = interpreted(with_small_tiles, kept_for_backward, GPU_CASES)
    for overrides, alive in zip(GPU_CASES, found, strict=True):
        # Only after a kernel: the interpreter holds what it was given until the next one.
        assert alive == planned_at_kernels(load_config(overrides)), overrides
        assert {"alexnet_dist::maps", "alexnet_dist::maps_backward"} < {name for name, _ in alive}
    config = load_config(GPU_CASES[0])
    slots_and_steps = 8 * config.train.batch + 3 * 8
    assert 0 <= kept - saved_by_formula(config) <= slots_and_steps


def test_a_gpu_holds_what_its_graph_and_its_update_keep() -> None:
    """The paper's network, 61 million parameters, batch 128, in bytes each."""
    base = ["paper/alexnet-2012", "model.classes=1000", "layout.kind=one"]
    count, pixels = 60_965_224, 128 * 3 * 227**2
    weights = count - sum((96, 256, 384, 384, 256, 4096, 4096, 1000))
    graph = plan(load_config(base), 1, gpu=True).of("one")
    memory = graph.memory
    assert (graph.execution, memory["parameters"], memory["optimizer"]) == (
        "graph", 4 * count, 4 * count,
    )  # fmt: skip
    assert memory["narrow copies"] == 2 * weights
    assert memory["undone by warm-up"] == 8 * count + 2 * weights
    assert memory["graph's batch"] == pytest.approx(pixels, rel=1e-3)  # in bytes
    assert memory["windows"] == pytest.approx(2 * pixels, rel=1e-3)  # in bf16
    assert memory["gradients"] <= 2 * weights + 4 * (count - weights)  # bf16 of a rank alone
    fused = plan(load_config([*base, "train.execution=fused"]), 1, gpu=True).of("one").memory
    without = sum(memory[name] for name in ("undone by warm-up", "graph's batch"))
    assert fused["peak"] == memory["peak"] - without
    eager = plan(load_config([*base, "train.execution=eager"]), 1, gpu=True).of("one").memory
    assert eager["activations"] + eager["temporary"] > 1.5 * fused["activations"]
    parts = plan(load_config([*base, "train.micro_batches=2"]), 1, gpu=True).of("one").memory
    assert parts["activations"] < 0.6 * memory["activations"]
    ranks = plan(load_config([*base[:2], "layout.kind=replicas"]), 2, gpu=True)
    assert ranks.of("replicas").execution == "graph"
    assert ranks.of("replicas").memory["gradients"] == 4 * count  # sums are float32's
    assert ranks.of("columns").memory["narrow copies"] == weights
    assert ranks.of("zero1").memory["optimizer"] < 1.01 * 8 * count / 2


def test_what_a_rank_needs_is_one_call() -> None:
    config = load_config(["paper/alexnet-2012", "model.classes=1000", "layout.kind=one"])
    peak = plan(config, 1, gpu=True).of("one").memory["peak"]
    assert needed(config, 1) == peak
    with pytest.raises(ConfigError, match=r"layout\.kind=one takes 1 rank"):
        needed(config, 2)
