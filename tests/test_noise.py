"""Noise: a function of (root key, step, leaf), and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from dpjax.noise import add_noise, root_key

KEY = root_key(0)
SHAPES = {"a": jnp.zeros((64, 32)), "b": {"c": jnp.zeros(2048), "d": jnp.zeros(2048)}}


def noise(step, key=KEY, tree=SHAPES):
    return add_noise(tree, key=key, step=step, stddev=1.0)


def test_noise_is_standard_normal_to_the_tails():
    values = np.concatenate(
        [np.ravel(x) for s in range(20) for x in jax.tree.leaves(noise(s))]
    )
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4
    # P(|Z| > 3.5) = 4.65e-4; a generator cut short at 23 bits still has these tails.
    tail = np.mean(np.abs(values) > 3.5)
    assert abs(tail - 4.65e-4) < 5 * np.sqrt(4.65e-4 / len(values))


def test_no_value_repeats_over_leaves_steps_and_keys():
    trees = [noise(s, root_key(k)) for s in range(5) for k in (0, 1)]
    values = np.concatenate([np.ravel(x) for t in trees for x in jax.tree.leaves(t)])
    # Float32 sums collide now and then by chance; a reused stream would halve the count.
    assert len(np.unique(values)) > 0.99 * len(values)


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
