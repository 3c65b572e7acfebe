"""Optax transforms: where sensitive sums become plain updates."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from dpjax.checks import (
    ClipStyle,
    ErrorScale,
    check_error_clip,
    check_mechanism,
    check_number,
    check_positive_int,
    check_style,
)
from dpjax.mechanisms import Mechanism
from dpjax.mechanisms.mathematics.differences import (
    Diff2State,
    advance,
    distance,
    start,
)
from dpjax.mechanisms.mathematics.feedback import (
    ErrorFeedbackState,
    feed_back,
    init_memory,
)
from dpjax.optimizers import owning
from dpjax.privacy.fingerprint import combined_fingerprint
from dpjax.privacy.noise import check_root_key
from dpjax.privacy.sensitive import ClippedSum
from dpjax.typing import Key, Params, Scalar


class PrivateState(NamedTuple):
    """State of ``private``. Secret: it holds the noise key.

    Attributes:
        step: ``int32``, releases made; the only step counter there is.
        noise_key: Root noise key, ``key[2]``.
        released: ``uint32`` fingerprint of the last release; see ``dpjax.training.ledger``.
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
        noise_key: ``dpjax.privacy.noise.root_key()``. Kept in the state and not in the
            program, so that it reaches no compilation cache; ``init`` refuses to be traced.

    Raises:
        ValueError: ``mechanism`` is none, ``noise_key`` another key, or none, or
            ``optimizer`` no transform.
    """
    check_root_key("noise_key", noise_key)
    check_mechanism(mechanism)
    inner = owning(optimizer)

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
                "place it first in the chain, right after dpjax.clipped_grad, and hand it the "
                "sum as it is"
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


def error_feedback(
    *,
    error_clip_norm: float | None,
    error_scale: ErrorScale,
    divisor: float,
    style: ClipStyle = "flat",
) -> optax.GradientTransformationExtraArgs:
    """Give back in later steps what clipping cut off: DiceSGD, before its noise.

    ``update`` takes ``sum_i clip(g_i, C1)`` as a plain tree and, as an extra argument,
    either ``residual = sum_i g_i - clip(g_i, C1)`` or ``unclipped = sum_i g_i``. It returns
    ``(sum_i clip(g_i, C1) + clip(e, C2)) / divisor`` and updates e as
    ``dpjax.mechanisms.mathematics.feedback`` says (Zhang et al. 2024, arXiv 2311.14632,
    Algorithm 2; followed by ``optax.adam``, the order of its Algorithm 3). With
    ``style="automatic"``, and gradients clipped in that style, it is Algorithm 4 as we read
    it.

    Sums of clipped gradients are private, and no noise is added here: to train with
    privacy use ``private(DiceSgd(...), optimizer)``, which calls the same function.

    Args:
        error_clip_norm: C2; None gives back the whole memory at once.
        error_scale: Whether C2 bounds the memory of sums ("sum") or that of means ("mean").
        divisor: What turns sums into means, such as the expected batch size.
        style: How the memory is clipped; see ``dpjax.clipping.Query``.

    Raises:
        ValueError: ``error_clip_norm`` or ``divisor`` is not positive and finite, or the
            scale is unknown.
        TypeError: At the update: not exactly one of ``residual`` and ``unclipped``.

    Example:
        >>> import dpjax, jax.numpy as jnp
        >>> feedback = dpjax.error_feedback(
        ...     error_clip_norm=1.0, error_scale="sum", divisor=2.0)
        >>> state = feedback.init(jnp.zeros(()))
        >>> total, unclipped = jnp.float32(2.0), jnp.float32(5.0)
        >>> for _ in range(3):
        ...     mean, state = feedback.update(total, state, unclipped=unclipped)
        >>> round(float(mean), 4), round(float(state.memory), 4)
        (1.5, 7.0)
    """
    check_error_clip(error_clip_norm=error_clip_norm, error_scale=error_scale)
    check_number("divisor", divisor)
    check_style("style", style)
    if not 0 < divisor < float("inf"):
        raise ValueError(f"divisor={divisor} must be positive and finite")

    def update(
        updates: Params,
        state: ErrorFeedbackState,
        params: Params | None = None,
        *,
        residual: Params | None = None,
        unclipped: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, ErrorFeedbackState]:
        del params, extra_args
        if (residual is None) == (unclipped is None):
            raise TypeError(
                "error_feedback needs one extra argument, residual= (what clipping cut off) "
                "or unclipped= (the sum of gradients as they are)"
            )
        if residual is None:
            residual = jax.tree.map(jnp.subtract, unclipped, updates)
        vector, state = feed_back(
            updates,
            residual,
            state,
            error_clip_norm=error_clip_norm,
            unit=1.0 if error_scale == "sum" else divisor,
            style=style,
        )
        return jax.tree.map(lambda v: v / divisor, vector), state

    # Optax's type of an update knows no named extra arguments.
    return optax.GradientTransformationExtraArgs(init_memory, cast(Any, update))


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
    check_positive_int("restart_every", restart_every)

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
