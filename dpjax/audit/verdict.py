"""From the scores of an attack to a verdict on a claimed epsilon."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpjax.audit import bayes, distinguish, estimators, one_run
from dpjax.audit.estimators import Counts
from dpjax.checks import check_probability
from dpjax.clipping import Engine, vmap
from dpjax.mechanisms import Mechanism
from dpjax.privacy.accounting import epsilon, privacy_profile

Verdict = Literal["consistent", "VIOLATED"]
CREDIBILITY = 0.9


class Claim(NamedTuple):
    """What is claimed: epsilon at delta, and the deltas of other epsilons.

    Attributes:
        epsilon, delta: As on the privacy card.
        epsilons, deltas: ``E`` points of the whole claimed profile.
    """

    epsilon: float
    delta: float
    epsilons: tuple[float, ...]
    deltas: tuple[float, ...]


class Excess(NamedTuple):
    """Where the attack comes closest to, or exceeds, the claimed profile.

    Attributes:
        epsilon: The point of the profile.
        shown: Delta there is at least this, with confidence.
        claimed: Delta there, as claimed.
    """

    epsilon: float
    shown: float
    claimed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What one attack found.

    Attributes:
        attack: Its name.
        trials: Runs on each neighbour (or canaries) whose answers were counted.
        confidence: With which the bounds hold.
        counts: True and false positives and negatives of those runs.
        lower_bound: Of epsilon at the claim's delta; assumes nothing of the mechanism.
        gdp_lower_bound: The same IF the mechanism is Gaussian; no part of the verdict.
        posterior: Credible interval and median of the attack's epsilon.
        excess: The profile's most strained point.
        roc: ``(FPR, TPR)`` points over all runs.
        verdict: "VIOLATED" if the lower bound exceeds the claimed epsilon, or delta the
            claimed profile anywhere.
    """

    attack: str
    trials: int
    confidence: float
    counts: Counts
    lower_bound: float
    gdp_lower_bound: float
    posterior: bayes.Posterior
    excess: Excess
    roc: tuple[tuple[float, float], ...]
    verdict: Verdict


def claim_of(mechanism: Mechanism, *, steps: int | None = None) -> Claim:
    """Return what is claimed of ``steps`` releases (all, by default).

    Raises:
        ValueError: Nothing finite is claimed, so that nothing can be refuted.
    """
    claimed = epsilon(mechanism, steps=steps)
    if not math.isfinite(claimed):
        raise ValueError(
            f"epsilon={claimed} of {type(mechanism).__name__} is no claim that an audit "
            "could refute: give it noise, or an accounting that knows its event"
        )
    points = tuple(float(e) for e in np.linspace(0, max(claimed, 1.0), 21))
    profile = privacy_profile(mechanism, points, steps=steps)
    return Claim(claimed, mechanism.delta, points, tuple(profile))


def judge(
    inside: ArrayLike,
    outside: ArrayLike,
    claim: Claim,
    *,
    attack: str,
    confidence: float,
) -> Finding:
    """Return what scores (see ``estimators.split``) say about a claim.

    Args:
        inside: ``float[n]``, scores of runs with the target.
        outside: ``float[n]``, scores of runs without it.
        claim: What to test.
        attack: Its name.
        confidence: Of the bounds, all together.

    Raises:
        ValueError: Unequal lengths, NaN, or too few runs to refute the claim at all.
    """
    one, two = estimators.checked_scores(inside, outside)
    # Two thresholds are part of the verdict, so each has half of the error.
    each = (1 + confidence) / 2
    _check_trials(len(one) - len(one) // 2, claim, confidence=each)
    given = {"delta": claim.delta, "confidence": each}
    at_delta = estimators.epsilon_at(claim.delta)
    counts = estimators.split(one, two, at_delta, confidence=each)
    gaussian = estimators.split(one, two, estimators.mu_of, confidence=each)
    excess = _excess(one, two, claim, confidence=each)
    lower = estimators.epsilon_lower_bound(counts, **given)
    violated = lower > claim.epsilon or excess.shown > excess.claimed
    return Finding(
        attack=attack,
        trials=counts.true_positives + counts.false_negatives,
        confidence=confidence,
        counts=counts,
        lower_bound=lower,
        gdp_lower_bound=estimators.gdp_lower_bound(gaussian, **given),
        posterior=bayes.posterior(counts, delta=claim.delta, credibility=CREDIBILITY),
        excess=excess,
        roc=tuple(estimators.roc(one, two)),
        verdict="VIOLATED" if violated else "consistent",
    )


def judge_one_run(
    scores: ArrayLike,
    members: ArrayLike,
    claim: Claim,
    *,
    attack: str,
    confidence: float,
) -> Finding:
    """Return what the canaries of one run say about a claim.

    The lower bound, and the verdict, are those of one-run auditing, which assumes nothing
    of the canaries; a third of them is guessed. The other numbers treat canaries as runs of
    their own, which is exact only if they do not disturb each other, as Diracs.

    Args:
        scores: ``float[m]``, the higher, the more "in".
        members: ``bool[m]``, the coins.
        claim: What to test.
        attack: Its name.
        confidence: Of the lower bound.

    Raises:
        ValueError: Unequal lengths, or too few canaries to show anything.
    """
    values, coins = estimators.checked_scores(scores, np.asarray(members, np.float64))
    guesses = _guesses(len(values))
    given = {"delta": claim.delta, "confidence": confidence}
    needed = 3 * one_run.canaries_needed(epsilon=0.0, **given) + 3
    if len(values) < needed:
        raise ValueError(
            f"canaries={len(values)} are too few to show any epsilon at confidence="
            f"{confidence:g}: at least {needed} are needed"
        )
    lower = one_run.audit(values, coins, guesses=guesses, **given)
    size = int(min(coins.sum(), len(coins) - coins.sum()))
    inside, outside = values[coins == 1][:size], values[coins == 0][:size]
    at_delta = estimators.epsilon_at(claim.delta)
    counts = estimators.split(inside, outside, at_delta, confidence=confidence)
    gaussian = estimators.split(
        inside, outside, estimators.mu_of, confidence=confidence
    )
    return Finding(
        attack=attack,
        trials=guesses,
        confidence=confidence,
        counts=counts,
        lower_bound=lower,
        gdp_lower_bound=estimators.gdp_lower_bound(gaussian, **given),
        posterior=bayes.posterior(counts, delta=claim.delta, credibility=CREDIBILITY),
        excess=_excess(inside, outside, claim, confidence=confidence),
        roc=tuple(estimators.roc(inside, outside)),
        verdict="VIOLATED" if lower > claim.epsilon else "consistent",
    )


def check_canaries(canaries: int, claim: Claim, *, confidence: float) -> None:
    """Raise ValueError if flawless guesses of so many canaries could not refute the claim.

    ``judge_one_run`` then finds any mechanism consistent. What it shows may be of interest
    all the same; as a check it would be none.
    """
    guesses = _guesses(canaries)
    given = {"delta": claim.delta, "confidence": confidence}
    shown = one_run.epsilon_lower_bound(
        canaries=canaries, guesses=guesses, correct=guesses, **given
    )
    if shown <= claim.epsilon:
        needed = 3 * one_run.canaries_needed(epsilon=claim.epsilon, **given) + 3
        raise ValueError(
            f"canaries={canaries} show epsilon >= {shown:.4g} at most, even if every guess "
            f"is right, and cannot refute epsilon={claim.epsilon:.4g}: at least {needed} "
            "are needed"
        )


def audit_mechanism(
    mechanism: Mechanism,
    *,
    trials: int,
    seed: int,
    confidence: float,
    attacks: Sequence[str] | None = None,
    engine: Engine = vmap,
) -> list[Finding]:
    """Attack a mechanism by simulation, and judge its claim.

    Args:
        mechanism: See ``dpjax.audit.distinguish``.
        trials: Simulated runs on each neighbour. Half choose thresholds, half count.
        seed: Of the simulation.
        confidence: Of all findings together: each gets its share of the error.
        attacks: All that apply, by default.
        engine: Computes the clipped sums.
    """
    claim = claim_of(mechanism)
    chosen = distinguish.attacks_on(mechanism) if attacks is None else tuple(attacks)
    check_probability("confidence", confidence)
    if not chosen:
        raise ValueError(
            f"attacks={attacks!r} names none; leave it out for all that apply"
        )
    each = 1 - (1 - confidence) / len(chosen)
    findings = []
    for attack in chosen:
        scores = distinguish.attack_scores(
            mechanism, attack=attack, trials=trials, seed=seed, engine=engine
        )
        findings.append(judge(*scores, claim, attack=attack, confidence=each))
    return findings


def worst(findings: Sequence[Finding]) -> Verdict:
    """Return "VIOLATED" if any finding is."""
    return (
        "VIOLATED" if any(f.verdict == "VIOLATED" for f in findings) else "consistent"
    )


def _excess(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    claim: Claim,
    *,
    confidence: float,
) -> Excess:
    """Return the most strained point, at the threshold that strains most on the first half."""
    claimed = np.asarray(claim.deltas)

    def strain(tpr: ArrayLike, fpr: ArrayLike) -> NDArray[np.float64]:
        return (estimators.delta_at(claim.epsilons, tpr, fpr) - claimed).max(axis=-1)

    counts = estimators.split(inside, outside, strain, confidence=confidence)
    rates = estimators.rates(counts, confidence=confidence)
    shown = estimators.delta_at(claim.epsilons, *rates)
    at = int(np.argmax(shown - claimed))
    return Excess(claim.epsilons[at], float(shown[at]), claim.deltas[at])


def _guesses(canaries: int) -> int:
    """Return how many coins are guessed: a third, half of them each way."""
    return canaries // 6 * 2


def _check_trials(counted: int, claim: Claim, *, confidence: float) -> None:
    """Raise ValueError if flawless answers could refute no point of the profile."""
    needed = min(
        estimators.trials_needed(epsilon=e, delta=d, confidence=confidence)
        for e, d in zip(claim.epsilons, claim.deltas, strict=True)
        if d < 1
    )
    if counted < needed:
        raise ValueError(
            f"trials={2 * counted} are too few to refute epsilon={claim.epsilon:.4g} at this "
            f"confidence, even if every answer is right: at least {2 * needed} are needed"
        )
