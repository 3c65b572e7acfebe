"""DPZero (Zhang et al. 2024, arXiv 2310.09639): private steps along public directions.

From the paper and its authors' code: two-point differences of each example's loss along
one direction shared by all, clipped, averaged, noised as one number; the code draws the
direction from N(0, I), as here. DP-ZO (Tang et al. 2024, arXiv 2401.04343) is the same on
Poisson batches. Ours: the calibration. The authors' code adds noise for a sensitivity of
2 C (one example replaced) at a multiplier that their accountant gives for adding or
removing one: twice what the claim takes. And sums are divided by a public constant, not by
the size of the batch.
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


class DpZeroState(NamedTuple):
    """Which direction is next: the step, ``int32``. Public."""

    step: "Scalar"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpZero:
    """Release ``u_t (sum_i clip(d_i) + N(0, noise_stddev^2)) / expected_batch_size``.

    Here u_t ~ N(0, I) is a public direction, a function of ``direction_seed`` and t, and

        d_i = (loss(x + lambda u_t; i) - loss(x - lambda u_t; i)) / (2 lambda)

    one number for each example, clipped to [-C, C]; both losses are of the same example
    with the same randomness. Noise is drawn for the one number that is released.

    Sensitivity: that number moves by at most C = ``clip_norm`` when one example is added,
    removed or zeroed (up to float32 rounding of the sum); direction and divisor are public.

    No gradient is computed: a step is two forward passes, one after the other, and holds
    the direction and one moved copy of the parameters besides. Temporaries of a compiled
    chunk on a CPU, against those of DP-SGD with the engine "auto": 2.3 MB to 4.0 MB (MLP of
    4 x 256 on 256 rows), 17 to 77 (the benchmark's convnet), 77 to 123 (its gpt in
    microbatches of 4, of which 2 x 30 are parameters). The estimate varies as if from one
    of d coordinates, so steps are many and short; it is meant for fine-tuning.

    Attributes:
        clip_norm: C, bound on each example's slope along u_t; slopes are as long as the
            example's gradient.
        smoothing: lambda, how far along u_t losses are evaluated; small against what bends
            the loss, large against its rounding (1e-3 in the authors' code).
        direction_seed: Of the directions. Public.
        noise_multiplier: Noise standard deviation in units of ``clip_norm``.
        sampling, steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    smoothing: float
    direction_seed: int
    noise_multiplier: float
    sampling: Sampling
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_clip(clip_norm=self.clip_norm, style="flat")
        check_noise(self.noise_multiplier)
        if not 0 < self.smoothing < math.inf:
            raise ValueError(
                f"smoothing={self.smoothing} must be positive and finite; it is the length "
                "of the step, in units of the direction, over which slopes are measured"
            )
        seed = self.direction_seed
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(
                f"direction_seed={seed!r} must be an integer; it is public"
            )
        check_plan(self)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the sum of slopes."""
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

    def diagnose(self, state: DpZeroState) -> dict[str, float]:
        """Return nothing: the state is public."""
        del state
        return {}

    def init(self, params: "Params") -> DpZeroState:
        """Return the state before the first step."""
        del params
        import jax.numpy as jnp

        return DpZeroState(jnp.zeros((), jnp.int32))

    def phase(self, step: int) -> str:
        """Return the only phase."""
        del step
        return "slope"

    def query(self, phase: str, params: "Params", state: DpZeroState) -> "Query":
        """Ask for the clipped slopes of losses at ``params`` along the step's direction."""
        from dpjax.clipping import Query, Slope
        from dpjax.mechanisms.mathematics.directions import gaussian_direction

        u = gaussian_direction(params, seed=self.direction_seed, step=state.step)
        slope = Slope(u, self.smoothing)
        return Query((params,), clip_norm=self.clip_norm, phase=phase, slope=slope)

    def release(
        self,
        clipped: "ClippedSum",
        state: DpZeroState,
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, DpZeroState]":
        """Return the noisy slope times the direction; NaN if the sum is another one.

        All NaN too if ``step`` is not the one whose direction the sum was taken along.

        Raises:
            TypeError: The sum is of vectors.
            ValueError: There are no ``params``.
        """
        import jax
        import jax.numpy as jnp

        from dpjax.mechanisms.mathematics.directions import gaussian_direction
        from dpjax.privacy.noise import noisy_mean

        if not (isinstance(clipped.total, jax.Array) and clipped.total.ndim == 0):
            raise TypeError(
                "the sum is not one number: ask the engine mechanism.query('slope', ...)"
            )
        if params is None:
            raise ValueError("params are missing: the direction is shaped like them")
        due = jnp.asarray(step) == state.step
        slope = noisy_mean(
            clipped,
            # A comparison with NaN is never true.
            l2_bound=jnp.where(due, self.clip_norm, jnp.nan),
            stddev=self.noise_stddev,
            divisor=self.expected_batch_size,
            key=key,
            step=step,
        )
        u = gaussian_direction(params, seed=self.direction_seed, step=state.step)
        return jax.tree.map(lambda u: slope * u, u), DpZeroState(state.step + 1)
