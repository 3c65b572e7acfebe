"""Randomness inside the loss: nobody's depends on who else is there, or on where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax.clipping import ENGINES, Query, plain
from dpjax.clipping.execution.keys import example_keys
from dpjax.data.arrays import ArraySource
from tests.checks import batch_of

PUBLIC = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 8)).astype(np.float32)
W = jnp.asarray(RNG.normal(size=(8, 64)), jnp.float32)


def worst(params, example, key):
    """The gradient is of norm 1 in a direction that the key alone chooses."""
    del example
    direction = jax.random.normal(key, params.shape)
    return jnp.vdot(params, direction) / jnp.linalg.norm(direction)


def dropout(params, example, key):
    kept = jax.random.bernoulli(key, 0.5, (params.shape[1],))
    return jnp.sum(jnp.tanh(example["x"] @ params) * kept)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", [worst, dropout])
def test_without_an_example_the_others_contribute_the_same(loss, engine):
    """The key is public: that it is not secret must not matter (it did, 12 C and more)."""
    grad = jax.jit(dpjax.clipped_grad(loss, clip_norm=0.5, engine=engine))
    whole = grad(W, {"x": X}, PUBLIC)[0].total
    for gone in (0, 5):
        others, _ = grad(W, {"x": np.delete(X, gone, axis=0)}, PUBLIC)
        alone, _ = grad(W, {"x": X[[gone]]}, PUBLIC)
        np.testing.assert_allclose(others.total + alone.total, whole, atol=1e-5)
        assert jnp.linalg.norm(whole - others.total) <= 0.5 * (1 + 1e-4)


def test_so_do_they_in_the_batches_of_a_source_and_without_privacy():
    query = Query((W,), clip_norm=jnp.inf)

    def total(x):
        plan = dpjax.NonPrivate(
            sampling=dpjax.FullBatch(), steps=1, num_examples=len(x), delta=1e-5
        )
        (step,) = dpjax.batches(
            ArraySource({"x": x}), plan, seed=1, physical_batch_size=16
        )
        return plain(dropout, query, step.chunks[0], PUBLIC)[0].total

    np.testing.assert_allclose(total(X[1:]) + total(X[:1]), total(X), atol=1e-4)


EXAMPLES = {
    "one bit": np.eye(256, dtype=bool),
    "few floats": np.eye(64, dtype=np.float32).reshape(64, 8, 8),
    "round floats": np.arange(1024, dtype=np.float32)[:, None] * np.ones(3, np.float32),
    "tokens": RNG.permuted(np.tile(np.arange(8), (500, 1)), axis=1),
    "labels": np.arange(1000),
    "bf16": jnp.arange(200, dtype=jnp.bfloat16),
    "complex": np.exp(1j * np.arange(100)).astype(np.complex64),
    "several arrays": {"x": np.zeros((50, 3)), "y": {"label": np.arange(50)}},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_that_differ_have_keys_that_differ(name):
    columns = jax.tree.map(np.asarray, EXAMPLES[name])
    size = len(jax.tree.leaves(columns)[0])
    different = {
        tuple(x[i].tobytes() for x in jax.tree.leaves(columns)) for i in range(size)
    }
    batch = batch_of(columns, index=np.zeros(size, np.int32))
    data = jax.random.key_data(jax.jit(example_keys)(PUBLIC, batch))
    assert len(np.unique(data, axis=0)) == len(different) > size / 2


def test_keys_follow_examples_wherever_they_are_and_change_with_the_step():
    order = RNG.permutation(12)
    here = jax.random.key_data(example_keys(PUBLIC, batch_of({"x": X})))
    moved = batch_of({"x": X[order]}, index=RNG.permutation(99)[:12])
    there = jax.random.key_data(example_keys(PUBLIC, moved))
    np.testing.assert_array_equal(here[order], there)
    later = example_keys(jax.random.key(1), batch_of({"x": X}))
    assert not np.isin(jax.random.key_data(later), here).any()


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_keys_that_vmap_draws_from_for_all_examples_at_once_are_refused(kind):
    grad = dpjax.clipped_grad(lambda p, x, key: p * x, clip_norm=1.0)
    with pytest.raises(TypeError, match=f"key is of the kind '{kind}', by which"):
        grad(jnp.ones(()), jnp.ones(3), jax.random.key(0, impl=kind))
