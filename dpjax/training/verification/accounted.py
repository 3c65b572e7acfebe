"""What an event says was accounted, read term by term, without an accountant."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Term(NamedTuple):
    """Equal releases among those of an event.

    Attributes:
        count: How many.
        rate: With which chance an example takes part in each; None if it is not said.
        noise_multiplier: Of each; None if it is no plain Gaussian.
    """

    count: int
    rate: float | None
    noise_multiplier: float | None


def terms(event: Any) -> Iterator[Term]:
    """Yield the terms of a dp_accounting event, in order."""
    # By name: the package is imported where something is accounted only.
    match type(event).__name__:
        case "SelfComposedDpEvent":
            for term in terms(event.event):
                yield term._replace(count=event.count * term.count)
        case "ComposedDpEvent":
            for part in event.events:
                yield from terms(part)
        case "PoissonSampledDpEvent":
            for term in terms(event.event):
                yield term._replace(rate=event.sampling_probability)
        case "GaussianDpEvent":
            yield Term(1, 1.0, event.noise_multiplier)
        case "TruncatedSubsampledGaussianDpEvent":
            yield Term(1, event.sampling_probability, event.noise_multiplier)
        case _:
            yield Term(1, None, None)
