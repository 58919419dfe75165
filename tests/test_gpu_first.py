"""The features that steps on a GPU depend on, each by itself in minimal code: if a run or another
test fails, these show which feature is at fault. They are the first part of `make gpu`."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import shared
import torch
import torch.distributed as dist
from conftest import on_ranks
from made import decoded
from shared import SHARED
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.compat import abandon_capture, all_gather_single
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.engines.ddp import _WARM_UP_DDP, TorchEngine
from alexnet_dist.engines.graph import on_stream
from alexnet_dist.engines.make import make_engine
from alexnet_dist.network import concurrent, layers, model
from alexnet_dist.parallel.replicas import sum_bucket, sum_bucket_in_bf16
from alexnet_dist.parallel.topology import Topology, connect

*pytestmark, share_a_gpu = shared.marks
on_a_gpu = pytest.mark.skipif(shared.REHEARSED, reason="a CPU has no graphs")
GRAPHS: list[torch.cuda.CUDAGraph] = []  # of this process


def captured(step: Callable[[], None], warm_up: int = 2, stream: Any = None) -> Callable[[], None]:
    """The step as a graph's replay; on a CPU the step."""
    if not torch.cuda.is_available():
        return step
    stream, graph = stream or torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with on_stream(stream):
        for _ in range(warm_up):
            step()
    capturing = torch.cuda.graph(graph, None, stream, capture_error_mode="thread_local")
    with on_stream(stream), capturing:
        step()
    GRAPHS.append(graph)
    return graph.replay


def one(*more: str) -> Config:
    return load_config(["layout.kind=one", "layout.device=cuda", "train.batch=8", *more])


# --- one process


def numbers(config: Config) -> list[float]:
    topology = connect(config)
    engine, batch = make_engine(config, topology), made_batch(config, topology.device)
    made = [engine.train_step(batch, step, 0.001).tolist() for step in range(3)]
    if config.train.execution == "graph":
        assert isinstance(engine, TorchEngine)
        assert list(engine.graphs) == [False], "the step was not captured"
    return [value for step in made for value in step]


@on_a_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("execution", ["eager", "fused", "graph"])
def test_a_step_of_the_papers_network(execution: str, precision: str) -> None:
    config = one(f"train.execution={execution}", f"train.precision={precision}")
    (found,) = on_ranks(1, numbers, config)
    assert found[3::6] == [0.0] * 3
    assert found[0] == pytest.approx(8 * 6.9, rel=0.1)  # of 1000 classes


def by_streams(config: Config) -> list[list[Tensor]]:
    """What steps make whose columns have streams of their own, and what steps make without."""

    def in_turn(functions: Sequence[Callable[..., Tensor]], columns: Sequence[Any]) -> list[Tensor]:
        return [function(*given) for function, given in zip(functions, columns, strict=True)]

    made = []
    for at_once in (concurrent.at_once, in_turn):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "at_once", at_once)
            patch.setattr(model, "at_once", at_once)
            topology = connect(config)
            engine, batch = make_engine(config, topology), made_batch(config, topology.device)
            steps = [engine.train_step(batch, step, 0.001).cpu() for step in range(3)]
            parameters, optimizer = engine.whole_tensors()
            made.append([*steps, *parameters.values(), *optimizer.values()])
    return made


@on_a_gpu
@pytest.mark.parametrize("execution", ["fused", "graph"])
def test_columns_side_by_side_give_the_bits_of_one_after_another(execution: str) -> None:
    config = one(f"train.execution={execution}", "train.deterministic=true")
    ((ours, expected),) = on_ranks(1, by_streams, config)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def by_windows(config: Config) -> list[list[Tensor]]:
    """What steps make that cut windows from images on the device, captured and not."""
    made = []
    for execution in ("graph", "fused"):
        own = load_config([flat(config), f"train.execution={execution}"])
        topology = connect(own)
        engine = make_engine(own, topology)
        given = decoded(own, topology.device, resident=True)
        steps = [engine.train_step(part, step, 0.001).cpu() for step, part in enumerate(given)]
        assert isinstance(engine, TorchEngine)
        assert list(engine.graphs) == [False] * (execution == "graph")
        made.append([*steps, *engine.whole_tensors()[0].values()])
    return made


@on_a_gpu
def test_a_captured_step_cuts_its_windows_from_resident_images() -> None:
    ((ours, expected),) = on_ranks(1, by_windows, one("train.deterministic=true"))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len({step[0].item() for step in ours[:3]}) == 3


def beside_another_thread(config: Config) -> float:
    """What a replay adds up, captured while another thread pins, allocates, copies and waits."""
    connect(config)
    total, over = torch.zeros(1000, device="cuda"), threading.Event()

    def work() -> None:
        own, kept = torch.cuda.Stream(), list[Tensor]()
        with torch.cuda.stream(own):
            while not over.is_set():
                kept = [*kept[-99:], torch.zeros(2**20).pin_memory().to("cuda", non_blocking=True)]
                own.synchronize()

    def step() -> None:
        for _ in range(200):
            total.add_(torch.ones(1000, device="cuda"))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        replay = captured(step)
    finally:
        over.set()
        thread.join()
    total.zero_()
    replay()
    return total[0].item()


@on_a_gpu
def test_a_capture_beside_a_thread_that_copies() -> None:
    assert on_ranks(1, beside_another_thread, one()) == [200.0]


def timed(config: Config) -> list[float]:
    """ms between a graph's own events after each of two replays."""
    connect(config)
    a, marks = torch.randn(4096, 4096, device="cuda"), list[torch.cuda.Event]()

    def step() -> None:
        marks[:] = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)]
        marks[0].record()
        for _ in range(20):
            a @ a
        marks[1].record()

    replay, found = captured(step), []
    for _ in range(2):
        replay()
        torch.cuda.synchronize()
        found.append(marks[0].elapsed_time(marks[1]))
    return found


@on_a_gpu
def test_events_of_a_graph_tell_time() -> None:
    ((first, second),) = on_ranks(1, timed, one())
    assert 0.01 < first < 1000
    assert 0.01 < second < 1000


def after_a_failure(config: Config) -> tuple[bool, float, int]:
    """Whether a capture of what waits for the device fails; what one after it makes; and bytes that
    stay with tensors that another stream used."""
    device, failed = connect(config).device, False
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    try:
        with on_stream(stream), torch.cuda.graph(
            torch.cuda.CUDAGraph(), pool, stream, capture_error_mode="thread_local"
        ):  # fmt: skip
            torch.ones(10, device=device).sum().item()
    except RuntimeError:
        failed = True
        abandon_capture(device, pool)
    before = torch.cuda.memory_reserved()
    for _ in range(20):
        used = torch.zeros(2**22, device=device)
        with on_stream(stream):
            used.record_stream(stream)
        del used
        torch.cuda.synchronize()
    kept, total = torch.cuda.memory_reserved() - before, torch.zeros((), device=device)

    def step() -> None:
        total.add_(torch.ones((), device=device))

    captured(step)()
    return failed, total.item(), kept


@on_a_gpu
def test_after_a_capture_that_fails_all_goes_on() -> None:
    ((failed, total, kept),) = on_ranks(1, after_a_failure, one())
    assert failed
    assert total == 3  # two steps warm up, and a replay
    assert kept <= 4 * 2**24


def narrow_gradients(config: Config) -> tuple[str, bool, float]:
    """A float32 weight's gradient in a graph: its type, whether it stays where it is, its value."""
    connect(config)
    weight = nn.Parameter(torch.ones(64, 64, device="cuda"))
    weight.grad_dtype = torch.bfloat16
    x = torch.ones(8, 64, device="cuda", dtype=torch.bfloat16)
    places: list[int] = []

    def step() -> None:
        weight.grad = None
        (x @ weight.bfloat16()).sum().backward()
        assert weight.grad is not None
        places.append(weight.grad.data_ptr())

    replay = captured(step)
    x.mul_(2)
    replay()
    assert weight.grad is not None
    return str(weight.grad.dtype), weight.grad.data_ptr() == places[-1], weight.grad[0, 0].item()


@on_a_gpu
def test_narrow_gradients_in_a_graph() -> None:
    assert on_ranks(1, narrow_gradients, one()) == [("torch.bfloat16", True, 16.0)]


def hooked(config: Config) -> tuple[list[float], int]:
    """What hooks as DeepSpeed's see, of a module whose forward and backward are graphs."""
    connect(config)
    linear, seen = nn.Linear(4, 4, bias=False, device="cuda"), list[float]()

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        seen.append(weight.grad[0, 0].item())
        weight.grad = None

    linear.weight.register_post_accumulate_grad_hook(hook)
    graphs: Any = torch.cuda.make_graphed_callables(linear, (torch.ones(2, 4, device="cuda"),))
    while_capturing = len(seen)
    for value in (1.0, 2.0):
        graphs(torch.full((2, 4), value, device="cuda")).sum().backward()
    return seen, while_capturing


@on_a_gpu
def test_hooks_see_the_gradients_of_graphed_callables() -> None:
    assert on_ranks(1, hooked, one()) == [([2.0, 4.0], 0)]


# --- ranks that exchange

EXCHANGES = ("all_reduce", "all_gather", "all_to_all", "all_reduce beside", "ddp", "ddp, bf16")


def step_of(how: str, mine: Tensor, made: Tensor, topology: Topology, stream: Any) -> Any:
    """A step that makes the sum over ranks of what is in `mine`, (2, 64), of one value."""
    group = topology.replica_group
    assert group is not None
    both, swapped = mine.new_empty(4, 64), torch.empty_like(mine)
    with on_stream(stream):
        linear = nn.Linear(64, 64, bias=False, device=mine.device)
        if how.startswith("ddp"):
            network = DistributedDataParallel(
                linear, process_group=group, init_sync=False, gradient_as_bucket_view=True
            )
            network._set_ddp_runtime_logging_sample_rate(2**31 - 1)
            network.register_comm_hook(group, sum_bucket_in_bf16 if "bf16" in how else sum_bucket)

    def step() -> None:
        match how:
            case "all_reduce":
                made.copy_(mine)
                dist.all_reduce(made, group=group)
            case "all_gather":
                all_gather_single(both, mine, group)
                made.copy_(both.view(2, 2, 64).sum(0))
            case "all_to_all":
                dist.all_to_all_single(swapped, mine, group=group)
                made.copy_(swapped.sum(0))
            case "all_reduce beside":  # as DDP's hook
                made.copy_(mine)
                work = dist.all_reduce(made, group=group, async_op=True)
                assert work is not None
                work.get_future().then(lambda done: made.mul_(1)).wait()
            case _:
                linear.weight.grad = None
                (network(mine).sum() / 2).backward()
                assert linear.weight.grad is not None
                made.copy_(linear.weight.grad[:2])

    return step


def exchanged(config: Config, how: str, graph: bool) -> list[list[float]]:
    """Least and largest of what three steps make, each of twice as much; single ones between."""
    topology = connect(config)
    assert topology.replica_group is not None
    mine = torch.full((2, 64), topology.replica + 1.0, device=topology.device)
    made, found = torch.zeros_like(mine), []
    stream = torch.cuda.Stream() if graph and topology.device.type == "cuda" else None
    step = step_of(how, mine, made, topology, stream)
    if graph:
        step = captured(step, _WARM_UP_DDP + 1 if how.startswith("ddp") else 2, stream)
    for _ in range(3):
        step()
        found.append([made.min().item(), made.max().item()])
        between = torch.ones(3, device=topology.device)
        dist.all_reduce(between, group=topology.replica_group)
        assert between.tolist() == [2.0] * 3
        mine.mul_(2)
    for one_graph in GRAPHS:
        one_graph.reset()
    return found


@share_a_gpu
@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("graph", [False, True], ids=["launched", "captured"])
def test_two_ranks_exchange(how: str, graph: bool) -> None:
    config = load_config([*SHARED, "layout.kind=replicas", "layout.ranks=2", "train.batch=8",
                          "train.precision=fp32"])  # fmt: skip
    for found in on_ranks(2, exchanged, config, how, graph):
        assert found == [[3.0, 3.0], [6.0, 6.0], [12.0, 12.0]]


@on_a_gpu
@share_a_gpu
@pytest.mark.parametrize("kind", ["zero1", "zero2"])
def test_deepspeed_takes_steps(kind: str) -> None:
    config = load_config([*SHARED, f"layout.kind={kind}", "layout.ranks=2", "train.batch=8"])
    for found in on_ranks(2, zero_numbers, config):
        assert found == [0.0] * 3


def zero_numbers(config: Config) -> list[float]:
    topology = connect(config)
    engine = make_engine(config, topology)
    batch = made_batch(config, topology.device, samples=4)
    captured = "forward" in vars(engine.model)
    assert captured == (config.layout.kind == "zero1"), "its forward was not captured"
    return [engine.train_step(batch, step, 0.001)[3].item() for step in range(3)]
