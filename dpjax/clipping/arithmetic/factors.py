"""From per-example squared norms to clip factors: shared by every engine."""

import math
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from dpjax.checks import MIN_CLIP_NORM, ClipStyle
from dpjax.typing import Scalar

AUTOMATIC_GAMMA = 0.01  # "stability constant" of AUTO-S, arXiv 2206.07136, section 3.3


class Factors(NamedTuple):
    """How much of each example to keep.

    Attributes:
        leaves: ``[B]`` for each leaf of the gradient; 0 where masked or not finite.
        rest: Likewise, how much of each example goes to the residual.
        norms: ``[B]``, the norm over all leaves, as computed (perhaps inf or NaN).
        finite: ``bool[B]``. A zero factor does not silence ``0 * inf``: engines must
            also replace the vectors of examples that are not finite by zeros.
    """

    leaves: PyTree[Float[Array, "B"]]
    rest: PyTree[Float[Array, "B"]]
    norms: Float[Array, "B"]
    finite: Bool[Array, "B"]


def clip_factors(
    squares: PyTree[Float[Array, "B"]],
    *,
    slack: PyTree[Float[Array, "B"]] | None = None,
    mask: Bool[Array, "B"],
    clip_norm: float | Scalar,
    style: ClipStyle,
    outer_norm: float | Scalar = math.inf,
) -> Factors:
    """Return the factors that clip each example to ``clip_norm``.

    Sensitivity: the vector scaled by these factors has L2 norm at most ``clip_norm``; a
    margin of 8 machine epsilons (1e-6 in float32), and of one for each leaf, keeps what
    is rounded here, and where factors are applied, inside the bound.

    Args:
        squares: Squared L2 norm of each example's vector, ``[B]`` for each leaf.
        slack: How far above ``squares`` the truth may be, likewise; None for exact ones.
            Examples are clipped as if their squared norms were ``squares + slack``.
        mask: False rows get factor 0.
        clip_norm: C >= 0.
        style: See ``Query``.
        outer_norm: Likewise.
    """
    norms = jnp.sqrt(sum(jax.tree.leaves(squares)))
    if slack is not None:
        squares = jax.tree.map(jnp.add, squares, slack)
    total = jnp.sqrt(sum(jax.tree.leaves(squares)))
    finite = jnp.isfinite(total)
    keep = mask & finite
    leaves = len(jax.tree.leaves(squares))
    margin = 1 - (8 + leaves) * jnp.finfo(total.dtype).eps
    outer = jnp.asarray(outer_norm, total.dtype) * margin
    outer = jnp.where(keep, jnp.where(total > outer, outer / total, 1.0), 0.0)

    def factor(norms: Array, bound: Array) -> Array:
        norms, bound = norms * outer, bound * margin
        if style == "automatic":
            raw = bound / (norms + AUTOMATIC_GAMMA)
        else:
            raw = jnp.where(norms > bound, bound / norms, 1.0)
            # Squares of such small entries underflow: the norm cannot be trusted. A tenth
            # leaves room for the margin above and for a clip norm shared among layers.
            raw = jnp.where(bound < MIN_CLIP_NORM / 10, 0.0, raw)
        return jnp.where(keep, raw * outer, 0.0)

    bound = jnp.asarray(clip_norm, total.dtype)
    if style == "per_layer":
        layers = _layer_norms(squares)
        bound = bound / jnp.sqrt(jnp.asarray(len(layers), total.dtype))
        by_layer = {name: factor(norms, bound) for name, norms in layers.items()}
        weights = jax.tree_util.tree_map_with_path(
            lambda path, _: by_layer[path[:-1]], squares
        )
    else:
        shared = factor(total, bound)
        weights = jax.tree.map(lambda _: shared, squares)
    rest = jax.tree.map(lambda leaf: outer - leaf, weights)
    return Factors(weights, rest, norms, finite)


def centred_count(
    norms: Float[Array, "B"], *, mask: Bool[Array, "B"], clip_norm: float | Scalar
) -> Scalar:
    """Return the sum of 1/2 for each norm of at most ``clip_norm``, -1/2 for each other.

    Sensitivity: 1/2 under add/remove-one. A norm that is not finite is not within.

    Args:
        norms: Of each example's vector, before any clipping.
        mask: False rows count as nothing.
        clip_norm: C.
    """
    halves = jnp.where(norms <= clip_norm, 0.5, -0.5)
    return jnp.sum(jnp.where(mask, halves, 0.0), dtype=jnp.float32)


def _layer_norms(squares: PyTree[Array]) -> dict[Hashable, Array]:
    sums: dict[Hashable, Array] = {}
    for path, square in jax.tree_util.tree_leaves_with_path(squares):
        sums[path[:-1]] = sums.get(path[:-1], 0.0) + square
    return {name: jnp.sqrt(square) for name, square in sums.items()}
