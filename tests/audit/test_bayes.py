"""The posterior of epsilon: the authors' numbers, an oracle, coverage and width."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpjax.audit import bayes, estimators
from dpjax.audit.estimators import Counts


def test_the_readme_case_of_the_authors():
    # microsoft/responsible-ai-toolbox-privacy, README: TP 487, TN 1, FP 512, FN 0, alpha
    # 0.1, delta 1e-5 give [0.145, 6.399]; its solver's tolerance is 1e-2.
    found = bayes.posterior(Counts(487, 0, 512, 1), delta=1e-5, credibility=0.9)
    assert (found.lower, found.upper) == pytest.approx((0.145, 6.399), abs=0.02)


@pytest.mark.parametrize("counts", [(40, 10, 5, 45), (30, 70, 60, 40), (50, 0, 0, 50)])
def test_cdf_is_the_mass_of_the_private_region(counts):
    """Monte Carlo over both rates, from the definition."""
    tp, fn, fp, tn = counts
    delta, rng = 1e-3, np.random.default_rng(0)
    fnr = rng.beta(fn + 0.5, tp + 0.5, 400_000)
    fpr = rng.beta(fp + 0.5, tn + 0.5, 400_000)
    for epsilon in (0.3, 1.0, 3.0):
        grow = np.exp(epsilon)
        inside = (
            (fpr + grow * fnr >= 1 - delta)
            & (fnr + grow * fpr >= 1 - delta)
            & (1 - fpr + grow * (1 - fnr) >= 1 - delta)
            & (1 - fnr + grow * (1 - fpr) >= 1 - delta)
        )
        points = bayes.fnr_quantiles(Counts(*counts))
        ours = bayes.cdf(
            jnp.float32(epsilon), jnp.float32(points), jnp.float32(counts), delta
        )
        assert ours == pytest.approx(inside.mean(), abs=4e-3)


def test_intervals_cover_and_are_narrower_than_counting():
    """90 % intervals on Gaussian mechanisms; issue: at least 88 %."""
    rng, delta, runs = np.random.default_rng(3), 1e-5, 120
    covered, certain, ratios = 0, 0, []
    for _ in range(runs):
        mu, threshold = rng.uniform(0.5, 2.0), rng.uniform(0.0, 1.0)
        tpr, fpr = scipy.stats.norm.sf([threshold - mu, threshold])
        # Epsilon of this attack at its threshold, exactly.
        true = max(np.log((tpr - delta) / fpr), np.log((1 - fpr - delta) / (1 - tpr)))
        tp, fp = rng.binomial(500, [tpr, fpr])
        counts = Counts(tp, 500 - tp, fp, 500 - fp)
        found = bayes.posterior(counts, delta=delta, credibility=0.9)
        covered += found.lower <= true <= found.upper
        low, high = estimators.epsilon_interval(counts, delta=delta, confidence=0.9)
        certain += low <= true <= high
        ratios.append((found.upper - found.lower) / (high - low))
    assert covered >= 0.88 * runs
    assert certain >= 0.9 * runs
    assert 0.5 < np.median(ratios) < 0.8


def test_an_end_beyond_the_largest_epsilon_is_inf():
    found = bayes.posterior(Counts(0, 0, 0, 0), delta=0.0, credibility=0.9)
    assert found.lower < found.median < found.upper
    nothing = bayes.posterior(Counts(50, 50, 50, 50), delta=0.5, credibility=0.9)
    assert nothing == (0, 0, 0)
