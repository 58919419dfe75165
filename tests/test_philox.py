"""Counter-based draws: published vectors, NumPy = torch, slices, uniformity, independence."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from alexnet_dist.network import philox

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


# Of row 4095 of fc6.weight, seed 0, by NumPy 2.4.
PINNED = [0.07146697306580685, -1.5187383859288084, 0.06820504553224023]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_philox_gives_the_published_vectors(counter: str, key: str, expected: str) -> None:
    for make in (np.array, torch.tensor):
        c0, c1, c2, c3 = (make([word]) for word in words(counter))
        k0, k1 = words(key)
        assert tuple(int(w[0]) for w in philox.philox((c0, c1, c2, c3), (k0, k1))) == words(
            expected
        )


def test_numpy_and_torch_draw_the_same_bits() -> None:
    ids = np.arange(10_000)
    zero = np.zeros_like(ids)
    of_numpy = philox.philox((ids, zero + 3, zero, zero), (7, 9))
    as_torch = [torch.from_numpy(a) for a in (ids, zero + 3, zero, zero)]
    of_torch = philox.philox(tuple(as_torch), (7, 9))  # type: ignore[arg-type]
    for ours, theirs in zip(of_numpy, of_torch, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(
        philox.integers(of_numpy[0], 29), philox.integers(of_torch[0], 29).numpy()
    )
    assert philox.uniforms(np.array([2**32 - 1])).item() < 1


def test_words_are_uniform_and_independent() -> None:
    ids = np.arange(200_000)
    zero = np.zeros_like(ids)
    columns = [*philox.philox((ids, zero, zero, zero), (0, 1)),
               *philox.philox((ids, zero + 1, zero, zero), (0, 1)),
               *philox.philox((ids, zero, zero, zero), (0, 2)),
               *philox.philox((ids, zero, zero, zero), (1, 1))]  # fmt: skip
    for column in columns:
        counts = np.bincount(philox.integers(column, 256), minlength=256)
        chi_square = ((counts - len(ids) / 256) ** 2 / (len(ids) / 256)).sum()
        assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6  # 255 degrees: deviation 22.6
    correlations = np.corrcoef(np.stack([philox.uniforms(c) for c in columns]))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / np.sqrt(len(ids))


def test_integers_reach_every_value_and_no_other() -> None:
    edge = np.array([0, 2**32 - 1])
    assert philox.integers(edge, 30).tolist() == [0, 29]
    assert 0 < philox.uniforms(edge).min() < philox.uniforms(edge).max() < 1


def test_normals_have_the_moments_of_normals() -> None:
    ids = np.arange(100_000)
    zero = np.zeros_like(ids)
    values = np.stack(philox.normals(philox.philox((ids, zero, zero, zero), (5, 3))))
    assert np.abs(values.mean(1)).max() < 5 / np.sqrt(len(ids))
    assert np.abs(values.std(1) - 1).max() < 5 / np.sqrt(2 * len(ids))
    assert np.abs((values**4).mean(1) - 3).max() < 5 * np.sqrt(96 / len(ids))
    assert np.abs(np.corrcoef(values) - np.eye(4)).max() < 5 / np.sqrt(len(ids))


def test_an_epochs_order_is_a_permutation_of_its_own() -> None:
    orders = [philox.permutation(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(1000))
        assert np.abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 5 / np.sqrt(1000)
    assert len({tuple(order) for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], philox.permutation(0, 0, 1000))


@pytest.mark.parametrize(("first", "count"), [(0, 48), (0, 24), (24, 24), (17, 5), (47, 1)])
def test_any_part_of_a_dropout_mask_is_the_part_of_the_whole(first: int, count: int) -> None:
    slots = torch.arange(32)
    whole = philox.dropout_mask(3, 11, 6, slots, 0, 48, 0.5)
    part = philox.dropout_mask(3, 11, 6, slots[8:20], first, count, 0.5)
    assert torch.equal(part, whole[8:20, first : first + count])


def test_the_cpus_loop_draws_philoxs_words() -> None:
    slots, drop = torch.arange(40) * 7919, 0.3
    blocks = torch.arange(100)[None, :]
    counter = (blocks, slots[:, None], torch.tensor(2**31), torch.tensor(7))
    words = philox.philox(counter, (4294967295, philox.Purpose.DROPOUT))
    stay = torch.stack(torch.broadcast_tensors(*words), -1).flatten(1) >= round(drop * 2**32)
    assert torch.equal(philox.dropout_mask(4294967295, 2**31, 7, slots, 0, 400, drop), stay)


def test_a_compiled_loop_leaves_torchs_threads_as_they_are() -> None:
    code = (
        "import torch; torch.set_num_threads(1); from alexnet_dist.network import philox; "
        "philox.dropout_mask(0, 0, 6, torch.arange(4), 0, 8, 0.5); print(torch.get_num_threads())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.stdout == "1\n", result.stderr


def test_dropout_masks_differ_by_seed_step_layer_slot_and_unit() -> None:
    slots = torch.arange(500)
    mask = philox.dropout_mask(0, 0, 6, slots, 0, 400, 0.3).double()
    assert abs(mask.mean() - 0.7) < 5 * np.sqrt(0.21 / mask.numel())
    for other in ((1, 0, 6), (0, 1, 6), (0, 0, 7)):
        another = philox.dropout_mask(*other, slots, 0, 400, 0.3).double()
        agree = np.corrcoef(mask.flatten(), another.flatten())[0, 1]
        assert abs(agree) < 5 / np.sqrt(mask.numel())
    for axis in (mask, mask.t()):
        correlations = np.corrcoef(axis[:100])
        np.fill_diagonal(correlations, 0)
        assert np.abs(correlations).max() < 6 / np.sqrt(axis.shape[1])


def weights(name: str, shape: tuple[int, ...], rows: slice = slice(None), std: float = 1.0):  # type: ignore[no-untyped-def]
    return philox.initial_weights(4, name, shape, rows, std, torch.float64).numpy()


def test_any_rows_of_initial_weights_are_the_rows_of_the_whole() -> None:
    whole = weights("conv2.weight", (16, 3, 5, 5))
    np.testing.assert_array_equal(weights("conv2.weight", (16, 3, 5, 5), slice(8, 16)), whole[8:])
    assert abs(whole.mean()) < 5 / np.sqrt(whole.size)
    assert abs(whole.std() - 1) < 5 / np.sqrt(2 * whole.size)
    np.testing.assert_array_equal(weights("conv2.weight", (16, 3, 5, 5), std=0.01), whole * 0.01)
    other = weights("conv3.weight", (16, 3, 5, 5))
    assert abs(np.corrcoef(whole.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(whole.size)


def test_initial_weights_are_those_of_earlier_versions() -> None:
    """Pinned, because NumPy promises no stream for ever: another NumPy must not change a run."""
    last_row = slice(4095, 4096)
    values = philox.initial_weights(0, "fc6.weight", (4096, 9216), last_row, 1.0, torch.float64)
    assert values[0, :3].tolist() == PINNED
