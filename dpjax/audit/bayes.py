"""The posterior distribution of an attack's epsilon, in one dimension.

Zanella-Beguelin et al. 2023 (arXiv 2206.05199): with Jeffreys' priors, the error rates of an
attack are ``FNR ~ Beta(FN + 1/2, TP + 1/2)`` and ``FPR ~ Beta(FP + 1/2, TN + 1/2)``, and the
posterior of epsilon is ``G(epsilon) = P[(FNR, FPR) in R(epsilon, delta)]`` with R the error
rates that (epsilon, delta)-privacy allows. They integrate over the plane; the form here is
ours: given FNR, the FPR allowed is an interval, so

    G(epsilon) = E_u [F_FPR(hi(x)) - F_FPR(lo(x))],   x = F_FNR^-1(u),  u uniform,

one mean over quantiles. It is a posterior of the epsilon of ONE attack at one threshold that
was fixed before; no bound on the mechanism's, whose epsilon is at least that.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from jaxtyping import Array, Float

from dpjax.audit.estimators import Counts
from dpjax.checks import check_probability

LARGEST = 60.0
"""Epsilon beyond this is called infinite."""
_POINTS = 2048
_ROUNDS = 20


class Posterior(NamedTuple):
    """Quantiles of epsilon: the ends of the credible interval, and the median."""

    lower: float
    median: float
    upper: float


def posterior(counts: Counts, *, delta: float, credibility: float) -> Posterior:
    """Return the central credible interval of the attack's epsilon, and its median.

    Args:
        counts: Of an attack whose threshold was chosen on other runs.
        delta: At which epsilon is asked.
        credibility: Such as 0.9.

    Returns:
        Epsilons, 0 to ``LARGEST``, beyond which an end is inf.
    """
    check_probability("credibility", credibility)
    tail = (1 - credibility) / 2
    levels = jnp.asarray([tail, 0.5, 1 - tail], jnp.float32)
    # Quantiles of Beta by scipy: JAX has no inverse of betainc.
    found = quantiles(
        fnr_quantiles(counts), jnp.asarray(counts, jnp.float32), levels, delta
    )
    ends = [float("inf") if e > LARGEST - 1e-3 else float(e) for e in np.asarray(found)]
    return Posterior(*ends)


def fnr_quantiles(counts: Counts) -> Float[np.ndarray, "points"]:
    """Return the points x of FNR at evenly spaced quantiles."""
    from scipy.special import betaincinv

    levels = (np.arange(_POINTS) + 0.5) / _POINTS
    false, true = counts.false_negatives + 0.5, counts.true_positives + 0.5
    return betaincinv(false, true, levels)


@jax.jit
def quantiles(
    fnr: Float[Array, "points"],
    counts: Float[Array, "4"],
    levels: Float[Array, "levels"],
    delta: float,
) -> Float[Array, "levels"]:
    """Return the epsilons at which G reaches each of ``levels``, by bisection."""
    below, above = jnp.zeros_like(levels), jnp.full_like(levels, LARGEST)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        reached = jax.vmap(cdf, in_axes=(0, None, None, None))(
            middle, fnr, counts, delta
        )
        reached = reached >= levels
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    low, high = jax.lax.fori_loop(0, _ROUNDS, halve, (below, above))
    # Where G(0) is above the level already, the quantile is 0.
    return jnp.where(low == 0, 0.0, (low + high) / 2)


def cdf(
    epsilon: Float[Array, ""],
    fnr: Float[Array, "points"],
    counts: Float[Array, "4"],
    delta: float,
) -> Float[Array, ""]:
    """Return G(epsilon)."""
    shrink, grow = jnp.exp(-epsilon), jnp.exp(epsilon)
    low = jnp.maximum(1 - delta - grow * fnr, shrink * (1 - delta - fnr))
    high = jnp.minimum(1 + (delta - fnr) * shrink, delta + (1 - fnr) * grow)
    _, _, false_positives, true_negatives = counts

    def below(x: Array) -> Array:
        clipped = jnp.clip(x, 0.0, 1.0)
        return betainc(false_positives + 0.5, true_negatives + 0.5, clipped)

    return jnp.mean(jnp.maximum(below(high) - below(low), 0.0))
