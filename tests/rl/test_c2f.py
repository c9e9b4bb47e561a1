"""Coarse-to-fine bins against repeated zooming in float64."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from qlab.rl import c2f

GRIDS = [(1, 1, 2), (2, 1, 3), (3, 2, 3), (2, 3, 5), (1, 4, 7), (2, 1, 15)]


def zoom_by_hand(action, num_levels, num_bins):
    """Bins and the interval before each choice, one float64 number at a time."""
    low, high, bins, centres = -1.0, 1.0, [], []
    for _ in range(num_levels):
        centres.append((low + high) / 2)
        width = (high - low) / num_bins
        i = int(np.clip(np.floor((action - low) / width), 0, num_bins - 1))
        bins.append(i)
        low, high = low + width * i, low + width * (i + 1)
    return bins, centres, (low + high) / 2


@pytest.mark.parametrize(("d", "l", "b"), GRIDS)
def test_encode_decode_and_centres_equal_zooming(d, l, b):
    actions = np.random.default_rng(0).uniform(-1, 1, (200, d)).astype(np.float32)
    bins = np.asarray(c2f.encode_c2f(jnp.asarray(actions), l, b))
    decoded = np.asarray(c2f.decode_c2f(jnp.asarray(bins), b))
    centres = np.asarray(c2f.prefix_centres(jnp.asarray(bins), b))
    assert bins.shape == (200, l, d)
    for n in range(200):
        for i in range(d):
            want_bins, want_centres, want = zoom_by_hand(float(actions[n, i]), l, b)
            assert bins[n, :, i].tolist() == want_bins
            np.testing.assert_allclose(centres[n, :, i], want_centres, atol=2e-7)
            np.testing.assert_allclose(decoded[n, i], want, atol=2e-7)


@pytest.mark.parametrize(("d", "l", "b"), GRIDS)
def test_encode_inverts_decode_for_every_cell(d, l, b):
    bins = c2f.all_bins(c2f.action_grid(1, l, b))
    assert len(bins) == b**l
    assert len({tuple(x.ravel()) for x in bins}) == len(bins)
    again = c2f.encode_c2f(c2f.decode_c2f(jnp.asarray(bins), b), l, b)
    np.testing.assert_array_equal(again, bins)


@pytest.mark.parametrize(("d", "l", "b"), GRIDS)
def test_rounding_error_is_at_most_half_a_cell(d, l, b):
    a = jnp.linspace(-1, 1, 4001)[:, None]
    error = jnp.abs(a - c2f.decode_c2f(c2f.encode_c2f(a, l, b), b))
    assert float(error.max()) <= b**-l * (1 + 1e-6) + 2e-7  # 2e-7: rounding of float32 near 1
    assert float(error.max()) >= 0.9 * b**-l


@pytest.mark.parametrize("b", [2, 3, 5, 10])
def test_edges_of_the_box_fall_into_the_outermost_bins(b):
    ends = jnp.asarray([-1.0, 1.0, -1.0001, 1.0001, np.nextafter(np.float32(1), 2)])
    bins = np.asarray(c2f.encode_c2f(ends, 2, b))
    for level in range(2):
        assert bins[level].tolist() == [0, b - 1, 0, b - 1, b - 1]


def test_zoom_splits_an_interval_without_gaps():
    ends = [c2f.zoom(jnp.float32(-0.5), jnp.float32(1.0), i, 6) for i in range(6)]
    assert float(ends[0][0]) == -0.5
    np.testing.assert_allclose(ends[-1][1], 1.0, atol=1e-7)
    for (_, high), (low, _) in pairwise(ends):
        assert float(high) == float(low)


def test_enumeration_is_level_major_with_the_last_dimension_fastest():
    bins = c2f.all_bins(c2f.action_grid(2, 2, 2))
    assert bins.shape == (16, 2, 2)
    assert bins[1].tolist() == [[0, 0], [0, 1]]
    assert bins[4].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("bad", [(0, 1, 3), (2, 0, 3), (2, 1, 1), (1, 9, 10)])
def test_bad_grids_are_refused_with_the_numbers(bad):
    with pytest.raises(ValueError, match=f"num_bins={bad[2]}"):
        c2f.action_grid(*bad)


def test_too_large_an_enumeration_is_refused():
    with pytest.raises(ValueError, match="too many to enumerate"):
        c2f.all_bins(c2f.action_grid(6, 3, 5))
