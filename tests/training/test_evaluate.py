"""The mean of a metric over held-out data."""

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
