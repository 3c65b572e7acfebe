"""AdaptiveDpSgd: the clip norm goes to the quantile, at the price of DP-SGD."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.clipping import vmap
from dpjax.clipping.arithmetic.factors import centred_count
from dpjax.mechanisms.adaptive_dp_sgd import ClipNormState
from dpjax.privacy.sensitive import ClippedSum
from tests.checks import batch_of, check_joint_release
from tests.contracts.test_mechanisms import adaptive, dp_sgd

ROOT = dpjax.root_key(0)


def linear(params, example, key):
    del key
    return params @ example["x"]


def state_of(clip_norm):
    return ClipNormState(jnp.float32(clip_norm))


def next_clip_norm(mechanism, count, clip_norm=0.5):
    zeros = ClippedSum.zeros({"w": jnp.zeros(2)}, l2_bound=clip_norm, count=True)
    clipped = dataclasses.replace(zeros, count=jnp.float32(count))
    state = state_of(clip_norm)
    _, state = mechanism.release(clipped, state, None, key=ROOT, step=0)
    return float(state.clip_norm)


@pytest.mark.parametrize("count", [-50.0, 0.0, 20.0, 45.5])
def test_the_update_is_the_published_one(count):
    """100 examples expected, of which 50 + count are within the norm."""
    silent = adaptive(noise_multiplier=0.0)
    expected = 0.5 * math.exp(-0.2 * ((50 + count) / 100 - 0.7))
    assert next_clip_norm(silent, count) == pytest.approx(expected, rel=1e-6)


def test_the_clip_norm_stays_within_its_bounds():
    near = adaptive(
        noise_multiplier=0.0, min_clip_norm=0.49, max_clip_norm=0.52, steps=3
    )
    assert next_clip_norm(near, 50) == pytest.approx(0.49)
    assert next_clip_norm(near, -50) == pytest.approx(0.52)


@pytest.mark.parametrize(
    "sampling",
    [dpjax.Poisson(rate=0.1), dpjax.ShuffledFixed(batch_size=100)],
    ids=["add or remove", "zero out"],
)
def test_sum_and_count_together_cost_one_gaussian(sampling):
    check_joint_release(adaptive(sampling=sampling))


def test_noise_of_the_sum_is_the_published_one():
    """Andrew et al. 2021, Theorem 1: (z^-2 - (2 sigma_b)^-2)^(-1/2)."""
    for z, size in ((1.0, 100.0), (0.5, 100.0), (4.0, 100.0)):
        mechanism = adaptive(noise_multiplier=z, count_share=(10 * z / size) ** 2)
        sigma = mechanism.count_stddev
        assert sigma == pytest.approx(size / 20)
        published = (z**-2 - (2 * sigma) ** -2) ** -0.5
        assert mechanism.noise_stddev(1.0) == pytest.approx(published)


def test_epsilon_is_that_of_dp_sgd():
    assert adaptive().event() == dp_sgd().event()
    assert adaptive(count_share=0.9).event(7) == dp_sgd().event(7)


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
@pytest.mark.parametrize(("start", "quantile"), [(20.0, 0.5), (0.01, 0.8)])
def test_the_clip_norm_goes_to_the_quantile(start, quantile, noise_multiplier):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(256, 3)) * np.exp(rng.normal(size=(256, 1)))
    norms = np.linalg.norm(vectors, axis=1)
    mechanism = adaptive(
        initial_clip_norm=start,
        max_clip_norm=100.0,
        target_quantile=quantile,
        noise_multiplier=noise_multiplier,
        count_share=0.02,
        sampling=dpjax.FullBatch(),
        num_examples=256,
        steps=200,
    )
    batch = batch_of({"x": jnp.asarray(vectors, jnp.float32)})
    params = jnp.zeros(3)

    def step(state, number):
        query = mechanism.query("gradient", params, state)
        clipped, _ = vmap(linear, query, batch, jax.random.key(0))
        clipped = query.empty().merge(clipped)
        mean, state = mechanism.release(clipped, state, params, key=ROOT, step=number)
        return state, mean

    scanned = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(200)))
    state, means = scanned(mechanism.init(params))
    assert np.isfinite(means).all()
    within = np.mean(norms <= float(state.clip_norm))
    assert abs(within - quantile) < 0.01 + 0.05 * noise_multiplier


def test_it_trains_through_private_and_counts_over_chunks():
    """The count of a step is that of its chunks together."""
    mechanism = adaptive(noise_multiplier=0.0, num_examples=8, sampling=FULL, steps=2)
    transform = dpjax.private(mechanism, optax.sgd(1.0), noise_key=ROOT)
    params = jnp.zeros(2)
    state = transform.init(params)
    lengths = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9], np.float32)
    x = np.stack([lengths, np.zeros(8, np.float32)], axis=1)
    query = mechanism.query("gradient", params, state.mechanism)
    total = query.empty()
    engine = jax.jit(vmap, static_argnums=0)
    for mask in (np.arange(8) < 3, np.arange(8) >= 3):
        batch = batch_of({"x": x}, mask=mask)
        total = total.merge(engine(linear, query, batch, jax.random.key(0))[0])
    updates, state = jax.jit(transform.update)(total, state, params)
    clipped = np.minimum(lengths, 0.5)
    np.testing.assert_allclose(updates, [-clipped.mean(), 0.0], rtol=1e-5, atol=1e-7)
    expected = 0.5 * math.exp(-0.2 * (4 / 8 - 0.7))
    assert float(state.mechanism.clip_norm) == pytest.approx(expected, rel=1e-6)


FULL = dpjax.FullBatch()


def test_a_sum_without_a_count_is_refused():
    clipped = ClippedSum.zeros({"w": jnp.zeros(2)}, l2_bound=0.5)
    with pytest.raises(TypeError, match="no count; ask with Query"):
        adaptive().release(clipped, state_of(0.5), None, key=ROOT, step=0)


def test_a_sum_clipped_for_another_step_spoils_the_clip_norm_too():
    mechanism, params = adaptive(), {"w": jnp.zeros(2)}
    clipped = mechanism.query("gradient", params, state_of(0.6)).empty()
    mean, state = mechanism.release(clipped, state_of(0.5), None, key=ROOT, step=0)
    assert np.isnan(mean["w"]).all()
    assert np.isnan(state.clip_norm)


def test_padding_counts_as_nothing_so_one_example_moves_the_count_by_a_half():
    norms = jnp.float32([1.0, 3.0, 0.0, 9.0, jnp.nan])
    for filled, expected in (
        (0, 0.0),
        (1, 0.5),
        (2, 0.0),
        (3, 0.5),
        (4, 0.0),
        (5, -0.5),
    ):
        mask = jnp.arange(5) < filled
        assert centred_count(norms, mask=mask, clip_norm=2.0) == expected
