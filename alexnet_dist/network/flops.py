"""The number of arithmetic operations of the network."""

from collections.abc import Mapping

import torch

from alexnet_dist.config.schema import Config
from alexnet_dist.network.layers import Layer
from alexnet_dist.network.model import AlexNet
from alexnet_dist.network.shapes import map_sides


def training_flops(config: Config) -> int:
    """Return the FLOPs of training on one image: the forward, as many for the gradients of the
    weights, and as many again for those of the layers' inputs, except conv1's."""
    with torch.device("meta"):
        counted = multiply_adds(AlexNet(config.model, init_weights=False))
    forward = {layer.name: 2 * macs for layer, macs in counted.items()}
    return 3 * sum(forward.values()) - forward["conv1"]


def multiply_adds(model: AlexNet) -> dict[Layer, int]:
    """Return each layer's multiply-adds in the forward of one image: output positions × weights."""
    config = model.config
    made = dict(zip(config.conv_names, (side for side, _ in map_sides(config)), strict=True))
    return {layer: made.get(layer.name, 1) ** 2 * layer.weight.numel() for layer in model.layers()}


def map_values(counted: Mapping[Layer, int]) -> dict[str, int]:
    """Return the number of values that each layer makes of an image, by its name.

    Args:
        counted: what `multiply_adds` returned.
    """
    return {
        layer.name: macs // layer.weight.numel() * len(layer.weight)
        for layer, macs in counted.items()
    }
