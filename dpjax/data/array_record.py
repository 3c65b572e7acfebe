"""Shards of array_record files with records of fixed size: data larger than memory."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from dpjax.checks import check_path
from dpjax.data.arrays import check_indices, scale_pixels


class Column(NamedTuple):
    """Where one feature lies in each record.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, little-endian.
        start, stop: Its bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRecordSource:
    """Records on disk, read at each use: memory does not grow with the data.

    Attributes:
        path: Their folder, for errors.
        records: ``array_record``'s source of bytes.
        columns: What each record is made of.
        pixels: The uint8 features that are read as float32 in [0, 1].
    """

    path: str
    records: Any
    columns: Mapping[str, Column]
    pixels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        rows = check_indices(indices, length=len(self))
        # Ascending within each shard, so that a disk reads forward.
        order, place = np.unique(rows, return_inverse=True)
        found = self._bytes(order)[place]
        return scale_pixels(
            {key: _values(found, column) for key, column in self.columns.items()},
            keys=self.pixels,
        )

    def _bytes(self, rows: np.ndarray) -> np.ndarray:
        """Return the records as ``uint8[len(rows), bytes]``."""
        size = max(column.stop for column in self.columns.values())
        read = self.records.__getitems__(rows.tolist()) if len(rows) else []
        if any(len(record) != size for record in read):
            # Neither which one nor its size is told: they are the data's.
            raise ValueError(
                f"path={self.path!r}: a record is not of the {size} bytes that features "
                "asks for; correct features, or pad what is ragged, with a mask"
            )
        return np.frombuffer(b"".join(read), np.uint8).reshape(len(rows), size)


def array_records(
    *, path: str, features: Sequence[tuple[str, str]], pixels: tuple[str, ...]
) -> ArrayRecordSource:
    """Open the shards ``<path>/*.array_record``, and read one record only.

    A record is the bytes of its features one after another, in the order of ``features``,
    each little-endian in C order. To write a shard::

        writer = ArrayRecordWriter("train-00000.array_record", "group_size:1")
        writer.write(tokens.astype("<i4").tobytes() + mask.astype(bool).tobytes())

    with ``array_record.python.array_record_module.ArrayRecordWriter``; ``group_size:1``
    makes each record readable alone. Examples are numbered through the shards in the
    order of their names: do not rename them while a run goes on.

    Args:
        path: Folder of the shards of one split.
        features: Pairs of a key and its dtype and shape, in the order of their bytes, such
            as ``(("tokens", "int32[1025]"), ("label", "int32[]"))``.
        pixels: The keys of uint8 features to read as float32 in [0, 1].

    Returns:
        A source with ``features`` as keys.

    Raises:
        FileNotFoundError: If the folder has no such files.
        ValueError: If a shard is unreadable or has no records, or ``features`` or
            ``pixels`` is malformed. Here or while reading, if a record has another size.
    """
    check_path("path", path)
    columns = _columns(features)
    for key in pixels:
        if key not in columns or columns[key].dtype != np.uint8:
            raise ValueError(f"pixels={key!r} is not a uint8 feature of {features}")
    shards = sorted(pathlib.Path(path).glob("*.array_record"))
    if not shards:
        raise FileNotFoundError(f"path={path!r} has no files *.array_record")
    source = ArrayRecordSource(path, _opened(shards), columns, tuple(pixels))
    source[[0]]  # is it of the size that features asks for?
    return source


def _opened(shards: Sequence[pathlib.Path]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with futures.ThreadPoolExecutor(16) as pool:  # there may be thousands, far away
        counts = list(pool.map(_count, shards))
    if 0 in counts:
        raise ValueError(
            f"{shards[counts.index(0)]} has no records, or is no array_record file; "
            "write it again, or remove it"
        )
    return ArrayRecordDataSource(
        [_Shard(str(shard), 0, n, n) for shard, n in zip(shards, counts, strict=True)]
    )


@dataclasses.dataclass
class _Shard:
    """A file and its records, as ``array_record`` asks for them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _count(shard: pathlib.Path) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(shard))
    if not reader.ok():  # to close it would raise
        return 0
    count = reader.num_records()
    reader.close()
    return count


def _columns(features: Sequence[tuple[str, str]]) -> dict[str, Column]:
    # Not a dict: a config sorts its keys.
    pairs = isinstance(features, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in features
    )
    if not pairs or not features or len(dict(features)) < len(features):
        raise ValueError(
            f"features={features!r} must be pairs of different keys, such as "
            '(("tokens", "int32[1025]"), ("label", "int32[]"))'
        )
    columns, start = {}, 0
    for key, text in features:
        found = re.fullmatch(r"(\w+)\[((?:\d+(?:, ?\d+)*)?)\]", str(text))
        dtype = _dtype(found[1]) if found else None
        if found is None or dtype is None:
            raise ValueError(
                f"features[{key!r}]={text!r} must be a numeric dtype and a shape, such as "
                "'uint8[32, 32, 3]' or 'int32[]'"
            )
        shape = tuple(map(int, re.findall(r"\d+", found[2])))
        if 0 in shape:
            raise ValueError(f"features[{key!r}]={text!r} has no values; remove it")
        stop = start + dtype.itemsize * math.prod(shape)
        columns[key] = Column(shape, dtype, start, stop)
        start = stop
    return columns


def _dtype(name: str) -> np.dtype | None:
    """Return the little-endian dtype of numbers of this name, if there is one."""
    try:
        dtype = np.dtype(name).newbyteorder("<")
    except TypeError:
        return None
    return dtype if dtype.kind in "biuf" else None


def _values(records: np.ndarray, column: Column) -> np.ndarray:
    """Return one feature of ``uint8[n, bytes]`` in native byte order: ``[n, ...]``."""
    part = np.ascontiguousarray(records[:, column.start : column.stop])
    values = part.view(column.dtype).reshape(len(records), *column.shape)
    return values.astype(column.dtype.newbyteorder("="), copy=False)
