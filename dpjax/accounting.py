"""Epsilon of a mechanism and calibration of its noise, thin over dp_accounting.

Adjacency is always handed to dp_accounting as ADD_OR_REMOVE_ONE: its 0.6.0 REPLACE_ONE
means different things to its PLD and RDP accountants. Zero-out adjacency moves a sum by
the same distance as add/remove, so plain Gaussians are accounted alike under both.

This module may not import jax or, at the top, dp_accounting (0.9 s).
"""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dpjax.checks import check_epsilon

if TYPE_CHECKING:
    from dp_accounting import DpEvent, PrivacyAccountant

Accountant = Literal["pld", "rdp"]
LARGEST_EPSILON, LEAST_DELTA = 50.0, 1e-14
"""How far PLD is asked; beyond, RDP alone."""
MechanismT = TypeVar("MechanismT")


def epsilon(
    mechanism: Any, *, steps: int | None = None, accountant: Accountant = "pld"
) -> float:
    """Return epsilon at ``mechanism.delta`` after ``steps`` releases.

    Args:
        mechanism: Any mechanism.
        steps: Releases really made; all the planned ones by default.
        accountant: "pld" (tight, pessimistic rounding) or "rdp" (looser cross-check). Above
            an epsilon of 50, where PLD takes minutes and gigabytes, and at a delta below
            1e-14, where its own error is more, "pld" is the bound by RDP too.

    Returns:
        Epsilon; ``inf`` if nothing is guaranteed, ``nan`` if the accountant does not
        know the mechanism's event.

    Raises:
        ValueError: More steps than planned, or an unknown accountant.
    """
    steps = mechanism.steps if steps is None else steps
    if not 0 <= steps <= mechanism.steps:
        raise ValueError(
            f"steps={steps} is outside the plan of mechanism.steps={mechanism.steps}"
        )
    if accountant not in ("pld", "rdp"):
        raise ValueError(f"accountant={accountant!r} is unknown; use 'pld' or 'rdp'")
    return _epsilon(mechanism, steps, accountant) if steps else 0.0


def calibrate(make: Callable[[float], MechanismT], *, epsilon: float) -> MechanismT:
    """Return the mechanism with the least noise whose ``epsilon`` is at most the target.

    Args:
        make: Noise multiplier -> mechanism, with epsilon falling in the multiplier.
        epsilon: Target, positive and finite.

    Raises:
        ValueError: The target is not positive and finite, or out of reach.
    """
    check_epsilon(epsilon)
    from dp_accounting import mechanism_calibration as calibration

    plan: Any = make(1.0)
    accountant: Any = _Remembering
    try:
        noise_multiplier = calibration.calibrate_dp_mechanism(
            accountant,
            lambda z: _event(make(z)),
            target_epsilon=epsilon,
            target_delta=plan.delta,
            bracket_interval=calibration.LowerEndpointAndGuess(0.0, 1.0),
            tol=1e-4,
        )
    except calibration.NoBracketIntervalFoundError as error:
        raise ValueError(
            f"epsilon={epsilon} cannot be reached with any noise multiplier; "
            "raise epsilon, or lower steps or the sampling rate"
        ) from error
    return make(float(noise_multiplier))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningCost:
    """What several runs on the same data cost together.

    Attributes:
        runs: How many.
        delta: At which every epsilon is stated.
        dearest: Epsilon of the dearest run, had it been the only one.
        composed: Epsilon of all of them, everything published: it holds whatever was
            chosen by looking at them.
        selected: Epsilon of publishing the best run of each plan only, had the number of
            runs been random; by the name of its distribution.
        analysed: How many runs ``selected`` is about: RDP has no analysis of others.
        claimed: How many runs have caveats: all these epsilons rest on theirs.
    """

    runs: int
    delta: float
    dearest: float
    composed: float
    selected: Mapping[str, float]
    analysed: int
    claimed: int


def tuning_cost(
    mechanisms: Sequence[Any], *, steps: Sequence[int] | None = None
) -> TuningCost:
    """Return what a search over runs of these mechanisms cost.

    ``composed`` composes the events of all runs, and is the lesser of the PLD and the RDP
    bound. For ``selected``, runs of equal events are one
    plan: a number of trials is drawn from the distribution (its mean is how many runs
    there were), the best trial is published, the others never seen; the bests of several
    plans are composed. That is Papernot and Steinke 2022 (arXiv 2110.03620, theorems 2 and
    6), by dp_accounting's ``RepeatAndSelectDpEvent``. It is the price of that protocol:
    with a number of trials that is fixed, only ``composed`` holds.

    Args:
        mechanisms: One for each run, all on the same data; at least one.
        steps: How many each run has taken; None for the planned ones.

    Raises:
        ValueError: There are none, or their delta or adjacency differs.
    """
    import dp_accounting as dp

    adjacencies = {mechanism.sampling.adjacency for mechanism in mechanisms}
    if len(adjacencies) > 1:
        raise ValueError(
            f"runs of the adjacencies {sorted(adjacencies)} have no common epsilon: compose "
            "those of each apart"
        )

    deltas = {mechanism.delta for mechanism in mechanisms}
    if len(deltas) != 1:
        raise ValueError(f"delta={sorted(deltas)} must be the same for all runs")
    (delta,) = deltas
    taken = [m.steps for m in mechanisms] if steps is None else steps
    runs = collections.Counter(zip(mechanisms, taken, strict=True))
    counts = collections.Counter(
        _named(m.event(number)) for m, number in runs.elements()
    )
    together = _named(
        dp.ComposedDpEvent(
            [dp.SelfComposedDpEvent(plan.event, n) for plan, n in counts.items()]
        )
    )
    bounds = [_spent(together, delta, name) for name in ("pld", "rdp")]
    known = {p: n for p, n in counts.items() if not math.isnan(_spent(p, delta, "rdp"))}
    return TuningCost(
        runs=len(mechanisms),
        delta=delta,
        dearest=max(_spent(plan, delta, "pld") for plan in counts),
        composed=min(bound for bound in bounds if not math.isnan(bound)),
        selected={
            name: _spent(_best_of(known, shape), delta, "rdp")
            for name, shape in (("geometric", 1.0), ("Poisson", math.inf))
            if known
        },
        analysed=sum(known.values()),
        claimed=sum(n for (m, number), n in runs.items() if m.caveats(number)),
    )


def _best_of(plans: "Mapping[_Named, int]", shape: float) -> "_Named":
    from dp_accounting import dp_event

    return _named(
        dp_event.ComposedDpEvent(
            [
                dp_event.RepeatAndSelectDpEvent(
                    event=plan.event, mean=runs, shape=shape
                )
                for plan, runs in plans.items()
            ]
        )
    )


def _epsilon(mechanism: Any, steps: int, accountant: Accountant) -> float:
    return _spent(_named(mechanism.event(steps)), mechanism.delta, accountant)


@dataclasses.dataclass(frozen=True)
class _Named:
    """An event known by its text, which has all digits: events may hold lists."""

    text: str
    event: Any = dataclasses.field(compare=False)


def _named(event: "DpEvent") -> _Named:
    return _Named(str(event), event)


@functools.lru_cache(maxsize=1024)
def _spent(named: _Named, delta: float, accountant: Accountant) -> float:
    from dp_accounting.privacy_accountant import UnsupportedEventError

    if accountant == "pld":
        looser = _spent(named, delta, "rdp")
        if looser > LARGEST_EPSILON or (delta < LEAST_DELTA and not math.isnan(looser)):
            return looser
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # RDP tells of each order that it has to leave out.
    try:
        return float(_composed(named, accountant).get_epsilon(delta))
    except UnsupportedEventError:
        return math.nan
    finally:
        absl.setLevel(level)


class _Remembering:
    """What calibration asks of a PLD accountant, which is slow, computed once an event."""

    def __init__(self) -> None:
        import dp_accounting as dp

        self.ledger: DpEvent = dp.NoOpDpEvent()

    def compose(self, event: "DpEvent") -> "_Remembering":
        self.ledger = event
        return self

    def get_epsilon(self, delta: float) -> float:
        return _spent(_named(self.ledger), delta, "pld")


@functools.lru_cache(maxsize=8)
def _composed(named: _Named, accountant: Accountant) -> "PrivacyAccountant":
    ledger = _accountant(accountant)
    ledger.compose(named.event)
    return ledger


def _event(mechanism: Any) -> "DpEvent":
    return mechanism.event(mechanism.steps)


def _accountant(name: Accountant) -> "PrivacyAccountant":
    import dp_accounting as dp
    from dp_accounting import pld, rdp

    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if name == "pld":
        return pld.PLDAccountant(relation)
    # Orders below 1.6 often fail to converge, with a warning each; none was ever best.
    orders = [*(1 + x / 10 for x in range(6, 100)), *range(11, 64), 128, 256, 512, 1024]
    return rdp.RdpAccountant(orders, relation)


def privacy_profile(
    mechanism: Any, epsilons: Sequence[float], *, steps: int | None = None
) -> list[float]:
    """Return the delta claimed at each of ``epsilons``, by PLD (pessimistic rounding).

    The whole curve is what an accountant claims; ``epsilon`` is one point of it.
    """
    steps = mechanism.steps if steps is None else steps
    ledger: Any = _composed(_named(mechanism.event(steps)), "pld")
    return [float(ledger.get_delta(epsilon)) for epsilon in epsilons]
