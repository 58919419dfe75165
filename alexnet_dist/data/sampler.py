"""Choose samples, windows and lighting, as pure functions of the config and the step.

Slot s of step t is sample t·B + s of the concatenated epoch permutations, for a batch of B. So
nothing is dropped or padded at the end of an epoch, and there is no loader state to save.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from alexnet_dist.config.schema import Config
from alexnet_dist.data.batch import Samples
from alexnet_dist.data.dataset import Statistics
from alexnet_dist.data.split import Ints
from alexnet_dist.network import philox
from alexnet_dist.network.philox import Purpose


class TrainSampler:
    """The endless stream of training samples with their random draws.

    Args:
        count: number of samples in the training split.
    """

    def __init__(self, config: Config, count: int, statistics: Statistics) -> None:
        self.config, self.count = config, count
        self.axes = lighting_axes(config, statistics)
        # The permutation of an epoch, (count,). A batch rarely spans more than two epochs.
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: philox.permutation(config.seed, epoch, count)
        )

    def samples(self, step: int, slots: range) -> Samples:
        """Return the samples in some slots of a step."""
        position = step * self.config.train.batch + np.arange(slots.start, slots.stop)
        epochs, places = np.divmod(position, self.count)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            ids[chosen] = self._order(epoch)[places[chosen]]
        return self._draw(ids, epochs)

    def plan(self, first_step: int, last_step: int, slots: range) -> Iterator[Samples]:
        """Return the samples of steps first_step … last_step − 1, lazily."""
        return (self.samples(step, slots) for step in range(first_step, last_step))

    def _draw(self, ids: Ints, epochs: Ints) -> Samples:
        """Draw windows, flips and lighting for samples (n,), each in its epoch (n,)."""
        data, seed = self.config.data, self.config.seed
        zero = np.zeros_like(ids)
        # Windows and flips.
        top, left, mirror, _ = philox.philox((ids, epochs, zero, zero), (seed, Purpose.WINDOW))
        margin = data.canvas - self.config.model.crop
        if data.random_crop:
            corners = np.stack([philox.integers(w, margin + 1) for w in (top, left)], axis=-1)
        else:
            corners = np.full((len(ids), 2), margin // 2)
        # Lighting (paper §4.1), off from some epoch on.
        words = philox.philox((ids, epochs, zero, zero), (seed, Purpose.LIGHTING))
        scale = data.lighting * (epochs < data.lighting_epochs)  # (n,)
        alphas = np.stack(philox.normals(words)[:3], axis=-1) * scale[:, None]  # (n, 3)
        return Samples(
            ids=ids,
            corners=corners[:, None, :],
            flips=(data.flip & (mirror >> 31 == 1))[:, None],
            # Not a product of matrices, which may round otherwise with fewer samples.
            lighting=(alphas[..., None] * self.axes).sum(1).astype(np.float32),
        )


def lighting_axes(config: Config, statistics: Statistics) -> npt.NDArray[np.float64]:
    """Return (3, 3): row i is what α_i = 1 adds to red, green and blue, grey levels (paper §4.1).

    The printed formula has λ. With pixels of 0–255 only its square root makes sense, and the
    released code takes the square root. `eigenvalue` applies the formula to pixels of 0–1.
    """
    values = statistics.eigenvalues
    scale = np.sqrt(values) if config.data.lighting_by == "sqrt_eigenvalue" else values / 255
    return scale[:, None] * statistics.eigenvectors


def views(config: Config) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return corners (v, 2) and flips (v,) of the test windows: the centre, or the ten of §4.1."""
    margin = config.data.canvas - config.model.crop
    middle = margin // 2
    if config.evaluate.views == 1:
        return np.array([[middle, middle]]), np.array([False])
    five = [[0, 0], [0, margin], [margin, 0], [margin, margin], [middle, middle]]
    return np.array(five * 2), np.arange(10) >= 5


def evaluation_plan(config: Config, batches: Iterable[range]) -> Iterator[Samples]:
    """Yield samples for evaluation, with their test windows and without lighting.

    Args:
        batches: places in the split's index, batch by batch.
    """
    corners, flips = views(config)
    for batch in batches:
        n = len(batch)
        yield Samples(
            ids=np.array(batch, dtype=np.int64),
            corners=np.broadcast_to(corners, (n, *corners.shape)),
            flips=np.broadcast_to(flips, (n, len(flips))),
            lighting=np.zeros((n, 3), np.float32),
        )
