"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1)."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from dpjax.checks import ClipStyle, check_clip, check_noise
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpSgd:
    """Release ``(sum_i clip(g_i) + N(0, noise_stddev^2)) / expected_batch_size``.

    Sensitivity: the sum moves by at most ``clip_norm`` when one example is added,
    removed or zeroed (up to float32 rounding of the sum); the divisor is public.

    Attributes:
        clip_norm: L2 bound on each example's contribution.
        clip_style: "flat", "automatic" or "per_layer"; see ``dpjax.clipping.Query``.
        noise_multiplier: Noise standard deviation in units of ``clip_norm``.
        sampling, steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    clip_style: ClipStyle
    noise_multiplier: float
    sampling: Sampling
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_clip(clip_norm=self.clip_norm, style=self.clip_style)
        check_noise(self.noise_multiplier)
        check_plan(self)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the sum."""
        return self.noise_multiplier * self.clip_norm

    @property
    def expected_batch_size(self) -> float:
        """The public constant that divides each released sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return ``steps`` (all, by default) Gaussian releases under the sampling."""
        return self.sampling.compose(
            self.noise_multiplier,
            steps=self.steps if steps is None else steps,
            num_examples=self.num_examples,
        )

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def diagnose(self, state: tuple[()]) -> dict[str, float]:
        """Return nothing: there is no state."""
        del state
        return {}

    def init(self, params: "Params") -> tuple[()]:
        """Return no state."""
        del params
        return ()

    def phase(self, step: int) -> str:
        """Return the only phase."""
        del step
        return "gradient"

    def query(self, phase: str, params: "Params", state: tuple[()]) -> "Query":
        """Ask for the clipped gradient at ``params``."""
        del phase, state
        from dpjax.clipping import Query

        return Query((params,), clip_norm=self.clip_norm, style=self.clip_style)

    def release(
        self,
        clipped: "ClippedSum",
        state: tuple[()],
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, tuple[()]]":
        """Return the noisy mean gradient; NaN if the sum is not the one asked for."""
        del params
        from dpjax.privacy.noise import noisy_mean

        mean = noisy_mean(
            clipped,
            l2_bound=self.clip_norm,
            stddev=self.noise_stddev,
            divisor=self.expected_batch_size,
            key=key,
            step=step,
        )
        return mean, state
