"""Error feedback as a pure function: what clipping cuts off is given back in later steps.

DiceSGD (Zhang et al. 2024, arXiv 2311.14632, Algorithm 2), on the scale of sums:

    v = sum_i clip(g_i, C1) + clip(e, C2)
    e' = e + sum_i g_i - v

Noise is added to v afterwards and is no part of e'. No public implementation we found
updates e like this; the authors' own keeps ``min(a, 1 - a) e`` of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpjax.checks import ClipStyle
from dpjax.clipping.arithmetic.factors import clip_factors
from dpjax.clipping.arithmetic.rounding import row_norms
from dpjax.privacy.sensitive import accumulation_dtype
from dpjax.typing import Params, Scalar


class ErrorFeedbackState(NamedTuple):
    """State of error feedback. Private: the memory carries no noise.

    Attributes:
        memory: e, like params, at least float32, on the scale of sums.
    """

    memory: Params

    def __repr__(self) -> str:
        return "ErrorFeedbackState(private: an un-noised memory of gradients)"


def init_memory(params: Params) -> ErrorFeedbackState:
    """Return the empty memory."""

    def empty(leaf: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype))

    return ErrorFeedbackState(jax.tree.map(empty, params))


def feed_back(
    total: Params,
    residual: Params,
    state: ErrorFeedbackState,
    *,
    error_clip_norm: float | None,
    unit: float,
    style: ClipStyle,
) -> tuple[Params, ErrorFeedbackState]:
    """Return ``v`` and the next state: one exact step of DiceSGD, before any noise.

    Sensitivity: whatever the memory holds, ``clip(e)`` is at most ``unit *
    error_clip_norm`` long, so two memories move v by at most twice that.

    Args:
        total: ``sum_i clip(g_i, C1)``.
        residual: ``sum_i g_i - clip(g_i, C1)``, like ``total``.
        state: Holds e.
        error_clip_norm: C2; None gives back the whole memory at once.
        unit: What 1 on the scale of C2 is on the scale of sums: 1 if C2 bounds a sum, the
            divisor if it bounds a mean.
        style: How e is clipped; see ``dpjax.clipping.Query``. "automatic" is the variant
            without a threshold, of which 0.01 is added to the norm on the scale of C2.
    """
    given_back = state.memory
    if error_clip_norm is not None:
        given_back = _clipped(given_back, error_clip_norm, unit=unit, style=style)
    vector = jax.tree.map(jnp.add, total, given_back)
    # The same as e + sum_i g_i - v, but without its cancellations.
    memory = jax.tree.map(
        lambda e, g, r: ((e - g) + r).astype(e.dtype),
        state.memory,
        given_back,
        residual,
    )
    return vector, ErrorFeedbackState(memory)


def memory_norm(state: ErrorFeedbackState) -> Scalar:
    """Return the L2 norm of e, on the scale of sums. Private."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(state.memory)]
    return jnp.sqrt(sum(squares))


def _clipped(
    memory: Params, clip_norm: float, *, unit: float, style: ClipStyle
) -> Params:
    scaled = jax.tree.map(lambda e: e / unit, memory)
    leaves, treedef = jax.tree.flatten(scaled)
    norms = [row_norms(leaf[None]) for leaf in leaves]
    factors = clip_factors(
        treedef.unflatten([norm.squares for norm in norms]),
        slack=treedef.unflatten([norm.slack for norm in norms]),
        mask=jnp.ones(1, bool),
        clip_norm=clip_norm,
        style=style,
    )
    # A memory so large that its square overflows gets the factor 0, and gives back nothing.
    return jax.tree.map(lambda e, f: e * f[0], memory, factors.leaves)
