"""What a network's layers put out, beside its logits."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alexnet_dist.config.schema import Config
from alexnet_dist.data.dataset import Dataset
from alexnet_dist.data.pipelines.make import make_pipeline
from alexnet_dist.data.sampler import evaluation_plan
from alexnet_dist.engines.base import Engine
from alexnet_dist.network.exchange import side_by_side
from alexnet_dist.network.layers import ACTIVATIONS
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.precision import DTYPES


def by_one_view(config: Config) -> Config:
    """Return the config with one window per image: the centre."""
    return replace(config, evaluate=replace(config.evaluate, views=1))


@torch.no_grad()
def logits(model: AlexNet, config: Config, windows: Tensor) -> Tensor:
    """Return logits (n, classes), float32 or wider, computed in evaluation's precision."""
    outputs: Tensor = model(windows.to(DTYPES[config.train.precision]))
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def activations(
    model: AlexNet, config: Config, windows: Tensor, layers: Sequence[str]
) -> dict[str, list[Tensor]]:
    """Return the outputs of layers, after the activation, float32 or wider.

    For a convolution they are each column's maps (n, maps, h, w), neither normalised nor pooled;
    for a fully-connected layer the units (n, units) of each column, or of all together where both
    see the same; for the last layer the logits.
    """
    outputs: dict[str, list[Tensor]] = {}
    last = model.config.layer_names[-1]

    def keep(layer: str, parts: list[Tensor]) -> None:
        # Copied at once, since the network goes on in the same memory.
        wide = [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in parts]
        activate = ACTIVATIONS[model.config.activation]
        outputs[layer] = wide if layer == last else [activate(x) for x in wide]

    hooks = [
        model.get_submodule(layer).register_forward_hook(
            lambda _, seen, parts, layer=layer: keep(layer, parts)
        )
        for layer in layers
    ]
    try:
        logits(model, config, windows)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def features_and_logits(
    engine: Engine, config: Config, dataset: Dataset, split: str, samples: range
) -> tuple[Tensor, Tensor]:
    """Return what a network's last layer sees of samples (fc7), and its logits. Collective; each
    rank decodes all samples.

    Returns:
        (n, units) float32, the units that the last layer sees on this rank; and logits
        (n, classes). Both on the CPU.
    """
    config = by_one_view(config)
    features: list[Tensor] = []
    *_, last = engine.model.layers()
    products = last.products

    # Not by a hook: only here are the inputs those of all columns, after their exchange.
    def recorded(inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        features.append(side_by_side(inputs).flatten(1))
        return products(inputs, weight, bias)

    last.products = recorded  # type: ignore[method-assign]
    pipeline = make_pipeline(config, engine.topology, dataset, split)
    size = config.evaluate.batch
    parts = [samples[first : first + size] for first in range(0, len(samples), size)]
    try:
        outputs = [
            engine.predict(decoded.batch().windows)
            for decoded in pipeline.batches(evaluation_plan(config, parts))
        ]
    finally:
        del last.products
        pipeline.close()
    # Under sharded_fc the last layer sees the samples of all ranks, here the same ones.
    own = [part[: len(batch)] for part, batch in zip(features, outputs, strict=True)]
    return torch.cat(own).float().cpu(), torch.cat(outputs).cpu()
