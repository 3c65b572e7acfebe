"""DP-SGD whose clip norm and noise follow public functions of the step."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dpjax.checks import check_clip, check_noise, check_number
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import FullBatch, Poisson, TruncatedPoisson

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar

_LEVELS = 32
"""Noise multipliers are ``noise_multiplier`` times powers of ``2 ** (1 / _LEVELS)``."""


class StepState(NamedTuple):
    """The step that the next query is of, ``int32``. Public."""

    step: "Scalar"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledDpSgd:
    """Release ``(sum_i clip(g_i, C_t) + N(0, (z_t C_t)^2)) / expected_batch_size`` at step t.

    Sensitivity: the sum of step t moves by at most ``C_t`` when one example is added or
    removed. Both schedules are functions of the step alone, evaluated once, before any data
    are seen. A step costs what one of DP-SGD with multiplier ``z_t`` costs.

    So that few different multipliers are accounted, ``z_t`` is ``noise_multiplier *
    noise_schedule(t)`` rounded *up*, by at most 2.2%, to ``noise_multiplier`` times a power
    of ``2^(1/32)``; the noise is drawn with what is accounted.

    Attributes:
        clip_schedule: Step -> ``C_t``.
        noise_schedule: Step -> positive scale of the noise multiplier.
        noise_multiplier: What a scale of 1 means, in units of ``C_t``.
        sampling: One whose steps are alike: ``Poisson``, ``TruncatedPoisson``, ``FullBatch``.
        steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field, or a value of a schedule, out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    clip_schedule: Callable[[int], Any]
    noise_schedule: Callable[[int], Any]
    noise_multiplier: float
    sampling: Poisson | TruncatedPoisson | FullBatch
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        if not isinstance(self.sampling, Poisson | TruncatedPoisson | FullBatch):
            raise ValueError(
                f"sampling={self.sampling} does not treat all steps alike: which multiplier "
                "an example meets would depend on when it is drawn; use Poisson, "
                "TruncatedPoisson or FullBatch"
            )
        for name in ("clip_schedule", "noise_schedule"):
            if not callable(value := getattr(self, name)):
                raise ValueError(
                    f"{name}={value!r} must be a function of the step; for one number use "
                    "DpSgd, or optax.constant_schedule"
                )
        check_noise(self.noise_multiplier)
        check_plan(self)
        for clip_norm in self.clip_norms:
            check_clip(clip_norm=clip_norm, style="flat")
        for step, scale in enumerate(_values(self.noise_schedule, self.steps)):
            if not 0 < scale < math.inf:
                raise ValueError(
                    f"noise_schedule({step})={scale} must be positive and finite; it scales "
                    "noise_multiplier"
                )

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """``C_t`` of each step."""
        return _values(self.clip_schedule, self.steps)

    @property
    def noise_multipliers(self) -> tuple[float, ...]:
        """``z_t`` of each step."""
        scales = _values(self.noise_schedule, self.steps)
        # What is a power up to rounding is no step further up.
        powers = [math.ceil(_LEVELS * math.log2(scale) - 1e-6) for scale in scales]
        return tuple(self.noise_multiplier * 2 ** (p / _LEVELS) for p in powers)

    @property
    def expected_batch_size(self) -> float:
        """The public constant that divides each released sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return ``steps`` (all, by default) Gaussian releases, each with its multiplier."""
        import dp_accounting as dp

        counts = collections.Counter(self.noise_multipliers[:steps])
        return dp.ComposedDpEvent(
            [
                self.sampling.compose(z, steps=count, num_examples=self.num_examples)
                for z, count in counts.items()
            ]
        )

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def diagnose(self, state: StepState) -> dict[str, float]:
        """Return nothing: the state is public."""
        del state
        return {}

    def init(self, params: "Params") -> StepState:
        """Return step 0."""
        del params
        import jax.numpy as jnp

        return StepState(jnp.zeros((), jnp.int32))

    def phase(self, step: int) -> str:
        """Return the only phase."""
        del step
        return "gradient"

    def query(self, phase: str, params: "Params", state: StepState) -> "Query":
        """Ask for the gradient at ``params``, clipped to the norm of the step."""
        del phase
        from dpjax.clipping import Query

        return Query((params,), clip_norm=_at(self.clip_norms, state.step))

    def release(
        self,
        clipped: "ClippedSum",
        state: StepState,
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, StepState]":
        """Return the noisy mean gradient; NaN if the sum is not the one asked for."""
        del params
        from dpjax.privacy.noise import noisy_mean

        bound = _at(self.clip_norms, state.step)
        mean = noisy_mean(
            clipped,
            l2_bound=bound,
            stddev=_at(self.noise_multipliers, state.step) * bound,
            divisor=self.expected_batch_size,
            key=key,
            step=step,
        )
        return mean, StepState(state.step + 1)


@functools.lru_cache(maxsize=64)
def _values(schedule: Callable[[int], Any], steps: int) -> tuple[float, ...]:
    """Evaluate a schedule once: the plan is made anew for each noise that is tried."""
    return tuple(_value(schedule, step) for step in range(steps))


def _value(schedule: Callable[[int], Any], step: int) -> float:
    value = schedule(step)
    # A scalar of JAX is a number, too.
    if getattr(value, "shape", None) != ():
        check_number(f"schedule({step})", value)
    return float(value)


def _at(values: tuple[float, ...], step: "int | Scalar") -> "Scalar":
    import jax.numpy as jnp

    return jnp.asarray(values, jnp.float32)[step]
