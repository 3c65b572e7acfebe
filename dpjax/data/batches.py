"""From the indices a sampler draws to fixed-shape batches; and checks of a source."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Protocol

import numpy as np

from dpjax.checks import check_mechanism, check_positive_int
from dpjax.data.arrays import slices
from dpjax.data.inspection import MOST
from dpjax.privacy.sampling import Sampling
from dpjax.typing import Batch, Source

_HELD = 8
"""Chunks of a step that are read ahead as one; memory does not grow with larger steps."""


class Drawn(Protocol):
    """What of a mechanism decides its batches."""

    @property
    def sampling(self) -> Sampling:
        """Who is drawn at a step."""
        ...

    @property
    def steps(self) -> int:
        """How many batches there are."""
        ...

    @property
    def num_examples(self) -> int:
        """Size of the data set."""
        ...


class StepBatch(NamedTuple):
    """The examples of one step.

    Attributes:
        step: The step they were drawn for.
        chunks: ``ceil(k / physical_batch_size)`` batches of one fixed shape, numpy
            arrays, with the ``k`` drawn examples in the order of the draw, or those of
            them in the rows asked for. Only the last has padding: copies of its last
            example, with mask False. How many there are does not depend on the rows. The
            first few are in memory, the others are read as they are iterated over.
    """

    step: int
    chunks: Sequence[Batch]


def batches(
    source: Source,
    mechanism: Drawn,
    *,
    seed: int,
    physical_batch_size: int,
    start: int = 0,
    rows: np.ndarray | None = None,
) -> Generator[StepBatch, None, None]:
    """Yield the training batches of a mechanism, from step ``start`` to its last.

    This is the only source of training batches: they are what ``mechanism.sampling``
    draws, and so what it accounts. Resuming needs ``start`` and ``seed`` only.

    Args:
        source: The data set the mechanism was made for.
        mechanism: Its sampling draws; its ``steps`` end the iteration.
        seed: 128 secret bits, ``dpjax.secret_seed()``.
        physical_batch_size: Rows of every chunk; memory only.
        start: The first step to yield.
        rows: See ``read_steps``.

    Raises:
        ValueError: ``source`` or ``mechanism`` is none, ``len(source)`` is not
            ``mechanism.num_examples``, ``seed`` is not of 128 bits, ``start`` is not of the
            plan, or see ``read_steps``.
    """
    check_mechanism(mechanism)
    check_records(source)
    if len(source) != mechanism.num_examples:
        raise ValueError(
            f"len(source)={len(source)} is not mechanism.num_examples="
            f"{mechanism.num_examples}; make the mechanism for this source"
        )
    if not (isinstance(seed, int) and 0 <= seed < 2**128):
        raise ValueError(
            f"seed of type {type(seed).__name__} must be dpjax.secret_seed(), an integer of "
            "128 secret bits: whoever can guess which examples are drawn voids the "
            "amplification by sampling"
        )
    if not isinstance(start, int) or not 0 <= start <= mechanism.steps:
        raise ValueError(
            f"start={start!r} must be a step of the plan, 0 to mechanism.steps="
            f"{mechanism.steps}"
        )
    draw = functools.partial(
        mechanism.sampling.draw, num_examples=len(source), seed=seed
    )
    return read_steps(
        source,
        draw,
        steps=range(start, mechanism.steps),
        physical_batch_size=physical_batch_size,
        rows=rows,
    )


def read_steps(
    source: Source,
    draw: Callable[[int], np.ndarray],
    *,
    steps: range,
    physical_batch_size: int,
    rows: np.ndarray | None = None,
    prefetch: int = 2,
) -> Generator[StepBatch, None, None]:
    """Yield the batch of each step, read ahead of use in a background thread.

    A batch depends only on its step, so a run is resumed by passing the remaining
    steps. Close the generator (or exhaust it) to end the thread.

    Args:
        source: The data set.
        draw: Pure function from a step to the ``int64[k]`` indices of its examples; any
            ``k >= 0``. It is called in the background thread.
        steps: The steps to yield, in this order.
        physical_batch_size: Rows B of every chunk.
        rows: Which of these rows to read, ascending; None for all. The draw does not
            depend on it, so the processes of one run, each with rows of its own, hold
            together exactly the chunks of a run of one process.
        prefetch: Steps held ready in memory, of each its first chunks; of later chunks,
            this many. 0 reads in the calling thread.

    Raises:
        ValueError: If ``physical_batch_size < 1`` or ``prefetch < 0``, or if the source
            is too long for the int32 of ``Batch.index``. While reading, if the source
            gives other keys, dtypes or shapes than of its first record, or not as many
            rows as asked for.
    """
    check_positive_int("physical_batch_size", physical_batch_size)
    if prefetch < 0:
        raise ValueError(f"prefetch={prefetch} must be >= 0")
    if len(source) > np.iinfo(np.int32).max:
        raise ValueError(f"len(source)={len(source)} does not fit an int32 index")
    if rows is None:
        rows = np.arange(physical_batch_size)
    form = _form(source[[0]]) if len(source) else {}
    reader = _Reader(source, rows, form)
    parts = _Steps(reader, draw, steps, physical_batch_size, prefetch)
    return _read(parts, prefetch=prefetch)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """All batches by position. One element is one WHOLE step.

    Were an element one example, Grain's workers would regroup the examples, and a
    batch would no longer be what the sampler drew and the accountant assumes.
    """

    reader: "_Reader"
    draw: Callable[[int], np.ndarray]
    steps: range
    physical_batch_size: int
    prefetch: int

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> StepBatch:
        step, size = self.steps[index], self.physical_batch_size
        indices = self.draw(step)
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]
        first = tuple(map(self.reader, parts[:_HELD]))
        return StepBatch(step, _Chunks(self.reader, parts, first, self.prefetch))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Chunks(Sequence[Batch]):
    """The chunks of one step, of which only the first are held in memory."""

    reader: "_Reader"
    parts: list[np.ndarray]
    first: tuple[Batch, ...]
    prefetch: int

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]
        if place < len(self.first):
            return self.first[place]
        return self.reader(self.parts[place])

    def __iter__(self) -> Iterator[Batch]:
        rest = self.parts[len(self.first) :]
        if not rest or not self.prefetch:
            yield from itertools.chain(self.first, map(self.reader, rest))
            return
        with futures.ThreadPoolExecutor(1) as pool:
            read = (pool.submit(self.reader, part) for part in rest)  # when asked for
            ahead = collections.deque(itertools.islice(read, self.prefetch))
            yield from self.first
            while ahead:
                chunk = ahead.popleft().result()
                ahead.extend(itertools.islice(read, 1))
                yield chunk


@dataclasses.dataclass(frozen=True)
class _Reader:
    """From the indices of a chunk to its rows, for one thread at a time."""

    source: Source
    rows: np.ndarray
    form: dict[str, str]
    # A source of the user's may seek and read: steps to come are read while later chunks
    # of this one are.
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __call__(self, indices: np.ndarray) -> Batch:
        with self.lock:
            chunk = _chunk(self.source, indices, self.rows)
        found = _form(chunk.examples)
        if found != self.form:
            raise ValueError(
                f"source[...] gave {found}, and {self.form} before: all records of a source "
                "have the same keys, dtypes and shapes; pad what is ragged, with a mask"
            )
        return chunk


def _form(records: Mapping[str, Any]) -> dict[str, str]:
    """Return dtype and shape of one record by key."""
    return {k: f"{x.dtype}{list(x.shape[1:])}" for k, x in records.items()}


def _chunk(source: Source, indices: np.ndarray, rows: np.ndarray) -> Batch:
    """Read the examples of ``indices`` that are in ``rows``; those beyond are padding."""
    mask = rows < len(indices)
    # Where all are padding, one is read to be copied.
    chosen = indices[np.minimum(rows, len(indices) - 1)][: max(mask.sum(), 1)]
    rest = len(rows) - len(chosen)

    def pad(array: np.ndarray) -> np.ndarray:
        if not rest:
            return array  # nearly all chunks are full: they need no copy
        # Copies of a real row: zeros could be outside the domain of a loss, and the
        # plain engine cannot mask what is NaN.
        return np.pad(array, [(0, rest)] + [(0, 0)] * (array.ndim - 1), mode="edge")

    examples = source[chosen.tolist()]
    _check_rows(examples, len(chosen))
    return Batch(
        examples={key: pad(array) for key, array in examples.items()},
        mask=mask,
        index=pad(chosen.astype(np.int32)),
    )


def _read(steps: _Steps, *, prefetch: int) -> Generator[StepBatch, None, None]:
    import grain

    # One thread keeps the draws in order, and more were no faster (2 cores).
    options = grain.ReadOptions(
        num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch
    )
    dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
    with contextlib.closing(iter(dataset)) as iterator:
        yield from iterator


def fingerprint(source: Source) -> str:
    """Return 16 hex digits that tell data sets apart, to refuse a resume on another.

    Covers the length, the keys, dtypes and shapes, and the values of up to 256 evenly
    spaced records; equal on every machine. It detects mistakes, not tampering.
    """
    count = min(len(source), 256)
    records = source[[i * len(source) // count for i in range(count)]]
    digest = hashlib.sha256(str(len(source)).encode())
    for key, array in sorted(records.items()):
        digest.update(f"{key} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def overlap(source: Source, held_out: Source) -> float:
    """Return which part of ``held_out`` (of up to 256 records of it) is in ``source``.

    Reads all of ``source``; of more than ``MOST`` records evenly spaced pieces, from which
    the part is estimated. A few equal records are common in real data; a large part
    means that the model is evaluated on what it was trained on. Compared is what both
    have, as far as both have it: a text that is padded to another length is the same, and
    so is one of another dtype.
    """
    count = min(len(held_out), 256)
    records = held_out[[i * len(held_out) // count for i in range(count)]]
    first = source[[0]]
    common = {
        key: tuple(map(min, records[key].shape[1:], first[key].shape[1:]))
        for key in sorted(records.keys() & first.keys())
        if records[key].ndim == first[key].ndim
    }
    if not common:
        return 0.0
    missing = wanted = _digests(records, common)
    read = 0
    for indices in slices(len(source), most=MOST):
        missing = missing - _digests(source[indices], common)
        read += len(indices)
    found = 1 - len(missing) / len(wanted)
    return min(1.0, found * len(source) / read)


def _digests(
    records: dict[str, np.ndarray], common: dict[str, tuple[int, ...]]
) -> set[bytes]:
    columns = [
        records[key][(slice(None), *map(slice, shape))].astype(np.float32)
        for key, shape in common.items()
    ]
    return {
        hashlib.blake2b(
            b"".join(part.tobytes() for part in row), digest_size=16
        ).digest()
        for row in zip(*columns, strict=True)
    }


_WANTED = (
    "a source takes a list of ints and returns a dict of stacked numpy arrays, "
    '{"image": [N, ...], "label": [N]} for N ints; wrap a data set that gives one record '
    "for one int (PyTorch's kind), or can only be iterated, in a class whose __getitem__ "
    "stacks them"
)


def check_records(source: Source) -> None:
    """Check on its first and last record that a source gives dicts of stacked arrays.

    Raises:
        ValueError: With what came instead, or that there are no records.
    """
    try:
        size = len(source)
    except TypeError as error:
        raise ValueError(f"{type(source).__name__} has no len(); {_WANTED}") from error
    if size == 0:
        raise ValueError(f"{type(source).__name__} has no examples")
    first, both = _asked(source, [0]), _asked(source, [0, size - 1])
    if _form(first) != _form(both):
        raise ValueError(
            f"source[[0]] gave {_form(first)}, and source[[0, {size - 1}]] {_form(both)}: "
            "all records have the same keys, dtypes and shapes; pad what is ragged"
        )


def _asked(source: Source, indices: list[int]) -> Mapping[str, Any]:
    """Return ``source[indices]``, which must be what a source gives."""
    try:
        records = source[indices]
    except Exception as error:  # a source is the user's code: anything may come
        raise ValueError(
            f"source[{indices}] raised {type(error).__name__}: {error}; {_WANTED}"
        ) from error
    if not isinstance(records, Mapping):
        kind = type(records).__name__
        raise ValueError(f"source[{indices}] is a {kind}; {_WANTED}")
    if not records:
        raise ValueError(f"source[{indices}] is an empty dict; {_WANTED}")
    for key, array in records.items():
        if not isinstance(getattr(array, "dtype", None), np.dtype):
            kind = type(array).__name__
            raise ValueError(f"{key!r} of source[{indices}] is a {kind}; {_WANTED}")
    _check_rows(records, len(indices))
    for key, array in records.items():
        if array.dtype.kind in "OSUM":
            raise ValueError(
                f"{key!r} has dtype {array.dtype}; leave it out, or make it numbers"
            )
    return records


def _check_rows(records: Mapping[str, Any], count: int) -> None:
    """Raise ValueError unless all arrays have as many rows as were asked for."""
    for key, array in records.items():
        if np.shape(array)[:1] != (count,):
            raise ValueError(
                f"source[...] of {count} ints gave {key!r} of shape {np.shape(array)}, "
                f"not ({count}, ...); {_WANTED}"
            )
