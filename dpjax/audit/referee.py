"""Accountants against each other: what is epsilon of Poisson-sampled Gaussians really?

``fourier_epsilon`` is an accountant of our own, by one Fourier transform: rounded down it
is a lower bound on epsilon, rounded up an upper one, and it shares no code with
dp_accounting. ``edgeworth_epsilon`` is the estimate by which EW-Tune (Behnia et al. 2022,
arXiv 2210.15042; the expansion: Wang et al. 2022, arXiv 2206.04236) chose its noise: a
diagnostic, neither an upper nor a lower bound, never used to set noise here.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Order = Literal[1, 2, 3]


class Sampled(NamedTuple):
    """``steps`` Gaussians of ``noise_multiplier``, Poisson-sampled with ``rate``."""

    rate: float
    noise_multiplier: float
    steps: int


def fourier_epsilon(
    plan: Sampled, *, delta: float, rounded: Literal["up", "down"], size: int = 2**21
) -> float:
    """Return epsilon at ``delta``, rounded to the safe ("up") or the unsafe side ("down").

    The privacy loss of removing an example, ``log((1 - q + q e^((2x - 1)/(2 s^2))))`` with x
    from the mixture, has a distribution function in closed form. It is rounded to a grid,
    ``steps`` copies are added by one FFT, and delta is summed from the result. "down" is a
    lower bound on the epsilon of add/remove adjacency; "up" is an upper bound for removal,
    the worse of the two directions at the small deltas that matter.

    Args:
        plan: What is composed.
        delta: At which epsilon is asked.
        rounded: To which side losses are rounded.
        size: Points of the grid; the sides are about ``steps * width / size`` apart.
    """
    low, high = _range(plan)
    step = (high - low) / size
    # The grid of one loss is that of the sum: multiples of the step, wrapped around.
    least = math.log1p(-plan.rate) if plan.rate < 1 else low
    first = math.floor(least / step)
    edges: Any = (first + np.arange(size + 1)) * step
    mass = np.diff(_loss_cdf(edges, plan), prepend=0.0)
    tail = max(0.0, 1.0 - mass.sum())
    at = first + np.arange(size + 1) - (1 if rounded == "down" else 0)
    ring = np.zeros(size)
    np.add.at(ring, at % size, mass)
    composed = np.fft.irfft(np.fft.rfft(ring) ** plan.steps, size)
    start = math.floor(low / step)
    losses: Any = (start + np.arange(size)) * step
    chance = np.maximum(composed[(start + np.arange(size)) % size], 0.0)
    escaped = plan.steps * tail if rounded == "up" else 0.0
    return _epsilon_of(losses, chance, delta - escaped)


def edgeworth_epsilon(plan: Sampled, *, delta: float, order: Order) -> float:
    """Return the Edgeworth estimate of epsilon at ``delta``: no bound of any kind."""
    from scipy.optimize import brentq

    without, with_ = _cumulants(plan, sampled=False), _cumulants(plan, sampled=True)

    def excess(epsilon: float) -> float:
        x = _edgeworth(epsilon, without, plan.steps, order)
        y = _edgeworth(epsilon, with_, plan.steps, order)
        return float(1 - y - math.exp(epsilon) * (1 - x) - delta)

    # The estimate is no decreasing function of epsilon: the first crossing counts.
    grid = np.linspace(0.0, 40.0, 801)
    signs = np.array([excess(e) for e in grid]) > 0
    if not signs[0]:
        return 0.0
    (crossings,) = np.nonzero(signs[:-1] & ~signs[1:])
    if not crossings.size:
        return math.inf
    root: Any = brentq(excess, grid[crossings[0]], grid[crossings[0] + 1])
    return float(root)


def _range(plan: Sampled) -> tuple[float, float]:
    """Return between which losses all but 1e-15 of the sum lies."""
    mean, variance, *_ = _cumulants(plan, sampled=True)
    spread = math.sqrt(plan.steps * variance)
    centre = plan.steps * mean
    longest = (2 * (1 + 9 * plan.noise_multiplier) - 1) / (2 * plan.noise_multiplier**2)
    return centre - 10 * spread - 2.0, centre + 12 * spread + min(longest, 30.0)


def _loss_cdf(losses: NDArray[np.float64], plan: Sampled) -> NDArray[np.float64]:
    from scipy.special import ndtr

    q, s = plan.rate, plan.noise_multiplier
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        odds = (np.exp(losses) - (1 - q)) / q
        x = np.where(odds > 0, s**2 * np.log(odds) + 0.5, -np.inf)
    return (1 - q) * ndtr(x / s) + q * ndtr((x - 1) / s)


def _epsilon_of(
    losses: NDArray[np.float64], chance: NDArray[np.float64], delta: float
) -> float:
    """Return the epsilon at which ``sum_l chance(l) (1 - e^(epsilon - l))_+`` is delta."""
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        above = losses > epsilon
        return float(-np.sum(chance[above] * np.expm1(epsilon - losses[above])) - delta)

    if excess(0.0) <= 0:
        return 0.0
    if excess(losses[-1]) > 0:
        return math.inf
    root: Any = brentq(excess, 0.0, losses[-1], xtol=1e-6)
    return float(root)


def _cumulants(plan: Sampled, *, sampled: bool) -> tuple[float, ...]:
    """Return the first five cumulants of one loss, by quadrature.

    Args:
        plan: One step of it.
        sampled: Whether x comes from the mixture, or from N(0, 1).
    """
    q, shift = plan.rate, 1 / plan.noise_multiplier
    z = np.linspace(-14.0, 14.0 + shift, 60001)
    density = np.exp(-(z**2) / 2)
    tilt = np.exp(shift * z - shift**2 / 2)
    if sampled:
        density = density * (1 - q + q * tilt)
    weights = density * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    loss = np.log1p(q * (tilt - 1))
    mean = float(weights @ loss)
    m2, m3, m4, m5 = (float(weights @ (loss - mean) ** k) for k in (2, 3, 4, 5))
    return mean, m2, m3, m4 - 3 * m2**2, m5 - 10 * m2 * m3


def _edgeworth(
    epsilon: float, cumulants: tuple[float, ...], steps: int, order: Order
) -> float:
    """Return the distribution function of the sum of losses, expanded to ``order``."""
    from scipy.special import ndtr

    k1, k2, k3, k4, k5 = (steps * k for k in cumulants)
    u = (epsilon - k1) / math.sqrt(k2)
    g3, g4, g5 = k3 / k2**1.5, k4 / k2**2, k5 / k2**2.5
    hermite = {
        2: u**2 - 1,
        3: u**3 - 3 * u,
        4: u**4 - 6 * u**2 + 3,
        5: u**5 - 10 * u**3 + 15 * u,
        6: u**6 - 15 * u**4 + 45 * u**2 - 15,
        8: u**8 - 28 * u**6 + 210 * u**4 - 420 * u**2 + 105,
    }
    terms = (
        g3 * hermite[2] / 6,
        g4 * hermite[3] / 24 + g3**2 * hermite[5] / 72,
        g5 * hermite[4] / 120 + g3 * g4 * hermite[6] / 144 + g3**3 * hermite[8] / 1296,
    )
    density = math.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    return float(ndtr(u)) - density * sum(terms[:order])
