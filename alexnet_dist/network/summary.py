"""A network's layers as text: what `print(model)` shows."""

from collections.abc import Sequence

from alexnet_dist.config.schema import ModelConfig
from alexnet_dist.errors import aligned
from alexnet_dist.network.layers import Layer
from alexnet_dist.network.shapes import map_sides


def summary(config: ModelConfig, layers: Sequence[Layer]) -> str:
    """Describe a network, one line per layer: inputs, outputs, what follows, and weights here."""
    columns = len(layers[0].sizes)  # conv1 has a part for every column on this device
    here = "" if columns == config.columns else f", {columns} of them here"
    makes = "makes" if config.columns == 1 else "makes, each column"
    rows = [("layer", "sees", makes, "then", "weights here", "parameters")]
    sees = f"3 × {config.crop} × {config.crop}"
    sides = dict(zip(config.conv_names, map_sides(config), strict=True))
    for layer in layers:
        shape, size = tuple(layer.weight.shape), layer.sizes[0]
        both = config.columns > 1 and layer.name in config.exchange
        seen = sees + (" of each column" if both else "")
        if layer.name in sides:
            made, side = sides[layer.name]
            makes, sees = f"{size} × {made} × {made}", f"{size} × {side} × {side}"
        else:
            makes = sees = f"{size}"
        # In the order of `Column.maps`.
        norm = ["LRN"] * (layer.name in config.lrn.layers)
        norm += ["spatial norm"] * (layer.name in config.spatial_norm.layers)
        pool = [f"pool {config.pool[0]}/{config.pool[1]}"] * (layer.name in config.pool_after)
        then = [*pool, *norm] if config.pool_before_lrn else [*norm, *pool]
        if layer.name != config.layer_names[-1]:
            index = len(then) if layer.name in config.activation_last else 0
            then.insert(index, config.activation)
        count = layer.weight.numel() + layer.bias.numel()
        rows.append((layer.name, seen, makes, ", ".join(then), f"{shape}", f"{count:,}"))
    whole = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    kind = "1 column" if config.columns == 1 else f"{config.columns} columns{here}"
    head = f"AlexNet of {kind}, {config.classes} classes, {whole:,} parameters"
    return f"{head}\n{aligned(rows)}"
