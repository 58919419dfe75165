"""The number of arithmetic operations of the network, counted by running it on fake tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_dist.config.schema import Config
from alexnet_dist.network.layers import Layer
from alexnet_dist.network.model import AlexNet


def training_flops(config: Config) -> int:
    """Return the FLOPs of training on one image: the forward, as many for the gradients of the
    weights, and as many again for those of the layers' inputs, except conv1's."""
    with FakeTensorMode():
        counted = multiply_adds(AlexNet(config.model, init_weights=False))
    forward = {layer.name: 2 * macs for layer, macs in counted.items()}
    return 3 * sum(forward.values()) - forward["conv1"]


def multiply_adds(model: AlexNet) -> dict[Layer, int]:
    """Return each layer's multiply-adds in the forward of one image: output positions × weights."""
    counted: dict[Layer, int] = {}

    def count(layer: nn.Module, inputs: Any, outputs: list[Tensor]) -> None:
        assert isinstance(layer, Layer)
        counted[layer] = outputs[0][0, 0].numel() * layer.weight.numel()

    hooks = [layer.register_forward_hook(count) for layer in model.layers()]
    side = model.config.crop
    model.eval()(torch.empty(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return counted


def map_values(counted: Mapping[Layer, int]) -> dict[str, int]:
    """Return the number of values that each layer makes of an image, by its name.

    Args:
        counted: what `multiply_adds` returned.
    """
    return {
        layer.name: macs // layer.weight.numel() * len(layer.weight)
        for layer, macs in counted.items()
    }
