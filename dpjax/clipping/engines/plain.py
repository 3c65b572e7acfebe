"""The non-private engine: one ordinary gradient, no per-example work."""

import dataclasses

import jax
import jax.numpy as jnp

from dpjax.clipping.analysis.tracing import check_loss
from dpjax.clipping.execution.keys import example_keys
from dpjax.clipping.execution.statistics import per_example
from dpjax.clipping.query import Query
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss, Params


def plain(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the unclipped gradient sum by one backward pass over the whole batch.

    This is the speed of training without privacy: the norm of no example is known (they
    are reported as NaN), and an example that is not finite spoils the sum, as it does in
    ordinary training. The sum is marked as unbounded, so no private mechanism releases
    it.

    Raises:
        TypeError: See ``vmap``.
        ValueError: The query asks for anything but one point, unclipped.
    """
    one = len(query.points) == 1 and query.slope is None
    extra = query.residual or query.count
    if not one or extra or query.style != "flat":
        raise ValueError(
            f"the plain engine answers one flat query point without residual, count or "
            f"slope, not {len(query.points)} points, style={query.style!r}, "
            f"residual={query.residual}, count={query.count}, "
            f"slope={query.slope is not None}"
        )
    check_loss(loss, query.points[0], batch, key)
    keys = example_keys(key, batch)

    mask = jnp.asarray(batch.mask)

    def summed(params: Params) -> tuple[jax.Array, jax.Array]:
        losses = jax.vmap(loss, in_axes=(None, 0, 0))(params, batch.examples, keys)
        losses = jnp.where(mask, losses.astype(jnp.float32), 0.0)
        return losses.sum(), losses

    gradient, losses = jax.grad(summed, has_aux=True)(query.points[0])
    empty = ClippedSum.zeros(query.points[0], l2_bound=jnp.inf, phase=query.phase)
    total = jax.tree.map(lambda z, g: g.astype(z.dtype), empty.total, gradient)
    unclipped = dataclasses.replace(empty, total=total)
    unknown = jnp.full_like(losses, jnp.nan)
    return unclipped, per_example(losses, unknown, mask, mask)
