"""What a run would take, before anything is allocated: parameters, memory, arithmetic, traffic.

The engine runs one step on fake tensors (shapes without values) and torch's fake process group,
as rank 0 of any number of ranks; of a GPU with its fused kernels, which know the shapes of what
they make. ZeRO's figures are formulas: DeepSpeed does not run on those.
"""

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # gives the collectives fake results
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.data.batch import Batch, Decoded
from alexnet_dist.engines.ddp import TorchEngine
from alexnet_dist.engines.optimizer import Optimizer
from alexnet_dist.engines.sharded_fc import ShardedFcEngine
from alexnet_dist.errors import ConfigError
from alexnet_dist.network import kernels
from alexnet_dist.network.flops import multiply_adds
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import DTYPES
from alexnet_dist.parallel import layouts
from alexnet_dist.parallel.replicas import summed
from alexnet_dist.parallel.topology import Topology
from alexnet_dist.parallel.traffic import Traffic
from alexnet_dist.planning.machines import Machine
from alexnet_dist.planning.plan import Misfit, Passes, Plan, Rank

KINDS = ("one", "columns", "replicas", "columns_x_replicas", "sharded_fc", "zero1", "zero2")


# Of a GPU, beside tensors. cuBLAS takes 32 MiB for each stream from Hopper on, two of which steps
# run on; what cuDNN takes, and CUDA's context with NCCL's buffers, are estimates.
_LIBRARIES = 3 * 2**25
_CONTEXT = 600_000_000


def plan(config: Config, ranks: int, gpu: bool = False) -> Plan:
    """The plan of a config on this many ranks, for every layout: its own among them.

    A layout that does not lie on them has its `problem` instead.

    Args:
        gpu: each rank has a GPU; else they are a CPU's.
    """
    with _pretended(ranks), FakeTensorMode(allow_non_fake_inputs=True):
        whole = AlexNet(config.model, drawn=False)
        counted = multiply_adds(whole)
        forward = {layer.name: 2 * macs for layer, macs in counted.items()}
        values = {
            layer.name: macs // layer.weight.numel() * len(layer.weight)
            for layer, macs in counted.items()
        }
        kinds = dict.fromkeys((*KINDS, config.layout.kind))  # one of your own too
        beside = {kind: _on(config, kind, ranks, gpu) for kind in kinds}
        one = beside["one"]
        return Plan(
            recipe=flat(config),
            layout=config.layout.kind,
            ranks=ranks,
            batch=config.train.batch,
            parameters={
                layer.name: layer.weight.numel() + layer.bias.numel() for layer in whole.layers()
            },
            forward_flops_per_image=forward,
            # Backward: as much for the weights, and again for what a layer saw, but the image.
            training_flops_per_image=3 * sum(forward.values()) - forward["conv1"],
            map_values_per_image={
                "all": sum(values.values()),
                "normalised": sum(values[name] for name in config.model.lrn.layers),
            },
            layouts=beside,
            alone=one if isinstance(one, Rank) else _alone(config, ranks, gpu),
        )


def plan_on(config: Config, ranks: int, machine: Machine | None) -> Plan:
    """The plan of ranks on such devices; None: on a CPU's cores."""
    gpu = machine is not None and machine.overlap
    if machine and gpu and not machine.fused:
        config = load_config([flat(config), "train.execution=eager"])
    return plan(config, ranks, gpu)


def needed(config: Config, ranks: int) -> int:
    """Bytes of a GPU's memory that the tensors of a rank of the config's layout take at their peak,
    beside images that it keeps there; raises ConfigError where the layout does not lie on this many
    ranks."""
    layouts.check(config, ranks)
    with _pretended(ranks), FakeTensorMode(allow_non_fake_inputs=True):
        found = _on(config, config.layout.kind, ranks, gpu=True)
    assert isinstance(found, Rank)
    return found.memory["peak"]


def needed_of(rank: Rank) -> int:
    """Bytes of a GPU that a rank planned for one needs: tensors, and what libraries take."""
    return rank.memory["peak"] + _CONTEXT


def execution(config: Config, ranks: int, gpu: bool) -> str:
    """How a GPU is given a step of these ranks, by train.execution; a CPU knows `eager` alone."""
    if not gpu or "Triton" in kernels.lacking():  # whose shapes nothing else knows
        return "eager"
    return config.train.execution


def _on(config: Config, kind: str, ranks: int, gpu: bool, narrows: bool = True) -> Rank | Misfit:
    """Parameters, memory and traffic of a rank on one layout, or why it cannot be.

    Args:
        narrows: the update keeps narrow copies of the weights.
    """
    try:
        laid_out = load_config([flat(config), f"layout.kind={kind}", f"layout.ranks={ranks}"])
        if wrong := layouts.misfit(laid_out, ranks):
            takes, fitting = wrong
            return Misfit(f"takes {takes}: on {ranks} fit {', '.join(fitting)}")
        layouts.check(laid_out, ranks)
    except ConfigError as error:
        return Misfit(str(error))
    if kind in layouts.ZERO_STAGES:
        return _zero(laid_out, ranks, gpu)
    topology, how = _topology(laid_out, ranks), execution(laid_out, ranks, gpu)
    kind_of = _PlannedShards if kind == "sharded_fc" else _PlannedEngine
    engine = kind_of(laid_out, topology, drawn=False)
    if how != "eager":
        engine.fuse(narrows)
    copies = list((engine.optimizer.narrow or {}).values())
    part, counts = _decoded(laid_out, topology)
    engine.memory = memory = MemTracker()
    traffic, passes = Traffic(), _Passes()
    with traffic:
        batch = part.joined(counts, topology.column_group)
    given = [getattr(batch, field.name) for field in dataclasses.fields(Batch)]
    memory.track_external(
        engine.model, engine.optimizer.optimizer, *engine.buckets, *copies, *given
    )
    with memory, traffic, passes:
        engine.train_step(batch, 0, 0.01)
    peak = memory.get_tracker_snapshot("peak")[torch.device("cpu")]
    parts = {_PARTS[name]: size for name, size in peak.items() if name in _PARTS}
    parts["windows"] = _size(given)
    parts["buckets"] -= parts["windows"] + _size(copies)
    if gpu:
        parts |= {"narrow copies": _size(copies), "workspace": _LIBRARIES}
        if how == "graph":  # as `CapturedStep` keeps them
            parts["graph's batch"] = _size(given)
            parts["undone by warm-up"] = _size(engine.optimizer.state_tensors())
    else:
        # Not derived but measured: oneDNN and MKL pack the largest weights, by CPU one to three
        # times.
        weights = [p.numel() * p.element_size() for p in engine.model.parameters()]
        parts["workspace"] = 2 * max(weights)
    return Rank(
        batch_per_replica=config.train.batch // topology.replicas,
        parameters=sum(p.numel() for p in engine.model.parameters()),
        memory=_with_peak(parts),
        bytes=traffic.bytes() | {"total": traffic.total()},
        calls={name: traffic.calls[name] for name in traffic.bytes()},
        execution=how,
        passes=None if how == "eager" else passes.found(),
    )


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _with_peak(parts: dict[str, int]) -> dict[str, int]:
    return parts | {"peak": sum(parts.values())}


class _Passes(TorchDispatchMode):
    """Counts what passes over memory: all that is neither a view nor a convolution or product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maps = self.parameters = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name
        space, _, own = name.partition("::")
        if (
            space in ("aten", "alexnet_dist") and isinstance(func, OpOverload)
            and not func.is_view and "empty" not in own
        ):  # fmt: skip
            seen = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            given = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
            if own in _PRODUCTS:
                self.kernels += len(given)  # gradients of inputs and of weights are two
            elif seen or given:
                self.kernels += 1
                changed = given or [
                    t for t, of in zip(args, func._schema.arguments, strict=False)
                    if isinstance(t, Tensor) and of.alias_info and of.alias_info.is_write
                ]  # fmt: skip
                if own in _OF_PARAMETERS:
                    self.parameters += _size(seen) + _size(changed)
                else:
                    self.maps += _size(seen) + _size(changed)
        return made

    def found(self) -> Passes:
        return Passes(self.maps, self.parameters, self.kernels)


_PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm")
_OF_PARAMETERS = ("sgd_update", "_fused_sgd_", "_fused_adam_", "_foreach_norm")


def _alone(config: Config, ranks: int, gpu: bool) -> Rank:
    """All of the batch on one device; on a CPU, of a large one a rank's share is planned and scaled
    up."""
    share, times = config.train.batch // ranks, 1
    divides = config.train.batch % (ranks * config.train.micro_batches) == 0
    if config.train.batch > 512 and divides and not gpu:
        config, times = load_config([flat(config), f"train.batch={share}"]), ranks
    found = _on(config, "one", 1, gpu)
    assert isinstance(found, Rank)
    memory = {name: size for name, size in found.memory.items() if name != "peak"}
    for name in ("activations", "temporary", "windows"):
        memory[name] = memory.get(name, 0) * times
    batch = found.batch_per_replica * times
    return dataclasses.replace(found, batch_per_replica=batch, memory=_with_peak(memory))


_PARTS = {
    "Parameter": "parameters",
    "Gradient": "gradients",
    "Optstate": "optimizer",
    "Activation": "activations",
    "Temp": "temporary",
    "Other": "buckets",
}


class _PlannedEngine(TorchEngine):
    """DDP does not run on fake tensors: here each gradient lies in a bucket of its own, and is
    summed as soon as it is whole. Bytes and memory are DDP's."""

    buckets: tuple[Tensor, ...] = ()
    memory: MemTracker | None = None

    def fuse(self, narrows: bool) -> None:
        """Go on by a GPU's kernels, as the engine does where there is one."""
        self.fused, copies = True, self._narrowed()
        if not narrows:  # ZeRO's engine keeps none
            copies = {}
            for layer in self.model.layers():
                layer.narrow = None
        named = self.model.named_parameters()
        narrow = copies if narrows else None
        self.optimizer = Optimizer(self.config.optimizer, named, self.whole_sums, narrow)

    def replicate(self, group: dist.ProcessGroup) -> nn.Module:
        compress = self.config.layout.compress_gradients

        def sum_up(parameter: Tensor) -> None:
            if self._last and parameter.grad is not None:
                summed(parameter.grad.bfloat16() if compress else parameter.grad, group)

        for name, parameter in self.model.named_parameters():
            if self.split_over(name) is not group:
                parameter.grad = torch.zeros_like(parameter)
                self.buckets += (parameter.grad,)
                parameter.register_post_accumulate_grad_hook(sum_up)
        return self.model

    def summing(self, now: bool) -> AbstractContextManager[object]:
        self._last = now
        if self.memory:  # it follows one forward of a module at a time
            self.memory.reset_mod_stats()
        return contextlib.nullcontext()


class _PlannedShards(_PlannedEngine, ShardedFcEngine):
    """The same of sharded fully-connected layers."""


def _zero(config: Config, ranks: int, gpu: bool) -> Rank:
    """DeepSpeed's stages: gradients all-reduced (at stage 2 after every micro-batch), updated
    weights gathered; weights and biases each padded to an even piece a rank."""
    layers = AlexNet(config.model, drawn=False).layers()
    sizes = [sum(layer.get_parameter(kind).numel() for layer in layers) for kind in _KINDS]
    padded = sum(-(-size // (2 * ranks)) * 2 * ranks for size in sizes)
    rounds = config.train.micro_batches if config.layout.kind == "zero2" else 1
    width = 2 if config.layout.compress_gradients else 4
    share = ranks - 1
    sent = {
        "all-reduce": round(2 * (rounds * width * sum(sizes) + _STATS) * share / ranks),
        "all-gather": 4 * padded * share // ranks,
    }
    replica = _on(config, "replicas", ranks, gpu, narrows=False)
    assert isinstance(replica, Rank)
    names = ("activations", "temporary", "windows", "workspace")
    memory = {name: replica.memory[name] for name in names} | {
        "parameters": 4 * padded,
        "gradients": 4 * padded,  # whole until they are reduced, at stage 2 too
        "optimizer": 4 * padded // ranks * (1 + _STATES[config.optimizer.kind]),
    }
    return Rank(
        batch_per_replica=config.train.batch // ranks,
        parameters=sum(sizes),
        memory=_with_peak(memory),
        bytes=sent | {"total": sum(sent.values())},
        calls={name: rounds * -(-sum(sizes) // _BUCKET) for name in sent},
        execution=replica.execution,
        passes=replica.passes,
    )


_BUCKET = 2**24  # elements, as zero.py sets it
_KINDS, _STATES, _STATS = ("weight", "bias"), {"sgd": 1, "adam": 2}, 48


def lines(planned: Plan) -> list[str]:
    """A plan as text."""
    layers, flops = planned.parameters, planned.forward_flops_per_image
    text = [f"{'layer':8}{'parameters':>12}{'forward MFLOP/image':>21}"]
    text += [f"{name:8}{layers[name]:12,}{flops[name] / 1e6:21,.1f}" for name in layers]
    text += [
        f"{'all':8}{sum(layers.values()):12,}{sum(flops.values()) / 1e6:21,.1f}",
        f"training: {planned.training_flops_per_image / 1e9:.2f} GFLOP an image, "
        f"{planned.training_flops_per_image * planned.batch / 1e12:.2f} TFLOP a step",
        "",
        f"on {planned.ranks} rank(s), a batch of {planned.batch} in all; of a rank, a step:",
        f"{'':20}{'batch':>6}{'parameters':>12}{'memory, peak':>14}{'bytes sent':>17}",
    ]
    for kind, found in planned.layouts.items():
        if isinstance(found, Misfit):
            text.append(f"{kind:20}{found.problem}")
            continue
        sent = [f"{name} {size / 1e6:,.1f}" for name, size in found.bytes.items()]
        text.append(
            f"{kind:20}{found.batch_per_replica:6}{found.parameters:12,}"
            f"{found.memory['peak'] / 1e6:11,.0f} MB"
            f"{found.bytes.get('total', 0):17,}  ({', '.join(sent[:-1]) or 'nothing'}; MB)"
        )
    own = planned.layouts[planned.layout]
    if isinstance(own, Misfit):
        return text
    text += ["", f"memory of a rank of {planned.layout}, MB at its peak:"]
    text += [f"  {name:18}{size / 1e6:10,.1f}" for name, size in own.memory.items()]
    return text


@contextlib.contextmanager
def _pretended(ranks: int) -> Any:
    """A world of this many ranks of which this process is the first, and that says nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _topology(config: Config, ranks: int) -> Topology:
    columns = layouts.columns_of(config)

    def group(members: range) -> Any:
        return dist.new_group(list(members), backend="fake") if len(members) > 1 else None

    return Topology(
        world_size=ranks,
        columns=columns,
        column_group=group(range(columns)),
        replica_group=group(range(0, ranks, columns)),
    )


def _decoded(config: Config, topology: Topology) -> tuple[Decoded, list[int]]:
    """What rank 0 decodes of a step, and how many samples each column rank does."""
    counts = [len(slots) for slots in topology.shares(range(config.train.batch))]
    side, dtype = config.model.crop, DTYPES[config.train.precision]

    def finish(patches: Tensor, *drawn: Tensor) -> Tensor:
        windows = torch.empty(len(patches), 3, side, side, dtype=dtype)
        return windows.contiguous(memory_format=torch.channels_last)

    patches = torch.empty(counts[0], side, side, 3, dtype=torch.uint8)
    facts = torch.empty(counts[0], 9, dtype=torch.float64)  # of one window
    return Decoded(patches, facts, finish), counts
