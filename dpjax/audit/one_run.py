"""Lower bounds on epsilon from ONE training run with many canaries.

Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846, Theorem 5.2 and its implementation in
Appendix D): each of m canaries takes part by an independent fair coin; the auditor guesses
r of the coins and is right v times. Under (epsilon, delta)-privacy (add/remove) v is, up to a
term of delta, stochastically below Binomial(r, e^epsilon / (1 + e^epsilon)).
"""

import numpy as np
from numpy.typing import ArrayLike

from dpjax.audit.estimators import checked_scores
from dpjax.checks import check_positive_int, check_probability


def p_value(
    *, canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """Return an upper bound on the chance of so many right guesses under the claim.

    Args:
        canaries: m, all whose coin was flipped.
        guesses: r, of them guessed; the auditor may abstain from the others.
        correct: v, of the guesses.
        epsilon: Claimed.
        delta: Claimed.
    """
    from scipy.special import expit
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"correct={correct}, guesses={guesses} and canaries={canaries} must be in this "
            "order, from 0 up"
        )
    rate = expit(epsilon)
    tail = binom.sf(correct - 1, guesses, rate)
    # alpha = max_i P(v - i <= W < v) / i, by how much delta can shift the tail.
    lower = binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate)
    spread = np.cumsum(lower) / np.arange(1, correct + 1)
    alpha = spread.max(initial=0.0)
    return float(min(1.0, tail + 2 * canaries * delta * alpha))


def epsilon_lower_bound(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """Return the largest epsilon that the guesses refute with ``confidence``."""
    check_probability("confidence", confidence)
    error = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return error > p_value(
            canaries=canaries,
            guesses=guesses,
            correct=correct,
            epsilon=epsilon,
            delta=delta,
        )

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high) and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def canaries_needed(*, epsilon: float, delta: float, confidence: float) -> int:
    """Return how many canaries, all guessed right, refute ``epsilon``.

    Raises:
        ValueError: No number does: delta is too large.
    """
    for canaries in np.unique(np.geomspace(1, 1e5, 200).astype(int)):
        full = int(canaries)
        chance = p_value(
            canaries=full, guesses=full, correct=full, epsilon=epsilon, delta=delta
        )
        if chance < 1 - confidence:
            return full
    raise ValueError(
        f"epsilon={epsilon:.4g} at delta={delta:g} cannot be refuted in one run at "
        f"confidence={confidence:g}: 2 m delta exceeds what guessing can show"
    )


def audit(
    scores: ArrayLike,
    members: ArrayLike,
    *,
    guesses: int,
    delta: float,
    confidence: float,
) -> float:
    """Return the bound from scores of canaries and the coins that were flipped.

    The ``guesses / 2`` highest scores are guessed to be in, as many lowest to be out. How
    many to guess must be decided before the scores are seen.

    Args:
        scores: ``float[m]``, the higher, the more "in".
        members: ``bool[m]``, the coins.
        guesses: r, even, at most m.
        delta: At which epsilon is asked.
        confidence: Of the bound.

    Raises:
        ValueError: Unequal lengths, or more guesses than canaries.
    """
    check_positive_int("guesses", guesses)
    values, coins = checked_scores(scores, np.asarray(members, np.float64))
    if guesses % 2 or guesses > len(values):
        raise ValueError(
            f"guesses={guesses} must be even and at most the {len(values)} canaries"
        )
    order = np.argsort(values)
    half = guesses // 2
    correct = int(np.sum(coins[order[-half:]] == 1) + np.sum(coins[order[:half]] == 0))
    return epsilon_lower_bound(
        canaries=len(values),
        guesses=guesses,
        correct=correct,
        delta=delta,
        confidence=confidence,
    )
