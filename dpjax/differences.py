"""Recursive gradient differences: the pure part of DIFF2 and SPIDER, on plain trees."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from dpjax.sensitive import accumulation_dtype
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


class Diff2Query(NamedTuple):
    """Which gradients the next update of ``diff2`` is to be made of.

    Attributes:
        restart: ``bool``. True: the gradient at params. False: the gradient at params
            less the gradient at ``reference``, both of the same examples and with the
            same randomness.
        reference: Like params; where the last gradient was taken.
        distance: ``float32``, ``|params - reference|``.
    """

    restart: Scalar
    reference: Params
    distance: Scalar


def diff2(*, restart_every: int) -> optax.GradientTransformationExtraArgs:
    """Turn mean gradient differences into a running estimate of the gradient.

    ``v_t = u_t`` at every ``restart_every``-th update, from the first on, and
    ``v_t = u_t + v_{t-1}`` at the others. ``diff2_query`` says what ``u_t`` has to be.
    This is the server step of DIFF2 (Murata and Suzuki 2023, Algorithm 1) and, on
    minibatches, of SPIDER and SpiderBoost: it is one transform for all of them.

    Place it first in a chain; whatever follows may be any optimizer. ``update`` needs
    ``params``, the point that ``u_t`` was taken at, and takes no notice of other extra
    arguments.

    Args:
        restart_every: T >= 1; with 1 the transform changes nothing.

    Raises:
        ValueError: ``restart_every`` is less than 1; at the update, no ``params``.
    """
    if restart_every < 1:
        raise ValueError(f"restart_every={restart_every} must be at least 1")

    def update(
        updates: Params,
        state: Diff2State,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, Diff2State]:
        del extra_args
        if params is None:
            raise ValueError("diff2 needs params: the point the update was taken at")
        restart = state.count % restart_every == 0
        state = advance(state, updates, params, restart=restart)
        return state.estimate, state

    # Optax types states as trees of arrays only.
    return optax.GradientTransformationExtraArgs(start, cast(Any, update))


def diff2_query(state: Diff2State, params: Params, *, restart_every: int) -> Diff2Query:
    """Return which gradients the next ``update`` at ``params`` is to be made of."""
    return Diff2Query(
        restart=state.count % restart_every == 0,
        reference=state.prev_params,
        distance=distance(params, state.prev_params),
    )


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
