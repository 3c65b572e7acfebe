"""What norms allow for, beside what the machine at hand happens to round."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping.arithmetic.kernels import Dense, Patches, direct_norms, gram_norms
from dpjax.clipping.arithmetic.rounding import Norms, capped, row_norms, summed

UNIT = 2.0**-24


def test_the_longest_norm_allows_for_slack():
    norms = Norms(jnp.float32([1.0, 0.0]), jnp.float32([3.0, 4.0]))
    np.testing.assert_array_equal(norms.longest, [2.0, 2.0])


def test_what_is_formed_anew_is_scaled_back_and_dropped_if_it_is_not_finite():
    norms = Norms(jnp.float32([4.0, 1.0, jnp.inf, jnp.nan]), jnp.zeros(4))
    found = capped(jnp.float32([0.5] * 4), norms, jnp.float32([1.0, 2.0, 1.0, 1.0]))
    np.testing.assert_allclose(found, [0.25, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("shape", [(1,), (2048,), (2049,), (7, 300), (3, 3, 40, 41)])
def test_sums_in_stages_are_whole_and_count_their_roundings(shape):
    rows = np.random.default_rng(0).uniform(size=(2, *shape)).astype(np.float32)
    total, count = summed(jnp.asarray(rows))
    entries = np.prod(shape)
    np.testing.assert_allclose(
        total, rows.reshape(2, -1).sum(1, dtype=float), rtol=1e-5
    )
    # Two stages of n and m terms sum n m terms at most.
    assert count == entries if entries <= 2048 else (count / 2) ** 2 >= entries
    assert count <= max(2048, 8 * np.sqrt(entries))


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_norms_of_rows_allow_for_underflow_and_for_every_rounding(scale):
    rows = np.full((1, 1000), scale, np.float32)
    truth = np.sqrt(np.sum(np.float64(rows) ** 2))
    longest = float(row_norms(jnp.asarray(rows)).longest[0])
    assert longest >= truth * (1 + 400 * UNIT)
    assert longest <= truth * (1 + 2e-3) + 1e-17


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize(("norms", "times"), [(gram_norms, 2), (direct_norms, 3)])
def test_norms_allow_for_sums_over_positions_in_any_order(norms, times, opposite):
    t, k, n = 64, 4, 3
    signs = np.where(np.arange(t) % 2, -1.0, 1.0) if opposite else np.ones(t)
    left = np.ones((1, 1, t, k), np.float32)
    right = (signs[:, None] * np.ones((1, 1, t, n))).astype(np.float32)
    truth = abs(signs.sum()) * np.sqrt(k * n)
    mass = t * np.sqrt(k * n)
    longest = float(norms([Dense((jnp.asarray(left),), jnp.asarray(right))]).longest[0])
    assert longest >= truth + times * t * UNIT * mass


def test_gram_norms_allow_for_products_that_underflow():
    part = Dense((jnp.full((1, 1, 4, 3), 1e-12),), jnp.full((1, 1, 4, 2), 1e-12))
    truth = 4e-24 * np.sqrt(6)
    assert float(gram_norms([part]).longest[0]) >= truth


def test_patches_that_are_not_cut_out_allow_for_no_less():
    """Of a flat image, every pixel counts in as many patches as the kernel has offsets."""
    width, channels, size = 5, 2, 40

    def cut(image):
        places = size - width + 1
        shifts = [image[:, :, i : i + places] for i in range(width)]
        return (jnp.concatenate(shifts, axis=-1),)

    places = size - width + 1
    signs = np.where(np.arange(places) % 2, -1.0, 1.0)[:, None]
    right = np.float32(signs * np.ones((1, 1, places, 3)))
    patches = Patches(jnp.ones((1, 1, size, channels)), jnp.asarray(right), cut)
    assert patches.offsets == width
    found, known = direct_norms([patches]).slack, direct_norms([patches.dense]).slack
    assert found >= known * (1 - 1e-5)
