"""What an attacker who knows everything but the target sees of each mechanism.

A *view* turns the releases of one run into numbers ``y_t = shift_t + N(0, 1)``, where the
shift is 0 as long as the target takes no part, and says how to score such a sequence. To
attack a new mechanism, register its view: a few lines.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from dpjax.mechanisms import (
    AdaptiveDpSgd,
    BandMf,
    DiceSgd,
    Diff2,
    Diff2BvrLSgd,
    DpSgd,
    DpZero,
    Mechanism,
    PrivatizedErrorFeedback,
    ScheduledDpSgd,
    SpiderBoost,
)
from dpjax.mechanisms.diff2_bvr_l_sgd import LocalState
from dpjax.mechanisms.mathematics.directions import gaussian_direction
from dpjax.mechanisms.mathematics.toeplitz import strategy_column
from dpjax.typing import Params

Scores = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


class View(NamedTuple):
    """How to attack a mechanism.

    Attributes:
        gradient: Length of the target's gradient, per unit of the parameter.
        shifts: ``float64[T]``, how far the target moves y_t at a step it takes part in.
        read: ``(phase, released, state before, state after) -> y_t``, traced.
        score: ``(y[n, T], rates[T]) -> [n]``, the likelihood ratio of target to no target
            where it is known, or some other statistic that grows with the shifts.
        unclipped: Length of a gradient that nothing clips, if all steps are alike; else None.
        opposable: Whether y_t is the sum over a batch alone, without memory.
        whiten: ``y[n, T] -> [n, T]``, what makes the noise of all steps independent.
        start: Mechanism's first state -> the state the attack begins with, such as one
            that other examples have left behind.
        path: Step -> the parameter at that step; the attacker's optimizer ignores releases.
    """

    gradient: float
    shifts: NDArray[np.float64]
    read: Callable[[str, Params, Any, Any], jax.Array]
    score: Scores
    unclipped: float | None = None
    opposable: bool = False
    whiten: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda y: y
    start: Callable[[Any], Any] = lambda state: state
    path: Callable[[int], float] = lambda step: 1.0


@functools.singledispatch
def view(mechanism: Mechanism) -> View:
    """Return how to attack ``mechanism``.

    Raises:
        ValueError: No view of such a mechanism is known.
    """
    raise ValueError(
        f"mechanism={type(mechanism).__name__} has no known attack: register a view of it "
        "(dpjax.mechanisms.adversary.views)"
    )


def has_view(mechanism: Mechanism) -> bool:
    """Return whether a view of such a mechanism is known."""
    return view.dispatch(type(mechanism)) is not view.dispatch(object)


def memory_score(
    first: NDArray[np.float64], *, carry: float = 0.0, sticky: bool = False
) -> Scores:
    """Return the log likelihood ratio of a target that shows up again one step later.

    y_t is ``N(first_t b_t + carry m_t, 1)`` with independent coins ``b_t``; the memory m_t
    says whether the target took part in the step before ("sticky": in any step before).
    Without it y_t is N(0, 1). Exact, by a forward recursion over the two states of m.
    """

    def score(
        y: NDArray[np.float64], rates: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        def ratio(step: int, mean: float) -> NDArray[np.float64]:
            return mean * y[:, step] - mean**2 / 2

        fresh, used = np.zeros(len(y)), np.full(len(y), -np.inf)
        with np.errstate(divide="ignore"):
            log_in, log_out = np.log(rates), np.log1p(-rates)
        for t in range(y.shape[1]):
            skipped = used + log_out[t] + ratio(t, carry)
            drawn = np.logaddexp(
                fresh + log_in[t] + ratio(t, first[t]),
                used + log_in[t] + ratio(t, carry + first[t]),
            )
            fresh = fresh + log_out[t]
            if sticky:
                used = np.logaddexp(drawn, skipped)
            else:
                fresh, used = np.logaddexp(fresh, skipped), drawn
        return np.logaddexp(fresh, used)

    return score


@view.register
def _(mechanism: DpSgd) -> View:
    shifts = np.full(mechanism.steps, mechanism.clip_norm / mechanism.noise_stddev)
    scale = mechanism.expected_batch_size / mechanism.noise_stddev
    return View(
        gradient=_huge(mechanism.clip_norm),
        shifts=shifts,
        read=lambda phase, mean, before, after: _scalar(mean) * scale,
        score=memory_score(shifts),
        unclipped=mechanism.clip_norm,
        opposable=True,
    )


@view.register
def _(mechanism: PrivatizedErrorFeedback) -> View:
    batch, rate = mechanism.expected_batch_size, mechanism.memory_rate
    sums = np.array([mechanism.noise_stddev, mechanism.residual_stddev])
    longest = mechanism.outer_norm - mechanism.clip_norm
    each = np.array([mechanism.clip_norm, longest]) / sums
    shift = float(np.linalg.norm(each))
    weights = each / shift / sums

    def read(phase: str, mean: Params, before: Any, after: Any) -> jax.Array:
        del phase
        # The memory is public: both releases of the step can be solved for.
        old, new = _scalar(before.value), _scalar(after.value)
        first = batch * _scalar(mean) - new
        second = (new - (1 - rate) * old) / rate
        return weights[0] * first + weights[1] * second

    shifts = np.full(mechanism.steps, shift)
    return View(
        gradient=_huge(mechanism.outer_norm),
        shifts=shifts,
        read=read,
        score=memory_score(shifts),
        unclipped=mechanism.clip_norm,
        opposable=True,
    )


@view.register
def _(mechanism: DiceSgd) -> View:
    spread, steps = mechanism.noise_stddev, mechanism.steps
    bound = math.inf
    if mechanism.error_clip_norm is not None:
        unit = mechanism.expected_batch_size if mechanism.error_scale == "mean" else 1
        bound = mechanism.error_clip_norm * unit
    longest, unbounded = mechanism.outer_norm, mechanism.outer_norm is None
    if longest is None:
        longest = mechanism.clip_norm + 6 * steps * bound
    # One gradient fills the memory for the rest of the run, or for the next step only.
    sticky = longest - mechanism.clip_norm > 2 * bound
    # If nothing bounds gradients, other examples may have filled it with the opposite.
    held = 2 * steps * bound if unbounded else 0.0
    carry = (2 if unbounded else 1) * min(bound, longest - mechanism.clip_norm)
    offset = min(bound, held)

    def read(phase: str, mean: Params, before: Any, after: Any) -> jax.Array:
        del phase, before, after
        total = _scalar(mean) * mechanism.expected_batch_size
        return (total + offset) / spread

    def start(state: Any) -> Any:
        return state._replace(memory=jax.tree.map(lambda e: e - held, state.memory))

    shifts = np.full(steps, mechanism.clip_norm / spread)
    return View(
        gradient=longest,
        shifts=shifts,
        read=read,
        score=memory_score(shifts, carry=carry / spread, sticky=sticky),
        unclipped=mechanism.clip_norm,
        start=start,
    )


@view.register
def _(mechanism: AdaptiveDpSgd) -> View:
    batch, share = mechanism.expected_batch_size, mechanism.count_share

    def read(phase: str, mean: Params, before: Any, after: Any) -> jax.Array:
        del phase
        bound = before.clip_norm
        total = _scalar(mean) * batch / mechanism.noise_stddev(bound)
        # The clip norm is public: the count can be solved for, between the bounds.
        moved = jnp.log(after.clip_norm / bound) / mechanism.clip_learning_rate
        count = batch * (mechanism.target_quantile - 0.5 - moved)
        # The target is clipped: it counts as -1/2.
        return math.sqrt(1 - share) * total - math.sqrt(share) * (
            count / mechanism.count_stddev
        )

    each = mechanism.count_sensitivity / mechanism.count_stddev
    shift = math.hypot(1 / mechanism.noise_stddev(1.0), each)
    shifts = np.full(mechanism.steps, shift)
    return View(
        gradient=_huge(mechanism.max_clip_norm),
        shifts=shifts,
        read=read,
        score=memory_score(shifts),
    )


@view.register
def _(mechanism: ScheduledDpSgd) -> View:
    batch = mechanism.expected_batch_size
    multipliers = np.asarray(mechanism.noise_multipliers, np.float32)
    stddevs = jnp.asarray(multipliers * np.asarray(mechanism.clip_norms, np.float32))

    def read(phase: str, mean: Params, before: Any, after: Any) -> jax.Array:
        del phase, after
        return _scalar(mean) * batch / stddevs[before.step]

    shifts = 1 / multipliers
    return View(
        gradient=_huge(max(mechanism.clip_norms)),
        shifts=shifts,
        read=read,
        score=memory_score(shifts),
    )


@view.register
def _(mechanism: DpZero) -> View:
    scale = mechanism.expected_batch_size / mechanism.noise_stddev

    def read(phase: str, mean: Params, before: Any, after: Any) -> jax.Array:
        del phase, after
        u = _scalar(
            gaussian_direction(mean, seed=mechanism.direction_seed, step=before.step)
        )
        # The target's slope has the sign of the direction.
        return _scalar(mean) / jnp.abs(u) * scale

    shifts = np.full(mechanism.steps, mechanism.clip_norm / mechanism.noise_stddev)
    return View(
        # A direction may be short.
        gradient=1e4 * mechanism.clip_norm,
        shifts=shifts,
        read=read,
        score=memory_score(shifts),
        opposable=True,
    )


@view.register
def _(mechanism: BandMf) -> View:
    bands, steps = mechanism.bands, mechanism.steps
    column = strategy_column(mechanism.strategy, bands=bands, steps=steps)
    shift = mechanism.clip_norm / mechanism.noise_stddev
    scale = mechanism.expected_batch_size / mechanism.noise_stddev
    strategy = sum(c * np.eye(steps, k=-k) for k, c in enumerate(column))
    # Where the target shows, if it takes part at step t: row t of these.
    shown = shift * np.asarray(strategy).T

    def score(y: NDArray[np.float64], rates: NDArray[np.float64]) -> Any:
        ratios = y @ shown.T - np.square(shown).sum(axis=1) / 2
        cycle = getattr(mechanism.sampling, "cycle", 1)
        # It has one turn in each cycle, in the same place: one of these.
        rate = np.clip(rates.mean() * cycle, 0, 1)
        with np.errstate(divide="ignore"):
            each = np.logaddexp(np.log1p(-rate), np.log(rate) + ratios)
        places = [each[:, place::cycle].sum(axis=1) for place in range(cycle)]
        return np.logaddexp.reduce(places, axis=0) - math.log(cycle)

    return View(
        gradient=_huge(mechanism.clip_norm),
        shifts=np.full(steps, shift),
        read=lambda phase, mean, before, after: _scalar(mean) * scale,
        score=score,
        whiten=lambda y: y @ np.asarray(strategy)[: y.shape[1], : y.shape[1]].T,
    )


@view.register(Diff2)
@view.register(SpiderBoost)
@view.register(Diff2BvrLSgd)
def _(mechanism: Any) -> View:
    phases = [mechanism.phase(step) for step in range(mechanism.steps)]
    # All local steps have length 1, and so all rounds the same.
    origin = mechanism.init({"x": jnp.float32(0.0)})
    length = {"difference": mechanism.steps_per_round}
    radius = {
        p: float(
            mechanism.radius(p, {"x": jnp.float32(length.get(p, 1))}, _part(origin, p))
        )
        for p in set(phases)
    }
    spread = {p: float(mechanism.noise_stddev(p, radius[p])) for p in radius}

    def read(phase: str, mean: Params, before: Any, after: Any) -> jax.Array:
        del after
        size = mechanism.sampling_of(phase).expected_batch_size(mechanism.num_examples)
        old = 0.0 if phase == "restart" else _scalar(_part(before, phase).estimate)
        return (_scalar(mean) - old) * size / spread[phase]

    shifts = np.array([radius[p] / spread[p] for p in phases])
    return View(
        gradient=_huge(max(radius.values())),
        shifts=shifts,
        read=read,
        score=memory_score(shifts),
        path=lambda step: 1.0 + step,
    )


def _part(state: Any, phase: str) -> Any:
    return state.of(phase) if isinstance(state, LocalState) else state


def _huge(bound: float) -> float:
    # Far beyond the clip norm, as the worst example is.
    return 100 * bound


def _scalar(tree: Params) -> Float[jax.Array, ""]:
    (leaf,) = jax.tree.leaves(tree)
    return leaf
