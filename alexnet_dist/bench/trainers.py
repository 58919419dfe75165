"""The training steps that are timed: ours, and those of the same network in plain PyTorch."""

import gc
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.bench import Pass
from alexnet_dist.bench.contestants import Work
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import overridden
from alexnet_dist.config.schema import Config
from alexnet_dist.engines.base import AT
from alexnet_dist.engines.make import make_engine
from alexnet_dist.network.lrn import alpha_of
from alexnet_dist.network.model import pooled, whole_shapes
from alexnet_dist.network.precision import allow_tf32, product
from alexnet_dist.parallel.device import gpus
from alexnet_dist.parallel.topology import Topology, connect

WARM_UP = 5  # steps before a step is captured or profiled


class Eager(nn.Module):
    """The config's network in plain PyTorch, with nn.LocalResponseNorm and nn.Dropout."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = model = config.model
        self.activate = getattr(F, model.activation)
        self.dropout = nn.Dropout(model.dropout)
        shapes, seen = whole_shapes(model), 3
        self.convs, self.fcs = nn.ModuleDict(), nn.ModuleDict()
        for name, stride, padding in zip(
            model.conv_names, model.stride, model.padding, strict=True
        ):
            outputs, inputs, kernel, _ = shapes[f"{name}.weight"]
            groups = seen // inputs  # without exchange as many as columns
            self.convs[name] = nn.Conv2d(seen, outputs, kernel, stride, padding, groups=groups)
            seen = outputs
        for name in model.fc_names:
            outputs, inputs = shapes[f"{name}.weight"]
            self.fcs[name] = _Linear(inputs, outputs)
        lrn = model.lrn
        self.norms: dict[str, nn.Module] = {  # torch divides α by n
            name: nn.LocalResponseNorm(lrn.size, alpha_of(lrn, name) * lrn.size, lrn.beta, lrn.k)
            for name in lrn.layers
        }

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        stages = [self._normalised, lambda name, x: pooled(model, name, x)]
        shapes = zip(model.kernel, model.stride, model.padding, strict=True)
        for (name, conv), (kernel, stride, padding) in zip(self.convs.items(), shapes, strict=True):
            if model.round_up:
                right = -(x.shape[-1] + 2 * padding - kernel) % stride
                x = F.pad(x, (0, right, 0, right))
            x = conv(x) if name in model.activation_last else self.activate(conv(x))
            for stage in reversed(stages) if model.pool_before_lrn else stages:
                x = stage(name, x)
            x = self.activate(x) if name in model.activation_last else x
        x = x.flatten(1)
        for name, fc in self.fcs.items():
            x = fc(self.dropout(x) if name in model.dropout_before else x)
            x = x if name == model.fc_names[-1] else self.activate(x)
        return x

    def _normalised(self, name: str, x: Tensor) -> Tensor:
        spatial = self.model.spatial_norm
        if name in self.norms:  # within a column
            n, channels, h, w = x.shape
            columns = x.reshape(n * self.model.columns, -1, h, w)
            x = self.norms[name](columns).reshape(n, channels, h, w)
        if name in spatial.layers:
            mean = F.avg_pool2d(x * x, spatial.size, 1, spatial.size // 2)
            x = x / (1 + spatial.alpha * mean) ** spatial.beta
        return x

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copy our network's parameters, so that both compute the same."""
        for layers in (self.convs, self.fcs):
            own = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
            layers.load_state_dict({name: weights[name] for name in own})


class _Linear(nn.Linear):
    """A fully-connected layer; if it has fewer inputs than it is given, each column sees only its
    own."""

    def forward(self, x: Tensor) -> Tensor:
        columns = x.shape[1] // self.in_features
        if columns == 1:
            return super().forward(x)
        weights, biases = self.weight.chunk(columns), self.bias.chunk(columns)
        parts = zip(x.chunk(columns, 1), weights, biases, strict=True)
        return torch.cat([F.linear(*part) for part in parts], 1)


def device_of(config: Config) -> torch.device:
    """Return the device that steps run on."""
    return torch.device("cuda" if gpus(config) else "cpu")


def plain(network: nn.Module, config: Config, form: list[str]) -> Work:
    """Return a training step as it is usually written.

    Args:
        form: `fp32` with torch's defaults, or with `no TF32`; or `bf16`: autocast, channels_last,
            cuDNN's benchmark and fused SGD, optionally `compiled` and as a `graph`.
    """
    device, narrow = device_of(config), "bf16" in form
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

    if "compiled" in form and device.type == "cuda":
        compile_by(step)
    return graphed(step) if "graph" in form else step


def compile_by(step: Callable[[], object]) -> None:
    """Compile a GPU's kernels by running a step. Others may be using the GPU meanwhile, so this is
    done without cuDNN's benchmark, which chooses by time; and with deterministic convolutions, so
    that cuDNN's choice is not kept for the steps that are timed."""
    cudnn = torch.backends.cudnn
    kept = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        _aside(step)
        torch.cuda.synchronize()
    finally:
        cudnn.benchmark, cudnn.deterministic = kept
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def compile_ours(config: Config, topology: Topology) -> None:
    """Compile the kernels of our step for a GPU, by an engine that is dropped."""
    if topology.device.type != "cuda" or config.train.execution == "eager":
        return
    apart = overridden(config, "train.execution=fused")  # captures nothing

    def step() -> None:
        make_engine(apart, topology).train_step(made_batch(config, topology.device), 0, 1e-4)

    compile_by(step)


def graphed(step: Callable[[], Tensor]) -> Work:
    """Return a step as a CUDA graph, captured at the first call, after some steps on another
    stream, which allocate what a capture cannot."""
    replay: Callable[[], None] | None = None
    loss = torch.zeros(())

    def replayed() -> Tensor:
        nonlocal replay, loss
        if replay is None:
            _aside(*[step] * WARM_UP)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
            replay = graph.replay
        replay()
        return loss

    return replayed


def _aside(*steps: Callable[[], object]) -> None:
    """Run steps on a side stream: what autograd has first met on the default stream cannot be
    captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(aside)


def ours(config: Config) -> Work:
    """Return our training step."""
    topology = connect(config)
    compile_ours(config, topology)
    engine, batch = make_engine(config, topology), None

    def step() -> Tensor:
        nonlocal batch
        batch = batch or made_batch(config, topology.device)
        return engine.train_step(batch, 0, 1e-4)[AT.loss] / config.train.batch

    return step


def product_of(config: Config, precision: str) -> Work:
    """Return a product of two large matrices, computed as the network's are."""
    device, narrow = device_of(config), precision == "bf16"
    side = 8192 if device.type == "cuda" else 4096 if narrow else 2048
    dtype = torch.bfloat16 if narrow else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> float:
        product(lambda x, y, _: x @ y, a, b, None)
        return 2.0 * side**3  # its FLOP, in place of a loss

    return multiply


def timed(work: Callable[[], Tensor], device: torch.device) -> Pass:
    """Return a pass that times some work; on a GPU many times over, as a CUDA graph, since Python
    launches it more slowly than the GPU does it."""
    on_gpu = device.type == "cuda"
    pieces, once = (50, graphed(work)) if on_gpu else (1, work)

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(pieces):
            once()
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / pieces

    return run
