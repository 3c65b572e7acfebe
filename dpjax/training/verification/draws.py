"""Are batches drawn, and releases counted, as is accounted?

A sampling owns what is drawn and what is accounted, and could still be wrong in either.
Here the rates are read from the event, and hundreds of batches or more are held against
them.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpjax import mechanisms
from dpjax.mechanisms import DiceSgd, Mechanism
from dpjax.privacy import accounting
from dpjax.privacy.sampling import (
    CyclicPoisson,
    FullBatch,
    PeriodicPoisson,
    Poisson,
    Sampling,
    ShuffledFixed,
    TruncatedPoisson,
    secret_seed,
)
from dpjax.training import report
from dpjax.training.verification.accounted import terms
from dpjax.training.verification.errors import SelfCheckError

STEPS = 64
"""Of a simulated run."""
_DRAWS = (400, 20_000)
"""Least and most batches."""
_INDICES = 400_000
"""Examples in all batches: enough to see a rate that is wrong by 2%."""
_SIMULATED = 2**21
"""Examples of a simulated data set at most: 16 MiB for a count of each."""
_WHOLE = 4
"""Batches of the data set itself, where it is larger than that."""
_ERRORS = 6
"""Standard errors that are still taken for chance, for each statistic."""
_PROFILED = 30.0
"""Largest epsilon whose delta is computed anew: beyond, it takes minutes."""
_SHIPPED = tuple(
    getattr(mechanisms, name) for name in mechanisms.__all__ if name != "Mechanism"
)


class Coins(NamedTuple):
    """How examples take part in the first T steps of a run.

    Attributes:
        sizes: ``float64[T]``, expected batch sizes.
        spreads: ``float64[T]``, variances of batch sizes.
        mean, variance: Of how often one example takes part in all T steps.
        alike: Batches of a run whose sizes are independent.
    """

    sizes: NDArray[np.float64]
    spreads: NDArray[np.float64]
    mean: float
    variance: float
    alike: int


def check_draws(mechanism: Mechanism) -> str:
    """Return what was found to hold of the batches.

    Raises:
        SelfCheckError: They are not drawn as is accounted.
    """
    sampling, size = mechanism.sampling, mechanism.num_examples
    steps = min(mechanism.steps, STEPS)
    # Neither time nor memory may grow with the data: who is drawn is counted in smaller
    # data, and of the data themselves are few batches, for their sizes.
    smaller = min(size, max(_SIMULATED, math.ceil(mechanism.expected_batch_size)))
    few = min(steps, _WHOLE)
    part = _coins_of(sampling, steps=steps, size=smaller)
    whole = _coins_of(sampling, steps=few, size=size)
    if part is None or whole is None:
        return _check_magnitude(mechanism, steps)
    told = _check_coins(sampling, part, steps=steps, size=smaller)
    if smaller == size:
        return told
    sizes = _sizes(sampling, steps=few, size=size)
    _check_sizes(sampling, whole, sizes, size=size)
    return f"{told} (of {smaller} examples, and {few} of all {size})"


def _check_coins(sampling: Sampling, coins: Coins, *, steps: int, size: int) -> str:
    batches = _runs(coins, steps) * steps
    sizes, apart = _simulate(sampling, coins, runs=batches // steps, size=size)
    _check_sizes(sampling, coins, sizes, size=size)
    for found, error in apart:
        # Fixed rounds make it less than 1, favourites and public draws more.
        if abs(found - 1) > _ERRORS * error:
            raise SelfCheckError(
                f"{sampling} does not draw each example by coins of its own: some are drawn "
                "more often than others, or a batch says what is in another"
            )
    coin = ", each example by coins of its own" if apart else ""
    return f"{batches} batches are drawn as the sampling is accounted{coin}"


def _check_magnitude(mechanism: Mechanism, steps: int) -> str:
    """Check what is known of any sampling."""
    sampling, size = mechanism.sampling, mechanism.num_examples
    mean = mechanism.expected_batch_size
    if size > _SIMULATED:
        steps = min(steps, _WHOLE)
        sizes = _sizes(sampling, steps=steps, size=size)
    else:
        nothing = np.zeros(steps)
        coins = Coins(nothing + mean, nothing, steps * mean / size, 0.0, steps)
        sizes, _ = _simulate(sampling, coins, runs=1, size=size)
    if not 0 < sizes.mean() <= 2 * mean:
        raise SelfCheckError(
            f"{sampling} draws batches of {sizes.mean():.4g} examples, not of {mean:.4g}"
        )
    return (
        f"{steps} batches have about the size that is expected; how "
        f"{type(sampling).__name__} is accounted is not known, nor checked"
    )


def check_accounting(mechanism: Mechanism) -> str:
    """Return what was found to hold of the event, and of epsilon on the card.

    Raises:
        SelfCheckError: Fewer releases are accounted than are made, at other rates than
            they are drawn, or epsilon is not that of all steps.
    """
    steps, name = mechanism.steps, type(mechanism).__name__
    told = [_check_event(mechanism)] if isinstance(mechanism, _SHIPPED) else []
    epsilon = report.privacy_card(mechanism, steps=steps).epsilon
    if not epsilon <= _PROFILED:
        told += [f"epsilon, above {_PROFILED:g} or unknown, is not computed anew"]
        return "; ".join(told)
    (delta,) = accounting.privacy_profile(mechanism, [epsilon], steps=steps)
    if not delta <= mechanism.delta * (1 + 1e-3):
        raise SelfCheckError(
            f"epsilon={epsilon:.4g} on the card is not that of {steps} steps of {name}: "
            f"they cost delta={delta:.3g} there, not {mechanism.delta:g}"
        )
    return "; ".join([*told, "epsilon on the card is that of all steps"])


def _check_event(mechanism: Mechanism) -> str:
    sampling, size = mechanism.sampling, mechanism.num_examples
    name = type(mechanism).__name__
    if isinstance(mechanism, DiceSgd) and mechanism.accounting in (
        "conservative",
        "k_participation",
    ):
        return (
            f"releases in the event of {name} are not counted: its analysis is its own"
        )
    for steps in {1, mechanism.steps}:
        wanted = _participations(sampling, steps=steps, size=size)
        found = list(terms(mechanism.event(steps)))
        drawn = {
            term.rate
            for term in terms(sampling.compose(1.0, steps=steps, num_examples=size))
        }
        count = sum(term.count for term in found)
        if wanted is not None and count != wanted:
            raise SelfCheckError(
                f"{name} accounts {count} releases of an example in {steps} steps, which "
                f"takes part in {wanted}"
            )
        if not {term.rate for term in found} <= drawn:
            raise SelfCheckError(
                f"{name} accounts other rates than its sampling draws with: {sampling}"
            )
    return "all releases are accounted"


def _participations(sampling: Sampling, *, steps: int, size: int) -> int | None:
    """Return how many releases of one example have to be accounted."""
    match sampling:
        case ShuffledFixed():
            return math.ceil(steps / (size // sampling.batch_size))
        case CyclicPoisson():
            return math.ceil(steps / sampling.cycle)
        case Poisson() | TruncatedPoisson() | PeriodicPoisson() | FullBatch():
            return steps
    return None


def _coins_of(sampling: Sampling, *, steps: int, size: int) -> Coins | None:
    """Return the coins of what is accounted; None if the sampling is not known."""
    accounted = terms(sampling.compose(1.0, steps=steps, num_examples=size))
    return _coins(sampling, [term.rate for term in accounted], steps, size)


def _coins(
    sampling: Sampling, rates: list[float | None], steps: int, size: int
) -> Coins | None:
    """Return the coins of these accounted rates; None if the sampling is not known."""
    told = [rate for rate in rates if rate is not None]
    if len(told) < len(rates):
        return None
    rate = told[0]
    nothing = np.zeros(steps)
    match sampling:
        case FullBatch():
            return Coins(np.full(steps, size), nothing, steps, 0.0, steps)
        case ShuffledFixed():
            each = float(sampling.batch_size)
            return Coins(nothing + each, nothing, steps * each / size, 0.0, steps)
        case TruncatedPoisson():
            return _truncated(rate, sampling.capacity, steps=steps, size=size)
        case CyclicPoisson():
            return _cyclic(rate, sampling.cycle, steps=steps, size=size)
        case PeriodicPoisson():
            first = np.arange(steps) % sampling.period == 0
            each = np.where(first, rate, told[-1])
        case Poisson():
            each = np.full(steps, rate)
        case _:
            return None
    spread = each * (1 - each)
    return Coins(size * each, size * spread, each.sum(), spread.sum(), steps)


def _truncated(rate: float, capacity: int, *, steps: int, size: int) -> Coins:
    from scipy.stats import binom

    # Moments of min(Binomial, capacity): sums of the chances to be above.
    k = np.arange(capacity)
    above = binom.sf(k, size, rate)
    mean = above.sum()
    variance = ((2 * k + 1) * above).sum() - mean**2
    one = mean / size
    return Coins(
        np.full(steps, mean),
        np.full(steps, variance),
        steps * one,
        steps * one * (1 - one),
        steps,
    )


def _cyclic(rate: float, cycle: int, *, steps: int, size: int) -> Coins:
    # Of one example, whose part decides how many turns it has.
    turns = np.bincount(np.arange(steps) % cycle, minlength=cycle)
    one = rate / cycle
    variance = rate * (1 - rate) * turns.mean() + rate**2 * turns.var()
    return Coins(
        np.full(steps, size * one),
        np.full(steps, size * one * (1 - one)),
        rate * turns.mean(),
        variance,
        min(steps, cycle),
    )


def _runs(coins: Coins, steps: int) -> int:
    """Return how many runs to simulate: one if nothing is left to chance."""
    if not coins.spreads.any():
        return 1
    least, most = _DRAWS
    wanted = _INDICES / max(coins.sizes.mean(), 1e-9)
    return math.ceil(min(max(wanted, least * steps / coins.alike), most) / steps)


def _simulate(
    sampling: Sampling, coins: Coins, *, runs: int, size: int
) -> tuple[NDArray[np.float64], list[tuple[float, float]]]:
    """Draw the batches of ``runs`` runs.

    Returns:
        Their sizes, ``[runs, T]``. And how far examples differ in how often they are drawn,
        in one run and in all, as a multiple of what coins make of it, with its standard
        error; nothing where coins have no say in it.
    """
    steps = len(coins.sizes)
    sizes, pooled, squares = np.zeros((runs, steps)), np.zeros(size), 0.0
    most = _participations(sampling, steps=steps, size=size)
    if most is None:
        most = sampling.max_participations(steps=steps, num_examples=size)
    for run in range(runs):
        seed, times = secret_seed(), np.zeros(size)
        for step in range(steps):
            drawn = _drawn(sampling, step, size=size, seed=seed)
            times[drawn] += 1
            sizes[run, step] = len(drawn)
        if times.max() > most:
            raise SelfCheckError(
                f"{sampling} draws an example more than {most} times in {steps} steps"
            )
        squares += np.square(times - coins.mean).sum()
        pooled += times
    if not coins.variance:
        return sizes, []
    # Of a sum of coins; the variance of its square over the square of its variance.
    spread = 2 + 1 / coins.variance
    within = squares / (runs * size * coins.variance)
    across = np.square(pooled - runs * coins.mean).sum() / (
        runs * size * coins.variance
    )
    return sizes, [
        (within, math.sqrt(spread / (runs * size))),
        (across, math.sqrt((2 + 1 / (runs * coins.variance)) / size)),
    ]


def _sizes(sampling: Sampling, *, steps: int, size: int) -> NDArray[np.float64]:
    """Draw the first batches of one run, and return their sizes: ``[1, steps]``."""
    seed = secret_seed()
    drawn = (_drawn(sampling, step, size=size, seed=seed) for step in range(steps))
    return np.array([[len(batch) for batch in drawn]], np.float64)


def _drawn(sampling: Sampling, step: int, *, size: int, seed: int) -> np.ndarray:
    drawn = sampling.draw(step, num_examples=size, seed=seed)
    ordered = np.sort(drawn)
    twice = np.any(ordered[1:] == ordered[:-1])
    if twice or (len(drawn) and not 0 <= ordered[0] <= ordered[-1] < size):
        raise SelfCheckError(
            f"{sampling} draws an example twice in a batch, or one that is not there"
        )
    return drawn


def _check_sizes(
    sampling: Sampling, coins: Coins, sizes: NDArray[np.float64], *, size: int
) -> None:
    off = np.abs(sizes.sum() - len(sizes) * coins.sizes.sum())
    # Batches of a cycle share out the examples, and their sum varies the less for it.
    spread = min(size * coins.variance, coins.spreads.sum())
    wrong = off > _ERRORS * math.sqrt(len(sizes) * spread) + 1e-6
    if isinstance(sampling, TruncatedPoisson):
        wrong |= sizes.max() > sampling.capacity
    varied = coins.spreads > 0
    wrong |= not np.allclose(sizes[:, ~varied], coins.sizes[~varied])
    if varied.any():
        spreads = coins.spreads[varied]
        scores = np.square(sizes - coins.sizes)[:, varied] / spreads
        free = len(sizes) * min(coins.alike, len(spreads))
        error = math.sqrt((2 + 1 / spreads.min()) / free)
        wrong |= abs(scores.mean() - 1) > _ERRORS * error
    if wrong:
        raise SelfCheckError(
            f"{sampling} draws batches of other sizes than are accounted: their mean, their "
            "spread or the largest"
        )
