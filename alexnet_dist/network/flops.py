"""How much arithmetic the network takes, counted by running it on shapes without values."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_dist.config.schema import Config
from alexnet_dist.network.model import AlexNet, Layer


def training_flops(config: Config) -> int:
    """Of an image: forward; backward as much for the weights, and again for what a layer saw, but
    the image."""
    with FakeTensorMode():
        counted = multiply_adds(AlexNet(config.model, drawn=False))
    forward = {layer.name: 2 * macs for layer, macs in counted.items()}
    return 3 * sum(forward.values()) - forward["conv1"]


def multiply_adds(model: AlexNet) -> dict[Layer, int]:
    """Of each layer, forward, an image: places it is used at × its weights."""
    counted: dict[Layer, int] = {}

    def count(layer: nn.Module, seen: Any, made: list[Tensor]) -> None:
        assert isinstance(layer, Layer)
        counted[layer] = made[0][0, 0].numel() * layer.weight.numel()

    hooks = [layer.register_forward_hook(count) for layer in model.layers()]
    side = model.config.crop
    model.eval()(torch.empty(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return counted
