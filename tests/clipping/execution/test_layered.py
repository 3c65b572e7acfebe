"""Weights that a loop over layers uses in turn: no layer's gradient waits for the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, bookkeeping, vmap
from dpjax.clipping.analysis.uses import analyse
from dpjax.clipping.arithmetic.rounding import row_norms
from dpjax.clipping.execution import layered
from dpjax.clipping.execution.passes import Inputs, first_backward
from dpjax.clipping.planning.costs import saved_bytes
from dpjax.clipping.planning.plan import make_plan
from dpjax.clipping.planning.slots import find_slots
from dpjax.privacy.sensitive import reveal
from tests.checks import assert_close, batch_of, norm

KEY = jax.random.key(0)
LAYERS, LENGTH, WIDTH, RANK = 3, 16, 8, 2


def adapters(params, example, key):
    """Two thin factors a layer, long sequences: gradients are smaller than what makes them."""

    def layer(x, weights):
        change = (x @ weights["a"]) @ weights["b"]
        return jnp.tanh(x + change + weights["bias"][None]), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), example["x"], params)
    return jnp.sum(jnp.square(x))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "a": normal(LAYERS, WIDTH, RANK),
        "b": normal(LAYERS, RANK, WIDTH),
        "bias": normal(LAYERS, WIDTH),
    }
    batch = batch_of({"x": normal(6, LENGTH, WIDTH)}, mask=np.arange(6) < 5)
    return params, batch


def test_gradients_that_are_kept_are_formed_in_the_loop(case):
    params, batch = case
    query = Query((params,), clip_norm=0.1)
    program = analyse(adapters, query, batch, KEY)
    plan = make_plan(find_slots(program), saved_bytes)
    assert plan.formed == program.sites.keys()
    # Nothing as long as a sequence is left when the loop has ended, for any layer.
    left = jax.eval_shape(
        lambda leaves, batch, keys: first_backward(
            program, plan, Inputs(leaves, batch, keys)
        ),
        jax.tree.leaves(params),
        batch.examples,
        jax.random.split(KEY, 6),
    )
    assert left.factors == {}
    assert not [x for x in jax.tree.leaves(left) if LENGTH in x.shape]


@pytest.mark.parametrize("residual", [False, True])
def test_their_norms_and_sums_are_those_of_per_example_gradients(case, residual):
    params, batch = case
    query = Query((params,), clip_norm=0.1, residual=residual)
    (found, seen), (true, norms) = (
        jax.jit(engine, static_argnums=0)(adapters, query, batch, KEY)
        for engine in (bookkeeping, vmap)
    )
    for ours, theirs in ((found.total, true.total), (found.residual, true.residual)):
        if theirs is not None:
            assert_close(ours, theirs, rtol=1e-5, scale=norm(theirs))
    np.testing.assert_allclose(reveal(seen)["norms"], reveal(norms)["norms"], rtol=1e-5)


def test_an_example_that_is_not_finite_leaves_the_others_as_they_are(case):
    params, batch = case
    query = Query((params,), clip_norm=0.1)
    x = np.array(batch.examples["x"])
    x[2] = np.nan
    spoilt = batch_of({"x": x}, mask=batch.mask)
    without = batch_of(batch.examples, mask=batch.mask & (np.arange(6) != 2))
    run = jax.jit(bookkeeping, static_argnums=0)
    found, _ = run(adapters, query, spoilt, KEY)
    expected, _ = run(adapters, query, without, KEY)
    assert_close(found.total, expected.total, rtol=1e-6, scale=norm(expected.total))


@pytest.mark.parametrize("loops", [1, 2])
def test_norms_over_the_turns_of_loops_are_never_too_small(loops):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(*(3, 2)[:loops], 4, 5, 7)).astype(np.float32)
    scales = 10.0 ** np.arange(-18, 18, 9).reshape(4, 1, 1)
    rows = (rows * scales).astype(np.float32)
    found = layered.formed_norms(jnp.asarray(rows), loops=loops)
    moved = np.moveaxis(rows, loops, 0).reshape(4, -1).astype(np.float64)
    true = np.square(moved).sum(axis=1)
    assert (np.asarray(found.squares, np.float64) + found.slack >= true).all()
    alone = row_norms(jnp.asarray(moved, jnp.float32))
    np.testing.assert_allclose(found.longest, alone.longest, rtol=1e-4)
    weights = jnp.array([1.0, 0.0, 2.0, 0.5])
    total = layered.formed_sum(jnp.asarray(rows), weights, loops=loops)
    expected = np.tensordot(weights, np.moveaxis(rows, loops, 0), axes=1)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
