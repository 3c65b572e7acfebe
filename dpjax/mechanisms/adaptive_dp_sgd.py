"""DP-SGD whose clip norm follows a quantile of the gradient norms.

Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially Private Learning with Adaptive
Clipping" (arXiv 1905.03871). From the paper: the centred count, its noise beside that of
the sum (Theorem 1), the geometric update. Ours: the split given as a share, the bounds, and
the sensitivity under zero-out adjacency.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from dpjax.checks import check_clip, check_noise
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


class ClipNormState(NamedTuple):
    """The clip norm of the next step, ``float32``. Public: made of releases."""

    clip_norm: "Scalar"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveDpSgd:
    """Release the noisy clipped sum and a noisy count of how many were not clipped.

    With C the clip norm of the step and m = ``expected_batch_size``, a step releases

        s = sum_i clip(g_i, C) + N(0, noise_stddev(C)^2)
        b = sum_i (1[|g_i| <= C] - 1/2) + N(0, count_stddev^2)

    answers s / m, and sets C for the next step to ``C exp(-clip_learning_rate (1/2 + b/m -
    target_quantile))`` within ``[min_clip_norm, max_clip_norm]``: the part of the examples
    that are not clipped goes to ``target_quantile``.

    Sensitivity: adding or removing one example moves s by at most C, and b by 1/2 (which
    is why each example counts as 1/2 or -1/2, not as 1 or 0). Zeroing one out moves b by up
    to 1: the gradient 0 is within C. In units of their noise, s and b are one vector that
    an example moves by at most ``1/z`` with ``1/z^2 = (C / noise_stddev(C))^2 +
    (count_sensitivity / count_stddev)^2``, z = ``noise_multiplier``: a step costs what one
    of DP-SGD costs, sampling included, and C, a function of releases, costs nothing.

    The paper spends little on the count: its ``count_stddev = m / 20`` is a
    ``count_share`` of ``(10 z / m)^2``.

    Attributes:
        initial_clip_norm: C of the first step. The noise on s grows and falls with C.
        min_clip_norm, max_clip_norm: Public bounds on C.
        target_quantile: Which part of the examples is not to be clipped, in (0, 1).
        clip_learning_rate: How fast C follows; 0.2 in the paper.
        count_share: The part of ``1/z^2`` that is spent on b, in (0, 1).
        noise_multiplier: z, of both releases of a step together.
        sampling, steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    initial_clip_norm: float
    min_clip_norm: float
    max_clip_norm: float
    target_quantile: float
    clip_learning_rate: float
    count_share: float
    noise_multiplier: float
    sampling: Sampling
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        low, high = self.min_clip_norm, self.max_clip_norm
        for bound in (low, high, self.initial_clip_norm):
            check_clip(clip_norm=bound, style="flat")
        if not low <= self.initial_clip_norm <= high:
            raise ValueError(
                f"initial_clip_norm={self.initial_clip_norm} must be between "
                f"min_clip_norm={low} and max_clip_norm={high}"
            )
        for name in ("target_quantile", "count_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be in (0, 1); "
                    "for a constant clip norm use DpSgd"
                )
        rate = self.clip_learning_rate
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(
                f"clip_learning_rate={rate} must be positive and finite; "
                "for a constant clip norm use DpSgd"
            )
        check_noise(self.noise_multiplier)
        check_plan(self)

    def noise_stddev(self, clip_norm: "float | Scalar") -> "float | Scalar":
        """Return the standard deviation of the noise on a sum clipped to ``clip_norm``."""
        widening = 1 / math.sqrt(1 - self.count_share)
        return self.noise_multiplier * widening * clip_norm

    @property
    def count_sensitivity(self) -> float:
        """How far one example moves the centred count: 1/2, or 1 if it is zeroed out."""
        return 0.5 if self.sampling.adjacency == "add_or_remove_one" else 1.0

    @property
    def count_stddev(self) -> float:
        """Standard deviation of the noise on the count."""
        share = math.sqrt(self.count_share)
        return self.noise_multiplier * self.count_sensitivity / share

    @property
    def expected_batch_size(self) -> float:
        """The public constant that divides each released sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the event of ``steps`` double releases (all, by default): as DP-SGD's."""
        return self.sampling.compose(
            self.noise_multiplier,
            steps=self.steps if steps is None else steps,
            num_examples=self.num_examples,
        )

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def diagnose(self, state: ClipNormState) -> dict[str, float]:
        """Return nothing: the state is public."""
        del state
        return {}

    def init(self, params: "Params") -> ClipNormState:
        """Return the first clip norm."""
        del params
        import jax.numpy as jnp

        return ClipNormState(jnp.asarray(self.initial_clip_norm, jnp.float32))

    def phase(self, step: int) -> str:
        """Return the only phase."""
        del step
        return "gradient"

    def query(self, phase: str, params: "Params", state: ClipNormState) -> "Query":
        """Ask for the clipped gradient at ``params`` and how many are not clipped."""
        del phase
        from dpjax.clipping import Query

        return Query((params,), clip_norm=state.clip_norm, count=True)

    def release(
        self,
        clipped: "ClippedSum",
        state: ClipNormState,
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, ClipNormState]":
        """Return the noisy mean and the next clip norm; NaN if the sum is another one."""
        del params
        import jax.numpy as jnp

        from dpjax.privacy.noise import add_noise, noisy_mean
        from dpjax.privacy.sensitive import opened_count

        bound = state.clip_norm
        mean = noisy_mean(
            clipped,
            l2_bound=bound,
            stddev=self.noise_stddev(bound),
            divisor=self.expected_batch_size,
            key=key,
            step=step,
        )
        count = add_noise(
            opened_count(clipped, l2_bound=bound),
            key=key,
            step=step,
            stddev=self.count_stddev,
            stream=1,
        )
        surplus = 0.5 + count / self.expected_batch_size - self.target_quantile
        moved = bound * jnp.exp(-self.clip_learning_rate * surplus)
        moved = jnp.clip(moved, self.min_clip_norm, self.max_clip_norm)
        return mean, ClipNormState(moved)
