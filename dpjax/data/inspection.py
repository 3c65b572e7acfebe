"""A look at a data set before training: what would train silently, and wrongly."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpjax.data.arrays import slices
from dpjax.typing import Source

FIXES = {
    "label": "correct the data, or num_classes={limit}",
    "tokens": "use the tokenizer of the model, or another vocab_size={limit}",
}
"""What to do about integers outside ``[0, limit)``, by the key of the record."""


MOST = 2**24
"""Records that are read: of more, a sample. 128 MiB of digests, and minutes of reading."""


class Inspection(NamedTuple):
    """What was counted. All but ``read`` depends on single examples: private as they are.

    Attributes:
        duplicates: Examples that are equal, in every bit, to one before them.
        copies: How many times the most frequent example is there; 1 if none is repeated.
        read: Records among which was counted.
        whole: Whether these are all.
    """

    duplicates: int
    copies: int
    read: int
    whole: bool

    def __repr__(self) -> str:
        return "Inspection(private where the data are)"


def inspect(source: Source, *, limits: Mapping[str, int]) -> Inspection:
    """Read every record once, or a sample of very many; refuse what no loss can use.

    None of it would fail later: an example whose gradient is not finite is left out of
    every sum, and under jit a label outside gives NaN, or another class.

    Args:
        source: The data set; 8 bytes of memory for each record read. Of more than ``MOST``
            records, evenly spaced pieces of so many in all.
        limits: Key -> how many values its integers may have, 0 and up. A "label" is one
            integer for each record.

    Raises:
        ValueError: A value is NaN or infinite, or outside its limit, or a label is no
            integer. Neither value nor place is told: they are the data's, and an error
            ends up in logs.
    """
    seen = []
    for indices in slices(len(source), most=MOST):
        records = {key: np.asarray(x) for key, x in source[indices].items()}
        for key, array in records.items():
            _check_finite(key, array)
        for key, limit in limits.items():
            _check_range(key, records[key], limit)
        digests = [_digest(row) for row in zip(*_rows(records), strict=True)]
        seen.append(np.array(digests, np.uint64))
    _, counts = np.unique(np.concatenate(seen), return_counts=True)
    read = int(counts.sum())
    return Inspection(
        duplicates=read - len(counts),
        copies=int(counts.max()),
        read=read,
        whole=read == len(source),
    )


def _check_finite(key: str, array: np.ndarray) -> None:
    # Of bfloat16 too, which is no kind of numpy's own.
    floating = array.dtype.kind not in "biu"
    if floating and not np.isfinite(array.astype(np.float32, copy=False)).all():
        raise ValueError(
            f"a value of {key!r} is NaN or infinite (which one is not told: it may be "
            "private); correct the data, or let a field of its own say what is missing"
        )


def _check_range(key: str, array: np.ndarray, limit: int) -> None:
    if array.dtype.kind not in "iu" or (key == "label" and array.ndim != 1):
        wanted = "a scalar integer, [N] in all" if key == "label" else "integers"
        shape = ", ".join(["N", *map(str, array.shape[1:])])
        raise ValueError(f"{key} must be {wanted}, not {array.dtype} [{shape}]")
    if np.any((array < 0) | (array >= limit)):
        raise ValueError(
            f"a value of {key!r} is outside [0, {limit}) (which one is not told: it may "
            f"be private); {FIXES[key].format(limit=limit)}"
        )


def _rows(records: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return the bytes of each record, key by key: ``uint8[n, bytes]``."""
    return [
        np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
        for _, array in sorted(records.items())
    ]


def _digest(row: tuple[np.ndarray, ...]) -> int:
    # 64 bits: of 2**27 different records, less than one chance in 2000 of two alike.
    hashed = hashlib.blake2b(digest_size=8)
    for part in row:
        hashed.update(part.data)
    return int.from_bytes(hashed.digest(), "big")
