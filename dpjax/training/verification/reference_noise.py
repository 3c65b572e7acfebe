"""The noise once more: slow, in float64 numpy, from Threefry and the normal quantile.

It shares no code with ``dpjax.privacy.noise``: what it states is what that has to draw.
"""

import math

import numpy as np
import scipy.special
from numpy.typing import ArrayLike, NDArray

_MASK = np.uint64(0xFFFFFFFF)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(
    key: ArrayLike, high: ArrayLike, low: ArrayLike
) -> tuple[NDArray, NDArray]:
    """Return Threefry-2x32 with 20 rounds (Salmon et al. 2011, figure 2), by words.

    Args:
        key: Two words.
        high: First words of the counters.
        low: Their second words.
    """
    # In 64 bits, so that carries are cut off by hand and not by overflow.
    k0, k1 = np.asarray(key).astype(np.uint64)
    schedule = (k0, k1, k0 ^ k1 ^ np.uint64(0x1BD11BDA))
    x0 = (np.asarray(high, np.uint64) + k0) & _MASK
    x1 = (np.asarray(low, np.uint64) + k1) & _MASK
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _MASK
            turned = (x1 << np.uint64(rotation)) | (x1 >> np.uint64(32 - rotation))
            x1 = (turned & _MASK) ^ x0
        x0 = (x0 + schedule[(group + 1) % 3]) & _MASK
        x1 = (x1 + schedule[(group + 2) % 3] + np.uint64(group + 1)) & _MASK
    return x0, x1


def normals(
    root: NDArray[np.uint32],
    *,
    step: int,
    stream: int,
    index: int,
    shape: tuple[int, ...],
) -> NDArray[np.float64]:
    """Return the deviates of one leaf, ``float64[shape]``.

    Args:
        root: ``uint32[2, 2]``, the data of the root key.
        step: Which step's noise.
        stream: Which of its streams.
        index: Which leaf of the tree.
        shape: Of the leaf.
    """
    total = np.zeros(shape)
    for key, share in zip(root, (math.cos(0.7), math.sin(0.7)), strict=True):
        for word in (step, stream, index):
            key = threefry(key, 0, word)
        high, low = threefry(key, 0, np.arange(math.prod(shape)).reshape(shape))
        word = high ^ low
        far = scipy.special.ndtri(((word >> np.uint64(1)) + 0.5) / 2.0**32)
        total += share * np.where(word & np.uint64(1), -far, far)
    return total


def grid(stddev: float) -> float:
    """Return the power of two of which values with this noise are multiples."""
    return 2.0 ** (math.floor(math.log2(stddev)) - 10)
