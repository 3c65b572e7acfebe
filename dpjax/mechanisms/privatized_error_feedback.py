"""Error feedback with a memory that is itself released, so that one example is in it once."""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from dpjax.checks import check_clip, check_noise, check_outer_norm
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


_LEAST_ROOM = 1.01
"""Of G over C: a residual is the difference of factors that are rounded to 1e-7 of G."""


class ResidualEstimate(NamedTuple):
    """A moving average of released residuals, like params. Public."""

    value: "Params"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivatizedErrorFeedback:
    """Release the clipped sum and, on a channel of its own, what clipping cut off.

    Each step releases, with G = ``outer_norm`` and C = ``clip_norm``,

        a = sum_i clip(g_i, C) + N(0, noise_stddev^2)
        r = sum_i (clip(g_i, G) - clip(g_i, C)) + N(0, residual_stddev^2)

    then ``h' = (1 - memory_rate) h + memory_rate r`` and answers ``(a + h') /
    expected_batch_size``. One example moves a by at most C and r by at most G - C, so a
    step is one Gaussian release of noise multiplier z with ``1/z^2 = (C / noise_stddev)^2 +
    ((G - C) / residual_stddev)^2``, amplified by sampling as a whole. The memory h is made
    of releases: public. A construction of ours, the sound relative of DiceSGD.

    Attributes:
        clip_norm: C, the L2 bound on what one example contributes to a.
        outer_norm: G >= 1.01 C, to which gradients are clipped first.
        noise_multiplier: z, of both releases of a step together.
        residual_share: The part of ``1/z^2`` that is spent on r, in (0, 1).
        memory_rate: How fast h follows r, in (0, 1].
        sampling, steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    outer_norm: float
    noise_multiplier: float
    residual_share: float
    memory_rate: float
    sampling: Sampling
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_clip(clip_norm=self.clip_norm, style="flat")
        check_outer_norm(self.outer_norm, clip_norm=self.clip_norm)
        if not _LEAST_ROOM * self.clip_norm <= self.outer_norm < math.inf:
            raise ValueError(
                f"outer_norm={self.outer_norm} must be finite and above clip_norm="
                f"{self.clip_norm}, by 1% at least: the noise on a shorter residual could "
                "not hide its float32 rounding; without a residual use DpSgd"
            )
        check_noise(self.noise_multiplier)
        if not 0 < self.residual_share < 1:
            raise ValueError(
                f"residual_share={self.residual_share} must be in (0, 1); "
                "without a residual use DpSgd"
            )
        if not 0 < self.memory_rate <= 1:
            raise ValueError(f"memory_rate={self.memory_rate} must be in (0, 1]")
        check_plan(self)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the clipped sum."""
        share = 1 - self.residual_share
        return self.noise_multiplier * self.clip_norm / math.sqrt(share)

    @property
    def residual_stddev(self) -> float:
        """Standard deviation of the noise on the sum of residuals."""
        longest = self.outer_norm - self.clip_norm
        return self.noise_multiplier * longest / math.sqrt(self.residual_share)

    @property
    def expected_batch_size(self) -> float:
        """The public constant that divides each released sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the event of ``steps`` double releases, all by default."""
        return self.sampling.compose(
            self.noise_multiplier,
            steps=self.steps if steps is None else steps,
            num_examples=self.num_examples,
        )

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def init(self, params: "Params") -> ResidualEstimate:
        """Return the empty memory, at least float32."""
        from dpjax.mechanisms.mathematics.feedback import init_memory

        return ResidualEstimate(init_memory(params).memory)

    def phase(self, step: int) -> str:
        """Return the only phase."""
        del step
        return "gradient"

    def query(self, phase: str, params: "Params", state: ResidualEstimate) -> "Query":
        """Ask for the clipped gradient at ``params`` and what clipping cuts off."""
        del phase, state
        from dpjax.clipping import Query

        return Query(
            (params,),
            clip_norm=self.clip_norm,
            residual=True,
            outer_norm=self.outer_norm,
        )

    def release(
        self,
        clipped: "ClippedSum",
        state: ResidualEstimate,
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, ResidualEstimate]":
        """Return the noisy mean and the next memory; NaN if the sum is another one."""
        del params
        import jax

        from dpjax.privacy.noise import add_noise
        from dpjax.privacy.sensitive import opened, opened_residual

        first = add_noise(
            opened(clipped, l2_bound=self.clip_norm),
            key=key,
            step=step,
            stddev=self.noise_stddev,
        )
        second = add_noise(
            opened_residual(
                clipped, l2_bound=self.clip_norm, outer_norm=self.outer_norm
            ),
            key=key,
            step=step,
            stddev=self.residual_stddev,
            stream=1,
        )
        rate = self.memory_rate
        memory = jax.tree.map(
            lambda h, r: ((1 - rate) * h + rate * r).astype(h.dtype),
            state.value,
            second,
        )
        mean = jax.tree.map(
            lambda a, h: (a + h) / self.expected_batch_size, first, memory
        )
        return mean, ResidualEstimate(memory)

    def diagnose(self, state: ResidualEstimate) -> dict[str, float]:
        """Return nothing: the state is public."""
        del state
        return {}
