"""`bench step`: a training step, beside the same network in plain PyTorch, and beside torchvision's
alexnet in each form in which it is used."""

import logging
import statistics
from collections.abc import Mapping, Sequence

import torch

from alexnet_dist.bench import Result, in_turn, machine, ratio
from alexnet_dist.bench.contestants import Contestant, Work
from alexnet_dist.bench.trainers import Eager, device_of, ours, plain, product_of
from alexnet_dist.config.load import overridden
from alexnet_dist.config.schema import Config
from alexnet_dist.network.flops import training_flops
from alexnet_dist.network.model import AlexNet
from alexnet_dist.parallel.device import peak_flops
from alexnet_dist.planning.dry_run import plan


def contestant(name: str, config: Config) -> Work:
    """Return the training step that a row of the table names; its result is the loss, nats a
    sample."""
    who, *form = name.split(", ")
    match who:
        case "ours":
            how = ["model.lrn.layers=[]"] if "no LRN" in form else []
            return ours(overridden(config, f"train.precision={form[0]}", *how))
        case "matrix product":
            return product_of(config, form[0])
        case "eager":
            network = Eager(config)
            network.take(dict(AlexNet(config.model, config.seed).named_parameters()))
            return plain(network, config, form)
        case "torchvision's alexnet":
            from torchvision.models import alexnet

            return plain(alexnet(num_classes=config.model.classes), config, form)
        case _:
            raise ValueError(name)


_LOSSES = ("ours, bf16", "ours, fp32", "eager, fp32")
_OURS, _NO_LRN, _PRODUCT = "ours, bf16", "ours, bf16, no LRN", "matrix product, bf16"
log = logging.getLogger(__name__)
_TORCHVISION, _LEAST = "torchvision's alexnet", 63  # its smallest window, pixels
_CONTESTANTS = (*_LOSSES, _NO_LRN, f"{_TORCHVISION}, fp32", _PRODUCT, "matrix product, fp32")
_FORMS = ("fp32, no TF32", "bf16", "bf16, compiled", "bf16, compiled, graph")
_BEST = f"{_TORCHVISION}, {_FORMS[-1]}"  # the fastest form in which it is used
_ON_A_GPU = ("ours, tf32", *(f"{who}, {how}" for who in ("eager", _TORCHVISION) for how in _FORMS))


def bench_step(
    config: Config, repeats: int, batches: Sequence[int] = (), best: bool = False
) -> Result:
    """Time training steps of the config's network in one process, on a GPU if there is one, and of
    its references.

    Args:
        batches: batch sizes instead of train.batch; after the first, only a few rows are timed.
        best: only these few for the first too, among them torchvision's alexnet at its fastest.

    Returns:
        ratios (medians of pairs; of speeds, unless they say otherwise), ceilings, machine, the
        losses of a first step without dropout (which show that the work is equal; not with
        `best`), and every pass's seconds a step.
    """
    configs = [overridden(config, f"train.batch={n}") for n in batches or (config.train.batch,)]
    gpu = device_of(config).type == "cuda"
    few = (_OURS, _NO_LRN, _PRODUCT, *((_BEST,) if gpu else ()))
    names = few if best else (*_CONTESTANTS, *(_ON_A_GPU if gpu else ()))
    # All of them start at the same time, and from then on work one at a time. Without dropout, the
    # losses of a first step are equal if the work is.
    without = overridden(configs[0], "model.dropout=0")
    alike = [] if best else [_made(name, without, pieces=1) for name in _LOSSES]
    groups = [_contestants(configs[0], names), *(_contestants(one, few) for one in configs[1:])]
    everyone = [*alike, *(one for group in groups for one in group.values())]
    try:
        for contestant in everyone:
            contestant.wait()
        losses = _first_losses(alike)
        results = [_timed(*each, repeats, gpu) for each in zip(configs, groups, strict=True)]
    finally:
        for contestant in everyone:
            contestant.close()

    result = results[0]
    for other, more in zip(configs[1:], results[1:], strict=True):
        at = f", batch {other.train.batch}"
        result["ratios"] |= {name + at: value for name, value in more["ratios"].items()}
        result["ceilings"] |= {name + at: value for name, value in more["ceilings"].items()}
        for run, beside in zip(result["runs"], more["runs"], strict=True):
            run |= {name + at: seconds for name, seconds in beside.items()}
    return result if best else result | {"losses": losses}


def _contestants(config: Config, names: Sequence[str]) -> dict[str, Contestant]:
    """Start these contestants."""
    if config.model.crop < _LEAST:
        log.warning(
            f"model.crop={config.model.crop}: {_TORCHVISION} needs {_LEAST} pixels: left out"
        )
        names = [name for name in names if not name.startswith(_TORCHVISION)]
    # The same number of images in a pass for any batch; on a GPU a pass takes half a second.
    pieces = max(5, 50 * 128 // config.train.batch) if device_of(config).type == "cuda" else 2
    return {name: _made(name, config, pieces) for name in names}


def _timed(
    config: Config, contestants: Mapping[str, Contestant], repeats: int, gpu: bool
) -> Result:
    """Time contestants in turn, and end them."""
    # This torch may be unable to run a reference on this GPU.
    runs = in_turn(contestants, repeats, [n for n in _ON_A_GPU if not n.startswith("ours")])
    flop = {n: one.results[0] for n, one in contestants.items() if n.startswith("matrix")}
    for contestant in contestants.values():
        contestant.close()

    work = training_flops(config) * config.train.batch
    rates = {name: [flop[name] / run[name] for run in runs] for name in flop}
    ratios = _ratios(runs)
    ratios["ours, bf16 / bf16 matrix product, by FLOP"] = statistics.median(
        work / run[_OURS] / rate for run, rate in zip(runs, rates[_PRODUCT], strict=True)
    )
    if gpu:
        ratios |= _gpu_ratios(config, runs, work, contestants[_OURS].peak)
    decodes = statistics.median(config.train.batch / run[_OURS] for run in runs)
    return {
        "ratios": ratios,
        "ceilings": {f"{n}, GFLOP/s": statistics.median(rate) / 1e9 for n, rate in rates.items()}
        | {f"images/s to decode for {_OURS}": decodes},
        "machine": machine(config.data.workers),
        "unit": "seconds a step",
        "runs": runs,
    }


def _ratios(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the ratios of ours to its references, by speed unless they say otherwise."""
    pairs = (  # ours, and a reference
        (_OURS, "eager, fp32"), ("ours, fp32", "eager, fp32"), (_OURS, f"{_TORCHVISION}, fp32"),
        ("ours, fp32", "eager, fp32, no TF32"), ("ours, tf32", "eager, fp32"),
        (_OURS, f"eager, {_FORMS[-1]}"), (_OURS, _BEST),
    )  # fmt: skip
    ratios = {f"{a} / {b}": ratio(runs, b, a) for a, b in pairs if {a, b} <= {*runs[0]}}
    ratios["ours, bf16 / the same without LRN"] = ratio(runs, _NO_LRN, _OURS)
    if _BEST in runs[0]:
        ratios[f"{_OURS} / {_BEST}, by seconds"] = ratio(runs, _OURS, _BEST)
    return ratios


def _gpu_ratios(
    config: Config, runs: Sequence[Mapping[str, float]], work: float, peak_memory: int
) -> dict[str, float]:
    """Return the ratios of ours to what the GPU's data sheet and the plan say.

    Args:
        work: FLOP of a step.
        peak_memory: bytes of GPU memory that our step took at its peak.
    """
    ratios = {}
    if peak := peak_flops(torch.cuda.get_device_name()):
        ratios["ours, bf16 / data sheet, by FLOP (MFU)"] = statistics.median(
            work / run[_OURS] / peak for run in runs
        )
    planned = plan(overridden(config, "train.precision=bf16"), 1, gpu=True)
    memory = planned.of("one").memory["peak"]
    return ratios | {"ours, bf16, peak memory / planned": peak_memory / memory}


def _first_losses(contestants: Sequence[Contestant]) -> dict[str, float]:
    """Return the losses of a first step, and end the contestants."""
    for contestant in contestants:
        contestant()
        contestant.close()
    return {contestant.name: contestant.results[0] for contestant in contestants}


def _made(name: str, config: Config, pieces: int) -> Contestant:
    """Return a contestant of this module."""
    return Contestant("step", name, config, pieces, plain=not name.startswith("ours"))
