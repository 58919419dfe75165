"""Sizes of the maps that a network's config implies."""

from alexnet_dist.config.schema import ModelConfig


def final_side(config: ModelConfig) -> int:
    """Return the side, in pixels, of the maps that the first fully-connected layer sees; 6 in the
    paper."""
    *_, (_, side) = map_sides(config)
    return side


def map_sides(config: ModelConfig) -> list[tuple[int, int]]:
    """Return, for each convolution, the side of its output maps before and after pooling, pixels.

    The list ends with the first side below 1, which no network can have.
    """

    def steps(room: int, stride: int) -> int:
        return (-(-room // stride) if config.round_up else room // stride) + 1

    side, sides = config.crop, []
    shapes = zip(config.kernel, config.stride, config.padding, strict=True)
    for name, (kernel, stride, padding) in zip(config.conv_names, shapes, strict=True):
        made = side = steps(side + 2 * padding - kernel, stride)
        if name in config.pool_after:
            window, apart = config.pool
            side = steps(made - window, apart)
            # torch lets no pooling window begin beyond the edge.
            side -= config.round_up and (side - 1) * apart >= made
        sides.append((made, side))
        if side < 1:
            break
    return sides
