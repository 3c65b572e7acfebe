"""DpZero: what is particular to slopes along public directions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.clipping import vmap
from dpjax.mechanisms.mathematics.directions import gaussian_direction
from dpjax.privacy.noise import add_noise
from dpjax.privacy.sensitive import ClippedSum
from tests.checks import batch_of
from tests.contracts.test_mechanisms import dp_sgd, dp_zero

KEY = jax.random.key(5)
ROOT = dpjax.root_key(0)


def loss(params, example, key):
    del key
    return jnp.square(jnp.dot(params["w"], example["x"]) + params["b"] - example["y"])


rng = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(rng.normal(size=6), jnp.float32), "b": jnp.float32(0.1)}
EXAMPLES = {
    "x": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=8), jnp.float32),
}


def test_noise_is_half_of_the_published_at_the_same_epsilon():
    """The authors' code adds N(0, (2 sigma C / B)^2) at the sigma of DP-SGD."""
    sigma, clip_norm = 4.0, 0.5
    mechanism = dp_zero(noise_multiplier=sigma, clip_norm=clip_norm)
    assert mechanism.noise_stddev == 2 * sigma * clip_norm / 2
    assert mechanism.event() == dp_sgd(noise_multiplier=sigma).event()


def test_the_noise_is_one_number_along_the_direction():
    mechanism = dp_zero()
    state = mechanism.init(PARAMS)
    empty = mechanism.query("slope", PARAMS, state).empty()
    assert empty.total.shape == ()
    out, after = mechanism.release(empty, state, PARAMS, key=ROOT, step=0)
    drawn = add_noise(jnp.zeros(()), key=ROOT, step=0, stddev=4.0 * 0.5)
    u = gaussian_direction(PARAMS, seed=7, step=0)
    expected = jax.tree.map(lambda u: u * drawn / 100.0, u)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), out, expected)
    assert after.step == 1


def test_a_sum_along_the_direction_of_another_step_is_nan():
    mechanism = dp_zero()
    state = mechanism.init(PARAMS)
    empty = mechanism.query("slope", PARAMS, state).empty()
    out, _ = mechanism.release(empty, state, PARAMS, key=ROOT, step=1)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(out))


def test_without_noise_and_clipping_the_estimate_is_the_gradient_on_average():
    mechanism = dp_zero(
        noise_multiplier=0.0,
        clip_norm=1e6,
        smoothing=1e-2,
        sampling=dpjax.FullBatch(),
        num_examples=8,
    )
    batch = batch_of(EXAMPLES)

    def estimate(step):
        state = mechanism.init(PARAMS)._replace(step=step)
        clipped, _ = vmap(loss, mechanism.query("slope", PARAMS, state), batch, KEY)
        return mechanism.release(clipped, state, PARAMS, key=ROOT, step=step)[0]

    each = jax.jit(jax.vmap(estimate))(jnp.arange(5_000))

    def mean(params):
        return jnp.mean(jax.vmap(loss, (None, 0, None))(params, EXAMPLES, KEY))

    for name, exact in jax.grad(mean)(PARAMS).items():
        error = np.std(each[name], axis=0) / np.sqrt(5_000)
        assert (np.abs(np.mean(each[name], axis=0) - exact) < 5 * error).all()


def test_directions_are_gaussian_and_depend_on_seed_step_and_leaf_alone():
    like = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(2000, jnp.bfloat16)}

    @functools.partial(jax.jit, static_argnums=0)
    def draw(seed, step):
        return gaussian_direction(like, seed=seed, step=step)

    found = [draw(*at) for at in ((0, 0), (0, 1), (1, 0))]
    rows = [np.ravel(x) for u in found for x in jax.tree.leaves(u)]
    assert {row.dtype for row in rows} == {np.dtype("float32")}
    apart = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(apart).max() < 6 / np.sqrt(2000)
    values = np.concatenate(rows)
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / values.size)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_direction_shares_nothing_with_the_noise_of_the_same_seed(seed):
    u = gaussian_direction(jnp.zeros(2000), seed=seed, step=3)
    noise = add_noise(jnp.zeros(2000), key=dpjax.root_key(seed), step=3, stddev=1.0)
    assert abs(np.corrcoef(u, noise)[0, 1]) < 6 / np.sqrt(2000)
    mechanism = dp_zero(direction_seed=seed)
    state = mechanism.init(PARAMS)
    empty = mechanism.query("slope", PARAMS, state).empty()
    one, other = (
        mechanism.release(empty, state, PARAMS, key=dpjax.root_key(k), step=0)[0]["w"]
        for k in (seed, seed + 1)
    )
    assert not np.allclose(one, other)
    assert abs(np.corrcoef(one, other)[0, 1]) > 1 - 1e-6


def test_two_machines_that_share_numbers_only_walk_together():
    """Each sums the slopes of its half; what they send is one number a step."""
    mechanism = dp_zero(sampling=dpjax.FullBatch(), num_examples=8)
    transform = dpjax.private(mechanism, optax.sgd(1e-2), noise_key=ROOT)
    run = jax.jit(vmap, static_argnums=0)
    halves = [batch_of(EXAMPLES, mask=(np.arange(8) < 3) == k) for k in (True, False)]
    params = [PARAMS] * 3
    states = [transform.init(PARAMS)] * 3
    for step in range(3):
        key = jax.random.fold_in(KEY, step)
        queries = [
            mechanism.query("slope", p, s.mechanism)
            for p, s in zip(params, states, strict=True)
        ]
        sums = [run(loss, q, h, key)[0] for q, h in zip(queries, halves, strict=False)]
        both = sums[0].merge(sums[1])
        whole = run(loss, queries[2], batch_of(EXAMPLES), key)[0]
        for i, total in enumerate((both, both, whole)):
            updates, states[i] = transform.update(total, states[i], params[i])
            params[i] = optax.apply_updates(params[i], updates)
    jax.tree.map(np.testing.assert_array_equal, params[0], params[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4), *params[1:])


def test_temporaries_are_two_copies_of_the_parameters_whatever_the_depth():
    def deep(params, example, key):
        del key
        hidden = example["x"]
        for weight in params:
            hidden = jnp.tanh(hidden @ weight)
        return jnp.sum(hidden)

    params = [jnp.zeros((64, 64))] * 12
    batch = batch_of({"x": jnp.zeros((256, 64))})
    size = sum(p.nbytes for p in params)
    activations = 256 * 64 * 4

    def temporaries(mechanism):
        query = mechanism.query(mechanism.phase(0), params, mechanism.init(params))
        run = jax.jit(lambda query: dpjax.clipping.auto(deep, query, batch, KEY))
        compiled = run.lower(query).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    zero, sgd = temporaries(dp_zero()), temporaries(dp_sgd())
    assert zero < 2 * size + 4 * activations
    assert sgd > 12 * activations


def test_sums_that_are_no_slopes_are_refused_and_so_are_missing_params():
    mechanism = dp_zero()
    state = mechanism.init(PARAMS)
    gradients = ClippedSum.zeros(PARAMS, l2_bound=0.5)
    with pytest.raises(TypeError, match="the sum is not one number: ask the engine"):
        mechanism.release(gradients, state, PARAMS, key=ROOT, step=0)
    empty = mechanism.query("slope", PARAMS, state).empty()
    with pytest.raises(ValueError, match="params are missing: the direction"):
        mechanism.release(empty, state, None, key=ROOT, step=0)


@pytest.mark.parametrize("fact", ["clip_norm", "noise_multiplier"])
def test_replacing_a_fact_moves_query_and_noise(fact):
    mechanism = dp_zero()
    doubled = dataclasses.replace(mechanism, **{fact: 2 * getattr(mechanism, fact)})
    assert doubled.noise_stddev == 2 * mechanism.noise_stddev
    cheaper = dpjax.epsilon(doubled) < dpjax.epsilon(mechanism)
    assert cheaper == (fact == "noise_multiplier")
    query = doubled.query("slope", PARAMS, doubled.init(PARAMS))
    assert query.clip_norm == doubled.clip_norm
