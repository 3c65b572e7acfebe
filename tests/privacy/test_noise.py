"""Noise: a function of (root key, step, leaf), and of nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from dpjax.privacy import noise as noise_module
from dpjax.privacy.noise import add_noise, grid, noise_like, root_key
from dpjax.privacy.sensitive import ClippedSum
from dpjax.training.verification import reference_noise
from tests.checks import (
    FAR_STEPS,
    FORTY,
    check_rounded,
    filled,
    flat,
    reference_sum,
    repeated,
    thinned,
)

KEY = root_key(0)
SHAPES = {"a": jnp.zeros((64, 32)), "b": {"c": jnp.zeros(2048), "d": jnp.zeros(2048)}}


def noise(step, key=KEY, tree=SHAPES):
    return add_noise(tree, key=key, step=step, stddev=1.0)


def test_noise_is_standard_normal_to_the_tails():
    values = np.concatenate(
        [np.ravel(x) for s in range(20) for x in jax.tree.leaves(noise(s))]
    )
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4
    # P(|Z| > 3.5) = 4.65e-4.
    tail = np.mean(np.abs(values) > 3.5)
    assert abs(tail - 4.65e-4) < 5 * np.sqrt(4.65e-4 / len(values))


def test_no_value_repeats_over_leaves_steps_and_keys():
    trees = [noise(s, root_key(k)) for s in range(5) for k in (0, 1)]
    # Single values repeat, as they are rounded; four in a row do not, but by reuse.
    assert repeated(np.concatenate([flat(t) for t in trees])) < 0.001


def test_leaves_steps_and_keys_are_uncorrelated():
    base = noise(3)
    others = [
        (base["b"]["c"], base["b"]["d"]),
        (base["b"]["c"], noise(4)["b"]["c"]),
        (base["b"]["c"], noise(3, root_key(1))["b"]["c"]),
    ]
    for one, other in others:
        correlation = np.corrcoef(one, other)[0, 1]
        assert abs(correlation) < 5 / np.sqrt(2048)


def test_noise_depends_on_both_halves_of_the_key():
    key = root_key(0)
    other = root_key(1)
    for mixed in (jnp.stack([key[0], other[1]]), jnp.stack([other[0], key[1]])):
        assert not np.array_equal(noise(0, mixed)["a"], noise(0, key)["a"])


def test_streams_of_one_step_differ():
    other = add_noise(SHAPES, key=KEY, step=3, stddev=1.0, stream=1)
    correlation = np.corrcoef(noise(3)["b"]["c"], other["b"]["c"])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(2048)


def test_replayed_step_draws_the_same_noise_bitwise():
    jax.tree.map(np.testing.assert_array_equal, noise(7), noise(7))
    traced = jax.jit(noise)(jnp.int32(7), root_key(0))
    jax.tree.map(np.testing.assert_array_equal, traced, jax.jit(noise)(7, root_key(0)))


@pytest.mark.parametrize(
    ("stddev", "step"),
    thinned(itertools.product([1.0, 1.7, 3e-9, 6e11], FAR_STEPS), 3),
)
def test_noise_is_that_of_the_slow_reference(step, stddev):
    """Each coordinate of 40 leaves, to the last place of what is released."""
    tree = filled(FORTY, stddev)
    for stream in (0, 5):
        parts = [(stddev, stream)]
        expected = reference_sum(tree, key=KEY, step=step, parts=parts)
        found = add_noise(tree, key=KEY, step=step, stddev=stddev, stream=stream)
        check_rounded(flat(found), expected, unit=reference_noise.grid(stddev))


def test_noise_before_rounding_is_that_of_the_slow_reference():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros((200, 50))}
    found = noise_like(tree, key=KEY, step=jnp.int32(9), stddev=1.7)
    expected = reference_sum(tree, key=KEY, step=9, parts=[(1.7, 0)])
    np.testing.assert_allclose(flat(found), expected, atol=2e-6)


def words_up_to(tail):
    """Words from the end of the tail inwards."""
    near = np.geomspace(1, tail, 3000).astype(np.uint32)
    return jnp.asarray(np.concatenate([np.arange(16, dtype=np.uint32), near]))


def test_deviates_are_normal_quantiles_into_the_tails(monkeypatch):
    words = words_up_to(2**32 - 1)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: words)
    found = np.asarray(noise_module._deviates(KEY[0], 0, words.shape), np.float64)
    far = scipy.special.ndtri((np.asarray(words >> 1) + 0.5) / 2.0**32)
    expected = np.where(np.asarray(words) % 2, -far, far)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert found.max() > 6.3


def test_without_noise_nothing_is_rounded():
    tree = {"a": jnp.array([0.1, -3e-20, 1e30])}
    found = jax.jit(add_noise)(tree, key=KEY, step=0, stddev=0.0)
    np.testing.assert_array_equal(found["a"], tree["a"])


@pytest.mark.parametrize("stddev", [np.nan, np.inf, 1e-38])
def test_noise_without_a_grid_is_nan(stddev):
    """Never a sum without its noise: a denormal is flushed to 0 by many a machine."""
    found = jax.jit(add_noise)({"a": jnp.ones(5)}, key=KEY, step=0, stddev=stddev)
    assert np.isnan(found["a"]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_large_sums_are_rounded_to_floats_of_the_exact_sum(dtype):
    """Where floats are further apart than the grid, the nearest float comes out."""
    with jax.enable_x64(dtype == jnp.float64):
        tree = {"a": jnp.asarray([-1e8, 3e8 + 64, 1e12], dtype)}
        found = add_noise(tree, key=KEY, step=1, stddev=1.7)["a"]
        assert found.dtype == dtype
        expected = reference_sum(tree, key=KEY, step=1, parts=[(1.7, 0)])
    unit = np.maximum(
        np.spacing(np.abs(np.asarray(tree["a"]))), reference_noise.grid(1.7)
    )
    assert (np.abs(np.asarray(found, np.float64) - expected) <= 0.51 * unit).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_noise_needs_room_for_its_last_bits(dtype):
    with pytest.raises(ValueError, match=f"dtype={jnp.dtype(dtype)} .* float32"):
        add_noise({"a": jnp.zeros(3, dtype)}, key=KEY, step=0, stddev=1.0)


def test_grids_are_powers_of_two_next_to_the_noise():
    for stddev in (1.0, 1.999, 2.0, 3e-20, 7e20):
        unit = float(jax.jit(grid)(stddev))
        assert unit == reference_noise.grid(np.float32(stddev))
        assert stddev / 2048 < unit <= stddev / 1024
        assert np.frexp(unit)[0] == 0.5


def test_what_comes_out_is_a_multiple_of_the_grid_whatever_went_in():
    tree = {"a": jnp.asarray(np.random.default_rng(0).normal(size=4000), jnp.float32)}
    for stddev in (1.7, 30.0):
        found = add_noise(tree, key=KEY, step=0, stddev=stddev)["a"]
        cells = np.asarray(found, np.float64) / float(grid(stddev))
        np.testing.assert_array_equal(cells, np.round(cells))


def test_noise_is_the_same_for_every_sharding():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(noise, out_shardings=spread)(5, root_key(0))
    single = jax.jit(noise)(5, root_key(0))
    jax.tree.map(np.testing.assert_array_equal, sharded, single)


def test_root_keys_from_the_os_hold_128_fresh_bits():
    keys = np.stack([jax.random.key_data(root_key()) for _ in range(64)])
    assert keys.dtype == np.uint32
    assert keys.shape == (64, 2, 2)
    assert len(np.unique(keys)) == keys.size
    ones = np.unpackbits(keys.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(keys.size * 32)


def test_numpy_global_state_does_not_decide_the_key():
    np.random.seed(0)  # noqa: NPY002 (what it must not influence)
    first = jax.random.key_data(root_key())
    np.random.seed(0)  # noqa: NPY002 (what it must not influence)
    assert not np.array_equal(first, jax.random.key_data(root_key()))


def test_several_streams_are_those_that_are_named():
    tree = {"w": jnp.zeros(16)}
    found = noise_module.noisy_sum(
        ClippedSum.zeros(tree, l2_bound=1.0),
        l2_bound=1.0,
        stddev=1.0,
        key=KEY,
        step=3,
        streams=range(2, 4),
    )
    expected = tree
    for stream in (2, 3):
        expected = add_noise(expected, key=KEY, step=3, stddev=1.0, stream=stream)
    np.testing.assert_array_equal(found["w"], expected["w"])
