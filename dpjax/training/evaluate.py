"""Average a metric over held-out data."""

import collections
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpjax.checks import check_positive_int
from dpjax.data.batches import read_steps
from dpjax.parallel.sharding import Layout
from dpjax.typing import Batch, Example, Params, Source

_AHEAD = 4
"""Chunks that a device may hold while it works on one."""

Metric = Callable[[Params, Example], Array]
Evaluate = Callable[[Params, Source], float]


def evaluator(metric: Metric, *, batch_size: int, layout: Layout) -> Evaluate:
    """Return ``(params, source) -> mean of metric over all of source``, compiled once.

    The mean is exact and carries no noise: evaluated on private data it is itself a
    private statistic.

    Args:
        metric: ``(params, example) -> scalar`` of one example.
        batch_size: Examples at once; memory only, the mean does not depend on it.
        layout: The devices that share the work. All processes of a run must evaluate.

    Raises:
        ValueError: ``batch_size`` is no positive integer.
    """
    check_positive_int("batch_size", batch_size)
    padded_size = math.ceil(batch_size / layout.row_parts) * layout.row_parts

    metric = layout.gathering(metric)

    def part(params: Params, batch: Batch) -> Array:
        values = jax.vmap(metric, in_axes=(None, 0))(params, batch.examples)
        return jnp.sum(jnp.where(batch.mask, values, 0.0))[None]

    @functools.partial(jax.jit, out_shardings=layout.whole)
    def total(params: Params, batch: Batch) -> Array:
        return jnp.sum(layout.on_each(part)(params, batch))

    def evaluate(params: Params, source: Source) -> float:
        size = len(source)

        def draw(part: int) -> np.ndarray:
            return np.arange(part * batch_size, min((part + 1) * batch_size, size))

        parts = range(math.ceil(size / batch_size))
        stream = read_steps(
            source,
            draw,
            steps=parts,
            physical_batch_size=padded_size,
            rows=layout.rows(padded_size),
        )
        summed, pending = 0.0, collections.deque[Array]()
        for batch in stream:
            for chunk in batch.chunks:
                pending.append(total(params, layout.place(chunk, padded_size)))
                # Or all of the source would wait on a device that is slower than the disk.
                if len(pending) > _AHEAD:
                    summed += float(pending.popleft())
        return (summed + sum(map(float, pending))) / size

    return evaluate
