"""The mean of a metric over held-out data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.data.arrays import ArraySource
from dpjax.parallel.sharding import make_layout
from dpjax.training.evaluate import evaluator


@pytest.mark.parametrize("devices", [1, 3])
def test_every_example_counts_once_whatever_the_batches(devices):
    values = np.float32([3, 1, 4, 1, 5, 9, 2, 6, 5, 7])
    layout = make_layout(data=devices, fsdp=1, model=1, rules=[(".*", None)])
    for batch_size in (1, 4, 10, 64):
        evaluate = evaluator(
            lambda params, example: params * example["x"],
            batch_size=batch_size,
            layout=layout,
        )
        assert evaluate(jnp.float32(2), ArraySource({"x": values})) == 8.6


def test_a_device_holds_few_chunks_however_many_there_are():
    alive = []

    class Watched(ArraySource):
        def __getitem__(self, indices):
            alive.append(len(jax.live_arrays()))
            return super().__getitem__(indices)

    layout = make_layout(data=1, fsdp=1, model=1, rules=[(".*", None)])
    evaluate = evaluator(
        lambda params, example: example["x"], batch_size=1, layout=layout
    )
    before = len(jax.live_arrays())
    assert evaluate((), Watched({"x": np.ones(200, np.float32)})) == 1.0
    assert max(alive) - before < 40
