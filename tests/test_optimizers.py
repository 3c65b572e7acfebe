import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.optimizers import sgdw, tunable_sgd


def test_sgdw_follows_its_formula():
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    optimizer = sgdw(learning_rate=schedule, momentum=0.9, weight_decay=0.01)
    params, state = jnp.float32(2.0), optimizer.init(jnp.float32(2.0))
    expected, moment = 2.0, 0.0
    for step, gradient in enumerate([1.0, -0.5, 0.25]):
        updates, state = optimizer.update(jnp.float32(gradient), state, params)
        params = optax.apply_updates(params, updates)
        moment = 0.9 * moment + gradient
        expected -= float(schedule(step)) * (moment + 0.01 * expected)
        assert float(params) == pytest.approx(expected, rel=1e-6)


def test_decay_alone_shrinks_the_parameters():
    optimizer = sgdw(learning_rate=1.0, momentum=0.0, weight_decay=0.1)
    params = jnp.full(3, 2.0)
    updates, _ = optimizer.update(jnp.zeros(3), optimizer.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates), 1.8, rtol=1e-6)


def test_tunable_sgd_has_one_program_for_all_rates():
    params, gradients = jnp.ones(3), jnp.full(3, 2.0)
    texts = []
    for rate in (0.5, 0.25):
        optimizer = tunable_sgd(learning_rate=rate)
        state = optimizer.init(params)
        updates, _ = optimizer.update(gradients, state)
        np.testing.assert_allclose(updates, -rate * gradients)
        texts.append(jax.jit(optimizer.update).lower(gradients, state).as_text())
    assert texts[0] == texts[1]
