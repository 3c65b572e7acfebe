"""diff2() alone, as an optax transform of plain mean gradients and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.mechanisms.mathematics.differences import distance

PARAMS = {"w": jnp.arange(3.0), "b": jnp.float32(1.0)}


def objective(params):
    return jnp.sum(jnp.cosh(params["w"])) + jnp.square(params["b"] * params["w"][0])


def trajectory(transform, *, restart_every, steps=7):
    """Gradients by differences, as ``diff2_query`` asks for them."""
    params, state = PARAMS, transform.init(PARAMS)
    update = jax.jit(transform.update)
    seen, restarts = [], []
    for _ in range(steps):
        asked = dpjax.diff2_query(state[0], params, restart_every=restart_every)
        gradient = jax.grad(objective)(params)
        if not asked.restart:
            before = jax.grad(objective)(asked.reference)
            gradient = jax.tree.map(jnp.subtract, gradient, before)
        updates, state = update(gradient, state, params, value=1.0, odd_one=2)
        params = optax.apply_updates(params, updates)
        seen.append(params)
        restarts.append(bool(asked.restart))
    assert update._cache_size() == 1
    return seen, restarts


@pytest.mark.parametrize("restart_every", [1, 3, 100])
@pytest.mark.parametrize("optimizer", [optax.sgd(0.05), optax.adam(0.05)])
def test_exact_differences_give_the_gradient_step_by_step(restart_every, optimizer):
    chain = optax.chain(dpjax.diff2(restart_every=restart_every), optimizer)
    found, restarts = trajectory(chain, restart_every=restart_every)
    assert restarts == [step % restart_every == 0 for step in range(7)]
    params, state = PARAMS, optimizer.init(PARAMS)
    for each in found:
        updates, state = optimizer.update(jax.grad(objective)(params), state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), each, params
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_type_stable_and_sums_in_float32(dtype):
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    transform = dpjax.diff2(restart_every=3)
    state = transform.init(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(4):
        _, state = jax.jit(transform.update)(params, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == types
    assert state.estimate["w"].dtype == jnp.float32
    assert int(state.count) == 4


def test_a_restart_forgets_an_estimate_that_is_not_finite():
    transform = dpjax.diff2(restart_every=2)
    state = transform.init(PARAMS)
    state = state._replace(estimate=jax.tree.map(lambda p: p * jnp.nan, PARAMS))
    out, _ = transform.update(PARAMS, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, out, PARAMS)


def test_the_state_shares_no_buffer_with_the_parameters():
    state = dpjax.diff2(restart_every=2).init(PARAMS)
    donate = jax.jit(lambda p, s: (p, s), donate_argnums=(0, 1))
    donate(jax.tree.map(jnp.copy, PARAMS), state)


def test_distance_is_exact_at_zero_and_float32():
    moved = jax.tree.map(lambda p: p + 1, PARAMS)
    assert distance(PARAMS, PARAMS) == 0.0
    assert distance(moved, PARAMS) == 2.0
    assert distance(moved, PARAMS).dtype == jnp.float32


def test_wrong_use_is_one_clear_line():
    with pytest.raises(
        ValueError, match="restart_every=0 must be an integer of at least 1"
    ):
        dpjax.diff2(restart_every=0)
    transform = dpjax.diff2(restart_every=2)
    with pytest.raises(ValueError, match="diff2 needs params"):
        transform.update(PARAMS, transform.init(PARAMS))
