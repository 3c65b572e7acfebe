"""Private SpiderBoost (Arora et al. 2023, arXiv 2206.00846): DIFF2 on Poisson batches.

From the paper: the recursion and the cap on the noise of a difference. There the cap rests
on an assumed Lipschitz constant; here, as it has to be, differences are clipped to it.
Ours: the accounting, by composition of two Poisson-sampled schedules.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from dpjax.mechanisms import recursion
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import PeriodicPoisson, Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.mechanisms.mathematics.differences import Diff2State
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpiderBoost:
    """Release a running gradient estimate made of noisy minibatch differences.

    As ``Diff2``, with two changes. A restart is over a Poisson batch of the sampling's
    ``first_rate``, a difference over one of its ``rate`` (the same examples with the same
    randomness at both points); each sum is divided by the expected size of its batch. And
    the radius of a difference is ``R_t = min(C2 |x_t - x_{t-1}|, 2 C1)``: gradients of norm
    C1 are never further apart, so the cap costs nothing where C1 clips nothing.

    Sensitivity: each sum moves by at most its radius (C1 or R_t) when one example is added
    or removed (up to float32 rounding of the sum); the divisors are public.

    State: ``dpjax.mechanisms.mathematics.differences.Diff2State``, the estimate and the last
    parameters. Both are outputs of releases, no more secret than the parameters, and cost two
    copies of them.

    Attributes:
        clip_norm: C1, L2 bound on each example's gradient at restarts.
        difference_clip_norm: C2, bound on each example's difference per unit of
            ``|x_t - x_{t-1}|``: about how smooth the loss of one example is.
        noise_multiplier: z1, noise at restarts in units of C1.
        noise_ratio: z2 / z1, where z2 is noise at differences in units of R_t; 1 is the
            usual choice.
        sampling: ``PeriodicPoisson``; its period is that of the restarts.
        steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    difference_clip_norm: float
    noise_multiplier: float
    noise_ratio: float
    sampling: PeriodicPoisson
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        recursion.check(self)
        if not isinstance(self.sampling, PeriodicPoisson):
            raise ValueError(
                f"sampling={self.sampling} must be PeriodicPoisson(period=..., "
                "first_rate=..., rate=...), for SpiderBoost restarts periodically; for "
                "full batches use Diff2"
            )
        check_plan(self)

    @property
    def expected_batch_size(self) -> float:
        """Examples of a step, expected on average over a period."""
        return self.sampling.expected_batch_size(self.num_examples)

    @property
    def restart_every(self) -> int:
        """The period of the sampling."""
        return self.sampling.period

    @property
    def steps_per_round(self) -> int:
        """Every step is a round: there are no local ones."""
        return 1

    def sampling_of(self, phase: str) -> Sampling:
        """Return the part of the sampling that draws this phase."""
        return self.sampling.first if phase == "restart" else self.sampling.rest

    def multiplier(self, phase: str) -> float:
        """Return the noise multiplier of a phase: what is accounted."""
        return recursion.multiplier(self, phase)

    def noise_stddev(self, phase: str, radius: "float | Scalar") -> "float | Scalar":
        """Return the standard deviation of the noise on a sum clipped to ``radius``."""
        return self.multiplier(phase) * radius

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the sampled Gaussians of ``steps`` (all, by default), restarts apart."""
        return recursion.event(self, self.steps if steps is None else steps)

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def init(self, params: "Params") -> "Diff2State":
        """Return the state before the first step."""
        return recursion.init(params)

    def phase(self, step: int) -> str:
        """Return "restart" or "difference"."""
        return recursion.phase(self, step)

    def radius(
        self, phase: str, params: "Params", state: "Diff2State"
    ) -> "float | Scalar":
        """Return the clip norm of a step of this phase at ``params``: C1 or R_t."""
        import jax.numpy as jnp

        if phase == "restart":
            return self.clip_norm
        smooth = self.difference_clip_norm * recursion.moved(params, state)
        return jnp.minimum(smooth, 2 * self.clip_norm)

    def query(self, phase: str, params: "Params", state: "Diff2State") -> "Query":
        """Ask for the gradient, or for its difference from that of the last step."""
        return recursion.query(self, phase, params, state)

    def release(
        self,
        clipped: "ClippedSum",
        state: "Diff2State",
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, Diff2State]":
        """Return the estimate; NaN if the sum is not the one asked for at ``step``."""
        return recursion.release(self, clipped, state, params, key=key, step=step)

    def diagnose(self, state: "Diff2State") -> dict[str, float]:
        """Return nothing: the state is public."""
        del state
        return {}
