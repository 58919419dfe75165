"""How fast a training step is, beside the same network as it is usually written.

Every contestant lives in a process of its own, with the memory and threads it would have by
itself, and steps when it is its turn; so what one sets (an allocator, say) is not another's.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.bench import in_turn, machine, median
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config import Config, flat
from alexnet_dist.config_layers import load_config
from alexnet_dist.engine import on_host
from alexnet_dist.engines import make_engine
from alexnet_dist.errors import ConfigError
from alexnet_dist.lrn import alpha_of
from alexnet_dist.model import AlexNet, final_side
from alexnet_dist.plan import multiply_adds
from alexnet_dist.topology import connect

Step = Callable[[], float]  # one training step; its loss, nats a sample
_TRAINING = 3  # of a forward's: the gradients of inputs and of weights cost as much again


class Eager(nn.Module):
    """The config's network as most PyTorch code has it: nn.LocalResponseNorm, nn.Dropout, NCHW."""

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
                columns = x.view(n * self.model.columns, -1, h, w)
                x = self.norms[f"conv{number}"](columns).view(n, channels, h, w)
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


def _eager(network: nn.Module, config: Config) -> Step:
    """A plain loop: fp32, torch's defaults."""
    batch = made_batch(config, torch.device("cpu"), torch.float32)
    windows, labels = batch.windows.contiguous(), batch.labels
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-4, momentum=0.9, weight_decay=config.optimizer.weight_decay
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(windows), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _ours(config: Config) -> Step:
    topology = connect(config)
    engine, batch = make_engine(config, topology), None

    def step() -> float:
        nonlocal batch
        batch = batch or made_batch(config, topology.device)
        return on_host(engine.train_step(batch, 0, 1e-4))()[0] / config.train.batch

    return step


def _contestant(name: str, config: Config) -> Step:
    """A step of what a row of the table names."""

    def with_(*overrides: str) -> Config:
        return load_config([flat(config), *overrides])

    match name:
        case "ours, bf16":
            return _ours(with_("train.precision=bf16"))
        case "ours, fp32":
            return _ours(with_("train.precision=fp32"))
        case "ours, bf16, no LRN":
            return _ours(with_("train.precision=bf16", "model.lrn.layers=[]"))
        case "eager, fp32":
            network = Eager(config)
            network.take(dict(AlexNet(config.model, config.seed).named_parameters()))
            return _eager(network, config)
        case "torchvision's alexnet, fp32":
            from torchvision.models import alexnet

            return _eager(alexnet(num_classes=config.model.classes), config)
        case "matrix product, bf16" | "matrix product, fp32":
            side = 4096 if name.endswith("bf16") else 2048
            dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
            a, b = (torch.randn(side, side).to(dtype) for _ in range(2))

            def product() -> float:
                a @ b
                return 2.0 * side**3  # its FLOP, in the loss's place

            return product
    raise ValueError(name)


_LOSSES = ("ours, bf16", "ours, fp32", "eager, fp32")
_CONTESTANTS = (*_LOSSES, "ours, bf16, no LRN", "torchvision's alexnet, fp32",
                "matrix product, bf16", "matrix product, fp32")  # fmt: skip


def serve(name: str, config: dict[str, Any]) -> None:
    """A contestant's process: a line in, a step, its seconds and loss out."""
    step = _contestant(name, load_config([config]))
    for line in sys.stdin:
        steps = int(line)
        begin = time.perf_counter()
        losses = [step() for _ in range(steps)]
        print(json.dumps([(time.perf_counter() - begin) / steps, losses[0]]), flush=True)


class _Process:
    """A contestant, as a pass of the benchmark."""

    def __init__(self, name: str, config: Config) -> None:
        self.name, self.losses = name, list[float]()
        code = f"from alexnet_dist.bench import step; step.serve({name!r}, {flat(config)!r})"
        environment = dict(os.environ)
        if not name.startswith("ours"):  # a reference has what its users have
            environment.pop("GOMP_SPINCOUNT", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def __call__(self, steps: int = 2) -> float:
        """Seconds a step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(steps, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise ConfigError(f"bench step: {self.name!r} failed; it has said why")
        seconds, loss = json.loads(answer)
        self.losses.append(loss)
        return float(seconds)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def bench_step(config: Config, repeats: int) -> dict[str, Any]:
    """Training steps of the config's network on one process, and of its references.

    Returns:
        ratios (medians of pairs; of a reference's seconds to ours), ceilings, machine, the loss of
        each one's first step without dropout (equal work), and every pass's seconds a step.
    """
    losses = first_losses(config)
    contestants = {name: _Process(name, config) for name in _CONTESTANTS}
    try:
        runs = in_turn(dict(contestants), repeats)
        flop = {n: contestants[n].losses[0] for n in _CONTESTANTS if n.startswith("matrix")}
    finally:
        for contestant in contestants.values():
            contestant.close()

    def ratio(reference: str, ours: str) -> float:
        return median(run[reference] / run[ours] for run in runs)

    macs = multiply_adds(AlexNet(config.model, drawn=False))
    work = _TRAINING * 2 * sum(macs.values()) * config.train.batch
    rates = {name: [flop[name] / run[name] for run in runs] for name in flop}
    reached = median(
        work / run["ours, bf16"] / rate
        for run, rate in zip(runs, rates["matrix product, bf16"], strict=True)
    )
    return {
        "ratios": {
            "ours, bf16 / eager, fp32": ratio("eager, fp32", "ours, bf16"),
            "ours, fp32 / eager, fp32": ratio("eager, fp32", "ours, fp32"),
            "ours, bf16 / torchvision's alexnet, fp32": ratio(
                "torchvision's alexnet, fp32", "ours, bf16"
            ),
            "ours, bf16 / the same without LRN": ratio("ours, bf16, no LRN", "ours, bf16"),
            "ours, bf16 / bf16 matrix product, by FLOP": reached,
        },
        "ceilings": {f"{n}, GFLOP/s": median(rate) / 1e9 for n, rate in rates.items()},
        "losses": losses,
        "machine": machine(config.data.workers),
        "unit": "seconds a step",
        "runs": runs,
    }


def first_losses(config: Config) -> dict[str, float]:
    """Of a first step without dropout: what must be equal, for the same work to be timed."""
    plain = load_config([flat(config), "model.dropout=0"])
    found = {}
    for name in _LOSSES:
        process = _Process(name, plain)
        process(1)
        found[name] = process.losses[0]
        process.close()
    return found
