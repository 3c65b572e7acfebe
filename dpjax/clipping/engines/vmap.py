"""The reference engine: per-example gradients by jit(vmap(grad)), then clip and sum."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.clipping.analysis.tracing import check_loss
from dpjax.clipping.arithmetic.factors import centred_count, clip_factors
from dpjax.clipping.arithmetic.rounding import apart, row_norms
from dpjax.clipping.execution.isolation import isolated
from dpjax.clipping.execution.keys import example_keys
from dpjax.clipping.execution.statistics import per_example
from dpjax.clipping.query import Query, Slope
from dpjax.privacy.sensitive import ClippedSum, PerExample, accumulation_dtype
from dpjax.typing import Batch, Example, Key, Loss, Params


def vmap(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum of materialised per-example gradients, or slopes.

    Memory: one float32 copy of the parameters for each example (twice that while a
    difference or a residual is formed); see ``microbatched``. Slopes of
    losses take two forward passes, one after the other, and one number of each example.

    Sensitivity: ``query.clip_norm`` under add/remove-one.

    Args:
        loss: Loss of one example.
        query: Points, signs, clip norm and style.
        batch: B examples; masked rows contribute nothing.
        key: Randomness of the loss; see ``dpjax.clipping.execution.keys``.

    Raises:
        TypeError: The loss is not a scalar float, or a parameter is not floating.
    """
    check_loss(loss, query.points[0], batch, key)
    keys = example_keys(key, batch)
    mask = jnp.asarray(batch.mask)
    if query.slope is None:
        vector = _signed_gradient(loss, query)
        losses, vectors = jax.vmap(isolated(vector))(batch.examples, keys)
    else:
        (point,) = query.points
        losses, vectors = _slopes(loss, point, query.slope, batch, keys)

    leaves, treedef = jax.tree.flatten(vectors)
    norms = apart(lambda rows: [row_norms(row) for row in rows], leaves)
    factors = clip_factors(
        treedef.unflatten([norm.squares for norm in norms]),
        slack=treedef.unflatten([norm.slack for norm in norms]),
        mask=mask,
        clip_norm=query.clip_norm,
        style=query.style,
        outer_norm=query.outer_norm,
    )
    keep = mask & factors.finite
    weights = [factors.leaves, *([factors.rest] if query.residual else [])]
    total, *rest = apart(_weighted_sums, (weights, keep, vectors))
    count = None
    if query.count:
        count = centred_count(factors.norms, mask=mask, clip_norm=query.clip_norm)
    clipped = dataclasses.replace(
        query.empty(),
        total=total,
        residual=rest[0] if rest else None,
        count=count,
    )
    return clipped, per_example(losses, factors.norms, factors.finite, mask)


def _slopes(
    loss: Loss, point: Params, slope: Slope, batch: Batch, keys: Key
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Return the mean of both losses, and the slope, of each example."""

    def losses_at(offset: Array) -> Array:
        moved = jax.tree.map(
            lambda p, u: (p + offset * u).astype(p.dtype), point, slope.direction
        )
        # Both points share examples and keys: same augmentation, same dropout.
        rows = jax.vmap(isolated(loss), in_axes=(None, 0, 0))
        return _accumulated(rows(moved, batch.examples, keys))

    # In turn, so that only one moved copy of the parameters is in memory.
    ahead, behind = jax.lax.map(losses_at, jnp.array([slope.span, -slope.span]))
    mean, rise = (ahead + behind) / 2, ahead - behind
    return mean, (rise / (2 * slope.span)).astype(jnp.float32)


def _signed_gradient(
    loss: Loss, query: Query
) -> Callable[[Example, Key], tuple[Array, Params]]:
    def float32_loss(params: Params, example: Example, key: Key) -> Array:
        return _accumulated(loss(params, example, key))

    def vector(example: Example, key: Key) -> tuple[Array, Params]:
        # The points share the example and its key: same augmentation, same dropout.
        results = [
            jax.value_and_grad(float32_loss)(point, example, key)
            for point in query.points
        ]
        gradients = [jax.tree.map(_accumulated, gradient) for _, gradient in results]
        total = jax.tree.map(
            lambda *leaves: sum(
                leaf if sign == 1 else sign * leaf
                for sign, leaf in zip(query.signs, leaves, strict=True)
            ),
            *gradients,
        )
        return results[0][0], total

    return vector


def _accumulated(leaf: Array) -> Array:
    return leaf.astype(accumulation_dtype(leaf.dtype))


def _rows(vector: Array, like: Array) -> Array:
    return vector.reshape(vector.shape + (1,) * (like.ndim - 1))


def _weighted_sums(operands: tuple[list[Params], Array, Params]) -> list[Params]:
    weights, keep, vectors = operands
    vectors = jax.tree.map(lambda v: jnp.where(_rows(keep, v), v, 0.0), vectors)
    return [jax.tree.map(_weighted_sum, some, vectors) for some in weights]


def _weighted_sum(weights: Array, leaf: Array) -> Array:
    # The default precision of some accelerators (TF32, bfloat16) would let a clipped
    # gradient exceed its bound.
    return jnp.tensordot(weights, leaf, axes=1, precision=jax.lax.Precision.HIGHEST)
