"""Average a metric over held-out data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpjax.data.arrays import slices
from dpjax.data.batches import pad_batch
from dpjax.typing import Batch, Example, Params, Source

Metric = Callable[[Params, Example], Array]
Evaluate = Callable[[Params, Source], float]


def evaluator(metric: Metric, *, batch_size: int) -> Evaluate:
    """Return ``(params, source) -> mean of metric over all of source``, compiled once.

    The mean is exact and carries no noise: evaluated on private data it is itself a
    private statistic.

    Args:
        metric: ``(params, example) -> scalar`` of one example.
        batch_size: Examples at once; memory only, the mean does not depend on it.
    """

    @jax.jit
    def total(params: Params, batch: Batch) -> Array:
        values = jax.vmap(metric, in_axes=(None, 0))(params, batch.examples)
        return jnp.sum(jnp.where(batch.mask, values, 0.0))

    def evaluate(params: Params, source: Source) -> float:
        totals = [
            total(params, pad_batch(source, indices, size=batch_size))
            for indices in slices(len(source), batch_size)
        ]
        return float(sum(float(part) for part in totals) / len(source))

    return evaluate
