"""Do the last bits of a release tell that an example is in it?

Floats lie on lattices. Where nobody else contributes to a coordinate of the sum (a rare
token's row, a border pixel, a dead unit), noise alone has other last bits than noise plus a
value, unless both are rounded alike. This attack looks at nothing else: given the binade of
a released number, how many of its last bits are zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dpjax.audit.distinguish import Scores
from dpjax.checks import check_positive_int
from dpjax.mechanisms import Mechanism
from dpjax.typing import Key

_BITS = 24


def lattice_scores(
    mechanism: Mechanism, *, value: float, coordinates: int, trials: int, seed: int
) -> Scores:
    """Score first steps with and without a target, by the last bits of what they release.

    The score is a log likelihood ratio in nats, summed over the coordinates: of the number
    of last bits that are zero, given the binade. What the size of a number tells is no part
    of it, as the accountant has counted that. Without the target all coordinates of the sum
    are 0.

    Args:
        mechanism: What is attacked.
        value: What the target adds to each of the coordinates; best with many digits.
        coordinates: How many there are.
        trials: Runs on each neighbour; the law is learnt from as many others.
        seed: Of keys. The simulated runs protect nobody.

    Raises:
        ValueError: The mechanism releases no sum of vectors, or divides it by a number that
            is no power of two, which hides the bits from this attack and not from others.
    """
    check_positive_int("coordinates", coordinates)
    check_positive_int("trials", trials)
    size = mechanism.expected_batch_size
    if np.frexp(size)[0] != 0.5:
        raise ValueError(
            f"expected_batch_size={size} must be a power of two, or last bits cannot be read "
            "off: change num_examples or the rate of the plan"
        )
    count = trials * coordinates
    words = jax.random.bits(jax.random.key(seed), (4, 2, 2), jnp.uint32)
    keys = jax.random.wrap_key_data(words, impl="threefry2x32")
    seen = [
        _features(_released(mechanism, count, value=held, key=key))
        for held, key in zip((value, value, 0.0, 0.0), keys, strict=True)
    ]
    # On one scale: binades from the least that was seen.
    least = min(binade.min() for binade, _ in seen)
    seen = [((binade - least) * (_BITS + 1) + zeros) for binade, zeros in seen]
    bins = (max(cell.max() for cell in seen) // (_BITS + 1) + 1) * (_BITS + 1)
    ratio = _log_ratio(*(np.bincount(seen[i], minlength=bins) for i in (0, 2)))
    inside, outside = (
        ratio[seen[i]].reshape(trials, coordinates).sum(axis=1) for i in (1, 3)
    )
    return Scores(inside, outside)


def _released(
    mechanism: Mechanism, count: int, *, value: float, key: Key
) -> NDArray[np.float32]:
    """Return the first release, ``[count]``, of a sum that is ``value`` everywhere."""
    params = {"x": jnp.zeros(count, jnp.float32)}
    state = mechanism.init(params)
    asked = mechanism.query(mechanism.phase(0), params, state)
    if asked.slope is not None:
        raise ValueError(
            f"mechanism={type(mechanism).__name__} releases one slope times a direction, "
            "which has no coordinates of its own"
        )
    total = {"x": jnp.full(count, value, jnp.float32)}
    clipped = dataclasses.replace(asked.empty(), total=total)
    mean, _ = mechanism.release(clipped, state, params, key=key, step=0)
    return np.asarray(mean["x"])


def _features(
    values: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return binades, and how many of the 24 bits of a float are zero at the end."""
    mantissa, binade = np.frexp(np.abs(values.astype(np.float64)))
    whole = (mantissa * 2**_BITS).astype(np.int64)
    zeros = np.where(whole > 0, np.log2(np.maximum(whole & -whole, 1)), _BITS)
    return binade.astype(np.int64), zeros.astype(np.int64)


def _log_ratio(
    inside: NDArray[np.int64], outside: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return ``log P(zeros | binade)`` inside less outside, from counts of both.

    Half an observation is added to each binade, shared out as those of both sides together:
    what was seen on one side only is far from impossible on the other.
    """
    sides = [x.reshape(-1, _BITS + 1).astype(np.float64) for x in (inside, outside)]
    pooled = sides[0] + sides[1] + 1e-9
    prior = 0.5 * pooled / pooled.sum(axis=1, keepdims=True)
    logs = [
        np.log(x + prior) - np.log(x.sum(axis=1, keepdims=True) + 0.5) for x in sides
    ]
    return (logs[0] - logs[1]).ravel()
