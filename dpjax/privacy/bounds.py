"""What an event costs, by the accountants of dp_accounting, wherever they are right.

A composition of Gaussians is one Gaussian, whose epsilon is known exactly. Else RDP bounds
epsilon in milliseconds, and says on what grid of losses PLD is precise and quick: a grid
of 1e-4 takes minutes and gigabytes at an epsilon of 50, one of 1e-3 a second.

Adjacency is always handed to dp_accounting as ADD_OR_REMOVE_ONE: its 0.6.0 REPLACE_ONE
means different things to its PLD and RDP accountants. Zero-out adjacency moves a sum by
the same distance as add/remove, so plain Gaussians are accounted alike under both.

This module may not import jax or, at the top, dp_accounting (0.9 s).
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dp_accounting import DpEvent, PrivacyAccountant

Accountant = Literal["pld", "rdp"]
LEAST_DELTA = 1e-14
"""Below, what PLD leaves out may be more than delta."""
FINEST_GRID, MOST_POINTS = 1e-4, 4e6
ORDERS = (*(1 + x / 10 for x in range(6, 100)), *range(11, 64), 128, 256, 512, 1024)
LOW_ORDERS = tuple(1 + 0.0125 * 1.2**k for k in range(21))
"""Best where epsilon is large; where it is small some come out as nothing at all."""


@dataclasses.dataclass(frozen=True)
class Named:
    """An event known by its text, which has all digits: events may hold lists."""

    text: str
    event: Any = dataclasses.field(compare=False)


def named(event: "DpEvent") -> Named:
    """Return ``event`` with its text."""
    return Named(str(event), event)


@functools.lru_cache(maxsize=1024)
def spent(event: Named, delta: float, accountant: Accountant) -> float:
    """Return the epsilon of ``event`` at ``delta``, rounded up; NaN if it is not known.

    "pld" is the least of all bounds there are: as Gaussian, by PLD, by RDP.
    """
    if accountant == "rdp":
        return _by_rdp(event, delta)
    gaussian, others = _parts(event)
    if not others:
        return _of_gaussian(gaussian, delta)
    looser = _by_rdp(event, delta)
    grid = _grid(event, delta)
    if grid is None:
        return looser
    tight = _known(lambda: _pld(event, grid).get_epsilon(delta))
    # RDP of 0 may be the rounding of an order.
    bounds = [x for x in (tight, looser) if not math.isnan(x) and (x is tight or x > 0)]
    return min(bounds, default=math.nan)


def deltas(event: Named, epsilons: Sequence[float], *, delta: float) -> list[float]:
    """Return the delta at each of ``epsilons`` by PLD, on the grid that fits ``delta``."""
    ledger = _pld(event, _grid(event, delta) or FINEST_GRID)
    return [float(ledger.get_delta(epsilon)) for epsilon in epsilons]


def _by_rdp(event: Named, delta: float) -> float:
    usual = _known(lambda: _rdp(event, ORDERS).get_epsilon(delta))
    low = _known(lambda: _rdp(event, LOW_ORDERS).get_epsilon(delta))
    # An order whose divergence is rounded to less than 0 is taken for one of no cost.
    return min(usual, low) if low > 0 else usual


def _of_gaussian(squares: float, delta: float) -> float:
    """Return epsilon of one Gaussian of ``1 / noise_multiplier^2 = squares``."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    sigma = 1 / math.sqrt(squares) if squares else math.inf
    # Ten digits are found; what is told is rounded up.
    return float(get_epsilon_gaussian(sigma, delta)) * (1 + 1e-9)


def _grid(event: Named, delta: float) -> float | None:
    """Return the distance of losses for PLD; None where RDP has to do.

    A power of two times the finest, so that each grid holds the coarser ones, and coarser
    the larger epsilon is: PLD rounds up on either, more on the coarser, and epsilon does
    not fall where they change. It stays well below the spread of one loss, of which PLD
    on a coarser grid would make too much.
    """
    estimate = _by_rdp(_untruncated(event), delta)
    if delta < LEAST_DELTA and not math.isnan(estimate):
        return None
    if math.isnan(estimate):
        return FINEST_GRID
    if math.isinf(estimate):
        return None
    squares, others = _parts(event)  # All Gaussians are one.
    count = max((squares > 0) + sum(n for _, n in others.values()), 1)
    tail = math.sqrt(-2 * math.log(delta))
    spread = (math.sqrt(tail**2 + 2 * estimate) - tail) / math.sqrt(count)
    finest = max(FINEST_GRID, min(2e-5 * estimate, spread / 10))
    grid = FINEST_GRID * 2 ** math.floor(math.log2(finest / FINEST_GRID))
    return grid if estimate / grid < MOST_POINTS else None


def _parts(event: Named) -> "tuple[float, dict[str, tuple[DpEvent, int]]]":
    """Return ``sum 1 / z^2`` of the Gaussians in ``event``, and what else is in it."""
    squares, others = 0.0, {}
    for part, count in _flat(event.event, 1):
        multiplier = getattr(part, "noise_multiplier", 0)
        if type(part).__name__ == "GaussianDpEvent" and multiplier:
            squares += count / multiplier**2
        else:
            _, before = others.get(str(part), (part, 0))
            others[str(part)] = part, before + count
    return squares, others


def _flat(event: "DpEvent", count: int) -> "Iterator[tuple[DpEvent, int]]":
    """Yield what is composed in ``event``, and how often."""
    import dp_accounting as dp

    match event:
        case dp.NoOpDpEvent():
            pass
        case dp.SelfComposedDpEvent():
            yield from _flat(event.event, count * event.count)
        case dp.ComposedDpEvent():
            for part in event.events:
                yield from _flat(part, count)
        case dp.PoissonSampledDpEvent(sampling_probability=1):
            yield from _flat(event.event, count)
        case _:
            yield event, count


def _simplified(event: Named) -> "DpEvent":
    import dp_accounting as dp

    squares, others = _parts(event)
    one = [dp.GaussianDpEvent(1 / math.sqrt(squares))] if squares else []
    rest = [dp.SelfComposedDpEvent(part, count) for part, count in others.values()]
    return dp.ComposedDpEvent([*one, *rest])


def _untruncated(event: Named) -> Named:
    """Return ``event`` with plain Poisson sampling, which RDP knows: for an estimate."""
    import dp_accounting as dp

    def poisson(part: "DpEvent") -> "DpEvent":
        if not isinstance(part, dp.TruncatedSubsampledGaussianDpEvent):
            return part
        gaussian = dp.GaussianDpEvent(part.noise_multiplier)
        return dp.PoissonSampledDpEvent(part.sampling_probability, gaussian)

    parts = _flat(_simplified(event), 1)
    composed: Any = [dp.SelfComposedDpEvent(poisson(x), n) for x, n in parts]
    return named(dp.ComposedDpEvent(composed))


def _known(ask: Any) -> float:
    """Return what an accountant answers; NaN if it does not know the event."""
    from dp_accounting.privacy_accountant import UnsupportedEventError

    try:
        return float(ask())
    except UnsupportedEventError:
        return math.nan


@functools.lru_cache(maxsize=8)
def _pld(event: Named, grid: float) -> "PrivacyAccountant":
    import dp_accounting as dp
    from dp_accounting import pld

    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    ledger = pld.PLDAccountant(relation, value_discretization_interval=grid)
    return ledger.compose(_simplified(event))


@functools.lru_cache(maxsize=64)
def _rdp(event: Named, orders: tuple[float, ...]) -> "PrivacyAccountant":
    import dp_accounting as dp
    from dp_accounting import rdp

    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    with _quiet():
        return rdp.RdpAccountant(orders, relation).compose(event.event)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what RDP tells of each order that it has to leave out."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)
