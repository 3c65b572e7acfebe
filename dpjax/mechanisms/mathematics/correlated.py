"""Correlated noise, one step at a time: ``y = C^{-1} z`` for a banded strategy C.

Row t of ``C y = z`` is ``c[0] y[t] + ... + c[b-1] y[t-b+1] = z[t]``, so the noise of a step
follows from fresh noise and from the b - 1 noises before it. They have to be kept: the
inverse of a banded matrix is not banded, so to draw a step anew would take the noise of all
steps before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.privacy.noise import add_noise, noise_like
from dpjax.privacy.sensitive import accumulation_dtype
from dpjax.typing import Key, Params, Scalar


class CorrelatedNoiseState(NamedTuple):
    """The last noises. Secret: with them, what they protect lies open.

    Attributes:
        count: ``int32``, noises made.
        recent: Like params, at least float32, with a leading axis ``[b - 1]``: the noise
            of step s in row ``s mod (b - 1)``; 0 before the first step.
    """

    count: Scalar
    recent: Params

    def __repr__(self) -> str:
        return "CorrelatedNoiseState(secret: holds the noise of the last steps)"


def init_noise(params: Params, *, bands: int) -> CorrelatedNoiseState:
    """Return the state before the first step: ``bands - 1`` times the size of params."""

    def empty(leaf: jax.Array) -> jax.Array:
        shape = (bands - 1, *leaf.shape)
        return jnp.zeros(shape, accumulation_dtype(leaf.dtype))

    return CorrelatedNoiseState(jnp.zeros((), jnp.int32), jax.tree.map(empty, params))


def add_next_noise(
    tree: Params,
    state: CorrelatedNoiseState,
    *,
    column: np.ndarray,
    stddev: float,
    key: Key,
    step: int | Scalar,
) -> tuple[Params, CorrelatedNoiseState]:
    """Return ``tree`` with the noise of ``step``, and the next state.

    The noise is NaN unless ``step`` is the one that follows the state: noise that does not
    go on from the right one is not correlated as the strategy says. What is returned is
    rounded like all that gets noise; the state keeps the noise itself, which must not know
    of the data.

    Args:
        tree: What is released, at least float32.
        state: After the step before.
        column: First column of C, ``[b]``.
        stddev: Of z.
        key: Root noise key, ``key[2]``.
        step: Which step this is.
    """
    rows = len(column) - 1
    step = jnp.asarray(step, jnp.int32)
    # Row k holds the noise of step - j, with j in 1..b-1.
    lags = 1 + (step - 1 - jnp.arange(rows)) % max(rows, 1)
    weights = jnp.asarray(column / column[0], jnp.float32)[lags]

    def carried(recent: jax.Array) -> jax.Array:
        weighted = jnp.tensordot(
            weights.astype(recent.dtype),
            recent,
            axes=1,
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.where(state.count == step, -weighted, jnp.nan)

    def stored(recent: jax.Array, new: jax.Array) -> jax.Array:
        return recent.at[step % rows].set(new) if rows else recent

    drawn = {"key": key, "step": step, "stddev": stddev / column[0]}
    old = jax.tree.map(carried, state.recent)
    # Fresh noise last: it covers what the sum of the other two shows by its rounding.
    noisy = add_noise(jax.tree.map(jnp.add, tree, old), **drawn)
    new = jax.tree.map(jnp.add, old, noise_like(old, **drawn))
    recent = jax.tree.map(stored, state.recent, new)
    return noisy, CorrelatedNoiseState(step + 1, recent)
