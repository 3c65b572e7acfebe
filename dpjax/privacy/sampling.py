"""Which examples take part in each step, and what the accountant may assume of it.

One frozen object owns both answers: ``draw`` is what happens, ``compose`` is what is
accounted, so the two cannot disagree. ``draw(step)`` is a pure function of (seed, step):
resuming needs one integer and no replay.

The generator is numpy's counter-based Philox with a 128-bit key. It is statistically
excellent but not a vetted cryptographic generator.

This module may not import jax: config errors are answered without it.
"""

import dataclasses
import functools
import math
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from dpjax.checks import check_number, check_positive_int
from dpjax.privacy.entropy import entropy

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Adjacency = Literal["add_or_remove_one", "zero_out_one"]
_NO_STEP = 2**63 - 1
"""Counter word of draws that are of no step."""


class Sampling(Protocol):
    """What a mechanism needs to know of its sampling.

    Attributes:
        adjacency: The neighbouring relation under which ``compose`` is valid.
        amplified: Whether ``compose`` relies on privacy amplification by sampling.
    """

    adjacency: ClassVar[Adjacency]
    amplified: ClassVar[bool]

    def expected_batch_size(self, num_examples: int) -> float:
        """Return the public constant that divides the released sum."""
        ...

    def max_participations(self, *, steps: int, num_examples: int) -> int:
        """Return in how many of the first ``steps`` batches an example can be."""
        ...

    def draw(self, step: int, *, num_examples: int, seed: int) -> np.ndarray:
        """Return the ``int64[k]`` indices of the examples of ``step``."""
        ...

    def compose(
        self, noise_multiplier: float, *, steps: int, num_examples: int
    ) -> "DpEvent":
        """Return the event of ``steps`` Gaussian releases on the drawn batches."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisson:
    """Every example joins every batch independently with probability ``rate``.

    Batch sizes vary; no batch is cut or padded to a privacy-relevant size.

    Attributes:
        rate: Sampling rate, in (0, 1].
    """

    rate: float
    adjacency: ClassVar[Adjacency] = "add_or_remove_one"
    amplified: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def expected_batch_size(self, num_examples: int) -> float:
        """Return ``rate * num_examples``."""
        check_positive_int("num_examples", num_examples)
        return self.rate * num_examples

    def max_participations(self, *, steps: int, num_examples: int) -> int:
        """Return ``steps``."""
        del num_examples
        return steps

    def draw(self, step: int, *, num_examples: int, seed: int) -> np.ndarray:
        """Return the ``int64[k]`` indices of ``step``; k ~ Binomial(N, rate).

        A Binomial size followed by a uniform subset of that size is exactly N
        independent coins, in O(k) instead of O(N): 0.1 s and 25 MB for a million of a
        billion. (Rates above 1/50 are drawn from an array of 8 N bytes.)
        """
        rng = _generator(seed, step)
        size = rng.binomial(num_examples, self.rate)
        return rng.choice(num_examples, size=size, replace=False, shuffle=False)

    def compose(
        self, noise_multiplier: float, *, steps: int, num_examples: int
    ) -> "DpEvent":
        """Return ``steps`` Poisson-sampled Gaussians."""
        del num_examples
        import dp_accounting as dp

        gaussian = dp.GaussianDpEvent(noise_multiplier)
        sampled = dp.PoissonSampledDpEvent(self.rate, gaussian)
        return dp.SelfComposedDpEvent(sampled, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedPoisson:
    """Poisson sampling, then a uniform subset of at most ``capacity`` examples.

    Truncation changes the privacy analysis, and is accounted (arXiv 2508.15089).

    Attributes:
        rate: Sampling rate before truncation, in (0, 1].
        capacity: Largest batch.
    """

    rate: float
    capacity: int
    adjacency: ClassVar[Adjacency] = "add_or_remove_one"
    amplified: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        check_positive_int("capacity", self.capacity)

    def expected_batch_size(self, num_examples: int) -> float:
        """Return ``rate * num_examples``, the expected size before truncation."""
        check_positive_int("num_examples", num_examples)
        expected = self.rate * num_examples
        if expected > self.capacity:
            raise ValueError(
                f"capacity={self.capacity} is below the expected batch size "
                f"{expected:.1f}; raise capacity or lower rate={self.rate}"
            )
        return expected

    def max_participations(self, *, steps: int, num_examples: int) -> int:
        """Return ``steps``."""
        del num_examples
        return steps

    def draw(self, step: int, *, num_examples: int, seed: int) -> np.ndarray:
        """Return the ``int64[k]`` indices of ``step``, k <= capacity."""
        rng = _generator(seed, step)
        size = min(rng.binomial(num_examples, self.rate), self.capacity)
        # A uniform subset of a uniform subset is a uniform subset.
        return rng.choice(num_examples, size=size, replace=False, shuffle=False)

    def compose(
        self, noise_multiplier: float, *, steps: int, num_examples: int
    ) -> "DpEvent":
        """Return ``steps`` truncated, Poisson-subsampled Gaussians."""
        import dp_accounting as dp

        event = dp.TruncatedSubsampledGaussianDpEvent(
            dataset_size=num_examples + 1,  # the larger neighbour, if one is added
            sampling_probability=self.rate,
            truncated_batch_size=self.capacity,
            noise_multiplier=noise_multiplier,
        )
        return dp.SelfComposedDpEvent(event, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeriodicPoisson:
    """Poisson batches of one rate at each first step of a period, of another between.

    Attributes:
        period: Steps from one first step to the next.
        first_rate: Sampling rate of steps 0, period, 2 period, ..., in (0, 1].
        rate: Sampling rate of all others, in (0, 1].
    """

    period: int
    first_rate: float
    rate: float
    adjacency: ClassVar[Adjacency] = "add_or_remove_one"
    amplified: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_int("period", self.period)
        _check_rate(self.first_rate, name="first_rate")
        _check_rate(self.rate)

    @property
    def first(self) -> Poisson:
        """What draws, and accounts, the first step of each period."""
        return Poisson(rate=self.first_rate)

    @property
    def rest(self) -> Poisson:
        """What draws, and accounts, the other steps."""
        return Poisson(rate=self.rate)

    def expected_batch_size(self, num_examples: int) -> float:
        """Return the expected size of a batch, on average over a period."""
        check_positive_int("num_examples", num_examples)
        rates = self.first_rate + (self.period - 1) * self.rate
        return rates / self.period * num_examples

    def max_participations(self, *, steps: int, num_examples: int) -> int:
        """Return ``steps``."""
        del num_examples
        return steps

    def draw(self, step: int, *, num_examples: int, seed: int) -> np.ndarray:
        """Return the ``int64[k]`` indices of ``step``; see ``Poisson.draw``."""
        part = self.rest if step % self.period else self.first
        return part.draw(step, num_examples=num_examples, seed=seed)

    def compose(
        self, noise_multiplier: float, *, steps: int, num_examples: int
    ) -> "DpEvent":
        """Return the Poisson-sampled Gaussians of the first ``steps``."""
        import dp_accounting as dp

        first = math.ceil(steps / self.period)
        counts = ((self.first, first), (self.rest, steps - first))
        return dp.ComposedDpEvent(
            [
                part.compose(noise_multiplier, steps=count, num_examples=num_examples)
                for part, count in counts
                if count
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CyclicPoisson:
    """Poisson batches of the parts of the data set in turn: each example rests between.

    Every example is put into one of ``cycle`` parts, by a uniform choice of its own that
    no other example has a say in. At step t every example of part ``t mod cycle`` joins
    independently with probability ``rate``. So an example can be in a batch at every
    ``cycle``-th step only, which correlated noise needs (``BandMf``); with independent
    noise, plain ``Poisson`` costs less. With ``rate=1`` the batches are the parts
    themselves, in a fixed order, and nothing is amplified. The parts are held in memory,
    8 bytes for each example.

    Attributes:
        cycle: Parts, and steps from one turn of an example to its next.
        rate: Sampling rate within a part, in (0, 1].
    """

    cycle: int
    rate: float
    adjacency: ClassVar[Adjacency] = "add_or_remove_one"
    amplified: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_int("cycle", self.cycle)
        _check_rate(self.rate)

    def expected_batch_size(self, num_examples: int) -> float:
        """Return ``rate * num_examples / cycle``."""
        check_positive_int("num_examples", num_examples)
        return self.rate * num_examples / self.cycle

    def max_participations(self, *, steps: int, num_examples: int) -> int:
        """Return the number of cycles begun."""
        del num_examples
        return math.ceil(steps / self.cycle)

    def draw(self, step: int, *, num_examples: int, seed: int) -> np.ndarray:
        """Return the ``int64[k]`` indices of ``step``; see ``Poisson.draw``."""
        parts = _parts(seed, self.cycle, num_examples)
        members = parts[step % self.cycle]
        rng = _generator(seed, step)
        size = rng.binomial(len(members), self.rate)
        return rng.choice(members, size=size, replace=False, shuffle=False)

    def compose(
        self, noise_multiplier: float, *, steps: int, num_examples: int
    ) -> "DpEvent":
        """Return one Poisson-sampled Gaussian for each cycle begun.

        Given all parts, and all coins but those of one example, a release depends on that
        example at its own turns only, of which there is one in each cycle.
        """
        turns = self.max_participations(steps=steps, num_examples=num_examples)
        return Poisson(rate=self.rate).compose(
            noise_multiplier, steps=turns, num_examples=num_examples
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullBatch:
    """Every example takes part in every step; no amplification."""

    adjacency: ClassVar[Adjacency] = "add_or_remove_one"
    amplified: ClassVar[bool] = False

    def expected_batch_size(self, num_examples: int) -> float:
        """Return ``num_examples``."""
        check_positive_int("num_examples", num_examples)
        return float(num_examples)

    def max_participations(self, *, steps: int, num_examples: int) -> int:
        """Return ``steps``."""
        del num_examples
        return steps

    def draw(self, step: int, *, num_examples: int, seed: int) -> np.ndarray:
        """Return all indices, ``int64[num_examples]``."""
        del step, seed
        return np.arange(num_examples)

    def compose(
        self, noise_multiplier: float, *, steps: int, num_examples: int
    ) -> "DpEvent":
        """Return ``steps`` composed Gaussians."""
        del num_examples
        import dp_accounting as dp

        return dp.SelfComposedDpEvent(dp.GaussianDpEvent(noise_multiplier), steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffledFixed:
    """Epochs of a fresh shuffle cut into batches of exactly ``batch_size``.

    The last, partial batch of an epoch is dropped. Shuffling has no valid amplification
    analysis of the Poisson kind, so none is claimed: an example takes part in at most
    one step an epoch, and that many plain Gaussians are accounted. With batches of
    fixed size, removing an example would move others, so the guarantee is for replacing
    an example by one whose gradient is zero. The order of an epoch is held in memory,
    8 bytes for each example, and that of the epoch before.

    Attributes:
        batch_size: Examples in each batch.
    """

    batch_size: int
    adjacency: ClassVar[Adjacency] = "zero_out_one"
    amplified: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive_int("batch_size", self.batch_size)

    def expected_batch_size(self, num_examples: int) -> float:
        """Return ``batch_size``."""
        self._steps_per_epoch(num_examples)
        return float(self.batch_size)

    def max_participations(self, *, steps: int, num_examples: int) -> int:
        """Return the number of epochs begun."""
        return math.ceil(steps / self._steps_per_epoch(num_examples))

    def draw(self, step: int, *, num_examples: int, seed: int) -> np.ndarray:
        """Return the ``int64[batch_size]`` indices of ``step``."""
        epoch, position = divmod(step, self._steps_per_epoch(num_examples))
        order = _permutation(seed, epoch, num_examples)
        return order[position * self.batch_size :][: self.batch_size]

    def compose(
        self, noise_multiplier: float, *, steps: int, num_examples: int
    ) -> "DpEvent":
        """Return one Gaussian for each epoch begun."""
        import dp_accounting as dp

        participations = self.max_participations(steps=steps, num_examples=num_examples)
        gaussian = dp.GaussianDpEvent(noise_multiplier)
        return dp.SelfComposedDpEvent(gaussian, participations)

    def _steps_per_epoch(self, num_examples: int) -> int:
        check_positive_int("num_examples", num_examples)
        if self.batch_size > num_examples:
            raise ValueError(
                f"batch_size={self.batch_size} exceeds num_examples={num_examples}; "
                "lower batch_size or use FullBatch"
            )
        return num_examples // self.batch_size


def secret_seed(seed: int | None = None) -> int:
    """Return a 128-bit sampling seed: from the operating system, or from ``seed``.

    Amplification by sampling assumes that nobody knows which examples were drawn, so a
    sampling seed derived from a written ``seed`` voids the guarantee.
    """
    return int.from_bytes(entropy("sampling", seed=seed), "big")


def _generator(seed: int, step: int) -> np.random.Generator:
    if not (isinstance(step, Integral) and 0 <= step <= _NO_STEP):
        raise ValueError(f"step={step!r} must be an integer of at least 0")
    if not (isinstance(seed, Integral) and 0 <= seed < 2**128):
        # Its value is a secret.
        raise ValueError(
            f"seed of type {type(seed).__name__} must be an integer of 0 to 2**128 - 1; "
            "make it by dpjax.secret_seed"
        )
    # The step is the highest counter word: 2**192 blocks lie between two steps.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = _generator(seed, epoch).permutation(num_examples)
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=2)
def _parts(seed: int, count: int, num_examples: int) -> tuple[np.ndarray, ...]:
    """Return the members of each part, ``int64``, read-only."""
    part_of = _generator(seed, _NO_STEP).integers(count, size=num_examples)
    order = np.argsort(part_of, kind="stable")
    order.setflags(write=False)
    ends = np.cumsum(np.bincount(part_of, minlength=count))
    return tuple(np.split(order, ends[:-1]))


def _check_rate(rate: float, *, name: str = "rate") -> None:
    check_number(name, rate)
    if not 0 < rate <= 1:
        raise ValueError(
            f"{name}={rate} must be in (0, 1]; "
            "rate = expected batch size / number of examples"
        )
