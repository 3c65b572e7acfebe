"""Any engine, in slices: bounds memory, changes nothing else."""

import jax
import jax.numpy as jnp

from dpjax.checks import check_positive_int
from dpjax.clipping.query import Query
from dpjax.clipping.types import Engine
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def microbatched(engine: Engine, *, size: int) -> Engine:
    """Return ``engine`` run on slices of ``size`` examples, accumulated locally.

    Each example is clipped alone, so the sum and its sensitivity are the engine's own.

    Args:
        engine: Any engine.
        size: Examples at once; must divide the batch.

    Raises:
        ValueError: ``size`` is below 1 or, at trace time, does not divide the batch.
    """
    check_positive_int("microbatch_size", size)

    def run(
        loss: Loss, query: Query, batch: Batch, key: Key
    ) -> tuple[ClippedSum, PerExample]:
        examples = batch.mask.shape[0]
        if examples % size:
            raise ValueError(
                f"microbatch_size={size} does not divide the batch of {examples}; "
                "choose a divisor"
            )

        def body(total: ClippedSum, part: Batch) -> tuple[ClippedSum, PerExample]:
            clipped, statistics = engine(loss, query, part, key)
            return total.merge(clipped), statistics

        # Slices take every n-th example: with the batch sharded on its leading axis, a
        # contiguous reshape would gather it.
        lead = (size, examples // size)
        slices = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(*lead, *x.shape[1:]), 0, 1), batch
        )
        total, statistics = jax.lax.scan(body, query.empty(), slices)
        restored = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).ravel(), statistics)
        return total, restored

    return run
