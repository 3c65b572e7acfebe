"""What the loop, the accountant and the report ask of a mechanism."""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dpjax.checks import check_numbers, check_positive_int, check_sampling
from dpjax.privacy.sampling import Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from dpjax.clipping import Query
    from dpjax.privacy.sensitive import ClippedSum
    from dpjax.typing import Key, Params


class Mechanism(Protocol):
    """A plan of ``steps`` releases from one data set.

    Fields hold independent facts only. Whatever must agree with them (the noise, the
    draws, the event) is derived, so ``dataclasses.replace`` is always consistent.

    Attributes:
        private: Whether releases protect the data at all; a fact of the class.
        sampling: Draws the batches and says what they let the accountant assume.
        steps: Releases planned; the loop refuses to make more.
        num_examples: Size of the training set, treated as public.
        delta: At which epsilon is reported.
    """

    private: ClassVar[bool]

    @property
    def sampling(self) -> Sampling:
        """See the class."""
        ...

    @property
    def steps(self) -> int:
        """See the class."""
        ...

    @property
    def num_examples(self) -> int:
        """See the class."""
        ...

    @property
    def delta(self) -> float:
        """See the class."""
        ...

    @property
    def expected_batch_size(self) -> float:
        """Examples of a step, expected; the public constant that divides its sum.

        Where steps differ in it (``SpiderBoost``), their mean.
        """
        ...

    def event(self, steps: int | None = None) -> "DpEvent":
        """Return what ``steps`` releases (all, by default) cost."""
        ...

    def caveats(self, steps: int) -> tuple[str, ...]:
        """Return why epsilon after ``steps`` may be false, if it rests on assumptions.

        Each is a flag on the privacy card, which then calls epsilon claimed.
        """
        ...

    def diagnose(self, state: Any) -> dict[str, float]:
        """Return un-noised facts of the state, and warn if it goes wrong.

        Private: the loop asks, and logs them, under ``run.log_sensitive`` only.
        """
        ...

    def init(self, params: "Params") -> Any:
        """Return the mechanism's own state before the first step."""
        ...

    def phase(self, step: int) -> str:
        """Name the kind of ``step``; each phase is compiled once."""
        ...

    def query(self, phase: str, params: "Params", state: Any) -> "Query":
        """Return what the engine is asked at a step of this phase.

        Its clip norm follows from releases, whatever the state holds: it is logged.
        """
        ...

    def release(
        self,
        clipped: "ClippedSum",
        state: Any,
        params: "Params",
        *,
        key: "Key",
        step: Any,
    ) -> "tuple[Params, Any]":
        """Return a plain, safe gradient estimate like params, and the next state.

        A sum whose seal is broken or whose bound exceeds the query's comes out as NaN.
        """
        ...


def check_kinds(mechanism: Mechanism) -> None:
    """Raise ValueError unless numbers are numbers, and the sampling is one."""
    check_numbers(mechanism)
    check_sampling(mechanism.sampling)


def check_plan(mechanism: Mechanism) -> None:
    """Raise ValueError unless the facts shared by all mechanisms make sense."""
    for name in ("steps", "num_examples"):
        check_positive_int(name, getattr(mechanism, name))
    if mechanism.steps >= 2**31:
        raise ValueError(
            f"steps={mechanism.steps} must be below 2**31: int32 counts them"
        )
    if not 0 < mechanism.delta < 1:
        raise ValueError(
            f"delta={mechanism.delta} must be in (0, 1), and well below 1/num_examples"
        )
    # Raises if the sampling does not fit the data set.
    mechanism.sampling.expected_batch_size(mechanism.num_examples)
