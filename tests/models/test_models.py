"""What every model must do, whatever its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.models.convnet import groupnorm_cnn, tanh_cnn
from dpjax.models.losses import classification
from dpjax.models.mlp import mlp
from dpjax.models.wide_resnet import wide_resnet
from tests.checks import thinned

MODELS = {
    "mlp": (mlp(features=(8, 6), num_classes=5, activation="tanh"), (4, 4, 1)),
    "tanh_cnn": (tanh_cnn(num_classes=5), (16, 16, 1)),
    "groupnorm_cnn": (groupnorm_cnn(num_classes=5), (6, 6, 3)),
    "wide_resnet": (
        wide_resnet(
            depth=10,
            width=1,
            num_classes=5,
            groups=4,
            weight_standardization=True,
            dtype="float32",
        ),
        (6, 6, 3),
    ),
}


def draw_examples(shape, count=3):
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(count, *shape)).astype(np.float32),
        "label": np.arange(count, dtype=np.int32),
    }


def pick(examples, i):
    return jax.tree.map(lambda x: x[i], examples)


def draw_params(model, example):
    """Draw random params: faster than init, and no bias or gain is 0 or 1."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), shapes
    )


@pytest.mark.parametrize("name", MODELS)
def test_init_is_float32_and_depends_on_the_key_alone(name):
    model, shape = MODELS[name]
    examples = draw_examples(shape)
    # The "rbg" generator compiles three times faster than the default one.
    key, other_key = jax.random.key(1, impl="rbg"), jax.random.key(2, impl="rbg")
    init = jax.jit(model.init)
    params = init(key, pick(examples, 0))
    again = init(key, pick(examples, 1))
    moved = init(other_key, pick(examples, 0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, params, again)
    differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, moved)
    is_kernel = jax.tree.map(lambda x: x.ndim > 1, params)
    assert differs == is_kernel


@pytest.mark.parametrize("name", MODELS)
def test_vmap_gives_the_logits_of_each_example_alone(name):
    model, shape = MODELS[name]
    examples = draw_examples(shape)
    key = jax.random.key(0)
    params = draw_params(model, pick(examples, 0))
    apply = jax.jit(model.apply)
    alone = [apply(params, pick(examples, i), key) for i in range(3)]
    assert alone[0].shape == (5,)
    assert alone[0].dtype == jnp.float32
    together = jax.jit(jax.vmap(model.apply, (None, 0, None)))(params, examples, key)
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", thinned([(name,) for name in MODELS], 2))
def test_per_example_gradients_are_finite_and_reach_every_parameter(name):
    model, shape = MODELS[name]
    examples = draw_examples(shape)
    # A black image without biases: every normalisation meets a variance of zero.
    examples["image"][1] = 0.0
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if path[-1].key == "bias" else x,
        draw_params(model, pick(examples, 0)),
    )
    gradient = jax.grad(classification(model))
    gradients = jax.jit(jax.vmap(gradient, (None, 0, None)))(
        params, examples, jax.random.key(0)
    )
    for g in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(g))
        assert np.any(g[0] != 0.0)
