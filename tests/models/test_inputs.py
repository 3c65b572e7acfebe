import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.models.inputs import resized, standardized
from dpjax.typing import Model

SEEN = Model(
    init=lambda key, example: example["image"],
    apply=lambda params, example, key: example["image"] * params,
)


def test_each_channel_is_standardized_before_the_model():
    model = standardized(SEEN, mean=(0.5, 0.25), std=(0.1, 0.5))
    example = {"image": jnp.full((2, 2, 2), 0.75), "label": 3}
    image = model.apply(jnp.float32(2.0), example, jax.random.key(0))
    np.testing.assert_allclose(image[..., 0], 5.0, rtol=1e-6)
    np.testing.assert_allclose(image[..., 1], 2.0, rtol=1e-6)
    np.testing.assert_allclose(model.init(jax.random.key(0), example), image / 2)


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        standardized(SEEN, mean=(0.0,), std=(0.0,))


def test_images_are_resized_before_the_model():
    model = resized(SEEN, size=4)
    example = {"image": np.arange(4.0, dtype=np.float32).reshape(2, 2, 1), "label": 3}
    image = model.apply(jnp.float32(1.0), example, jax.random.key(0))
    # Half-pixel centres: a quarter of the way, and no further than the borders.
    np.testing.assert_allclose(image[0, :, 0], [0, 0.25, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(image[:, 0, 0], [0, 0.5, 1.5, 2], atol=1e-6)
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        resized(SEEN, size=0)
