"""An attack on DiceSGD: what epsilon can at best be, whatever was claimed.

The analysis is ours. The attacked data set: all other gradients are zero, and the target's
gradient is ``outer_norm`` long and always points along one direction u. One participation
fills the error memory, which then answers for many steps, sampled or not; amplification by
sampling does not see them. The attacker adds up the releases along u.
"""

import math

import numpy as np

from dpjax.sampling import Poisson

TRIALS = 10_000
CONFIDENCE = 1 - 1e-6


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
    it, a mixture of such Gaussians over who is sampled when, which is simulated (noise is
    integrated exactly). The bound holds with confidence 1 - 1e-6 over the simulation, by
    the inequality of Dvoretzky, Kiefer and Wolfowitz. Deterministic.

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

    if noise_stddev == 0 or (math.isinf(error_clip_norm) and math.isinf(outer_norm)):
        return math.inf
    signals = _signals(clip_norm, error_clip_norm, outer_norm, rate, steps)
    spread = noise_stddev * math.sqrt(steps)
    thresholds = np.linspace(0.0, signals.max() + 6 * spread, 300)
    detected = ndtr((signals[:, None] - thresholds) / spread).mean(axis=0)
    # One and the same error bounds the distribution function of the signals everywhere.
    detected -= math.sqrt(-math.log(1 - CONFIDENCE) / (2 * TRIALS))
    excess = np.maximum(detected - delta, 1e-300)
    return float(max(0.0, (np.log(excess) - log_ndtr(-thresholds / spread)).max()))


def _signals(
    clip_norm: float, error_clip_norm: float, outer_norm: float, rate: float, steps: int
) -> np.ndarray:
    """Return what the target adds to the statistic in each simulated run, ``[TRIALS]``."""
    memory, signal = np.zeros(TRIALS), np.zeros(TRIALS)
    for step in range(steps):
        # Independent coins: one example of the sampler stands for one run of the attack.
        hit = Poisson(rate=rate).draw(step, num_examples=TRIALS, seed=0)
        fed_back = np.minimum(memory, error_clip_norm)
        signal += fed_back
        signal[hit] += clip_norm
        memory -= fed_back
        memory[hit] += outer_norm - clip_norm
    return signal
