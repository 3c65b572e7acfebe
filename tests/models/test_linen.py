import jax
import numpy as np
import pytest
from flax import linen as nn

from dpjax.models.linen import image_model


def test_group_norm_uses_all_positions_of_its_group():
    model = image_model(nn.GroupNorm(num_groups=2, epsilon=1e-6))
    image = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    params = model.init(jax.random.key(0), {"image": image})
    normal = model.apply(params, {"image": image}, jax.random.key(0))
    halves = np.split(image, 2, axis=-1)
    expected = [(half - half.mean()) / half.std() for half in halves]
    np.testing.assert_allclose(
        normal, np.concatenate(expected, axis=-1), rtol=1e-4, atol=1e-5
    )


def test_params_are_the_bare_dict_and_other_inputs_are_ignored():
    model = image_model(nn.Dense(2))
    example = {"image": np.ones((2, 2, 3), np.float32), "label": np.int32(0)}
    params = model.init(jax.random.key(0), example)
    assert jax.tree.map(np.shape, params) == {"kernel": (3, 2), "bias": (2,)}
    assert model.apply(params, example, jax.random.key(0)).shape == (2, 2, 2)


class _BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


def test_a_module_that_keeps_statistics_of_batches_is_refused_with_the_fix():
    model = image_model(_BatchNormed())
    with pytest.raises(ValueError, match=r"keeps batch_stats .* use GroupNorm"):
        model.init(jax.random.key(0), {"image": np.ones((2, 2, 3), np.float32)})
