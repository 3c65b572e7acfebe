import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from dpjax.optimizers import evaluation_params, owning, sgdw, tunable_sgd
from dpjax.training.train import train
from tests.containers import doubled
from tests.runs import exported, tiny


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


def test_schedule_free_is_evaluated_at_its_average(tmp_path):
    schedule_free = {"name": "optax.contrib:schedule_free_sgd", "learning_rate": 0.5}
    config = tiny(optimizer=schedule_free, **{"evaluation.ema_decay": 0.0})
    state = train(config, tmp_path)
    inner = state.private.optimizer
    wanted = optax.contrib.schedule_free_eval_params(inner, state.params)
    found = exported(tmp_path)
    jax.tree.map(np.testing.assert_allclose, found, wanted)
    apart = optax.tree.norm(optax.tree.sub(wanted, state.params))
    assert apart > 0.01 * optax.tree.norm(wanted)


def test_what_is_evaluated_is_found_wherever_it_is():
    params = {"one": jnp.ones(3), "other": jnp.full(2, 4.0)}
    free = optax.contrib.schedule_free_sgd(learning_rate=0.03)
    parts = optax.partition(
        {"free": free, "plain": optax.adam(0.1)}, {"one": "free", "other": "plain"}
    )
    optimizer = optax.chain(optax.clip(1.0), parts)
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    inner = state[1].inner_states["free"].inner_state
    found = evaluation_params(state, params)
    wanted = (params["one"] - 0.1 * inner.z["one"]) / 0.9
    np.testing.assert_allclose(found["one"], wanted, rtol=1e-6)
    assert found["other"] is params["other"]
    own = doubled(learning_rate=0.1)
    found = evaluation_params(own.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), found, params)


def test_the_moving_average_is_of_what_the_optimizer_evaluates(tmp_path):
    optimizer = {"name": "tests.containers:doubled", "learning_rate": 1e-6}
    state = train(tiny(optimizer=optimizer), tmp_path)
    # Parameters that hardly move, and an average that began at them.
    ratio = optax.tree.norm(state.average) / optax.tree.norm(state.params)
    assert 1.5 < ratio < 2.0001


def test_a_state_is_made_of_strongly_typed_arrays_that_can_be_donated():
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"start": params, "twice": (zeros, zeros), "rate": 0.5, "count": 0}

    def update(updates, state, params=None):
        return updates, {**state, "count": state["count"] + 1}

    optimizer = owning(optax.GradientTransformation(init, update))
    params = {"w": jnp.ones(3), "low": jnp.ones(2, jnp.bfloat16)}
    state = optimizer.init(params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert state["start"]["low"].dtype == jnp.float32
    step = jax.jit(optimizer.update, donate_argnums=(1, 2))
    gradient = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    for count in (1, 2):
        _, state = step(gradient, state, jax.tree.map(jnp.copy, params))
        assert int(state["count"]) == count
    assert step._cache_size() == 1
    with pytest.raises(ValueError, match=r"optimizer=0\.5 must be an optax transform"):
        owning(0.5)
