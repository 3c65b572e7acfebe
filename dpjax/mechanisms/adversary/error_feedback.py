"""An attack on DiceSGD: what epsilon can at best be, whatever was claimed.

The analysis is ours. The attacked data set: all other gradients are zero, and the target's
gradient is G long and always points along one direction u. One participation fills the
error memory, which then answers for many steps, sampled or not; amplification by sampling
does not see them. The attacker adds up the releases along u.
"""

import math

import numpy as np

HORIZON = 500
"""Steps that are attacked, at most: to attack fewer is an attack, too."""
CELLS = 4
"""Resolution of what the memory holds; rounding only ever weakens the attack."""


def epsilon_lower_bound(
    *,
    clip_norm: float,
    error_clip_norm: float,
    outer_norm: float,
    noise_stddev: float,
    rate: float,
    steps: int,
    delta: float,
) -> float:
    """Return an epsilon that DiceSGD exceeds or meets at ``delta``.

    The statistic is ``S = sum_t <y_t, u>``. Without the target it is N(0, T sigma^2); with
    it, a mixture of such Gaussians over who is sampled when, whose weights are computed
    exactly for a gradient and an error clip norm that are rounded down. Then epsilon is at
    least ``log((P(S > s) - delta) / P0(S > s))`` for each threshold s.

    Args:
        clip_norm: C1, of each gradient. All norms are on the scale of sums.
        error_clip_norm: C2, of the memory; inf if it is not clipped.
        outer_norm: G, the longest gradient there may be; inf if nothing bounds them.
        noise_stddev: Of the noise on the sum, for each step.
        rate: Of Poisson sampling; 1 for full batches.
        steps: T.
        delta: At which epsilon is asked.

    Returns:
        At least 0, which says nothing; inf without noise.
    """
    from scipy.special import log_ndtr, ndtr

    residual = outer_norm - clip_norm
    if noise_stddev == 0 or math.isinf(min(residual, error_clip_norm)):
        return math.inf
    steps = min(steps, HORIZON)
    signals, weights = _signals(clip_norm, error_clip_norm, residual, rate, steps)
    spread = noise_stddev * math.sqrt(steps)
    thresholds = np.linspace(0.0, signals.max() + 6 * spread, 400)
    detected = weights @ ndtr((signals[:, None] - thresholds) / spread)
    excess = np.maximum(detected - delta, 1e-300)
    return float(max(0.0, (np.log(excess) - log_ndtr(-thresholds / spread)).max()))


def _signals(
    clip_norm: float, error_clip_norm: float, residual: float, rate: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the target may add to the statistic, and with which probabilities.

    A run is followed by (k, f): k participations, f cells given back by the memory. Before
    the k-th participation adds to it, the memory gives back at most C2 of the ``R k - f``
    it holds.
    """
    most = min(steps, math.ceil(rate * steps + 10 * math.sqrt(rate * steps) + 10))
    cell = (min(error_clip_norm, residual) or 1.0) / CELLS
    # More than this cannot be given back; it stands for an infinite norm as well.
    add = int(min(residual, steps * error_clip_norm) / cell)
    give = int(min(error_clip_norm, most * residual) / cell)
    size = min(steps * give, most * add) + 1
    full = np.minimum(add * np.arange(most + 1), size - 1)
    reached = np.minimum(np.arange(size) + give, full[:, None])
    flat = (np.arange(most + 1)[:, None] * size + reached).ravel()
    chance = np.zeros((most + 1, size))
    chance[0, 0] = 1.0
    for _ in range(steps):
        given = np.bincount(flat, chance.ravel(), chance.size).reshape(chance.shape)
        chance = (1 - rate) * given
        chance[1:] += rate * given[:-1]
        chance[-1] += rate * given[-1]  # Further participations are not counted.
    signal = clip_norm * np.arange(most + 1)[:, None] + cell * np.arange(size)
    # Few different values, each rounded down.
    width = signal.max() / 1000
    bins = np.bincount((signal / width).astype(int).ravel(), chance.ravel())
    return width * np.arange(len(bins)), bins
