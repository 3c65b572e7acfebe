import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.models.mlp import mlp, regression_mlp


def test_parameters_are_dense_layers_from_the_flat_image():
    model = mlp(features=(20, 10), num_classes=3, activation="relu")
    example = {"image": jax.ShapeDtypeStruct((8, 7, 2), jnp.float32)}
    params = jax.eval_shape(model.init, jax.random.key(0), example)
    assert jax.tree.map(lambda x: x.shape, params) == {
        "dense_0": {"kernel": (8 * 7 * 2, 20), "bias": (20,)},
        "dense_1": {"kernel": (20, 10), "bias": (10,)},
        "head": {"kernel": (10, 3), "bias": (3,)},
    }


def test_no_hidden_layer_is_logistic_regression():
    model = mlp(features=(), num_classes=3, activation="relu")
    example = {"image": jax.ShapeDtypeStruct((8, 7, 2), jnp.float32)}
    assert set(jax.eval_shape(model.init, jax.random.key(0), example)) == {"head"}


def test_unknown_activation_raises():
    with pytest.raises(
        ValueError, match=r"activation='gelu'.*'relu', 'softplus', 'tanh'"
    ):
        mlp(features=(4,), num_classes=2, activation="gelu")
    with pytest.raises(ValueError, match=r"activation='gelu' is unknown"):
        regression_mlp(features=(4,), activation="gelu")


def test_regression_is_one_number_of_a_vector():
    model = regression_mlp(features=(3,), activation="softplus")
    x = np.array([1.0, -2.0], np.float32)
    params = model.init(jax.random.key(0), {"x": x})
    found = model.apply(params, {"x": x}, jax.random.key(0))
    hidden = np.log1p(np.exp(x @ params["dense_0"]["kernel"]))  # biases start at zero
    np.testing.assert_allclose(found, (hidden @ params["head"]["kernel"])[0], rtol=1e-5)
    assert found.shape == ()
