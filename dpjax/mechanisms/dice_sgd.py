"""DiceSGD: DP-SGD with error feedback (Zhang et al. 2024, arXiv 2311.14632), honestly."""

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from dpjax.checks import (
    ClipStyle,
    ErrorScale,
    check_clip,
    check_error_clip,
    check_noise,
    check_outer_norm,
)
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.mechanisms.dp_sgd import DpSgd
from dpjax.privacy.sampling import Poisson, Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.mechanisms.mathematics.feedback import ErrorFeedbackState
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar

Accounting = Literal["conservative", "outer_clip", "k_participation", "paper"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiceSgd:
    """Release ``(v + N(0, noise_stddev^2)) / expected_batch_size`` with error feedback.

    ``v = sum_i clip(g_i, C1) + clip(e, C2)`` and ``e' = e + sum_i g_i - v``; noise is no
    part of the memory e. C1, C2 and G below are on the scale of sums.

    One example stays in e after the step that drew it, so amplification by sampling does
    not cover ``clip(e, C2)``, and the noise of the paper, ``z sqrt(C1^2 + 2 C2^2)`` with z
    that of DP-SGD, is no guarantee: an attack refutes it (``dpjax.audit``). These
    analyses are ours:

    - "conservative": for any gradients. Given all releases before, the drawn example moves
      v by at most ``2 C2 + C1`` and an example not drawn by ``2 C2``, all on one line in
      the worst case: a mixture of Gaussians for each step, accounted by PLD.
    - "outer_clip": gradients are clipped to G first and e is given back whole. A step is
      then a function of two releases that DP-SGD with clip norm G could have made, the
      second a step late, so it costs what that costs.
    - "k_participation": no amplification. If an example takes part in at most k of T
      steps, it moves all releases together by at most ``sqrt(k) C1 + min(k (G - C1),
      2 C2 sqrt(T))``: what ``clip`` gives back of a difference is no more, in sum, than
      what went in (a projection is firmly non-expansive). One Gaussian, by the filter
      theorem of Smith and Thakurta 2022 (arXiv 2210.17520).
    - "paper": the claim of the paper as far as we could obtain it, accounted as DP-SGD. It
      is proven only if no gradient is longer than ``sqrt(C1^2 + 2 C2^2)`` and the memory
      is never clipped. The card calls epsilon claimed, and prints the attack beside it.

    The memory is private and un-noised: checkpoints hold it, exports, logs and reprs do
    not. It grows without end where ``|clip(g_i, C1)|`` summed over a batch exceeds C2 at
    the point where training settles. No release shows that, as the released sums average
    to zero there just as at an optimum, and stopping for it would itself be a release. So
    the loop looks at the memory under ``run.log_sensitive`` only (see ``diagnose``), and
    a memory of any size gives back at most C2. ``C2 >= C1 * expected_batch_size`` rules
    it out.

    Attributes:
        clip_norm: C1, the L2 bound on each example's contribution to the first sum.
        clip_style: How gradients and memory are clipped; see ``dpjax.clipping.Query``.
            "automatic" makes it the variant of the paper's Algorithm 4, as we read it.
        error_clip_norm: C2, how much of the memory is given back in one step; None, the
            whole, for "outer_clip" only.
        error_scale: Whether ``error_clip_norm`` bounds the memory of sums ("sum") or that
            of means ("mean", as in the paper: C2 is then ``error_clip_norm *
            expected_batch_size``). What noise the paper claims for it is the same.
        outer_norm: G, to which gradients are clipped first; None if they are not.
        noise_multiplier: Noise standard deviation in units of ``sensitivity``.
        sampling, steps, num_examples, delta: See ``Mechanism``.
        accounting: The analysis; see above.
        accept_unproven_epsilon: Must be True for "paper", and False else.

    Raises:
        ValueError: A field out of range, or an analysis that does not cover the others.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    clip_style: ClipStyle
    error_clip_norm: float | None
    error_scale: ErrorScale
    outer_norm: float | None
    noise_multiplier: float
    sampling: Sampling
    steps: int
    num_examples: int
    delta: float
    accounting: Accounting = "conservative"
    accept_unproven_epsilon: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        check_clip(clip_norm=self.clip_norm, style=self.clip_style)
        check_error_clip(
            error_clip_norm=self.error_clip_norm, error_scale=self.error_scale
        )
        if self.outer_norm is not None:
            check_outer_norm(self.outer_norm, clip_norm=self.clip_norm)
        check_noise(self.noise_multiplier)
        _check_accounting(self)
        check_plan(self)

    @property
    def sensitivity(self) -> float:
        """The unit of ``noise_multiplier``, on the sum.

        How far one example moves v in a step ("conservative": 2 C2 + C1), the whole
        sequence of v ("k_participation"), or what stands for it ("outer_clip": G;
        "paper": the claimed ``sqrt(C1^2 + 2 C2^2)``).
        """
        return self._sensitivity(self.steps)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def expected_batch_size(self) -> float:
        """The public constant that divides each released sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the event of ``steps`` releases, all by default. See the class."""
        import dp_accounting as dp
        from dp_accounting import dp_event

        steps = self.steps if steps is None else steps
        if self.noise_multiplier == 0:
            return dp.NonPrivateDpEvent()
        if self.accounting == "k_participation":
            return dp.GaussianDpEvent(self.noise_stddev / self._sensitivity(steps))
        rate = _rate(self.sampling)
        if self.accounting == "conservative" and rate < 1:
            carried = 2 * self._error_bound
            mixture = dp_event.MixtureOfGaussiansDpEvent(
                self.noise_stddev, (carried, carried + self.clip_norm), (1 - rate, rate)
            )
            return dp.SelfComposedDpEvent(mixture, steps)
        return self.sampling.compose(
            self.noise_multiplier, steps=steps, num_examples=self.num_examples
        )

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return why epsilon may be false: under "paper" accounting, the attack."""
        if self.accounting != "paper":
            return ()
        longest = "any" if self.outer_norm is None else f"{self.outer_norm:g}"
        return (
            "epsilon is claimed and rests on assumptions: proven only if no gradient is "
            f"longer than {self.sensitivity:g} and the error memory is never clipped",
            f"an attack shows epsilon >= {self.attacked_epsilon(steps):.2f} on data with "
            f"gradients of norm {longest}",
        )

    def attacked_epsilon(self, steps: int | None = None) -> float:
        """Return a lower bound on the true epsilon, by the better of two attacks.

        On one constant direction, see ``adversary.error_feedback``. On a direction that is new
        at each step, one participation shows up twice, C1 long and then as long as the memory
        gives it back: that is DP-SGD with the root of the sum of their squares.
        """
        from dpjax.mechanisms.adversary.error_feedback import epsilon_lower_bound
        from dpjax.privacy.accounting import epsilon

        steps = self.steps if steps is None else steps
        if steps == 0 or self.noise_multiplier == 0:
            return math.inf if steps else 0.0
        longest = math.inf if self.outer_norm is None else self.outer_norm
        constant = epsilon_lower_bound(
            clip_norm=self.clip_norm,
            error_clip_norm=self._error_bound,
            outer_norm=longest,
            noise_stddev=self.noise_stddev,
            rate=_rate(self.sampling),
            steps=steps,
            delta=self.delta,
        )
        # Longer ones would only be seen better, and cost PLD memory without end.
        late = min(longest - self.clip_norm, self._error_bound, 4 * self.noise_stddev)
        changing = DpSgd(
            clip_norm=math.hypot(self.clip_norm, late),
            clip_style="flat",
            noise_multiplier=self.noise_stddev / math.hypot(self.clip_norm, late),
            sampling=self.sampling,
            steps=self.steps,
            num_examples=self.num_examples,
            delta=self.delta,
        )
        return max(constant, epsilon(changing, steps=steps))

    def init(self, params: "Params") -> "ErrorFeedbackState":
        """Return the empty memory."""
        from dpjax.mechanisms.mathematics.feedback import init_memory

        return init_memory(params)

    def phase(self, step: int) -> str:
        """Return the only phase."""
        del step
        return "gradient"

    def query(
        self, phase: str, params: "Params", state: "ErrorFeedbackState"
    ) -> "Query":
        """Ask for the clipped gradient at ``params`` and what clipping cuts off."""
        del phase, state
        from dpjax.clipping import Query

        return Query(
            (params,),
            clip_norm=self.clip_norm,
            style=self.clip_style,
            residual=True,
            outer_norm=math.inf if self.outer_norm is None else self.outer_norm,
        )

    def release(
        self,
        clipped: "ClippedSum",
        state: "ErrorFeedbackState",
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, ErrorFeedbackState]":
        """Return the noisy mean, and the memory without noise.

        Both are NaN if the sum is not the one asked for.
        """
        del params
        import jax

        from dpjax.mechanisms.mathematics.feedback import feed_back
        from dpjax.privacy.noise import add_noise
        from dpjax.privacy.sensitive import opened, opened_residual

        outer = math.inf if self.outer_norm is None else self.outer_norm
        vector, state = feed_back(
            opened(clipped, l2_bound=self.clip_norm),
            opened_residual(clipped, l2_bound=self.clip_norm, outer_norm=outer),
            state,
            error_clip_norm=self.error_clip_norm,
            unit=self._error_unit,
            style=self.clip_style,
        )
        noisy = add_noise(vector, key=key, step=step, stddev=self.noise_stddev)
        return jax.tree.map(lambda x: x / self.expected_batch_size, noisy), state

    def diagnose(self, state: "ErrorFeedbackState") -> dict[str, float]:
        """Return facts of the memory; warn if it cannot drain in a run as long as this.

        Private: nothing here carries noise. The loop asks under ``run.log_sensitive`` only.

        Returns:
            ``error_norm`` on the scale of sums, and how many steps it takes to give all of
            it back, ``error_backlog``.
        """
        from dpjax.mechanisms.mathematics.feedback import memory_norm

        norm = float(memory_norm(state))
        backlog = norm / self._error_bound if self.error_clip_norm is not None else 1.0
        if not backlog <= self.steps:
            _log.warning(
                "the error memory diverges: it takes more than steps=%d to give back what "
                "clipping cut off; raise error_clip_norm=%g (and the noise with it) or "
                "clip_norm=%g, or use accounting='outer_clip'",
                self.steps,
                self.error_clip_norm,
                self.clip_norm,
            )
        return {"error_norm": norm, "error_backlog": backlog}

    @property
    def _error_unit(self) -> float:
        return 1.0 if self.error_scale == "sum" else self.expected_batch_size

    @property
    def _error_bound(self) -> float:
        """C2 on the sum; inf if the memory is not clipped."""
        if self.error_clip_norm is None:
            return math.inf
        return self.error_clip_norm * self._error_unit

    def _sensitivity(self, steps: int) -> float:
        match self.accounting:
            case "conservative":
                return 2 * self._error_bound + self.clip_norm
            case "paper":
                assert self.error_clip_norm is not None
                return math.hypot(self.clip_norm, math.sqrt(2) * self.error_clip_norm)
            case "outer_clip":
                assert self.outer_norm is not None
                return self.outer_norm
            case "k_participation":
                k = self.sampling.max_participations(
                    steps=steps, num_examples=self.num_examples
                )
                late = 2 * self._error_bound * math.sqrt(steps)
                if self.outer_norm is not None:
                    late = min(late, k * (self.outer_norm - self.clip_norm))
                return math.sqrt(k) * self.clip_norm + late


def _rate(sampling: Sampling) -> float:
    """Return the rate of independent coins: 1 for full batches."""
    return sampling.rate if isinstance(sampling, Poisson) else 1.0


def _check_accounting(plan: DiceSgd) -> None:
    """Raise ValueError unless the analysis covers the other fields."""
    mode = plan.accounting
    if mode not in get_args(Accounting):
        raise ValueError(
            f"accounting={mode!r} is unknown; use one of {', '.join(get_args(Accounting))}"
        )
    name = type(plan.sampling).__name__
    if mode in ("conservative", "paper") and name not in ("Poisson", "FullBatch"):
        raise ValueError(
            f"sampling={name} has no analysis under accounting={mode!r}, which needs "
            "independent coins: use Poisson or FullBatch, or accounting='k_participation' "
            "for ShuffledFixed"
        )
    if mode == "k_participation" and plan.sampling.amplified:
        raise ValueError(
            f"accounting='k_participation' has no amplification, which sampling={name} is "
            "for: use ShuffledFixed or FullBatch, or accounting='conservative'"
        )
    if (plan.error_clip_norm is None) != (mode == "outer_clip"):
        raise ValueError(
            f"error_clip_norm={plan.error_clip_norm} with accounting={mode!r}: "
            + (
                "the memory is given back whole, set error_clip_norm=None"
                if mode == "outer_clip"
                else "it must be positive; only 'outer_clip' gives the memory back whole"
            )
        )
    if mode == "outer_clip" and plan.outer_norm is None:
        raise ValueError(
            "outer_norm=None with accounting='outer_clip': set the norm to which gradients "
            "are clipped first, at least clip_norm"
        )
    if mode in ("outer_clip", "k_participation") and plan.clip_style != "flat":
        raise ValueError(
            f"clip_style={plan.clip_style!r} has no analysis under accounting={mode!r}; "
            "use 'flat', or accounting='conservative'"
        )
    _check_paper(plan)


def _check_paper(plan: DiceSgd) -> None:
    if plan.accounting != "paper":
        if plan.accept_unproven_epsilon:
            raise ValueError(
                f"accept_unproven_epsilon=True with accounting={plan.accounting!r}, which is "
                "proven; set it to False"
            )
        return
    if not plan.accept_unproven_epsilon:
        raise ValueError(
            "accounting='paper' gives an epsilon that attacks refute; use 'conservative', or "
            "set accept_unproven_epsilon=True to run it as a claim"
        )
    assert plan.error_clip_norm is not None
    if plan.error_clip_norm < plan.clip_norm:
        raise ValueError(
            f"error_clip_norm={plan.error_clip_norm} is below clip_norm={plan.clip_norm}; "
            "accounting='paper' needs C2 >= C1"
        )
    if plan.clip_style == "per_layer":
        raise ValueError(
            "clip_style='per_layer' is not in the paper; use 'flat' or 'automatic', or "
            "accounting='conservative'"
        )
