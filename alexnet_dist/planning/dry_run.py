"""`plan`: what a run would need, before anything is allocated: parameters, memory, arithmetic,
communication.

The engine runs one step on fake tensors (shapes without values) with torch's fake process group,
as rank 0 of any number of ranks; for a GPU with its fused kernels, which declare the shapes of
their results. ZeRO's figures are formulas, since DeepSpeed does not run on fake tensors.
"""

import dataclasses
import functools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from alexnet_dist.config.load import overridden
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.engines.optimizer import STATE
from alexnet_dist.errors import ConfigError
from alexnet_dist.network import kernels
from alexnet_dist.network.flops import map_values, multiply_adds, training_flops
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import DTYPES, cpu_multiplies
from alexnet_dist.parallel import layouts
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.planning.fake import (
    CountsPasses,
    PlannedEngine,
    PlannedShards,
    fake_decoded,
    fake_topology,
    pretended,
    size_of,
)
from alexnet_dist.planning.machines import Machine
from alexnet_dist.planning.plan import Misfit, Plan, Rank

KINDS = ("one", "columns", "replicas", "columns_x_replicas", "sharded_fc", "zero1", "zero2")

# Memory of a GPU that is not in tensors. cuBLAS takes 32 MiB for each stream from Hopper on, and a
# step runs on two; cuDNN's workspace, and CUDA's context with NCCL's buffers, are estimates.
_LIBRARIES = 3 * 2**25
_CONTEXT = 600_000_000
# What MemTracker's categories are called in a plan.
_PARTS = {
    "Parameter": "parameters",
    "Gradient": "gradients",
    "Optstate": "optimizer",
    "Activation": "activations",
    "Temp": "temporary",
    "Other": "buckets",
}
_ZERO_BUCKET = 2**24  # elements of a bucket, as in engines/zero.py
_STATS_BYTES = 48  # of a step's `StepStats`


def plan(config: Config, ranks: int, gpu: bool = False) -> Plan:
    """Plan a config on a number of ranks, for every layout, its own among them.

    A layout that cannot have so many ranks is a `Misfit`, but for `one`, which always has one.

    Args:
        gpu: whether each rank has a GPU; else they share a CPU.
    """
    with pretended(ranks), FakeTensorMode(allow_non_fake_inputs=True):
        whole = AlexNet(config.model, init_weights=False)
        counted = multiply_adds(whole)
        forward = {layer.name: 2 * macs for layer, macs in counted.items()}
        values = map_values(counted)
        kinds = dict.fromkeys((*KINDS, config.layout.kind))  # the config's may be a user's own
        planned = {kind: _rank(config, kind, ranks, gpu) for kind in kinds}
        if ranks > 1:
            planned["one"] = _whole_batch(config, ranks, gpu)
        return Plan(
            recipe=flat(config),
            layout=config.layout.kind,
            ranks=ranks,
            batch=config.train.batch,
            parameters={
                layer.name: layer.weight.numel() + layer.bias.numel() for layer in whole.layers()
            },
            forward_flops_per_image=forward,
            training_flops_per_image=training_flops(config),
            map_values_per_image={
                "all": sum(values.values()),
                "normalised": sum(values[name] for name in config.model.lrn.layers),
            },
            layouts=planned,
        )


def plan_on(config: Config, ranks: int, machine: Machine) -> Plan:
    """Plan for ranks on devices of this kind."""
    if machine.overlap and not machine.fused:
        config = overridden(config, "train.execution=eager")
    return plan(config, ranks, gpu=machine.overlap)


@functools.cache
def needed(config: Config, ranks: int) -> int:
    """Return the bytes of GPU memory that the tensors of a rank take at their peak, other than
    images that it keeps there; raises ConfigError if the layout cannot have so many ranks."""
    layouts.check(config, ranks)
    with pretended(ranks), FakeTensorMode(allow_non_fake_inputs=True):
        rank = _rank(config, config.layout.kind, ranks, gpu=True)
    assert isinstance(rank, Rank)
    return rank.memory["peak"]


def gpu_memory(rank: Rank) -> int:
    """Return the bytes of GPU memory that a rank needs: its tensors, and CUDA's context."""
    return rank.memory["peak"] + _CONTEXT


def _rank(config: Config, kind: str, ranks: int, gpu: bool, narrows: bool = True) -> Rank | Misfit:
    """Return parameters, memory and traffic of a rank in one layout, or why it cannot be.

    Args:
        narrows: whether the update keeps copies of the weights in the computing dtype.
    """
    try:
        laid_out = overridden(config, f"layout.kind={kind}", f"layout.ranks={ranks}")
        if wrong := layouts.misfit(laid_out, ranks):
            return Misfit(f"takes {'; '.join(wrong)}")
        layouts.check(laid_out, ranks)
    except ConfigError as error:
        return Misfit(str(error).removeprefix("the command line: "))  # which named no such layout
    if kind in layouts.ZERO_STAGES:
        return _zero_rank(laid_out, ranks, gpu)
    return _stepped(laid_out, ranks, gpu, narrows or not gpu)


@functools.lru_cache  # ZeRO's ranks compute as replicas do
def _stepped(laid_out: Config, ranks: int, gpu: bool, narrows: bool) -> Rank:
    """Return what a step of a rank's engine, on fake tensors, takes and sends.

    Args:
        narrows: as for `_rank`.
    """
    # The engine, as it would be on a rank, and one batch.
    topology = fake_topology(laid_out, ranks)
    fuses = gpu and "Triton" not in kernels.lacking()  # without it, its kernels declare no shapes
    how = laid_out.train.execution if fuses else "eager"
    engine_of = PlannedShards if laid_out.layout.kind == "sharded_fc" else PlannedEngine
    engine = engine_of(laid_out, topology, init_weights=False)
    if how != "eager":
        engine.fuse(narrows)
    engine.memory = memory = MemTracker()
    traffic, passes = Traffic(), CountsPasses()
    part, counts = fake_decoded(laid_out, topology)
    with traffic:
        joined = part.joined(counts, topology.column_group)
    ready = joined.batch()
    batch = [*ready.changing().values()]
    narrow = list((engine.optimizer.narrow or {}).values())

    # One step of it, counted.
    memory.track_external(
        engine.model, engine.optimizer.optimizer, *engine.buckets, *narrow, *batch
    )
    with memory, traffic, passes:
        engine.train_step(ready, 0, 0.01)

    # The memory at its peak, by part.
    peak = memory.get_tracker_snapshot("peak")[torch.device("cpu")]
    parts = {_PARTS[name]: size for name, size in peak.items() if name in _PARTS}
    parts["windows"] = size_of(batch)
    # What was tracked besides the model and its optimiser counts as Other: here, as buckets.
    parts["buckets"] -= parts["windows"] + size_of(narrow)
    if gpu:
        parts |= {"narrow copies": size_of(narrow), "workspace": _LIBRARIES}
        if how == "graph":  # what `CapturedStep` keeps besides
            parts["graph's batch"] = size_of([*joined.changing().values()])
            parts["undone by warm-up"] = size_of(engine.optimizer.state_tensors())
    else:
        parts["workspace"] = _cpu_workspace(engine.model, DTYPES[laid_out.train.precision])
    return Rank(
        batch_per_replica=laid_out.train.batch // topology.replicas,
        parameters=sum(p.numel() for p in engine.model.parameters()),
        memory=_with_peak(parts),
        bytes=traffic.bytes() | {"total": traffic.total()},
        calls={name: traffic.calls[name] for name in traffic.bytes()},
        execution=how,
        passes=None if how == "eager" else passes.found(),
    )


def _cpu_workspace(model: AlexNet, dtype: torch.dtype) -> int:
    """Return the bytes that a CPU's libraries take besides tensors. Measured rather than derived:
    oneDNN and MKL pack the largest weights, one to three times depending on the CPU.

    Args:
        dtype: what the network computes in.
    """
    weights = [p.numel() * p.element_size() for p in model.parameters()]
    widened = dtype.itemsize == 2 and not cpu_multiplies(dtype)  # to float32, which autograd keeps
    return 2 * max(weights) + (sum(weights) if widened else 0)


def _with_peak(parts: dict[str, int]) -> dict[str, int]:
    """Return the parts of memory with "peak", their sum."""
    return parts | {"peak": sum(parts.values())}


def _whole_batch(config: Config, ranks: int, gpu: bool) -> Rank:
    """Return the whole batch on one device. A large batch on a CPU is planned as one rank's share,
    and scaled up."""
    share, times = config.train.batch // ranks, 1
    divides = config.train.batch % (ranks * config.train.micro_batches) == 0
    if config.train.batch > 512 and divides and not gpu:
        config, times = overridden(config, f"train.batch={share}"), ranks
    rank = _rank(config, "one", 1, gpu)
    assert isinstance(rank, Rank)
    memory = {name: size for name, size in rank.memory.items() if name != "peak"}
    for name in ("activations", "temporary", "windows"):
        memory[name] = memory.get(name, 0) * times
    batch = rank.batch_per_replica * times
    return dataclasses.replace(rank, batch_per_replica=batch, memory=_with_peak(memory))


def _zero_rank(config: Config, ranks: int, gpu: bool) -> Rank:
    """Return ZeRO's figures: gradients are all-reduced (at stage 2 after every micro-batch),
    updated weights all-gathered; weights and biases are each padded to equal pieces per rank."""
    layers = AlexNet(config.model, init_weights=False).layers()
    sizes = [
        sum(layer.get_parameter(kind).numel() for layer in layers) for kind in ("weight", "bias")
    ]
    padded = sum(-(-size // (2 * ranks)) * 2 * ranks for size in sizes)
    rounds = config.train.micro_batches if config.layout.kind == "zero2" else 1
    width = 2 if config.layout.compress_gradients else 4
    share = ranks - 1
    beside_weights = sum(kind != "step" for kind in STATE[config.optimizer.kind])
    sent = {
        "all-reduce": round(2 * (rounds * width * sum(sizes) + _STATS_BYTES) * share / ranks),
        "all-gather": 4 * padded * share // ranks,
    }
    replica = _rank(config, "replicas", ranks, gpu, narrows=False)
    assert isinstance(replica, Rank)
    names = ("activations", "temporary", "windows", "workspace")
    memory = {name: replica.memory[name] for name in names} | {
        "parameters": 4 * padded,
        "gradients": 4 * padded,  # complete until they are reduced, at stage 2 too
        "optimizer": 4 * padded // ranks * (1 + beside_weights),
    }
    return Rank(
        batch_per_replica=config.train.batch // ranks,
        parameters=sum(sizes),
        memory=_with_peak(memory),
        bytes=sent | {"total": sum(sent.values())},
        calls={name: rounds * -(-sum(sizes) // _ZERO_BUCKET) for name in sent},
        execution=replica.execution,
        passes=replica.passes,
    )
