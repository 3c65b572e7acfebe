"""Data sets held in memory: plain arrays, scikit-learn digits and Keras-style npz."""

# What is heavy to import (scikit-learn here; Pillow, Grain and TFDS in the sibling
# modules) is imported inside the functions that use it, so that a run pays only for
# the source it reads.
import dataclasses
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpjax.checks import check_number, check_path, check_positive_int

if TYPE_CHECKING:
    from dpjax.typing import Source


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A data set in memory, one array per key.

    Attributes:
        arrays: Arrays ``[N, ...]`` with the same ``N >= 1``.
        pixels: The keys of ``uint8`` arrays that are read as float32 in [0, 1]. They
            stay ``uint8`` in memory, a quarter of the size.

    Raises:
        ValueError: If there are no arrays, if their lengths are unequal or zero, or if
            an entry of ``pixels`` is not the key of a ``uint8`` array.
    """

    arrays: Mapping[str, np.ndarray]
    pixels: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.arrays, Mapping) or not all(
            map(np.ndim, self.arrays.values())
        ):
            raise ValueError(
                'arrays must be a dict of arrays, {"image": [N, ...], "label": [N]}'
            )
        lengths = {key: len(array) for key, array in self.arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"arrays must have one equal length >= 1, got {lengths}")
        for key in self.pixels:
            if key not in self.arrays or self.arrays[key].dtype != np.uint8:
                found = {key: str(array.dtype) for key, array in self.arrays.items()}
                raise ValueError(f"pixels={key!r} is not a uint8 array of {found}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        rows = check_indices(indices, length=len(self))
        records = {key: array[rows] for key, array in self.arrays.items()}
        return scale_pixels(records, keys=self.pixels)


def scale_pixels(
    records: dict[str, np.ndarray], *, keys: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return ``records`` with the uint8 arrays of ``keys`` as float32 in [0, 1]."""
    scaled = {key: records[key] / np.float32(255) for key in keys}
    return records | scaled


def check_indices(indices: Sequence[int], *, length: int) -> np.ndarray:
    """Return ``indices`` as ``int64[len(indices)]``.

    Negative positions are refused: a sampler never means "from the end".

    Raises:
        TypeError: If ``indices`` is not a flat sequence of integers.
        IndexError: If an index is outside ``[0, length)``.
    """
    rows = np.asarray(indices)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise TypeError(
            f"indices must be a list of ints, got a {type(indices).__name__} of shape "
            f"{list(rows.shape)} and dtype {rows.dtype}"
        )
    if np.any((rows < 0) | (rows >= length)):
        # Which one is not told: who is in a batch is secret.
        raise IndexError(f"an index is outside [0, {length})")
    return rows.astype(np.int64)


def slices(length: int, *, most: int | None = None) -> Iterator[list[int]]:
    """Yield the indices [0, length) in pieces: a scan that needs little memory.

    Args:
        length: How many there are.
        most: If there are more, only evenly spaced pieces of about so many in all.
    """
    count = math.ceil(length / 1024)
    chosen = count if most is None or length <= most else math.ceil(most / 1024)
    for piece in range(chosen):
        start = piece * count // chosen * 1024
        yield list(range(start, min(start + 1024, length)))


def digits(*, split: str, test_fraction: float) -> ArraySource:
    """Return scikit-learn's handwritten digits: 1,797 images, no download.

    The split is stratified by class and the same on every machine and in every run.

    Args:
        split: "train" or "test".
        test_fraction: Fraction of the examples in the test split, in (0, 1).

    Returns:
        A source of ``image`` float32 [8, 8, 1] in [0, 1] and ``label`` int32 [].

    Raises:
        ValueError: If ``split`` or ``test_fraction`` is not one of the above.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_split(split)
    _check_fraction(test_fraction)
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)),
        test_size=test_fraction,
        random_state=0,  # public: which examples are in the test split is no secret
        stratify=labels,
    )
    rows = train if split == "train" else test
    return ArraySource(
        {
            "image": images[rows].reshape(-1, 8, 8, 1).astype(np.float32) / 16,
            "label": labels[rows].astype(np.int32),
        }
    )


def diabetes(*, split: str, test_fraction: float) -> ArraySource:
    """Return scikit-learn's diabetes data: 442 patients, no download.

    The features are standardised as published, with means and deviations of all patients:
    they are taken for public. The target, 25 to 346, is mapped to [-1, 1].

    Args:
        split: "train" or "test"; the same on every machine and in every run.
        test_fraction: Fraction of the examples in the test split, in (0, 1).

    Returns:
        A source of ``x`` float32 [10] and ``y`` float32 [].

    Raises:
        ValueError: If ``split`` or ``test_fraction`` is not one of the above.
    """
    from sklearn.datasets import load_diabetes

    x, y = (np.asarray(part) for part in load_diabetes(return_X_y=True))
    x = x * np.sqrt(len(x))  # columns of norm 1 are what is shipped
    return _regression(x, (y - 185.5) / 160.5, split=split, test_fraction=test_fraction)


def friedman(
    *, split: str, test_fraction: float, num_examples: int, noise: float, seed: int
) -> ArraySource:
    """Return a synthetic regression problem, the first of Friedman 1991.

    With x uniform in [0, 1]^10, the target is ``10 sin(pi x_1 x_2) + 20 (x_3 - 1/2)^2 +
    10 x_4 + 5 x_5`` plus normal noise; five features are useless. Features are shifted and
    scaled to mean 0 and variance 1, the target by its mean 14.4 and deviation 5.

    Args:
        split: "train" or "test".
        test_fraction: Fraction of the examples in the test split, in (0, 1).
        num_examples: Of both splits together.
        noise: Standard deviation of the noise, before the scaling.
        seed: Of the data; they are not secret.

    Returns:
        A source of ``x`` float32 [10] and ``y`` float32 [].

    Raises:
        ValueError: If an argument is not one of the above.

    References:
        Friedman, Multivariate Adaptive Regression Splines, Annals of Statistics 19, 1991
    """
    from sklearn.datasets import make_friedman1

    check_positive_int("num_examples", num_examples)
    check_number("noise", noise)
    if noise < 0:
        raise ValueError(f"noise={noise} must be at least 0")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to below 2**32")
    x, y = make_friedman1(num_examples, noise=noise, random_state=seed)
    x = (x - 0.5) * np.sqrt(12)
    return _regression(x, (y - 14.4) / 5, split=split, test_fraction=test_fraction)


def npz(*, path: str, split: str) -> ArraySource:
    """Read a data set in the layout of Keras' ``mnist.npz``.

    Args:
        path: File with the keys ``x_train, y_train, x_test, y_test``; images are uint8
            [N, H, W] or [N, H, W, C], labels are integers [N].
        split: "train" or "test".

    Returns:
        A source of ``image`` float32 [H, W, C] in [0, 1] and ``label`` int32 [].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If ``split`` is unknown, or the file has another layout.
    """
    check_split(split)
    check_path("path", path)
    images, labels = _arrays_of(path, (f"x_{split}", f"y_{split}"))
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"path={path!r}: x_{split} must be uint8 [N, H, W] or [N, H, W, C], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"path={path!r}: y_{split} must be integers [{len(images)}] like "
            f"x_{split}, got {labels.dtype} {list(labels.shape)}"
        )
    if images.ndim == 3:
        images = images[..., None]
    return ArraySource(
        {"image": images, "label": labels.astype(np.int32)}, pixels=("image",)
    )


def few_shots(*, source: "Source", per_class: int) -> ArraySource:
    """Keep the first ``per_class`` examples of each class: a small data set.

    What is private is then this small set. The rest must play no role: which examples are
    the first is decided by their order, and one that is taken away is not replaced.

    Args:
        source: With scalar integers ``label``; all of it is read.
        per_class: How many to keep of each class.

    Raises:
        ValueError: If a class has fewer.
    """
    check_positive_int("per_class", per_class)
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise ValueError(
            f"source={source!r} must be a source of examples, such as ArraySource({{...}})"
        )
    if "label" not in (fields := source[[0]]):
        raise ValueError(f"source has no 'label', only {sorted(fields)}")
    pieces = [source[rows]["label"] for rows in slices(len(source))]
    labels = np.concatenate(pieces)
    chosen: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise ValueError(
                f"a class has fewer examples than {per_class=} asks for (which one is not "
                "told: it may be private)"
            )
        chosen += rows[:per_class].tolist()
    return ArraySource(source[sorted(chosen)])


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'")


def _arrays_of(path: str, names: Sequence[str]) -> list[np.ndarray]:
    """Return the arrays of these names of an npz file."""
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"path={path!r} is no npz file of arrays")
    try:
        with np.load(path) as archive:
            found = {name: archive[name] for name in names if name in archive}
            others = sorted(archive)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"path={path!r} is no npz file of arrays: {error}") from error
    if missing := sorted({*names} - found.keys()):
        raise ValueError(f"path={path!r} has no {missing}, only {others}")
    return [found[name] for name in names]


def _check_fraction(test_fraction: float) -> None:
    check_number("test_fraction", test_fraction)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} must be in (0, 1)")


def _regression(
    x: np.ndarray, y: np.ndarray, *, split: str, test_fraction: float
) -> ArraySource:
    from sklearn.model_selection import train_test_split

    check_split(split)
    _check_fraction(test_fraction)
    if math.ceil(test_fraction * len(y)) >= len(y):
        raise ValueError(
            f"test_fraction={test_fraction} of {len(y)} examples leaves none for training"
        )
    rows = train_test_split(np.arange(len(y)), test_size=test_fraction, random_state=0)[
        split == "test"
    ]
    return ArraySource(
        {"x": x[rows].astype(np.float32), "y": y[rows].astype(np.float32)}
    )
