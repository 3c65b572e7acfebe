"""Optax transforms: where sensitive sums become plain updates."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from dpjax.fingerprint import combined_fingerprint
from dpjax.mechanisms import Mechanism
from dpjax.sensitive import ClippedSum
from dpjax.typing import Key, Params, Scalar


class PrivateState(NamedTuple):
    """State of ``private``. Secret: it holds the noise key.

    Attributes:
        step: ``int32``, releases made; the only step counter there is.
        noise_key: Root noise key, ``key[2]``.
        released: ``uint32`` fingerprint of the last release; see ``dpjax.ledger``.
        mechanism: The mechanism's own state.
        optimizer: The optimizer's state.
    """

    step: Scalar
    noise_key: Key
    released: Scalar
    mechanism: Any
    optimizer: optax.OptState

    def __repr__(self) -> str:
        return "PrivateState(secret: holds the noise key)"


def private(
    mechanism: Mechanism, optimizer: optax.GradientTransformation, *, noise_key: Key
) -> optax.GradientTransformationExtraArgs:
    """Bind a mechanism and any optimizer into one transform of clipped sums.

    ``update`` takes the ``ClippedSum`` of the step, adds the noise of the step, divides by
    the expected batch size and hands the result, which is safe, to ``optimizer``. Past
    ``mechanism.steps`` the updates are NaN: what is not accounted is not released.

    Args:
        mechanism: What is released, and what it costs.
        optimizer: Any optax transform of mean gradients.
        noise_key: ``dpjax.noise.root_key()``. Kept in the state and not in the program, so
            that it reaches no compilation cache; ``init`` refuses to be traced.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> PrivateState:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
            raise TypeError(
                "private(...).init must not be traced by jit: the noise key would become "
                "a constant of the program; call it outside"
            )
        return PrivateState(
            step=jnp.zeros((), jnp.int32),
            noise_key=noise_key,
            released=jnp.zeros((), jnp.uint32),
            mechanism=mechanism.init(params),
            optimizer=inner.init(params),
        )

    def update(
        updates: ClippedSum,
        state: PrivateState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, PrivateState]:
        if not isinstance(updates, ClippedSum):
            raise TypeError(
                f"private() releases a ClippedSum, not {type(updates).__name__}; "
                "place it first in the chain, right after dpjax.clipped_grad"
            )
        mean, mechanism_state = mechanism.release(
            updates,
            state.mechanism,
            params,
            key=state.noise_key,
            step=state.step,
        )
        planned = state.step < mechanism.steps
        mean = jax.tree.map(lambda x: jnp.where(planned, x, jnp.nan), mean)
        out, optimizer_state = inner.update(mean, state.optimizer, params, **extra_args)
        return out, PrivateState(
            step=state.step + 1,
            noise_key=state.noise_key,
            released=combined_fingerprint(mean),
            mechanism=mechanism_state,
            optimizer=optimizer_state,
        )

    # Optax types updates as trees of arrays; a ClippedSum is made to be none.
    return optax.GradientTransformationExtraArgs(init, cast(Any, update))
