"""Bounds against an independent implementation, golden numbers and simulations."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from jax_privacy import auditing

from dpjax.audit import estimators, one_run
from dpjax.audit.estimators import Counts


def oracle(counts):
    """jax-privacy 2.0's auditor, with 0/1 scores that give these counts."""
    tp, fn, fp, tn = counts
    return auditing.CanaryScoreAuditor(
        np.r_[np.ones(tp), np.zeros(fn)], np.r_[np.ones(fp), np.zeros(tn)]
    )


counts_of = st.integers(0, 400)


@given(counts_of, counts_of, st.sampled_from([1e-5, 0.01]))
def test_epsilon_bound_is_that_of_jax_privacy(tp, fp, delta):
    counts = Counts(tp, 400 - tp, fp, 400 - fp)
    ours = estimators.epsilon_lower_bound(counts, delta=delta, confidence=0.95)
    theirs = oracle(counts).epsilon_clopper_pearson(
        0.05, delta, one_sided=False, threshold_strategy=auditing.Explicit(0.5)
    )
    assert ours == pytest.approx(theirs, abs=1e-6)


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from([1e-5, 0.001]))
def test_one_run_bound_is_that_of_jax_privacy(tp, fp, delta):
    guesses = tp + fp
    ours = one_run.epsilon_lower_bound(
        canaries=600, guesses=guesses, correct=tp, delta=delta, confidence=0.95
    )
    theirs = oracle((tp, 300 - tp, fp, 300 - fp)).epsilon_one_run(
        0.05, delta, threshold_strategy=auditing.Explicit(0.5)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_rate_bounds_are_those_of_scipy():
    for k, n in ((0, 10), (3, 10), (10, 10), (57, 300)):
        exact = scipy.stats.binomtest(k, n).proportion_ci(0.9, method="exact")
        lower, upper = estimators.rate_bounds(k, n, confidence=0.95)
        assert (lower, upper) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_gaussian_epsilon_is_that_of_the_accountant():
    # dp_accounting's PLD of one Gaussian of noise multiplier 1, at delta 1e-5.
    assert estimators.gdp_epsilon(1.0, delta=1e-5) == pytest.approx(4.3772, abs=1e-3)
    assert estimators.gdp_epsilon(0.0, delta=1e-5) == 0
    assert estimators.gdp_epsilon(math.inf, delta=1e-5) == math.inf
    assert estimators.gdp_epsilon(0.1, delta=0.5) == 0


def test_bounds_hold_as_often_as_they_say():
    rng = np.random.default_rng(0)
    mu, delta, runs, misses = 1.0, 1e-3, 400, np.zeros(3)
    epsilon = estimators.gdp_epsilon(mu, delta=delta)
    grid = np.linspace(-2, 3, 20)
    for _ in range(runs):
        inside, outside = rng.normal(mu, 1, 200), rng.normal(0, 1, 200)
        given_ = {"delta": delta, "confidence": 0.9}
        counts, gaussian = (
            estimators.split(inside, outside, bound, confidence=0.9)
            for bound in (estimators.epsilon_at(delta), estimators.mu_of)
        )
        misses += [
            estimators.epsilon_lower_bound(counts, **given_) > epsilon,
            estimators.gdp_lower_bound(gaussian, **given_) > epsilon,
            estimators.bonferroni(inside, outside, grid, **given_) > epsilon,
        ]
    assert (misses <= 0.1 * runs + 3 * math.sqrt(0.09 * runs)).all(), misses


def test_a_threshold_chosen_on_the_same_scores_is_biased_and_split_is_not():
    rng = np.random.default_rng(1)
    biased = honest = 0
    for _ in range(200):
        # Nothing to tell apart: epsilon is 0.
        inside, outside = rng.normal(size=(2, 100))
        given_ = {"delta": 0.0, "confidence": 0.8}
        bound = estimators.epsilon_at(0.0)
        best = estimators.best_threshold(inside, outside, bound, confidence=0.8)
        counts = estimators.count(inside, outside, threshold=best)
        biased += estimators.epsilon_lower_bound(counts, **given_) > 0
        counts = estimators.split(inside, outside, bound, confidence=0.8)
        honest += estimators.epsilon_lower_bound(counts, **given_) > 0
    assert biased > 0.3 * 200
    assert honest < 0.2 * 200 + 3 * math.sqrt(0.16 * 200)


def test_delta_bound_is_the_same_inequality():
    counts = Counts(300, 100, 30, 370)
    epsilon = estimators.epsilon_lower_bound(counts, delta=0.01, confidence=0.95)
    rates = estimators.rates(counts, confidence=0.95)
    (shown,) = estimators.delta_at([epsilon], *rates)
    assert shown == pytest.approx(0.01, abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_trials_needed_is_the_least_that_can_refute(epsilon):
    given_ = {"delta": 1e-5, "confidence": 0.99}
    n = estimators.trials_needed(epsilon=epsilon, **given_)
    assert (
        estimators.epsilon_lower_bound(Counts(n, 0, 0, n), **given_) >= epsilon - 1e-9
    )
    fewer = Counts(n - 1, 0, 0, n - 1)
    assert estimators.epsilon_lower_bound(fewer, **given_) < epsilon


def test_one_run_counts_the_most_confident_guesses():
    scores = np.r_[np.arange(100), -np.arange(100)]
    members = np.r_[np.ones(100, bool), np.zeros(100, bool)]
    bound = one_run.audit(scores, members, guesses=100, delta=1e-5, confidence=0.95)
    perfect = one_run.epsilon_lower_bound(
        canaries=200, guesses=100, correct=100, delta=1e-5, confidence=0.95
    )
    assert bound == perfect > 2
    m = one_run.canaries_needed(epsilon=3.0, delta=1e-5, confidence=0.95)
    full = {"canaries": m, "guesses": m, "correct": m}
    assert one_run.epsilon_lower_bound(**full, delta=1e-5, confidence=0.95) > 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimators.count([1, 2], [1], threshold=0), "arrays of one length"),
        (lambda: estimators.count([math.nan], [1], threshold=0), "scores hold NaN"),
        (
            lambda: estimators.rates(Counts(1, 1, 1, 1), confidence=1.0),
            "confidence=1.0",
        ),
        (
            lambda: estimators.split([1.0], [0.0], estimators.mu_of, confidence=0.9),
            "at least 2 are needed",
        ),
        (
            lambda: one_run.audit([1, 2], [True], guesses=2, delta=0, confidence=0.9),
            "arrays of one length",
        ),
        (
            lambda: one_run.audit([1, 2], [1, 0], guesses=4, delta=0, confidence=0.9),
            "guesses=4 must be even and at most the 2 canaries",
        ),
        (
            lambda: one_run.p_value(
                canaries=3, guesses=2, correct=3, epsilon=1, delta=0
            ),
            "correct=3, guesses=2",
        ),
        (
            lambda: one_run.canaries_needed(epsilon=8.0, delta=0.1, confidence=0.95),
            "cannot be refuted in one run",
        ),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
