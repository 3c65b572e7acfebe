"""BandMf: its noise is the one that is accounted, step by step and all steps together."""

import dataclasses
import functools
import itertools
import math

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import dpjax
from dpjax.mechanisms.mathematics.toeplitz import strategy_column
from dpjax.privacy.sensitive import ClippedSum
from tests.checks import check_correlated
from tests.contracts.test_mechanisms import band_mf, dp_sgd
from tests.mechanisms.mathematics.test_toeplitz import dense

ROOT = dpjax.root_key(0)
PARAMS = {"a": jnp.zeros((60, 100)), "b": {"c": jnp.zeros(3000), "d": jnp.zeros(())}}
EMPTY = ClippedSum.zeros(PARAMS, l2_bound=0.5)


@functools.cache
def step_of(mechanism):
    return jax.jit(
        lambda clipped, state, step: mechanism.release(
            clipped, state, None, key=ROOT, step=step
        )
    )


def noises(mechanism, steps):
    """``[steps, parameters]``: what is released of sums of nothing."""
    state, rows = mechanism.init(PARAMS), []
    for step in range(steps):
        mean, state = step_of(mechanism)(EMPTY, state, step)
        rows.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)]))
    return np.stack(rows)


PLANS = {
    "square root": band_mf(steps=30),
    "mean error": band_mf(steps=30, bands=4, strategy="mean_error"),
    "two bands": band_mf(steps=30, bands=2),
    "all bands": band_mf(
        steps=12, bands=12, sampling=dpjax.CyclicPoisson(cycle=12, rate=1.0)
    ),
    "one band": band_mf(steps=30, bands=1),
}
all_plans = pytest.mark.parametrize("mechanism", PLANS.values(), ids=list(PLANS))


@all_plans
def test_strategy_times_noise_is_white_of_the_accounted_size(mechanism):
    check_correlated(noises(mechanism, mechanism.steps), mechanism)


@pytest.mark.parametrize("name", ["mean error", "all bands", "one band"])
def test_prefix_error_is_that_of_the_noise(name):
    mechanism = PLANS[name]
    sums = np.cumsum(noises(mechanism, mechanism.steps).astype(np.float64), axis=0)
    # Sums of neighbouring steps are alike; 9001 coordinates are independent.
    found = math.sqrt(np.mean(np.square(sums)))
    assert mechanism.rms_prefix_error() == pytest.approx(found, rel=0.02)


def test_one_band_is_dp_sgd_bit_for_bit():
    """Op by op; a compiler may fuse, and so round, the two differently."""
    total = {"w": jnp.linspace(-3.0, 5.0, 400)}
    clipped = dataclasses.replace(ClippedSum.zeros(total, l2_bound=0.5), total=total)
    one, plain = band_mf(bands=1, sampling=dpjax.Poisson(rate=0.1)), dp_sgd()
    state = one.init(total)
    for step in range(3):
        mean, state = one.release(clipped, state, None, key=ROOT, step=step)
        expected, _ = plain.release(clipped, (), None, key=ROOT, step=step)
        jax.tree.map(np.testing.assert_array_equal, mean, expected)
    assert one.event() == plain.event()
    assert dpjax.epsilon(one, steps=7) == dpjax.epsilon(plain, steps=7)


def test_noise_of_a_step_comes_back_with_the_other_sign():
    released = noises(PLANS["square root"], 30)
    correlations = np.corrcoef(released)
    # By hand: w = 1/(1 + x/2 + 3x^2/8) = 1 - .5 x - .125 x^2 + .25 x^3 - ...
    w = np.array([1, -0.5, -0.125, 0.25, -0.078125, -0.0546875, 0.056640625])
    expected = (w[:-1] @ w[1:]) / (w @ w)
    assert correlations[20, 21] == pytest.approx(expected, abs=0.05)


def test_steps_in_the_wrong_order_are_not_released():
    mechanism = PLANS["square root"]
    step = step_of(mechanism)
    start = mechanism.init(PARAMS)
    mean, after = step(EMPTY, start, 0)
    assert np.isfinite(mean["a"]).all()
    for state, wrong in ((start, 1), (after, 0), (after, 2)):
        mean, _ = step(EMPTY, state, wrong)
        assert all(np.isnan(x).all() for x in jax.tree.leaves(mean))


def test_noise_does_not_depend_on_the_sums():
    """Else what is kept of it would be private, and later steps would leak it."""
    mechanism = PLANS["mean error"]
    full = dataclasses.replace(EMPTY, total=jax.tree.map(lambda x: x + 1e6, PARAMS))
    states = [mechanism.init(PARAMS)] * 2
    for step in range(5):
        states = [
            step_of(mechanism)(clipped, state, step)[1]
            for clipped, state in zip((EMPTY, full), states, strict=True)
        ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def log_likelihood_ratio(outputs, turns, *, column, rate, sigma):
    """Of ``C x + sigma z`` with the example over without, summed over its coins."""
    matrix = dense(column, outputs.shape[1])[:, turns]
    terms = []
    for coins in itertools.product([0, 1], repeat=len(turns)):
        mean = matrix @ np.array(coins, float)
        weight = np.prod([rate if coin else 1 - rate for coin in coins])
        ratio = (outputs @ mean - mean @ mean / 2) / sigma**2
        terms.append(np.log(weight) + ratio)
    return scipy.special.logsumexp(terms, axis=0)


@pytest.mark.parametrize(
    ("turns", "covered"), [([0, 2, 4], True), ([0, 1, 2], False)], ids=["cycle", "row"]
)
def test_the_exact_divergence_of_the_mixture_is_what_is_accounted(turns, covered):
    """All coins of one example at once, in n = 6 steps of two bands: no theorem used."""
    rate, sigma, epsilon, count = 0.3, 1.0, 0.5, 400_000
    column = strategy_column("square_root", bands=2, steps=6)
    sampling = dpjax.CyclicPoisson(cycle=2, rate=rate)
    accountant = dp.pld.PLDAccountant()
    accountant.compose(sampling.compose(sigma, steps=6, num_examples=10))
    claimed = accountant.get_delta(epsilon)
    rng = np.random.default_rng(0)
    noise = sigma * rng.normal(size=(count, 6))
    coins = rng.random((count, len(turns))) < rate
    present = noise + coins @ dense(column, 6)[:, turns].T
    ratio = functools.partial(
        log_likelihood_ratio, turns=turns, column=column, rate=rate, sigma=sigma
    )
    losses = {"removed": ratio(present), "added": -ratio(noise)}
    gaps = {
        name: np.maximum(1 - np.exp(epsilon - loss), 0) for name, loss in losses.items()
    }
    worst = max(gaps.values(), key=np.mean)
    error = worst.std() / math.sqrt(count)
    if covered:
        assert worst.mean() == pytest.approx(claimed, abs=5 * error)
    else:
        assert worst.mean() > claimed + 10 * error


def test_batches_in_a_fixed_order_cost_one_gaussian_each_epoch():
    mechanism = band_mf(sampling=dpjax.CyclicPoisson(cycle=10, rate=1.0))
    gaussian = dp.GaussianDpEvent(mechanism.noise_multiplier)
    accountant = dp.pld.PLDAccountant()
    accountant.compose(dp.SelfComposedDpEvent(gaussian, 5))
    assert dpjax.epsilon(mechanism) == pytest.approx(
        accountant.get_epsilon(mechanism.delta), rel=1e-3
    )


def test_the_state_takes_a_band_less_one_of_memory_and_is_not_shown():
    state = band_mf(bands=3).init(PARAMS)
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert sum(x.size for x in jax.tree.leaves(state.recent)) == 2 * size
    assert "Array" not in repr(state)
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for leaf in jax.tree.leaves(band_mf(bands=2).init(small).recent):
        assert leaf.dtype == jnp.float32
