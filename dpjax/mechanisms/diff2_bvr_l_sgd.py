"""DIFF2-BVR-L-SGD (Murata and Suzuki 2023, arXiv 2302.03884): DIFF2 with local steps.

From the paper: the framework of DIFF2 (see ``diff2.py``) and, of its Algorithm 4, the name
and the arguments: a routine that starts from the server's estimate and takes K steps on
minibatches of b examples, with a clip norm C3 and a noise of its own. The routine itself
follows BVR-L-SGD (Murata and Suzuki 2021, arXiv 2102.03198), which it is named for:
recursive differences of minibatch gradients at consecutive iterates. Ours: that their
radius is C3 times the length of the last step, as in DIFF2; Poisson minibatches, the
accounting of all three schedules, and one holder of the data. In BVR-L-SGD each of P
workers takes its own local steps and one of them, drawn at random, goes on; who sees what
of the others decides what that costs, and that the text at hand does not say.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from dpjax.checks import check_positive_int
from dpjax.mechanisms import recursion
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import PeriodicPoisson, Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.mechanisms.mathematics.differences import Diff2State
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


class LocalState(NamedTuple):
    """State of ``Diff2BvrLSgd``: four copies of the parameters. All of it is released.

    Attributes:
        round: DIFF2's estimate at the first parameters of the round, and these.
        local: The estimate that local steps have made of it, and the last parameters.
    """

    round: "Diff2State"
    local: "Diff2State"

    def of(self, phase: str) -> "Diff2State":
        """Return the part that a step of this phase goes on from."""
        return self.local if phase == "local" else self.round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff2BvrLSgd:
    """Release DIFF2's estimate once a round, and local corrections of it between.

    A round is K steps, the period of the sampling. With x the parameters of a step and
    ``clip(v, C) = v min(1, C/|v|)``, the first step of round r, at x_r, releases V_r, where
    at restarts (every ``restart_every``-th round, from the first on) and in other rounds

        n V_r = sum_i clip(g_i(x_r), C1) + N(0, (z1 C1)^2)
        n V_r = sum_i clip(g_i(x_r) - g_i(x_{r-1}), C2 |x_r - x_{r-1}|) + noise + n V_{r-1}

    over batches of ``first_rate`` (1 in the paper: all examples), n expected examples. The
    other K - 1 steps release v_k, which starts at v_1 = V_r, over minibatches of b expected
    examples of the sampling's ``rate``, with y_1 = x_r and y_k the parameters of each step:

        b v_k = sum_i clip(g_i(y_k) - g_i(y_{k-1}), C3 |y_k - y_{k-1}|) + noise + b v_{k-1}

    The noise has standard deviation z2 (z3, locally) times the radius, which past outputs
    determine. The next round starts from the last parameters of this one. Each release is
    one step of any optimizer; the paper's is gradient descent. With K = 1 this is ``Diff2``.

    Sensitivity: each sum moves by at most its radius when one example is added or removed
    (up to float32 rounding of the sum); the divisors are public.

    Attributes:
        clip_norm: C1, L2 bound on each example's gradient at restarts.
        difference_clip_norm: C2, bound on each example's difference between rounds per
            unit of ``|x_r - x_{r-1}|``: about how smooth the loss of one example is.
        local_clip_norm: C3, likewise between local steps.
        restart_every: T, in rounds.
        noise_multiplier: z1, noise at restarts in units of C1.
        noise_ratio: z2 / z1.
        local_noise_ratio: z3 / z1; small rates of minibatches allow for small ones.
        sampling: ``PeriodicPoisson(period=K, first_rate=..., rate=...)``.
        steps: Releases: K times the rounds.
        num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, named with the fix.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    difference_clip_norm: float
    local_clip_norm: float
    restart_every: int
    noise_multiplier: float
    noise_ratio: float
    local_noise_ratio: float
    sampling: PeriodicPoisson
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        recursion.check(self)
        recursion.check_radius("local_clip_norm", self.local_clip_norm)
        recursion.check_ratio("local_noise_ratio", self.local_noise_ratio)
        check_positive_int("restart_every", self.restart_every)
        if not isinstance(self.sampling, PeriodicPoisson):
            raise ValueError(
                f"sampling={self.sampling} must be PeriodicPoisson(period=K, "
                "first_rate=1.0, rate=...): rounds of K steps, of which the first takes all "
                "examples; without local steps use Diff2"
            )
        check_plan(self)

    @property
    def expected_batch_size(self) -> float:
        """Examples of a step, expected on average over a round."""
        return self.sampling.expected_batch_size(self.num_examples)

    @property
    def steps_per_round(self) -> int:
        """K, the period of the sampling."""
        return self.sampling.period

    def sampling_of(self, phase: str) -> Sampling:
        """Return the part of the sampling that draws this phase."""
        return self.sampling.rest if phase == "local" else self.sampling.first

    def multiplier(self, phase: str) -> float:
        """Return the noise multiplier of a phase: what is accounted."""
        if phase == "local":
            return self.local_noise_ratio * self.noise_multiplier
        return recursion.multiplier(self, phase)

    def noise_stddev(self, phase: str, radius: "float | Scalar") -> "float | Scalar":
        """Return the standard deviation of the noise on a sum clipped to ``radius``."""
        return self.multiplier(phase) * radius

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the Gaussians of ``steps`` (all, by default), each phase apart."""
        return recursion.event(self, self.steps if steps is None else steps)

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def init(self, params: "Params") -> LocalState:
        """Return the state before the first step."""
        return LocalState(recursion.init(params), recursion.init(params))

    def phase(self, step: int) -> str:
        """Return "restart", "difference" or "local"."""
        return recursion.phase(self, step)

    def radius(
        self, phase: str, params: "Params", state: "Diff2State"
    ) -> "float | Scalar":
        """Return the clip norm of a step of this phase, given its part of the state."""
        if phase == "restart":
            return self.clip_norm
        smooth = {
            "difference": self.difference_clip_norm,
            "local": self.local_clip_norm,
        }[phase]
        return smooth * recursion.moved(params, state)

    def query(self, phase: str, params: "Params", state: LocalState) -> "Query":
        """Ask for the gradient, or its difference from that of the last round or step."""
        return recursion.query(self, phase, params, state.of(phase))

    def release(
        self,
        clipped: "ClippedSum",
        state: LocalState,
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, LocalState]":
        """Return the estimate; NaN if the sum is not the one asked for at ``step``."""
        part = state.of(clipped.phase)
        estimate, part = recursion.release(
            self, clipped, part, params, key=key, step=step
        )
        # A round starts its local steps from its own estimate.
        first = state.round if clipped.phase == "local" else part
        return estimate, LocalState(first, part)

    def diagnose(self, state: LocalState) -> dict[str, float]:
        """Return nothing: the state is public."""
        del state
        return {}
