"""Epsilon of a mechanism, calibration of its noise, and the cost of a search.

This module may not import jax or, at the top, dp_accounting (0.9 s).
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

from dpjax.checks import check_epsilon, check_mechanism, check_number
from dpjax.privacy.bounds import Accountant, Named, deltas, named, spent

if TYPE_CHECKING:
    from dp_accounting import DpEvent

MechanismT = TypeVar("MechanismT")


def epsilon(
    mechanism: Any, *, steps: int | None = None, accountant: Accountant = "pld"
) -> float:
    """Return epsilon at ``mechanism.delta`` after ``steps`` releases.

    Args:
        mechanism: Any mechanism.
        steps: Releases really made; all the planned ones by default.
        accountant: "pld" (tight, pessimistic rounding; exact for Gaussians alone) or "rdp"
            (looser cross-check). At a delta below 1e-14, where the error of PLD is more,
            "pld" is the bound by RDP too.

    Returns:
        Epsilon; ``inf`` if nothing is guaranteed, ``nan`` if the accountant does not
        know the mechanism's event.

    Raises:
        ValueError: More steps than planned, or an unknown accountant.
    """
    steps = _steps(mechanism, steps)
    if accountant not in ("pld", "rdp"):
        raise ValueError(f"accountant={accountant!r} is unknown; use 'pld' or 'rdp'")
    if not steps:
        return 0.0
    return spent(named(mechanism.event(steps)), mechanism.delta, accountant)


def calibrate(make: Callable[[float], MechanismT], *, epsilon: float) -> MechanismT:
    """Return the mechanism with the least noise whose ``epsilon`` is at most the target.

    Args:
        make: Noise multiplier -> mechanism, with epsilon falling in the multiplier.
        epsilon: Target, positive and finite.

    Raises:
        ValueError: The target is not positive and finite, or out of reach; ``make`` makes
            no mechanism; or no accountant knows the event of the mechanism.
    """
    check_epsilon(epsilon)
    if not callable(make):
        raise ValueError(
            f"make={make!r} must be a function from the noise multiplier to a mechanism"
        )
    from dp_accounting import mechanism_calibration as calibration

    plan: Any = make(1.0)
    check_mechanism(plan)
    accountant: Any = _Remembering
    if math.isnan(spent(named(_event(plan)), plan.delta, "pld")):
        raise ValueError(
            f"event={_event(plan)} of {type(plan).__name__} is not known to the accountants "
            "(PLD, RDP): give noise_multiplier, and an epsilon that you can prove"
        )
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

    if not isinstance(mechanisms, Sequence) or not mechanisms:
        raise ValueError(f"mechanisms={mechanisms!r} must be those of one run or more")
    taken: Sequence[int | None] = [None] * len(mechanisms) if steps is None else steps
    if len(taken) != len(mechanisms):
        raise ValueError(
            f"steps={[*taken]} must be one number for each of {len(mechanisms)} mechanisms"
        )
    taken = [_steps(m, number) for m, number in zip(mechanisms, taken, strict=True)]
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
    runs = collections.Counter(zip(mechanisms, taken, strict=True))
    counts = collections.Counter(
        named(m.event(number)) for m, number in runs.elements()
    )
    together = named(
        dp.ComposedDpEvent(
            [dp.SelfComposedDpEvent(plan.event, n) for plan, n in counts.items()]
        )
    )
    known = {p: n for p, n in counts.items() if not math.isnan(spent(p, delta, "rdp"))}
    return TuningCost(
        runs=len(mechanisms),
        delta=delta,
        dearest=max(spent(plan, delta, "pld") for plan in counts),
        composed=spent(together, delta, "pld"),
        selected={
            name: spent(_best_of(known, shape), delta, "rdp")
            for name, shape in (("geometric", 1.0), ("Poisson", math.inf))
            if known
        },
        analysed=sum(known.values()),
        claimed=sum(n for (m, number), n in runs.items() if m.caveats(number)),
    )


def _best_of(plans: "Mapping[Named, int]", shape: float) -> "Named":
    from dp_accounting import dp_event

    return named(
        dp_event.ComposedDpEvent(
            [
                dp_event.RepeatAndSelectDpEvent(
                    event=plan.event, mean=runs, shape=shape
                )
                for plan, runs in plans.items()
            ]
        )
    )


class _Remembering:
    """An accountant of one event for calibration, by ``dpjax.privacy.bounds``."""

    def __init__(self) -> None:
        import dp_accounting as dp

        self.ledger: DpEvent = dp.NoOpDpEvent()

    def compose(self, event: "DpEvent") -> "_Remembering":
        self.ledger = event
        return self

    def get_epsilon(self, delta: float) -> float:
        return spent(named(self.ledger), delta, "pld")


def _steps(mechanism: Any, steps: int | None) -> int:
    """Return the steps that are asked about, all of the plan for None.

    Raises:
        ValueError: They are not of the plan, or there is no mechanism.
    """
    check_mechanism(mechanism)
    if steps is None:
        return mechanism.steps
    if not isinstance(steps, Integral) or not 0 <= steps <= mechanism.steps:
        raise ValueError(
            f"steps={steps!r} is outside the plan of mechanism.steps={mechanism.steps}"
        )
    return int(steps)


def _event(mechanism: Any) -> "DpEvent":
    return mechanism.event(mechanism.steps)


def privacy_profile(
    mechanism: Any, epsilons: Sequence[float], *, steps: int | None = None
) -> list[float]:
    """Return the delta claimed at each of ``epsilons``, by PLD (pessimistic rounding).

    The whole curve is what an accountant claims; ``epsilon`` is one point of it.

    Raises:
        ValueError: More steps than planned, or a negative epsilon.
    """
    event = named(mechanism.event(_steps(mechanism, steps)))
    for value in epsilons:
        check_number("epsilons", value)
        if not value >= 0:
            raise ValueError(f"epsilons={value} must be at least 0")
    return deltas(event, epsilons, delta=mechanism.delta)
