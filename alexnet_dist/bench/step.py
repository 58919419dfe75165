"""How fast a training step is, beside the same network as it is usually written, and beside
torchvision's alexnet in each form that its users run."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.bench import in_turn, machine, median, ratio
from alexnet_dist.bench.contestants import Contestant, Work
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.engines.base import AT
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError
from alexnet_dist.network.flops import multiply_adds
from alexnet_dist.network.lrn import alpha_of
from alexnet_dist.network.model import AlexNet, final_side
from alexnet_dist.network.precision import allow_tf32
from alexnet_dist.parallel.device import gpus, peak_flops
from alexnet_dist.parallel.topology import connect
from alexnet_dist.planning.dry_run import plan

log = logging.getLogger(__name__)
_TRAINING = 3  # of a forward's: the gradients of inputs and of weights cost as much again


class Eager(nn.Module):
    """The config's network as most PyTorch code has it: nn.LocalResponseNorm, nn.Dropout."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.model, lrn = model, model.lrn
        if len(model.conv) != 5:
            raise ConfigError(f"model.conv={list(model.conv)}: bench step has five layers in mind")
        c1, c2, c3, c4, c5 = model.conv
        shapes = ((3, c1, 11, 4, 0), (c1, c2, 5, 1, 2), (c2, c3, 3, 1, 1), (c3, c4, 3, 1, 1),
                  (c4, c5, 3, 1, 1))  # fmt: skip
        alone = [n > 1 and f"conv{n}" not in model.exchange for n in range(1, 6)]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, k, s, p, groups=model.columns if own else 1)
            for (i, o, k, s, p), own in zip(shapes, alone, strict=True)
        )
        self.norms: dict[str, nn.Module] = {  # torch divides α by n itself
            name: nn.LocalResponseNorm(lrn.size, alpha_of(lrn, name) * lrn.size, lrn.beta, lrn.k)
            for name in lrn.layers
        }
        self.pool = nn.MaxPool2d(model.pool[0], model.pool[1])
        widths = (c5 * final_side(model) ** 2, *model.fc, model.classes)
        self.fcs = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor) -> Tensor:
        for number, conv in enumerate(self.convs, start=1):
            x = F.relu(conv(x))
            if f"conv{number}" in self.model.lrn.layers:  # never across columns
                n, channels, h, w = x.shape
                columns = x.reshape(n * self.model.columns, -1, h, w)
                x = self.norms[f"conv{number}"](columns).reshape(n, channels, h, w)
            if number in (1, 2, 5):
                x = self.pool(x)
        x = x.flatten(1)
        for number, fc in enumerate(self.fcs):
            x = self.dropout(F.relu(fc(x))) if number < 2 else fc(x)
        return x

    def take(self, weights: dict[str, Tensor]) -> None:
        """Our network's parameters, so that both compute the same."""
        layers = [*self.convs, *self.fcs]
        names = [f"conv{n}" for n in range(1, 6)] + ["fc6", "fc7", "fc8"]
        with torch.no_grad():
            for layer, name in zip(layers, names, strict=True):
                layer.weight.copy_(weights[f"{name}.weight"])
                layer.bias.copy_(weights[f"{name}.bias"])


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if gpus(config) else "cpu")


def plain(network: nn.Module, config: Config, form: list[str]) -> Work:
    """A training loop as most write it.

    Args:
        form: `fp32`, by torch's defaults, with `no TF32` or without; or `bf16`: autocast,
            channels_last, cuDNN's benchmark and fused SGD, with `compiled` and `graph` or without.
    """
    device, narrow = _device(config), "bf16" in form
    layout = torch.channels_last if narrow else torch.contiguous_format
    batch = made_batch(config, device, torch.float32)
    windows, labels = batch.windows.contiguous(memory_format=layout), batch.labels
    network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    torch.backends.cudnn.benchmark = narrow
    if "no TF32" in form:
        allow_tf32("fp32")
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-4, momentum=0.9, weight_decay=config.optimizer.weight_decay,
        fused=narrow or None,
    )  # fmt: skip
    run = torch.compile(network) if "compiled" in form else network

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            loss = F.cross_entropy(run(windows), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return graphed(step) if "graph" in form else step


def graphed(step: Callable[[], Tensor]) -> Work:
    """The step as a CUDA graph, captured when it is first called, after some steps on another
    stream: those allocate what a capture cannot."""
    replay: Callable[[], None] | None = None
    loss = torch.zeros(())

    def replayed() -> Tensor:
        nonlocal replay, loss
        if replay is None:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_BEFORE_CAPTURE):
                    step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
            replay = graph.replay
        replay()
        return loss

    return replayed


def _ours(config: Config) -> Work:
    topology = connect(config)
    engine, batch = make_engine(config, topology), None

    def step() -> Tensor:
        nonlocal batch
        batch = batch or made_batch(config, topology.device)
        return engine.train_step(batch, 0, 1e-4)[AT.loss] / config.train.batch

    return step


def _product(config: Config, precision: str) -> Work:
    device, narrow = _device(config), precision == "bf16"
    side = 8192 if device.type == "cuda" else 4096 if narrow else 2048
    dtype = torch.bfloat16 if narrow else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> float:
        a @ b
        return 2.0 * side**3  # its FLOP, in the loss's place

    return product


def contestant(name: str, config: Config) -> Work:
    """A step of what a row of the table names; it gives the loss, nats a sample."""
    who, *form = name.split(", ")
    match who:
        case "ours":
            how = ["model.lrn.layers=[]"] if "no LRN" in form else []
            return _ours(load_config([flat(config), f"train.precision={form[0]}", *how]))
        case "matrix product":
            return _product(config, form[0])
        case "eager":
            network = Eager(config)
            network.take(dict(AlexNet(config.model, config.seed).named_parameters()))
            return plain(network, config, form)
        case "torchvision's alexnet":
            from torchvision.models import alexnet

            return plain(alexnet(num_classes=config.model.classes), config, form)
    raise ValueError(name)


_BEFORE_CAPTURE = 5
_LOSSES = ("ours, bf16", "ours, fp32", "eager, fp32")
_OURS, _NO_LRN, _PRODUCT = "ours, bf16", "ours, bf16, no LRN", "matrix product, bf16"
_TORCHVISION = "torchvision's alexnet"
_CONTESTANTS = (*_LOSSES, _NO_LRN, f"{_TORCHVISION}, fp32", _PRODUCT, "matrix product, fp32")
_FORMS = ("fp32, no TF32", "bf16", "bf16, compiled", "bf16, compiled, graph")
_BEST = f"{_TORCHVISION}, {_FORMS[-1]}"  # that a user has
_ON_A_GPU = ("ours, tf32", *(f"{who}, {how}" for who in ("eager", _TORCHVISION) for how in _FORMS))


def bench_step(config: Config, repeats: int, batches: Sequence[int] = ()) -> dict[str, Any]:
    """Training steps of the config's network on one process, on a GPU where there is one, and of
    its references.

    Args:
        batches: in train.batch's place; at those after the first, what the first is scaled by.

    Returns:
        ratios (medians of pairs; of speeds, where they do not say otherwise), ceilings, machine,
        the loss of each one's first step without dropout (equal work), and every pass's seconds a
        step.
    """
    first, *others = [load_config([flat(config), f"train.batch={n}"])
                      for n in batches or (config.train.batch,)]  # fmt: skip
    gpu = _device(config).type == "cuda"
    found: dict[str, Any] = {"losses": first_losses(first)}
    found |= _timed(first, repeats, (*_CONTESTANTS, *(_ON_A_GPU if gpu else ())))
    for other in others:
        more = _timed(other, repeats, (_OURS, _NO_LRN, _PRODUCT, *((_BEST,) if gpu else ())))
        at = f", batch {other.train.batch}"
        for part in ("ratios", "ceilings"):
            found[part] |= {name + at: value for name, value in more[part].items()}
        for run, beside in zip(found["runs"], more["runs"], strict=True):
            run |= {name + at: seconds for name, seconds in beside.items()}
    return found | {"machine": machine(config.data.workers), "unit": "seconds a step"}


def _timed(config: Config, repeats: int, names: Sequence[str]) -> dict[str, Any]:
    """Ratios, ceilings and runs of these contestants."""
    # As many images a pass at any batch, so that a pass on a GPU is half a second.
    pieces = max(5, 50 * 128 // config.train.batch) if _device(config).type == "cuda" else 2
    contestants = {name: _made(name, config, pieces) for name in names}
    try:
        for name in names:
            try:
                contestants[name]()
            except ConfigError as error:  # a reference that this torch cannot run on this GPU
                if name.startswith("ours") or name not in _ON_A_GPU:
                    raise
                log.warning(f"{error}: left out")
                contestants.pop(name).close()
        runs = in_turn(dict(contestants), repeats)
        flop = {n: one.given[0] for n, one in contestants.items() if n.startswith("matrix")}
    finally:
        for contestant in contestants.values():
            contestant.close()

    macs = multiply_adds(AlexNet(config.model, drawn=False))
    work = _TRAINING * 2 * sum(macs.values()) * config.train.batch
    rates = {name: [flop[name] / run[name] for run in runs] for name in flop}
    pairs = (  # ours, and beside what
        (_OURS, "eager, fp32"), ("ours, fp32", "eager, fp32"), (_OURS, f"{_TORCHVISION}, fp32"),
        ("ours, fp32", "eager, fp32, no TF32"), ("ours, tf32", "eager, fp32"),
        (_OURS, f"eager, {_FORMS[-1]}"), (_OURS, _BEST),
    )  # fmt: skip
    ratios = {f"{a} / {b}": ratio(runs, b, a) for a, b in pairs if {a, b} <= {*runs[0]}}
    ratios["ours, bf16 / the same without LRN"] = ratio(runs, _NO_LRN, _OURS)
    if _BEST in runs[0]:
        ratios[f"{_OURS} / {_BEST}, by seconds"] = ratio(runs, _OURS, _BEST)
    ratios["ours, bf16 / bf16 matrix product, by FLOP"] = median(
        work / run[_OURS] / rate for run, rate in zip(runs, rates[_PRODUCT], strict=True)
    )
    if _device(config).type == "cuda":
        if peak := peak_flops(torch.cuda.get_device_name()):
            ratios["ours, bf16 / data sheet, by FLOP (MFU)"] = median(
                work / run[_OURS] / peak for run in runs
            )
        planned = plan(load_config([flat(config), "train.precision=bf16"]), 1, gpu=True)
        memory = planned.of("one").memory["peak"]
        ratios["ours, bf16, peak memory / planned"] = contestants[_OURS].peak / memory
    decodes = median(config.train.batch / run[_OURS] for run in runs)
    return {
        "ratios": ratios,
        "ceilings": {f"{n}, GFLOP/s": median(rate) / 1e9 for n, rate in rates.items()}
        | {f"images/s to decode for {_OURS}": decodes},
        "runs": runs,
    }


def first_losses(config: Config) -> dict[str, float]:
    """Of a first step without dropout: what must be equal, for the same work to be timed."""
    without = load_config([flat(config), "model.dropout=0"])
    contestants = [_made(name, without, pieces=1) for name in _LOSSES]
    try:
        for one in contestants:
            one()
        return {one.name: one.given[0] for one in contestants}
    finally:
        for one in contestants:
            one.close()


def _made(name: str, config: Config, pieces: int) -> Contestant:
    return Contestant("step", name, config, pieces, plain=not name.startswith("ours"))


# What a GPU's kernel or a CPU's operator belongs to: the first whose pattern its name has.
_GROUPS = {
    "communication": {"cuda": r"(?i)nccl", "cpu": r"c10d::|gloo:"},
    "copies": {
        "cuda": r"(?i)^mem(cpy|set)|copy|nchwToNhwc|nhwcToNchw|CatArray|FillFunctor",
        "cpu": r"::(_to_)?copy_?$|::cat$|::fill_$|::zero_$|::clone$|::contiguous$|mkldnn_reorder",
    },
    "update": {"cuda": r"\bsgd_kernel|FusedSgd|FusedAdam", "cpu": r"::_fused_(sgd|adam)"},
    "convolutions": {"cuda": r"fprop|dgrad|wgrad|convolve|(?i:conv2d)", "cpu": r"convolution"},
    "products": {
        "cuda": r"gemm|gemv|xmma|cutlass|nvjet|splitK",
        "cpu": r"::(add)?mm$|::bmm$|linear",
    },
    "passes over maps and units": {
        "cuda": r"\b((pooled|maps|units|scores)(_backward)?|ranks|counts|fold|masks|windows)"
        r"_kernel",
        "cpu": r"^alexnet_dist::|LocalResponseNorm|relu|clamp_min|threshold_backward|max_pool|nll_|"
        r"softmax",
    },
}
_ARITHMETIC = ("convolutions", "products")


def grouped(
    kernels: Sequence[tuple[str, float, float]], kind: str, elapsed: float
) -> dict[str, Any]:
    """What the kernels of a step add up to.

    Args:
        kernels: of each name: µs and calls a step.
        kind: `cuda` or `cpu`.
        elapsed: µs a step, from begin to begin.

    Returns:
        kernels (of each: name, µs, calls, group; the costliest first), groups (of each: µs, calls),
        and ratios: shares of all kernels' time, and of the time that elapsed.
    """
    rows = sorted(((*kernel, _group(kernel[0], kind)) for kernel in kernels), key=lambda r: -r[1])
    whole = sum(us for _, us, _, _ in rows)
    groups = {
        name: (sum(us for _, us, _, of in rows if of == name),
               sum(calls for _, _, calls, of in rows if of == name))
        for name in (*_GROUPS, "others")
    }  # fmt: skip
    arithmetic = sum(groups[name][0] for name in _ARITHMETIC)
    ratios = {"convolutions and products / all": arithmetic / whole}
    ratios |= {f"{name} / all": us / whole for name, (us, _) in groups.items()}
    ratios |= {
        "convolutions and products / elapsed": arithmetic / elapsed,
        "all / elapsed": whole / elapsed,
    }
    return {"kernels": rows, "groups": groups, "elapsed": elapsed, "ratios": ratios}


def _group(name: str, kind: str) -> str:
    found = (group for group, of in _GROUPS.items() if re.search(of[kind], name))
    return next(found, "others")


def bench_kernels(config: Config, steps: int) -> dict[str, Any]:
    """What a training step of ours, in train.precision, takes its time for: a GPU's kernels, a
    CPU's operators; as `grouped`, and machine and unit."""
    kind = _device(config).type
    work = _ours(config)
    for _ in range(_BEFORE_CAPTURE):
        float(work())  # and waits
    begin = time.perf_counter()
    for _ in range(steps):
        loss = work()
    float(loss)
    elapsed = (time.perf_counter() - begin) / steps * 1e6
    return grouped(profiled(work, steps, kind), kind, elapsed) | {
        "machine": machine(config.data.workers),
        "unit": "µs a step",
    }


def profiled(work: Work, steps: int, kind: str) -> list[tuple[str, float, float]]:
    """A GPU's kernels, or a CPU's operators: of each µs a step and calls a step, the costliest
    first."""
    watched = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=watched if kind == "cuda" else watched[:1]) as profiler:
        for _ in range(steps):
            loss = work()
        float(loss)
    time = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    kernels = [
        (event.key, getattr(event, time) / steps, event.count / steps)
        for event in profiler.key_averages()
        if event.device_type.name.lower() == kind and getattr(event, time) > 0
        and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip
    return sorted(kernels, key=lambda kernel: -kernel[1])


def kernel_lines(found: dict[str, Any], most: int = 40) -> str:
    """What `bench_kernels` found, for a reader."""
    kernels, ratios = found["kernels"], found["ratios"]
    lines = [f"{'µs a step':>10}{'calls':>8}{'share':>7}"]
    lines += [f"{us:10,.0f}{calls:8,.1f}{ratios[f'{name} / all']:7.1%}  {name}"
              for name, (us, calls) in found["groups"].items() if calls]  # fmt: skip
    whole = sum(us for _, us, _, _ in kernels)
    lines += [
        f"{whole:10,.0f}{sum(calls for _, _, calls, _ in kernels):8,.1f}{1:7.1%}  all",
        f"{found['elapsed']:10,.0f}{'':15}  elapsed, without the profiler",
        "",
        "convolutions and products are "
        f"{ratios['convolutions and products / all']:.0%} of the kernels' time, and "
        f"{ratios['convolutions and products / elapsed']:.0%} of the step's",
        "",
        f"{'µs a step':>10}{'calls':>8}",
    ]
    lines += [f"{us:10,.0f}{calls:8,.1f}  {group:27}{name[:90]}"
              for name, us, calls, group in kernels[:most]]  # fmt: skip
    rest = kernels[most:]
    lines += [f"{sum(us for _, us, _, _ in rest):10,.0f}{'':10}{len(rest)} more"] if rest else []
    return "\n".join(lines)
