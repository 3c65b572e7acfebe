"""What the mechanisms of recursive gradient differences share: Diff2 and its relatives."""

import math
from typing import TYPE_CHECKING, Protocol

from dpjax.checks import check_clip, check_noise
from dpjax.privacy.sampling import Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.mechanisms.mathematics.differences import Diff2State
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar

PHASES = ("restart", "difference", "local")
_ROUNDING = 1e-3
"""How far two compiled programs may disagree on one float32 norm, relatively."""


class Recursive(Protocol):
    """A mechanism of noisy restarts and noisy differences; see ``Diff2``."""

    @property
    def clip_norm(self) -> float:
        """C1, of restarts."""
        ...

    @property
    def difference_clip_norm(self) -> float:
        """C2, of differences per unit of the step's length."""
        ...

    @property
    def restart_every(self) -> int:
        """T, in rounds."""
        ...

    @property
    def steps_per_round(self) -> int:
        """K; 1 where there are no local steps."""
        ...

    @property
    def noise_multiplier(self) -> float:
        """z1, of restarts."""
        ...

    @property
    def noise_ratio(self) -> float:
        """z2 / z1."""
        ...

    @property
    def num_examples(self) -> int:
        """Size of the training set, public."""
        ...

    def sampling_of(self, phase: str) -> Sampling:
        """Return which examples take part in the steps of this phase."""
        ...

    def multiplier(self, phase: str) -> float:
        """Return the noise multiplier of a phase: what is accounted."""
        ...

    def radius(
        self, phase: str, params: "Params", state: "Diff2State"
    ) -> "float | Scalar":
        """Return the clip norm of a step of this phase; public given past outputs."""
        ...

    def noise_stddev(self, phase: str, radius: "float | Scalar") -> "float | Scalar":
        """Return the standard deviation of the noise on a sum clipped to ``radius``."""
        ...


def check(mechanism: Recursive) -> None:
    """Raise ValueError unless the facts shared by these mechanisms make sense."""
    check_clip(clip_norm=mechanism.clip_norm, style="flat")
    check_radius("difference_clip_norm", mechanism.difference_clip_norm)
    check_noise(mechanism.noise_multiplier)
    check_ratio("noise_ratio", mechanism.noise_ratio)


def check_radius(name: str, bound: float) -> None:
    """Raise ValueError unless ``bound`` clips differences."""
    if not (bound > 0 and math.isfinite(bound)):
        raise ValueError(
            f"{name}={bound} must be positive and finite; it bounds each "
            "example's gradient difference per unit of the step's length"
        )


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError unless ``ratio`` scales a noise multiplier."""
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(
            f"{name}={ratio} must be positive and finite: the noise multiplier of "
            "differences over that of restarts"
        )


def phase(mechanism: Recursive, step: int) -> str:
    """Return "restart" in every T-th round from the first on, else "difference".

    That is the first step of a round; the others are "local".
    """
    number, position = divmod(step, mechanism.steps_per_round)
    if position:
        return "local"
    return "difference" if number % mechanism.restart_every else "restart"


def multiplier(mechanism: Recursive, phase: str) -> float:
    """Return the noise multiplier of the steps that are not local."""
    ratio = {"restart": 1.0, "difference": mechanism.noise_ratio}[phase]
    return ratio * mechanism.noise_multiplier


def event(mechanism: Recursive, steps: int) -> "DpEvent":
    """Return the releases of each phase among the first ``steps``, composed."""
    import dp_accounting as dp

    rounds = math.ceil(steps / mechanism.steps_per_round)
    restarts = math.ceil(rounds / mechanism.restart_every)
    counts = {
        "restart": restarts,
        "difference": rounds - restarts,
        "local": steps - rounds,
    }
    return dp.ComposedDpEvent(
        [
            mechanism.sampling_of(phase).compose(
                mechanism.multiplier(phase),
                steps=count,
                num_examples=mechanism.num_examples,
            )
            for phase, count in counts.items()
            if count
        ]
    )


def _is_due(mechanism: Recursive, phase: str, step: "int | Scalar") -> "bool | Scalar":
    """Whether ``step``, which may be traced, is of this phase."""
    import jax.numpy as jnp

    number, position = jnp.divmod(jnp.asarray(step), mechanism.steps_per_round)
    if phase == "local":
        return position != 0
    restart = number % mechanism.restart_every == 0
    return (position == 0) & (restart == (phase == "restart"))


def init(params: "Params") -> "Diff2State":
    """Return the state before the first step."""
    from dpjax.mechanisms.mathematics.differences import start

    return start(params)


def moved(params: "Params", state: "Diff2State") -> "Scalar":
    """Return ``|x_t - x_{t-1}|``, float32."""
    from dpjax.mechanisms.mathematics.differences import distance

    return distance(params, state.prev_params)


def query(
    mechanism: Recursive, phase: str, params: "Params", state: "Diff2State"
) -> "Query":
    """Ask for the gradient, or for its difference from that at the last parameters.

    Both gradients of a difference are of the same examples with the same keys: the engine
    has one batch and one key for all points of a query.
    """
    from dpjax.clipping import Query

    radius = mechanism.radius(phase, params, state)
    if phase == "restart":
        return Query((params,), clip_norm=radius, phase=phase)
    points = (params, state.prev_params)
    return Query(points, signs=(1.0, -1.0), clip_norm=radius, phase=phase)


def noisy_sum(
    mechanism: Recursive,
    clipped: "ClippedSum",
    state: "Diff2State",
    params: "Params",
    *,
    key: "Key",
    step: "int | Scalar",
    workers: int = 1,
    senders: range = range(1),
) -> "Params":
    """Return the sum with the noise of ``senders``, who are some of ``workers``.

    All workers together add the mechanism's noise, each ``1 / sqrt(workers)`` of it. All
    NaN if the seal is broken, the sum was clipped further out than the query's radius, or
    it is of the other phase than ``step`` has.
    """
    import jax.numpy as jnp

    from dpjax.privacy import noise

    phase = clipped.phase
    if phase not in PHASES:
        raise ValueError(
            f"phase={phase!r} of the sum must be one of {', '.join(PHASES)}: ask the engine "
            "mechanism.query(mechanism.phase(step), params, state)"
        )
    if params is None:
        raise ValueError("params are missing: differences are clipped by their change")
    radius = mechanism.radius(phase, params, state)
    # The very float that the sum was clipped to: the norm of the step, computed anew here,
    # may differ from it in the last digits.
    stddev = mechanism.noise_stddev(phase, jnp.maximum(radius, clipped.l2_bound))
    # What is accounted at this step; a comparison with NaN is never true.
    due = _is_due(mechanism, phase, step)
    return noise.noisy_sum(
        clipped,
        l2_bound=jnp.where(due, radius * (1 + _ROUNDING), jnp.nan),
        stddev=stddev / math.sqrt(workers),
        key=key,
        step=step,
        streams=senders,
    )


def release(
    mechanism: Recursive,
    clipped: "ClippedSum",
    state: "Diff2State",
    params: "Params",
    *,
    key: "Key",
    step: "int | Scalar",
    workers: int = 1,
) -> "tuple[Params, Diff2State]":
    """Return the next estimate and state; see ``noisy_sum`` for when they are NaN."""
    import jax
    import jax.numpy as jnp

    from dpjax.mechanisms.mathematics.differences import advance

    total = noisy_sum(
        mechanism,
        clipped,
        state,
        params,
        key=key,
        step=step,
        workers=workers,
        senders=range(workers),
    )
    sampling = mechanism.sampling_of(clipped.phase)
    size = sampling.expected_batch_size(mechanism.num_examples)
    mean = jax.tree.map(lambda x: x / size, total)
    # The step that is accounted is the one that counts.
    state = state._replace(count=jnp.asarray(step, jnp.int32))
    state = advance(state, mean, params, restart=clipped.phase == "restart")
    return state.estimate, state


def optimal_noise_ratio(*, kappa: float) -> float:
    """Return the ``noise_ratio`` with the least mean noise variance for its epsilon.

    ``z2 / z1 = sqrt(sqrt(2) / kappa)`` (derived by us): the variance j steps after a
    restart is ``(z1 C1)^2 + j (z2 kappa C1)^2``, minimised on average over a period for a
    fixed sum of ``1/z^2`` over its steps. The length of the period cancels. It is for full
    batches; with Poisson batches of large z, multiply by the ratio of the rates.

    Args:
        kappa: Radius of a typical difference over ``clip_norm``:
            ``difference_clip_norm * |x_t - x_{t-1}| / clip_norm``.

    Raises:
        ValueError: ``kappa`` is not positive and finite.
    """
    return math.sqrt(math.sqrt(2) / _checked(kappa))


def variance_ratio(*, restart_every: int, kappa: float) -> float:
    """Return DIFF2's mean noise variance over that of DP-GD, at equal epsilon and steps.

    ``(sqrt(1/T) + kappa sqrt((1 - 1/T)(T - 1)/2))^2`` (derived by us), with the optimal
    ``noise_ratio``. It is least at T of about ``sqrt(2)/kappa``, where it is about
    ``2 sqrt(2) kappa``; no T gains anything unless ``kappa < 2 - sqrt(2)``.

    Args:
        restart_every: T.
        kappa: See ``optimal_noise_ratio``.
    """
    share = 1 / restart_every
    spread = math.sqrt((1 - share) * (restart_every - 1) / 2)
    return (math.sqrt(share) + _checked(kappa) * spread) ** 2


def _checked(kappa: float) -> float:
    if not (kappa > 0 and math.isfinite(kappa)):
        raise ValueError(
            f"kappa={kappa} must be positive and finite: the radius of a typical "
            "difference over clip_norm"
        )
    return kappa
