"""How fast a training step is, beside the same network as it is usually written."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_dist.bench import in_turn, machine, median, ratio
from alexnet_dist.bench.contestants import Contestant, Work
from alexnet_dist.bench.synthetic import made_batch
from alexnet_dist.config.load import load_config
from alexnet_dist.config.schema import Config, flat
from alexnet_dist.engines.make import make_engine
from alexnet_dist.errors import ConfigError
from alexnet_dist.network.flops import multiply_adds
from alexnet_dist.network.lrn import alpha_of
from alexnet_dist.network.model import AlexNet, final_side
from alexnet_dist.parallel.device import gpus, peak_flops
from alexnet_dist.parallel.topology import connect

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


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if gpus(config) else "cpu")


def _eager(network: nn.Module, config: Config) -> Work:
    """A plain loop: fp32, torch's defaults."""
    batch = made_batch(config, _device(config), torch.float32)
    windows, labels = batch.windows.contiguous(), batch.labels
    network.to(_device(config))
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-4, momentum=0.9, weight_decay=config.optimizer.weight_decay
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(windows), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _ours(config: Config) -> Work:
    topology = connect(config)
    engine, batch = make_engine(config, topology), None

    def step() -> Tensor:
        nonlocal batch
        batch = batch or made_batch(config, topology.device)
        return engine.train_step(batch, 0, 1e-4)[0] / config.train.batch

    return step


def contestant(name: str, config: Config) -> Work:
    """A step of what a row of the table names; it gives the loss, nats a sample."""

    def with_(*overrides: str) -> Config:
        return load_config([flat(config), *overrides])

    match name:
        case "ours, bf16":
            return _ours(with_("train.precision=bf16"))
        case "ours, fp32":
            return _ours(with_("train.precision=fp32"))
        case "ours, bf16, compiled":
            return _ours(with_("train.precision=bf16", "train.compile=inductor"))
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
            device, narrow = _device(config), name.endswith("bf16")
            side = 8192 if device.type == "cuda" else 4096 if narrow else 2048
            dtype = torch.bfloat16 if narrow else torch.float32
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

            def product() -> float:
                a @ b
                return 2.0 * side**3  # its FLOP, in the loss's place

            return product
    raise ValueError(name)


_LOSSES = ("ours, bf16", "ours, fp32", "eager, fp32")
_CONTESTANTS = (*_LOSSES, "ours, bf16, no LRN", "torchvision's alexnet, fp32",
                "matrix product, bf16", "matrix product, fp32")  # fmt: skip
_COMPILED = "ours, bf16, compiled"  # where there is a GPU


def bench_step(config: Config, repeats: int) -> dict[str, Any]:
    """Training steps of the config's network on one process, on a GPU where there is one, and of
    its references.

    Returns:
        ratios (medians of pairs; of a reference's seconds to ours), ceilings, machine, the loss of
        each one's first step without dropout (equal work), and every pass's seconds a step.
    """
    losses = first_losses(config)
    gpu = _device(config).type == "cuda"
    names = (*_CONTESTANTS, _COMPILED) if gpu else _CONTESTANTS
    contestants = {name: _made(name, config, pieces=50 if gpu else 2) for name in names}
    try:
        runs = in_turn(dict(contestants), repeats)
        flop = {n: contestants[n].given[0] for n in names if n.startswith("matrix")}
    finally:
        for contestant in contestants.values():
            contestant.close()

    best = _COMPILED if gpu else "ours, bf16"
    macs = multiply_adds(AlexNet(config.model, drawn=False))
    work = _TRAINING * 2 * sum(macs.values()) * config.train.batch
    rates = {name: [flop[name] / run[name] for run in runs] for name in flop}
    product = zip(runs, rates["matrix product, bf16"], strict=True)
    ratios = {
        "ours, bf16 / eager, fp32": ratio(runs, "eager, fp32", "ours, bf16"),
        "ours, fp32 / eager, fp32": ratio(runs, "eager, fp32", "ours, fp32"),
        "ours, bf16 / torchvision's alexnet, fp32": ratio(
            runs, "torchvision's alexnet, fp32", "ours, bf16"
        ),
        "ours, bf16 / the same without LRN": ratio(runs, "ours, bf16, no LRN", "ours, bf16"),
        f"{best} / bf16 matrix product, by FLOP": median(
            work / run[best] / rate for run, rate in product
        ),
    }
    if gpu:
        ratios[f"{best} / ours, bf16"] = ratio(runs, "ours, bf16", best)
        if peak := peak_flops(torch.cuda.get_device_name()):
            ratios[f"{best} / data sheet, by FLOP (MFU)"] = median(
                work / run[best] / peak for run in runs
            )
    decodes = median(config.train.batch / run[best] for run in runs)
    return {
        "ratios": ratios,
        "ceilings": {f"{n}, GFLOP/s": median(rate) / 1e9 for n, rate in rates.items()}
        | {f"images/s to decode for {best}": decodes},
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
        one = _made(name, plain)
        one()
        found[name] = one.given[0]
        one.close()
    return found


def _made(name: str, config: Config, pieces: int = 2) -> Contestant:
    return Contestant("step", name, config, pieces, plain=not name.startswith("ours"))
