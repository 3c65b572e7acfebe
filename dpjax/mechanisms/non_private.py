"""Training without privacy, on the same seams: the baseline of every comparison."""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from dpjax.mechanisms.base import check_kinds, check_plan
from dpjax.privacy.sampling import Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonPrivate:
    """Release the plain gradient sum over ``expected_batch_size``; epsilon is inf.

    With batches of fixed size (``ShuffledFixed``, ``FullBatch``) that is exactly the mean
    gradient of the batch. With Poisson batches it is DP-SGD's estimate without clipping
    and noise, so that an ablation changes one thing at a time.

    Attributes:
        sampling, steps, num_examples, delta: See ``Mechanism``.
    """

    private: ClassVar[bool] = False

    sampling: Sampling
    steps: int
    num_examples: int
    delta: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_plan(self)

    @property
    def expected_batch_size(self) -> float:
        """The constant that divides each sum."""
        return self.sampling.expected_batch_size(self.num_examples)

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return the event that no accountant gives a finite epsilon."""
        del steps
        import dp_accounting as dp

        return dp.NonPrivateDpEvent()

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return none: epsilon is inf."""
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
        """Ask for the gradient at ``params``, unclipped."""
        del phase, state
        from dpjax.clipping import Query

        return Query((params,), clip_norm=math.inf)

    def release(
        self,
        clipped: "ClippedSum",
        state: tuple[()],
        params: "Params",
        *,
        key: "Key",
        step: "int | Scalar",
    ) -> "tuple[Params, tuple[()]]":
        """Return the plain gradient estimate."""
        del params, key, step
        import jax

        from dpjax.privacy.sensitive import opened

        total = opened(clipped, l2_bound=math.inf)
        return jax.tree.map(lambda x: x / self.expected_batch_size, total), state
