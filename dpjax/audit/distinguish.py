"""White-box attacks on a mechanism: simulate its releases on worst-case neighbours.

Everything but the data is what ships: batches come from ``mechanism.sampling``; what is made
of them says ``mechanisms.adversary.simulation``.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpjax.checks import check_positive_int
from dpjax.clipping import Engine, vmap
from dpjax.mechanisms import Mechanism
from dpjax.mechanisms.adversary.simulation import Draws, observe
from dpjax.mechanisms.adversary.views import View, view
from dpjax.privacy.sampling import (
    CyclicPoisson,
    FullBatch,
    PeriodicPoisson,
    Poisson,
    Sampling,
)

ATTACKS = ("likelihood", "opposed", "reuse")
MOST_OPPOSED = 64
"""Most examples of a data set that "opposed" simulates one by one."""


class Scores(NamedTuple):
    """``float64[n]`` each: scores of runs with and without the target."""

    inside: NDArray[np.float64]
    outside: NDArray[np.float64]


def attacks_on(mechanism: Mechanism) -> tuple[str, ...]:
    """Return the attacks that can tell something about ``mechanism``."""
    known = view(mechanism)
    found: list[str] = ["likelihood"]
    small = mechanism.num_examples <= MOST_OPPOSED
    if known.opposable and small and not _independent(mechanism.sampling):
        found.append("opposed")
    if known.unclipped is not None and mechanism.steps > 1:
        found.append("reuse")
    return tuple(found)


def attack_scores(
    mechanism: Mechanism,
    *,
    attack: str,
    trials: int,
    seed: int,
    engine: Engine = vmap,
) -> Scores:
    """Simulate ``trials`` runs on each of two neighbours and score them.

    Attacks:
        - "likelihood": the target's gradient is as long as can be and all others are zero.
          The score is the likelihood ratio where it is known.
        - "opposed": others pull the other way, so that what the target's presence does to
          *their* part in the sum shows as well (fixed or truncated batches, clipping after
          summing). The score is the likelihood ratio, for the batches really drawn.
        - "reuse": the target's gradient grows from step to step. Without it, two releases
          with the same noise are equal; the score is the least distance of any two.

    Args:
        mechanism: What is attacked; it must have a view, see
        ``dpjax.mechanisms.adversary.views``.
        attack: One of ``ATTACKS``.
        trials: n, runs on each neighbour.
        seed: Of keys and draws. The simulated runs protect nobody.
        engine: Computes the clipped sums.

    Returns:
        Scores; the first half of the runs of "opposed" is what its law was learnt from, so
        only the second half may be counted (``estimators.split`` does so).

    Raises:
        ValueError: The attack does not apply to the mechanism.
    """
    check_positive_int("trials", trials)
    if attack not in ATTACKS:
        raise ValueError(
            f"attack={attack!r} is unknown; use one of {', '.join(ATTACKS)}"
        )
    known = view(mechanism)
    if attack == "reuse":
        if known.unclipped is None:
            raise ValueError(
                f"attack='reuse' needs steps alike, which {type(mechanism).__name__} has not"
            )
        ramp = np.arange(1, mechanism.steps + 1) / mechanism.steps
        short = known._replace(gradient=known.unclipped, path=lambda t: ramp[t])
        draws = _target_draws(mechanism, trials=trials, seed=seed)
        seen = observe(mechanism, short, draws, seed=seed, engine=engine)
        return Scores(*(_least_gap(y) for y in seen))
    if attack == "opposed":
        if not known.opposable or mechanism.num_examples > MOST_OPPOSED:
            raise ValueError(
                f"attack='opposed' on num_examples={mechanism.num_examples}: simulate a "
                f"plan of at most {MOST_OPPOSED} examples, of a mechanism without memory"
            )
        draws = _all_draws(mechanism, trials=trials, seed=seed)
        seen = observe(mechanism, known, draws, seed=seed, engine=engine)
        return _opposed_scores(known, draws, seen)
    draws = _target_draws(mechanism, trials=trials, seed=seed)
    seen = observe(mechanism, known, draws, seed=seed, engine=engine)
    rates = draws.inside[..., 0].mean(axis=0)
    return Scores(*(known.score(y, rates) for y in seen))


def _target_draws(mechanism: Mechanism, *, trials: int, seed: int) -> Draws:
    """Return the target's coins alone; nobody else has a gradient."""
    steps, sampling = mechanism.steps, mechanism.sampling
    if isinstance(sampling, FullBatch):
        inside = np.ones((trials, steps, 1), bool)
    elif _independent(sampling):
        # All examples are drawn alike and independently: each is the target of one run.
        inside = np.zeros((trials, steps, 1), bool)
        for t in range(steps):
            inside[sampling.draw(t, num_examples=trials, seed=seed), t] = True
    else:
        size = mechanism.num_examples
        inside = _drawn(mechanism, size, trials=trials, seed=seed, rows=1)
    return Draws(inside, np.zeros_like(inside))


def _all_draws(mechanism: Mechanism, *, trials: int, seed: int) -> Draws:
    size = mechanism.num_examples
    inside = _drawn(mechanism, size, trials=trials, seed=seed, rows=size)
    rest = size if mechanism.sampling.adjacency == "zero_out_one" else size - 1
    outside = _drawn(mechanism, rest, trials=trials, seed=seed + 1, rows=rest)
    absent = np.zeros_like(inside[..., :1])
    # Row 0 is no one: its gradient is zeroed, or it is not in the data at all.
    return Draws(inside, np.concatenate([absent, outside[..., rest - size + 1 :]], -1))


def _drawn(
    mechanism: Mechanism, size: int, *, trials: int, seed: int, rows: int
) -> NDArray[np.bool_]:
    """Return which of the first ``rows`` are drawn, a sampler seed for each run."""
    drawn = np.zeros((trials, mechanism.steps, rows), bool)
    for i in range(trials):
        own = (seed << 64) + i
        for t in range(mechanism.steps):
            indices = mechanism.sampling.draw(t, num_examples=size, seed=own)
            drawn[i, t, indices[indices < rows]] = True
    return drawn


def _opposed_scores(
    known: View, draws: Draws, seen: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> Scores:
    """Return log likelihood ratios of mixtures over the batches that are really drawn."""
    half = len(seen[0]) // 2
    scores = np.zeros((2, len(seen[0])))
    for t, shift in enumerate(known.shifts):
        laws = []
        for drawn in draws:
            # Each other example pulls back as far as the target pulls.
            pull = 2 * drawn[:half, t, 0] - drawn[:half, t].sum(axis=-1)
            values, weights = np.unique(pull, return_counts=True)
            laws.append((values * shift, np.log(weights / half)))
        for i, y in enumerate(seen):
            scores[i] += _log_density(y[:, t], *laws[0]) - _log_density(
                y[:, t], *laws[1]
            )
    return Scores(*scores)


def _log_density(
    y: NDArray[np.float64], means: NDArray[np.float64], log_weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    parts = log_weights - np.square(y[:, None] - means) / 2
    return np.logaddexp.reduce(parts, axis=1)


def _least_gap(y: NDArray[np.float64]) -> NDArray[np.float64]:
    if y.shape[1] == 1:
        return np.zeros(len(y))
    return np.diff(np.sort(y, axis=1), axis=1).min(axis=1)


def _independent(sampling: Sampling) -> bool:
    # Exactly these: what is derived from them may have changed the draws.
    return type(sampling) in (Poisson, PeriodicPoisson, CyclicPoisson, FullBatch)
