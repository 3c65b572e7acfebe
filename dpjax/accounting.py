"""Epsilon of a mechanism and calibration of its noise, thin over dp_accounting.

Adjacency is always handed to dp_accounting as ADD_OR_REMOVE_ONE: its 0.6.0 REPLACE_ONE
means different things to its PLD and RDP accountants. Zero-out adjacency moves a sum by
the same distance as add/remove, so plain Gaussians are accounted alike under both.

This module may not import jax or, at the top, dp_accounting (0.9 s).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dpjax.checks import check_epsilon

if TYPE_CHECKING:
    from dp_accounting import DpEvent, PrivacyAccountant

Accountant = Literal["pld", "rdp"]
MechanismT = TypeVar("MechanismT")


def epsilon(
    mechanism: Any, *, steps: int | None = None, accountant: Accountant = "pld"
) -> float:
    """Return epsilon at ``mechanism.delta`` after ``steps`` releases.

    Args:
        mechanism: Any mechanism.
        steps: Releases really made; all the planned ones by default.
        accountant: "pld" (tight, pessimistic rounding) or "rdp" (looser cross-check).

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
    """Return the mechanism with the least noise whose PLD epsilon is at most ``epsilon``.

    Args:
        make: Noise multiplier -> mechanism, with epsilon falling in the multiplier.
        epsilon: Target, positive and finite.

    Raises:
        ValueError: The target is not positive and finite, or out of reach.
    """
    check_epsilon(epsilon)
    from dp_accounting import mechanism_calibration as calibration

    plan: Any = make(1.0)
    try:
        noise_multiplier = calibration.calibrate_dp_mechanism(
            functools.partial(_accountant, "pld"),
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


@functools.lru_cache(maxsize=1024)
def _epsilon(mechanism: Any, steps: int, accountant: Accountant) -> float:
    from dp_accounting.privacy_accountant import UnsupportedEventError

    try:
        ledger = _composed(mechanism, steps, accountant)
    except UnsupportedEventError:
        return math.nan
    return float(ledger.get_epsilon(mechanism.delta))


@functools.lru_cache(maxsize=8)
def _composed(
    mechanism: Any, steps: int, accountant: Accountant
) -> "PrivacyAccountant":
    ledger = _accountant(accountant)
    ledger.compose(mechanism.event(steps))
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
    ledger: Any = _composed(mechanism, steps, "pld")
    return [float(ledger.get_delta(epsilon)) for epsilon in epsilons]
