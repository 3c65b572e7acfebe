"""Recursive gradient differences: the pure part of DIFF2 and SPIDER, on plain trees.

As a transform it is ``dpjax.transforms.diff2``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpjax.privacy.sensitive import accumulation_dtype
from dpjax.typing import Params, Scalar


class Diff2State(NamedTuple):
    """State of ``diff2``: two copies of the parameters. All of it is an output.

    Under a mechanism, estimate and parameters are outputs of private releases: nothing
    here is more secret than the parameters themselves.

    Attributes:
        count: ``int32``, updates made.
        estimate: The running estimate of the gradient, like params, at least float32.
        prev_params: Where the last gradient was taken, exactly.
    """

    count: Scalar
    estimate: Params
    prev_params: Params


def start(params: Params) -> Diff2State:
    """Return the state before the first update."""
    return Diff2State(
        count=jnp.zeros((), jnp.int32),
        estimate=jax.tree.map(lambda p: jnp.zeros(p.shape, _wide(p)), params),
        # A copy: the state is donated together with the parameters.
        prev_params=jax.tree.map(jnp.copy, params),
    )


def advance(
    state: Diff2State, updates: Params, params: Params, *, restart: bool | Scalar
) -> Diff2State:
    """Return the state with ``updates``, taken at ``params``, in the estimate."""
    estimate = jax.tree.map(
        # Not v * 0: a restart mends an estimate that is not finite.
        lambda u, v: jnp.where(restart, u, u + v).astype(v.dtype),
        updates,
        state.estimate,
    )
    return Diff2State(state.count + 1, estimate, params)


def distance(one: Params, other: Params) -> Scalar:
    """Return ``|one - other|`` over all leaves, float32; 0 exactly where they agree."""
    squares = jax.tree.map(
        lambda a, b: jnp.sum(jnp.square(a.astype(_wide(a)) - b.astype(_wide(b)))),
        one,
        other,
    )
    return jnp.sqrt(sum(jax.tree.leaves(squares))).astype(jnp.float32)


def _wide(leaf: jax.Array) -> jnp.dtype:
    return accumulation_dtype(leaf.dtype)
