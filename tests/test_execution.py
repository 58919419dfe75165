"""Execution of a step as on a GPU: with fused kernels, here run by Triton's interpreter; and as one
CUDA graph, here simulated by calling what was captured."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, interpreted, on_ranks, with_small_tiles
from made import decoded
from test_columns import EVERYTHING_ON, VARIANTS
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.autograd.graph import get_gradient_edge
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.compat import abandon_capture
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Batch, Decoded
from alexnet_dist.data.dataset import Statistics
from alexnet_dist.data.preprocess import Preprocess
from alexnet_dist.engines import ddp
from alexnet_dist.engines.base import AT, Engine
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.graph import release_graphs
from alexnet_dist.engines.make import make_engine
from alexnet_dist.engines.sharded_fc import ShardedFcEngine
from alexnet_dist.engines.zero import ZeroEngine
from alexnet_dist.network import kernels, philox
from alexnet_dist.network.kernels import lrn_cpu
from alexnet_dist.network.lrn import _LocalResponseNorm
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel.layouts import columns_of, ranks_wanted
from alexnet_dist.parallel.topology import Topology, connect
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.reporting.compare_layouts import InMemory
from alexnet_dist.timing import TIMELINE

SMALL = [*TINY, "model.conv=[4,6,4,4,4]", "model.fc=[12,12]", "train.batch=2", "layout.kind=one",
         "data.path=none"]  # fmt: skip


def trained(config: Config, steps: int = 2) -> dict[str, Tensor]:
    """All that some steps on one batch make: weights, state, gradients, numbers, an answer."""
    engine, batch = TorchEngine(config, connect(config)), made_batch(config, torch.device("cpu"))
    return after(engine, batch, steps)


def after(engine: Engine, batch: Any, steps: int, last_but_one: Any = None) -> dict[str, Tensor]:
    found = {}
    for step in range(steps):
        last = step == steps - 1
        with last_but_one if last_but_one and step == steps - 2 else nullcontext():
            found[f"numbers/{step}"] = engine.train_step(batch, step, 0.01 * 0.9**step, last)
    gradients = getattr(engine, "gradients", {})  # ZeRO keeps none
    found |= {f"gradient/{name}": grad for name, grad in gradients.items()}
    parameters, optimizer = engine.whole_tensors()
    return found | parameters | optimizer | {"logits": engine.predict(batch.windows)}


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, relative to a tensor's largest value."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in theirs.items()
    )


WAYS = [
    ["train.precision=fp64", "train.micro_batches=2"],
    ["train.precision=fp64", "optimizer.kind=lars", "model.activation=tanh", *VARIANTS[1]],
    [  # the released code's order, as few maps as can be, odd sides
        "train.precision=fp64", "optimizer.kind=adam", "model.activation_last=[conv1]",
        "model.spatial_norm.layers=[conv2]", "model.round_up=true", "model.pool=[2,2]",
        "model.lrn.size=3", "model.padding=[1,2,1,1,1]", "optimizer.momentum_form=torch",
    ],
    ["train.precision=fp32"],
    ["train.precision=fp16"],
    [  # strides of weights that say nothing: of one channel, of one pixel
        "train.precision=fp32", "model.conv=[2,4,4,4,4]", "model.kernel=[11,5,1,3,3]",
        "model.padding=[0,2,0,1,1]",
    ],
]  # fmt: skip


def steps_of(config: Config) -> int:
    """As few as show something: the interpreter takes seconds a step."""
    return 2 if config.train.precision == "fp32" else 1


def by_kernels(configs: list[Config]) -> list[tuple[dict[str, Tensor], list[str]]]:
    """What each makes, and the kernels that were launched for it."""

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            if func.namespace == "alexnet_dist":
                launched.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    found = []
    for config in configs:
        launched: list[str] = []
        with Noted():
            made = trained(config, steps_of(config))
        found.append((made, launched))
    return found


CONFIGS = [load_config([*SMALL, *EVERYTHING_ON, *way]) for way in WAYS]
NARROW = [load_config([*SMALL, f"train.precision={name}"]) for name in ("bf16", "fp16")]


def both(configs: list[Config], narrow: list[Config]) -> tuple[Any, list[dict[str, str]]]:
    return by_kernels(configs), [narrowed(config) for config in narrow]


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any]:
    """What the interpreter makes, in one process: it imports for seconds."""
    made: tuple[Any, Any] = interpreted(with_small_tiles, both, CONFIGS, NARROW)
    return made


@pytest.mark.kernels
def test_a_network_of_kernels_is_that_of_operators(found: tuple[Any, Any]) -> None:
    """In float64 too, by the same kernels."""
    for config, (ours, launched) in zip(CONFIGS, found[0], strict=True):
        expected = trained(config, steps_of(config))
        assert expected["numbers/0"][3] == 0
        bound = {"fp64": 1e-12, "fp32": 2e-5, "fp16": 0.05}[config.train.precision]
        assert furthest(ours, expected) < bound, config.train
        wanted = {"maps", "maps_backward", "units", "units_backward", "fold",
                  "scores", "scores_backward", "skip_flag"}  # fmt: skip
        wanted |= {"sgd_update"} if config.optimizer.kind != "adam" else set()
        assert wanted <= {name.partition("::")[2] for name in launched}


def test_a_parameter_that_is_not_learnt_stays_and_is_saved() -> None:
    config = load_config([*SMALL, "train.precision=fp32"])
    engine, batch = TorchEngine(config, connect(config)), made_batch(config, torch.device("cpu"))
    still = engine.model.get_parameter("conv2.weight").requires_grad_(False).clone()
    engine.train_step(batch, 0, 0.01, keep_gradients=True)
    assert torch.equal(engine.whole_tensors()[0]["conv2.weight"], still)
    assert engine.gradient("conv2.weight") is None
    assert engine.gradient("conv1.weight") is not None


@pytest.mark.kernels
def test_an_update_narrows_the_weights(found: tuple[Any, Any]) -> None:
    for kinds, dtype in zip(found[1], ("bfloat16", "float16"), strict=True):
        assert kinds == dict.fromkeys(NARROW[0].model.layer_names, f"torch.{dtype}")


def narrowed(config: Config) -> dict[str, str]:
    """Of each layer whose narrow copy follows its weights within a bit: its gradient's type."""
    engine, batch = TorchEngine(config, connect(config)), made_batch(config, torch.device("cpu"))
    kinds: dict[str, str] = {}
    for layer in engine.model.layers():
        layer.weight.register_post_accumulate_grad_hook(
            lambda w, name=layer.name: kinds.update({name: str(w.grad.dtype)})  # type: ignore[misc]
        )
    before = {layer.name: layer.weight.detach().clone() for layer in engine.model.layers()}
    assert engine.train_step(batch, 0, 0.01)[AT.failed] == 0
    close = {}
    for layer in engine.model.layers():
        assert layer.narrow is not None
        assert not torch.equal(layer.weight, before[layer.name])
        # Triton's interpreter cuts off where a GPU rounds.
        if ((layer.narrow.float() - layer.weight).abs() <= layer.weight.abs() * 2**-7).all():
            close[layer.name] = kinds[layer.name]
    return close


def test_narrow_copies_are_of_the_weights_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused", lambda execution, device: True)
    configs = [load_config([*SMALL, "train.precision=bf16", f"seed={seed}"]) for seed in (0, 1)]
    one, other = (TorchEngine(config, connect(config)) for config in configs)
    other.load(*map(InMemory, one.whole_tensors()))
    assert other.optimizer.narrow
    for name, copy in other.optimizer.narrow.items():
        assert torch.equal(copy, one.model.get_parameter(name).bfloat16()), name


class HostCopies(TorchDispatchMode):
    """Notes what moves values between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, made))
        if len({t.device.type for t in tensors if isinstance(t, Tensor)}) > 1:
            self.found.append(str(func))
        return made


WITHOUT_VALUES = [
    [], ["train.micro_batches=2"], ["optimizer.kind=lars"], ["optimizer.kind=adam"],
    ["train.precision=fp32", "optimizer.momentum_form=torch"],
    ["layout.kind=columns"], ["layout.kind=sharded_fc"],
    ["layout.kind=sharded_fc", "optimizer.kind=lars", "train.micro_batches=2"],
    ["layout.kind=columns_x_replicas", "layout.ranks=4"],
]  # fmt: skip


@pytest.mark.parametrize("way", WITHOUT_VALUES)
def test_a_step_can_be_captured(way: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has no values, nothing goes by values, or to and from the host."""
    config = load_config(["layout.kind=one", "train.batch=4", *way])
    monkeypatch.setattr(kernels, "fused", lambda execution, device: True)
    monkeypatch.setattr(TorchEngine, "replicate", lambda self, group: self.model)
    monkeypatch.setattr(torch, "_fused_adam_", lambda *_, **__: None)  # there is none
    with in_a_world_of(ranks_wanted(config, gpus=0)), torch.device("meta"):
        made = ShardedFcEngine if config.layout.kind == "sharded_fc" else TorchEngine
        engine = made(config, topology_of(config), init_weights=False)
        batch, copies = made_batch_of(config), HostCopies()
        now, rate = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)
        with copies, pytest.MonkeyPatch.context() as made_of_values:
            for name in ("tensor", "as_tensor", "from_numpy"):  # operators do not show these
                made_of_values.delattr(torch, name)
            numbers = engine._step(batch, now, rate, True)
            with pytest.raises(RuntimeError, match="meta"):
                numbers[0].item()
    if config.optimizer.kind == "adam":  # torch's kernel reads no other on a GPU
        assert [g["lr"].dtype for g in engine.optimizer.optimizer.param_groups] == [
            torch.float32
        ] * 2
    assert copies.found == []
    assert numbers.shape == (6,)
    assert engine.gradients.keys() == dict(engine.model.named_parameters()).keys()


class Order(TorchDispatchMode):
    """Notes by layer when gradients of what it saw are computed, and those of its weights."""

    def __init__(self, engine: TorchEngine) -> None:
        super().__init__()
        self.names = {tuple(layer.weight.shape): layer.name for layer in engine.model.layers()}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            name = self.names.get(tuple(args[2].shape), "one of two columns here")
            parts = zip(("seen", "weights"), made, strict=False)
            self.found += [f"{name}: {of}" for of, gradient in parts if gradient is not None]
        if func is torch.ops.aten.mm.default:
            of = "weights" if tuple(made.shape) in self.names else "seen"
            names = {self.names.get(tuple(t.shape)) for t in (*args, made)} - {None}
            self.found += [f"{name}: {of}" for name in names]  # none: LRN's
        return made


@pytest.mark.parametrize(
    ("kind", "meet"),
    [("columns", ["fc8", "fc7", "fc6", "conv3"]), ("sharded_fc", ["fc8", "fc7", "fc6"])],
)
def test_gradients_travel_while_those_of_the_weights_are_computed(
    kind: str, meet: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have begun before, and are waited for after; with dropout, biases and padding too."""
    config = load_config([
        *TINY, "train.micro_batches=2", "train.precision=fp64", f"layout.kind={kind}",
        "model.dropout_before=[fc6,fc7,fc8]", "model.round_up=true", "model.stride=[4,1,2,1,1]",
    ])  # fmt: skip
    with in_a_world_of(2), torch.device("meta"):
        made = ShardedFcEngine if kind == "sharded_fc" else TorchEngine
        monkeypatch.setattr(TorchEngine, "replicate", lambda self, group: self.model)
        engine = made(config, topology_of(config), init_weights=False)
        order, begin = Order(engine), dist.all_to_all_single

        class Waited:
            def __init__(self, work: Work) -> None:
                self.work = work

            def wait(self) -> None:
                order.found.append("waited for")
                self.work.wait()

        def begun(*given: Any, **named: Any) -> Waited:
            order.found.append("begun")
            return Waited(begin(*given, **named))

        monkeypatch.setattr(dist, "all_to_all_single", begun)
        engine.model.train()
        with order:
            for windows, _, slots in engine._micro_batches(made_batch_of(config)):
                engine.model(windows, slots, 0).sum().backward()
    found = [one for one in order.found if one.partition(":")[0] in (*meet, "begun", "waited for")]
    assert found == 2 * [
        when for name in meet
        for when in (f"{name}: seen", "begun", f"{name}: weights", "waited for")
    ]  # fmt: skip
    assert len(found) < len(order.found)


@contextmanager
def in_a_world_of(ranks: int) -> Iterator[None]:
    """As the last of so many processes, that exchange nothing."""
    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def topology_of(config: Config) -> Topology:
    """This process's place, on a device that has no values."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    columns = columns_of(config)

    def group(ranks: range) -> Any:
        return dist.new_group(list(ranks), backend="fake") if len(ranks) > 1 else None

    return Topology(
        global_rank=world - 1, world_size=world, columns=columns, device=torch.device("meta"),
        column_group=group(range(world - columns, world)),
        replica_group=group(range(columns - 1, world, columns)),
    )  # fmt: skip


def made_batch_of(config: Config) -> Any:
    """A batch of the device and mode around."""
    replicas = config.layout.ranks // columns_of(config) if config.layout.ranks else 1
    n, side = config.train.batch // replicas, config.model.crop
    windows = torch.empty(n, 3, side, side, dtype=DTYPES[config.train.precision])
    windows = windows.contiguous(memory_format=torch.channels_last)
    ids = torch.empty(n, dtype=torch.int64)
    return Batch(windows, ids, ids, torch.empty(n, 3), torch.empty(n, dtype=torch.bool))


class PlayedGraph:
    """In a CUDA graph's place: operators with the very tensors that they were given once, so that
    nothing of Python has a say when it is replayed. A collective is an operator as well."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def reset(self) -> None:
        self.tape.clear()

    def replay(self) -> None:
        with torch.no_grad(), _disable_current_modes():
            for func, args, kwargs, made in self.tape:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(new, torch.ScriptObject):  # a collective has begun
                        Work.unbox(new).wait()
                    elif isinstance(new, Tensor) and not shared(old, new):
                        old.copy_(new)


def shared(old: Tensor, new: Tensor) -> bool:
    """Whether it was made where it lies already."""
    return old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()


class Recorded(TorchDispatchMode):
    def __init__(self, graph: PlayedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step waits for the device"
        made = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.graph.tape.append((func, args, kwargs or {}, made))
        return made


def played_callables(module: torch.nn.Module, example: tuple[Tensor, ...], pool: Any) -> Any:
    """In the place of torch.cuda.make_graphed_callables."""
    given, parameters = [tensor.clone() for tensor in example], tuple(module.parameters())
    forward, backward = PlayedGraph(), PlayedGraph()
    with Recorded(forward):
        made = module(*given)
    above = torch.empty_like(made)
    with Recorded(backward):
        gradients = torch.autograd.grad(made, parameters, above)

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *now: Tensor) -> Tensor:
            for mine, theirs in zip(given, now, strict=False):
                mine.copy_(theirs)
            forward.replay()
            return made.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            above.copy_(grads[0])
            backward.replay()
            return *[None] * len(given), *(gradient.detach() for gradient in gradients)

    return lambda *now: Graphed.apply(*now, *parameters)


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


@contextmanager
def played(fails: str = "") -> Iterator[None]:
    """Steps are captured as played graphs.

    Args:
        fails: where a capture does, on every rank: at its "begin" or "amid" the backward; or at its
            "end", on the last rank alone.
    """

    @contextmanager
    def capture(graph: PlayedGraph, *_: object, **__: object) -> Iterator[None]:
        if fails == "begin":
            raise RuntimeError("operation not permitted when stream is capturing")
        with (
            Recorded(graph),
            patch.object(_LocalResponseNorm, "backward", amid)
            if fails == "amid"
            else nullcontext(),
        ):
            yield
        if fails == "end" and (not dist.is_initialized() or dist.get_rank() > 0):
            raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    def amid(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    mask = philox.dropout_mask

    def by_operators(*given: Any) -> Tensor:  # what compiled loops do is not seen
        with patch.object(torch.compiler, "is_compiling", lambda: True):
            return mask(*given)

    with (
        patch.object(torch.cuda, "CUDAGraph", PlayedGraph),
        patch.object(torch.cuda, "graph_pool_handle", lambda: (0, 1)),
        patch.object(torch.cuda, "make_graphed_callables", played_callables),
        patch.object(torch.cuda, "graph", capture),
        patch.object(torch.cuda, "current_stream", Stream),
        patch.object(torch.cuda, "stream", stream),
        patch.object(philox, "dropout_mask", by_operators),
        patch.object(lrn_cpu, "fits", lambda *_: False),
        patch.object(ddp, "_WARM_UP_DDP", 3),
    ):
        yield


def by_graphs(configs: list[Config], fails: str = "") -> list[tuple[Any, Any, list[bool]]]:
    """Of each, what steps of a graph make, and what others do; and which graphs there were."""
    found = []
    for config in configs:
        topology, made, graphs = connect(config), [], []
        batch = made_batch(config, topology.device, samples=config.train.batch // topology.replicas)
        batch.windows.mul_(1 + topology.replica)
        for captured in (True, False):
            with played(fails):
                engine, counted = make_engine(config, topology), Traffic()
                assert isinstance(engine, TorchEngine)
                engine.stream = Stream() if captured else None
                made.append(after(engine, batch, 4, counted))
                made[-1]["sent"] = torch.tensor(counted.total())
                graphs = graphs or list(engine.graphs)
        found.append((*made, graphs))
    return found


FP32 = ["train.precision=fp32", "optimizer.momentum_form=torch"]  # that asks for no value on a CPU


@pytest.mark.parametrize("resident", [False, True])
def test_a_captured_step_makes_its_own_windows(
    resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of patches that it copies, or of images that stay where they are, which it does not."""
    config = load_config([*SMALL, *FP32])
    monkeypatch.setattr(Preprocess, "by_loop", Preprocess.by_operators)  # what can be played
    given = decoded(config, torch.device("cpu"), resident)
    made = []
    for captured in (True, False):
        with played():
            engine = TorchEngine(config, connect(config))
            engine.stream = Stream() if captured else None  # type: ignore[assignment]
            stats = [engine.train_step(part, step, 0.01) for step, part in enumerate(given)]
            made.append({str(step): stat for step, stat in enumerate(stats)})
            made[-1] |= engine.whole_tensors()[0]
            for step in engine.graphs.values():
                own = step.inputs[0]
                assert isinstance(own, Decoded)
                assert own.metadata is not given[0].metadata
                assert (own.patches is given[0].patches) is resident
    assert_equal(*made)
    assert len({stat.tolist()[0] for stat in stats}) == 3


@pytest.mark.parametrize("kind", ["sgd", "lars", "adam"])
def test_a_captured_step_begins_where_it_was(kind: str) -> None:
    """Warming up changes nothing; gradients are kept when they are asked for; to the bit."""
    ((ours, expected, graphs),) = by_graphs(
        [load_config([*SMALL, *FP32, f"optimizer.kind={kind}"])]
    )
    assert graphs == [False, True]
    assert_equal(ours, expected)


def capturing(config: Config) -> tuple[TorchEngine, Batch]:
    """An engine on this process that captures its steps, and a batch for it."""
    engine = TorchEngine(config, connect(config))
    engine.stream = Stream()
    return engine, made_batch(config, torch.device("cpu"))


def test_a_capture_is_all_of_one_span() -> None:
    """Marks inside would be events of the graph, that the host asks for in vain."""
    config = load_config([*SMALL, *FP32])
    with played():
        engine, batch = capturing(config)
        TIMELINE.start(cuda=False)
        engine.train_step(batch, 0, 0.01)
        took = TIMELINE.take()
        TIMELINE.stop()
    assert took.seconds.keys() == {"step", "other"}


def test_a_capture_meets_no_older_node_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight's gradient is added up on the stream where its node was made: on torch's default
    one, which cannot be captured, if something has kept it."""
    with played():
        engine, batch = capturing(load_config([*SMALL, *FP32]))
        step, uses = engine._step, list[int]()

        def noted(*given: Any, **more: Any) -> Tensor:
            for parameter in engine.model.parameters():
                known = get_gradient_edge(parameter).node.metadata
                known["uses"] = known.get("uses", 0) + 1
                uses.append(known["uses"])
            return step(*given, **more)

        monkeypatch.setattr(engine, "_step", noted)
        engine.train_step(batch, 0, 0.01)
    assert uses == [1] * 3 * 16  # of as many parameters; two steps warm up, and one is captured


def test_graphs_are_given_up_before_ranks_part() -> None:
    """While one that exchanges is there, NCCL waits for it."""
    config = load_config([*SMALL, *FP32])
    with played():
        engine, batch = capturing(config)
        engine.train_step(batch, 0, 0.01)
        (graph,) = [step.graph for step in engine.graphs.values()]
        assert graph.tape
        release_graphs()
    assert not graph.tape


LAYOUTS = {
    2: [["columns"], ["replicas", "train.micro_batches=2"], ["sharded_fc"],
        ["sharded_fc", "optimizer.kind=lars"]],
    4: [["columns_x_replicas"]],
}  # fmt: skip


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_captured_step_of_any_layout_is_its_step(ranks: int) -> None:
    """To the bit, exchanges and all; what a replay sends is counted."""
    shared = [*SMALL, *FP32, "train.batch=8", f"layout.ranks={ranks}"]
    configs = [load_config([*shared, f"layout.kind={kind}", *more])
               for kind, *more in LAYOUTS[ranks]]  # fmt: skip
    for found in on_ranks(ranks, by_graphs, configs):
        for ours, expected, graphs in found:
            assert graphs == [False, True]
            assert ours["sent"] > 0
            assert_equal(ours, expected)


def by_zero(configs: list[Config]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of each, what steps whose forward and backward are graphs make, and what others do."""
    found = []
    for config in configs:
        topology, made = connect(config), []
        batch = made_batch(config, topology.device, samples=config.train.batch // topology.replicas)
        batch.windows.mul_(1 + topology.replica)
        for captured in (True, False):
            with played():
                engine = make_engine(config, topology)
                assert isinstance(engine, ZeroEngine)
                if captured:
                    engine._capture(Stream())
                assert ("forward" in vars(engine.model)) is captured
                made.append(after(engine, batch, 3))
        found.append((made[0], made[1]))
    return found


def test_graphs_up_to_the_step_of_zero_are_its_step() -> None:
    kinds = (["zero1"], ["zero2"], ["zero1", "train.precision=bf16"])
    configs = [load_config([*SMALL, *FP32, "train.batch=4", f"layout.kind={kind}", "layout.ranks=2",
                            *more]) for kind, *more in kinds]  # fmt: skip
    for found in on_ranks(2, by_zero, configs):
        for ours, expected in found:
            assert_equal(ours, expected)


@pytest.mark.parametrize("fails", ["begin", "amid", "end"])
def test_ranks_of_which_one_cannot_capture_go_on_without(fails: str) -> None:
    config = load_config([*SMALL, *FP32, "layout.kind=replicas", "layout.ranks=2", "train.batch=4"])
    for ((ours, expected, graphs),) in on_ranks(2, by_graphs, [config], fails):
        assert graphs == []
        assert_equal(ours, expected)


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_a_step_that_cannot_be_captured_is_made_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ((ours, expected, graphs),) = by_graphs([load_config([*SMALL, *FP32])], "begin")
    assert graphs == []
    assert_equal(ours, expected)
    assert "could not be captured as a CUDA graph" in caplog.text
    assert "not permitted" in caplog.text
    assert "train.execution=fused" in caplog.text


def test_a_capture_that_fails_names_its_first_error_and_where(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not those of ending what is broken, which come later."""
    with played("amid"), pytest.MonkeyPatch.context() as patched:
        engine, batch = capturing(load_config([*SMALL, *FP32]))
        capture = torch.cuda.graph

        @contextmanager
        def ends_too(*given: Any, **more: Any) -> Iterator[None]:
            try:
                with capture(*given, **more):
                    yield
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        patched.setattr(torch.cuda, "graph", ends_too)
        engine.train_step(batch, 0, 0.01)
    assert re.search(r"not permitted when stream is capturing \(ddp\.py:\d+\);", caplog.text)
    assert "previous error" not in caplog.text


def test_the_allocator_is_told_that_a_capture_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch 2.11, which does not see to it; once, since giving up memory twice is an error."""
    told: list[tuple[str, int, Any]] = []

    def end(device: int, pool: Any) -> None:
        if ("release", device, pool) in told:
            raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: told.append(("release", *of)))
    for _ in range(2):
        abandon_capture(torch.device("cuda", 1), (0, 7))
    abandon_capture(torch.device("cpu"), (0, 7))
    assert told == [("release", 1, (0, 7))]


def test_without_a_compiler_windows_are_the_same() -> None:
    config = load_config([*SMALL, "data.divide_by=[58.4,57.1,57.4]"])
    canvas, crop, generator = (
        config.data.canvas,
        config.model.crop,
        torch.Generator().manual_seed(0),
    )
    mean = (torch.rand(canvas, canvas, 3, generator=generator) * 255).numpy()
    statistics = Statistics(mean, mean.mean((0, 1)), mean[0, 0], mean[:3, 0])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        preprocess = Preprocess(config, statistics, torch.device("cpu"), dtype)
        for views, side in ((1, crop), (3, canvas)):
            patches = torch.randint(256, (2, side, side, 3), dtype=torch.uint8, generator=generator)
            corners = torch.randint(canvas - crop + 1, (2, views, 2), generator=generator)
            flips = torch.randint(2, (2, views), generator=generator).bool()
            light = torch.randn(2, 3, generator=generator).to(preprocess.mean.dtype)
            inside = torch.zeros_like(corners) if views == 1 else corners
            given = (patches, torch.tensor([1, 0]), inside, corners, flips, light)
            assert torch.equal(preprocess.by_operators(*given), preprocess.by_loop(*given))


def test_a_gpu_without_what_builds_kernels_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    kernels.can_be_built.cache_clear()
    cuda = torch.device("cuda", 0)
    try:
        assert not kernels.fused("graph", cuda)
        assert not kernels.fused("fused", cuda)
    finally:
        kernels.can_be_built.cache_clear()
    assert caplog.text.count("there is no C compiler") == 1
    assert "python3-dev" in caplog.text
    assert not kernels.fused("graph", torch.device("cpu"))


def test_a_run_is_as_deterministic_as_its_own_config_says_not_the_one_before() -> None:
    try:
        for wanted in (True, False):
            connect(load_config([*TINY, "layout.kind=one", f"train.deterministic={wanted}"]))
            assert torch.are_deterministic_algorithms_enabled() == wanted
    finally:
        torch.use_deterministic_algorithms(False)
