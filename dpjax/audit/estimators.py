"""Lower bounds on epsilon from how often an attack tells two neighbours apart.

An attack answers "in" (the target took part) or "out" for many independent runs on either
neighbour. With TPR and FPR its rates of answering "in" on the one and on the other, an
(epsilon, delta)-private mechanism has ``TPR <= e^epsilon FPR + delta`` and ``1 - FPR <=
e^epsilon (1 - TPR) + delta`` (Kairouz et al. 2015, arXiv 1311.0776). The two confidence
bounds that all bounds here rest on, TPR from below and FPR from above, are those of Clopper
and Pearson, each at half of the error that is allowed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpjax.checks import check_number, check_probability

Bound = Callable[[ArrayLike, ArrayLike], NDArray[np.float64]]
"""From bounds of TPR and FPR, ``float[k]`` each, to what they show, ``float[k]``."""


class Counts(NamedTuple):
    """How often the attack answered what.

    Attributes:
        true_positives: "in" on runs with the target.
        false_negatives: "out" on runs with the target.
        false_positives: "in" on runs without the target.
        true_negatives: "out" on runs without the target.
    """

    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int


class Rates(NamedTuple):
    """Confidence bounds: with confidence, TPR is at least and FPR at most this."""

    tpr_lower: float
    fpr_upper: float


def count(inside: ArrayLike, outside: ArrayLike, *, threshold: float) -> Counts:
    """Return the counts of the attack that answers "in" where a score >= ``threshold``.

    Args:
        inside: ``float[n]``, scores of runs with the target; the higher, the more "in".
        outside: ``float[n]``, scores of runs without it.
        threshold: Chosen without looking at these scores; see ``split``.

    Raises:
        ValueError: The scores are not two arrays of one length, or not finite numbers.
    """
    inside, outside = checked_scores(inside, outside)
    hits, alarms = int(np.sum(inside >= threshold)), int(np.sum(outside >= threshold))
    return Counts(hits, len(inside) - hits, alarms, len(outside) - alarms)


def checked_scores(
    inside: ArrayLike, outside: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both as ``float64[n]``.

    Raises:
        ValueError: The scores are not two arrays of numbers of one length, or hold NaN.
    """
    try:
        one, two = np.asarray(inside, np.float64), np.asarray(outside, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores must be two arrays of numbers: {error}") from None
    if one.ndim != 1 or one.shape != two.shape or not one.size:
        raise ValueError(
            f"scores of shapes {one.shape} and {two.shape} must be two arrays of one "
            "length: as many runs with the target as without it"
        )
    if np.isnan(one).any() or np.isnan(two).any():
        raise ValueError("scores hold NaN: some run of the attack failed")
    return one, two


def rate_bounds(
    successes: ArrayLike, trials: ArrayLike, *, confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Clopper and Pearson's lower and upper bounds of a rate.

    Each bound alone holds with probability ``confidence``, whatever the rate is; both
    together form an interval of confidence ``2 confidence - 1``. Arrays broadcast.
    """
    from scipy.special import betaincinv

    check_probability("confidence", confidence)
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    with np.errstate(invalid="ignore"):
        lower = np.where(k > 0, betaincinv(k, n - k + 1, 1 - confidence), 0.0)
        upper = np.where(k < n, betaincinv(k + 1, n - k, confidence), 1.0)
    return lower, upper


def rates(counts: Counts, *, confidence: float) -> Rates:
    """Return the bounds of TPR and FPR that hold together with ``confidence``."""
    each = (1 + confidence) / 2
    runs = (counts[0] + counts[1], counts[2] + counts[3])
    lower, _ = rate_bounds(counts.true_positives, runs[0], confidence=each)
    _, upper = rate_bounds(counts.false_positives, runs[1], confidence=each)
    return Rates(float(lower), float(upper))


def epsilon_lower_bound(counts: Counts, *, delta: float, confidence: float) -> float:
    """Return what epsilon at ``delta`` is at least, with ``confidence``.

    Nothing is assumed of the mechanism. Never below 0, which says nothing.
    """
    return float(epsilon_at(delta)(*rates(counts, confidence=confidence)))


def epsilon_interval(
    counts: Counts, *, delta: float, confidence: float
) -> tuple[float, float]:
    """Return the two-sided interval of the epsilon of this attack at its threshold.

    Its lower end alone bounds the mechanism's epsilon, with ``(1 + confidence) / 2``.
    """
    # Two rates with two ends each share the error.
    each = 1 - (1 - confidence) / 4
    hits, runs = counts.true_positives, counts.true_positives + counts.false_negatives
    alarms, others = (
        counts.false_positives,
        counts.false_positives + counts.true_negatives,
    )
    tpr = rate_bounds(hits, runs, confidence=each)
    fpr = rate_bounds(alarms, others, confidence=each)
    bound = epsilon_at(delta)
    return float(bound(tpr[0], fpr[1])), float(bound(tpr[1], fpr[0]))


def gdp_lower_bound(counts: Counts, *, delta: float, confidence: float) -> float:
    """Return what epsilon at ``delta`` is at least IF the mechanism is Gaussian.

    That is, if its trade-off curve is that of telling N(0, 1) from N(mu, 1) for some mu, as
    for compositions of Gaussians without subsampling (Dong et al. 2019, arXiv 1905.02383;
    the bound: Nasr et al. 2023, arXiv 2302.07956). Then ``mu >= Phi^-1(TPR) -
    Phi^-1(FPR)``, and epsilon at a small delta follows from rates that are not small.
    """
    bounds = rates(counts, confidence=confidence)
    return gdp_epsilon(float(mu_of(*bounds)), delta=delta)


def gdp_epsilon(mu: float, *, delta: float) -> float:
    """Return epsilon at ``delta`` of telling N(0, 1) from N(mu, 1).

    Solves ``Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) = delta`` (Balle and Wang 2018,
    arXiv 1805.06530, Theorem 8).
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr, ndtri

    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return math.inf

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
        return float(ndtr(mu / 2 - epsilon / mu) - tail - delta)

    if excess(0.0) <= 0:
        return 0.0
    root: Any = brentq(excess, 0.0, mu * (mu / 2 - ndtri(delta)), xtol=1e-10)
    return float(root)


def delta_at(
    epsilons: ArrayLike, tpr: ArrayLike, fpr: ArrayLike
) -> NDArray[np.float64]:
    """Return what delta is at least at every one of ``epsilons``, ``float[..., E]``.

    All follow from the same two rates (``float[...]``), so looking at many epsilons costs
    no confidence. Against a claimed privacy profile this is far sharper than one epsilon at
    one small delta.
    """
    grow = np.exp(np.asarray(epsilons, np.float64))
    hit, alarm = (np.asarray(x, np.float64)[..., None] for x in (tpr, fpr))
    return np.maximum(np.maximum(hit - grow * alarm, 1 - alarm - grow * (1 - hit)), 0.0)


def trials_needed(*, epsilon: float, delta: float, confidence: float) -> int:
    """Return how many runs on each neighbour a flawless attack needs to show ``epsilon``.

    With fewer, no attack whatever can refute a claim of ``epsilon`` at ``delta``.
    """
    check_number("epsilon", epsilon)
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon} must be at least 0")
    check_probability("confidence", confidence)
    # n right answers of n bound the rate by (error/2)^(1/n): log((x - delta)/(1 - x)).
    rate = (math.exp(epsilon) + delta) / (1 + math.exp(epsilon))
    if not rate < 1:
        raise ValueError(f"epsilon={epsilon} cannot be tested by counting runs")
    return max(1, math.ceil(math.log((1 - confidence) / 2) / math.log(rate)))


def split(
    inside: ArrayLike, outside: ArrayLike, bound: Bound, *, confidence: float
) -> Counts:
    """Choose the threshold on the first half of the scores, count on the second.

    So the counts do not know the threshold they are counted at, and their confidence is
    what it says. Scores must be in no particular order.

    Args:
        inside: ``float[n]``, scores of runs with the target.
        outside: ``float[n]``, scores of runs without it.
        bound: What the threshold should make large, such as ``mu_of`` or
            ``epsilon_at(delta)``.
        confidence: At which the bound will be taken.

    Returns:
        Counts of the second halves.
    """
    one, two = checked_scores(inside, outside)
    half = len(one) // 2
    if not half:
        raise ValueError(
            "trials=1 cannot be split in two halves; at least 2 are needed"
        )
    threshold = best_threshold(one[:half], two[:half], bound, confidence=confidence)
    return count(one[half:], two[half:], threshold=threshold)


def best_threshold(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    bound: Bound,
    *,
    confidence: float,
) -> float:
    """Return the threshold at which these very scores give the highest bound.

    A bound counted at it on the same scores is too high; see ``split``.
    """
    pooled = np.sort(np.concatenate([inside, outside]))
    quantiles = np.quantile(pooled, np.linspace(0, 1, 257), method="lower")
    # A quantile does not resolve the tails, where the best thresholds are.
    candidates = np.unique(np.concatenate([quantiles, pooled[:128], pooled[-128:]]))
    found = bound(*_rates_at(inside, outside, candidates, confidence=confidence))
    return float(candidates[np.argmax(found)])


def bonferroni(
    inside: ArrayLike,
    outside: ArrayLike,
    thresholds: Sequence[float],
    *,
    delta: float,
    confidence: float,
) -> float:
    """Return the best epsilon bound over ``thresholds`` fixed before seeing any score.

    Each is taken at ``1 - (1 - confidence) / len(thresholds)``, so that the best of them
    holds with ``confidence``. All scores count, unlike with ``split``.
    """
    one, two = checked_scores(inside, outside)
    fixed = np.asarray(thresholds, np.float64)
    each = 1 - (1 - confidence) / fixed.size
    bounds = _rates_at(one, two, fixed, confidence=each)
    return float(epsilon_at(delta)(*bounds).max())


def roc(
    inside: ArrayLike, outside: ArrayLike, *, points: int = 101
) -> list[tuple[float, float]]:
    """Return ``(FPR, TPR)`` at thresholds spread over all scores, from (0, 0) to (1, 1)."""
    one, two = checked_scores(inside, outside)
    pooled = np.quantile(np.concatenate([one, two]), np.linspace(1, 0, points))
    rates_of = [(float(np.mean(two >= t)), float(np.mean(one >= t))) for t in pooled]
    return [(0.0, 0.0), *rates_of, (1.0, 1.0)]


def epsilon_at(delta: float) -> Bound:
    """Return the larger epsilon of both inequalities, as a function of the two rates."""

    def bound(tpr: ArrayLike, fpr: ArrayLike) -> NDArray[np.float64]:
        hit, alarm = np.asarray(tpr, np.float64), np.asarray(fpr, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            detected = np.log(np.maximum(hit - delta, 0) / alarm)
            cleared = np.log(np.maximum(1 - alarm - delta, 0) / (1 - hit))
        found = np.maximum(np.maximum(detected, cleared), 0.0)
        return np.nan_to_num(found, nan=0.0)

    return bound


def mu_of(tpr: ArrayLike, fpr: ArrayLike) -> NDArray[np.float64]:
    """Return ``Phi^-1(TPR) - Phi^-1(FPR)``, at least 0: mu, of a Gaussian mechanism."""
    from scipy.special import ndtri

    return np.maximum(ndtri(tpr) - ndtri(fpr), 0.0)


def _rates_at(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    thresholds: NDArray[np.float64],
    *,
    confidence: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bounds of TPR and FPR at each threshold."""
    each = (1 + confidence) / 2
    hits, alarms = (
        len(x) - np.searchsorted(np.sort(x), thresholds) for x in (inside, outside)
    )
    tpr, _ = rate_bounds(hits, len(inside), confidence=each)
    _, fpr = rate_bounds(alarms, len(outside), confidence=each)
    return tpr, fpr
