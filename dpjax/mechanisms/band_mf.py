"""DP-FTRL by banded matrix factorisation: noise that later steps partly take back.

Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization" (arXiv 2306.08153);
Denisov et al. 2022 (arXiv 2202.08312) for adaptive inputs.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from dpjax.checks import ClipStyle, check_clip, check_noise, check_positive_int
from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.mechanisms.mathematics.toeplitz import (
    Strategy,
    check_strategy,
    prefix_errors,
    strategy_column,
)
from dpjax.privacy.sampling import CyclicPoisson, Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.mechanisms.mathematics.correlated import CorrelatedNoiseState
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class BandMf:
    """Release ``(sum_i clip(g_i) + y_t) / expected_batch_size`` with ``y = C^{-1} z``.

    z is independent N(0, noise_stddev^2), and C a lower-triangular Toeplitz matrix of
    ``bands`` bands whose first column has norm 1 (``dpjax.mechanisms.mathematics.toeplitz``).
    What ``optax.sgd`` adds up over steps has less noise than with independent noise of the
    same epsilon; see ``rms_prefix_error``. ``bands=1`` is DP-SGD.

    Sensitivity: releases x + C^{-1} z are a function of ``C x + z``. An example moves C x by
    the columns of C of the steps it takes part in, each times a vector of norm ``clip_norm``
    at most. Columns ``bands`` or more apart have no row in common, and norm 1. So each turn
    of an example is a Gaussian release of its own, of sensitivity ``clip_norm``, in rows of
    its own. Given the coins of all others, what these add to a row follows from the rows
    before, and the row tells of the example by its coin of this turn alone. Hence ``steps``
    releases cost one Poisson-sampled Gaussian for each cycle begun (the paper's theorem on
    amplification; ``CyclicPoisson.compose``). With ``rate=1`` that is one Gaussian for each
    epoch: DP-FTRL without amplification, in which no batch has to be secret.

    State: the last ``bands - 1`` noises, as many times the memory of the parameters.
    Secret like the noise key: in checkpoints and nowhere else.

    Attributes:
        clip_norm: L2 bound on each example's contribution.
        clip_style: "flat", "automatic" or "per_layer"; see ``dpjax.clipping.Query``.
        noise_multiplier: Standard deviation of z in units of ``clip_norm``.
        bands: b, in how many steps in a row one noise is taken back.
        strategy: Which C: "mean_error" or "square_root"; see
        ``dpjax.mechanisms.mathematics.toeplitz``.
        sampling: ``CyclicPoisson`` with a cycle of at least ``bands``; any if ``bands=1``.
        steps, num_examples, delta: See ``Mechanism``.

    Raises:
        ValueError: A field out of range, or a sampling that lets an example take part
            twice within ``bands`` steps.
    """

    private: ClassVar[bool] = True

    clip_norm: float
    clip_style: ClipStyle
    noise_multiplier: float
    bands: int
    strategy: Strategy
    sampling: Sampling
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_clip(clip_norm=self.clip_norm, style=self.clip_style)
        check_noise(self.noise_multiplier)
        check_positive_int("bands", self.bands)
        check_strategy(self.strategy)
        check_plan(self)
        if self.bands > self.steps:
            raise ValueError(
                f"bands={self.bands} exceeds steps={self.steps}: later bands would never "
                "be used; lower bands"
            )
        sampling = self.sampling
        apart = sampling.cycle if isinstance(sampling, CyclicPoisson) else 1
        if self.bands > apart:
            raise ValueError(
                f"sampling={self.sampling} lets an example take part twice within "
                f"bands={self.bands} steps, which has no analysis: use CyclicPoisson("
                f"cycle={self.bands}, rate=...), with rate=1.0 for batches in a fixed "
                "order, or lower bands"
            )

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of z, the noise before it is correlated."""
        return self.noise_multiplier * self.clip_norm

    @property
    def expected_batch_size(self) -> float:
        """The public constant that divides each released sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    def rms_prefix_error(self) -> float:
        """Return how wrong noise makes a sum of releases: what to compare plans by.

        The root mean square, over all t and per coordinate, of the noise in the sum of the
        first t released means.
        """
        column = strategy_column(self.strategy, bands=self.bands, steps=self.steps)
        errors = prefix_errors(column, steps=self.steps)
        gain = math.sqrt(float(errors.mean()))
        return gain * self.noise_stddev / self.expected_batch_size

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the event of ``steps`` releases, all by default. See the class."""
        return self.sampling.compose(
            self.noise_multiplier,
            steps=self.steps if steps is None else steps,
            num_examples=self.num_examples,
        )

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is proven."""
        del steps
        return ()

    def diagnose(self, state: "CorrelatedNoiseState") -> dict[str, float]:
        """Return nothing: noise says nothing about the data."""
        del state
        return {}

    def init(self, params: "Params") -> "CorrelatedNoiseState":
        """Return the state before the first noise."""
        from dpjax.mechanisms.mathematics.correlated import init_noise

        return init_noise(params, bands=self.bands)

    def phase(self, step: int) -> str:
        """Return the only phase."""
        del step
        return "gradient"

    def query(
        self, phase: str, params: "Params", state: "CorrelatedNoiseState"
    ) -> "Query":
        """Ask for the clipped gradient at ``params``."""
        del phase, state
        from dpjax.clipping import Query

        return Query((params,), clip_norm=self.clip_norm, style=self.clip_style)

    def release(
        self,
        clipped: "ClippedSum",
        state: "CorrelatedNoiseState",
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, CorrelatedNoiseState]":
        """Return the noisy mean gradient and the noises to go on from.

        NaN if the sum is not the one asked for, or ``step`` not the one after the state.
        """
        del params
        import jax

        from dpjax.mechanisms.mathematics.correlated import add_next_noise
        from dpjax.privacy.sensitive import opened

        noisy, state = add_next_noise(
            opened(clipped, l2_bound=self.clip_norm),
            state,
            column=strategy_column(self.strategy, bands=self.bands, steps=self.steps),
            stddev=self.noise_stddev,
            key=key,
            step=step,
        )
        return jax.tree.map(lambda x: x / self.expected_batch_size, noisy), state
