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
    side, sides = config.crop, []
    shapes = zip(config.kernel, config.stride, config.padding, strict=True)
    for name, (kernel, stride, padding) in zip(config.conv_names, shapes, strict=True):
        made = side = windows_along(side + 2 * padding, kernel, stride, config.round_up)
        if name in config.pool_after:
            window, apart = config.pool
            side = pooled_side(made, window, apart, config.round_up)
        sides.append((made, side))
        if side < 1:
            break
    return sides


def windows_along(side: int, window: int, stride: int, round_up: bool) -> int:
    """Return the number of windows along a side, pixels; rounded up, the last reaches beyond it."""
    room = side - window
    return (-(-room // stride) if round_up else room // stride) + 1


def pooled_side(side: int, window: int, stride: int, round_up: bool) -> int:
    """Return the number of pooling windows along a side, each of which must begin inside it, as for
    `F.max_pool2d`."""
    count = windows_along(side, window, stride, round_up)
    return count - (round_up and (count - 1) * stride >= side)
