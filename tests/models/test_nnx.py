import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpjax
from dpjax.models.losses import classification
from dpjax.models.nnx import array_model
from dpjax.models.partition import flatten
from tests.checks import assert_close

KEY = jax.random.key(3)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        sizes = [(64, 8), (8, 3)]
        self.layers = nnx.List([nnx.Linear(*size, rngs=rngs) for size in sizes])

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images))).reshape(len(images), -1)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(6, 4, 4, 1)).astype(np.float32)


def test_parameters_have_the_names_of_their_paths_and_outputs_are_the_modules(images):
    model, module = array_model(Net, field="image"), Net(nnx.Rngs(KEY))
    params = jax.jit(model.init)(KEY, {"image": images[0]})
    assert jax.tree.map(np.shape, params) == {
        "conv": {"kernel": (3, 3, 1, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "layers": {
            "0": {"kernel": (64, 8), "bias": (8,)},
            "1": {"kernel": (8, 3), "bias": (3,)},
        },
    }
    np.testing.assert_array_equal(params["conv"]["kernel"], module.conv.kernel[...])
    outputs = jax.vmap(model.apply, in_axes=(None, 0, None))(
        params, {"image": images}, KEY
    )
    np.testing.assert_allclose(outputs, module(images), atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.1, params)
    assert not np.allclose(model.apply(moved, {"image": images[0]}, KEY), outputs[0])


@pytest.mark.parametrize("engine", ["bookkeeping", "ghost"])
def test_every_parameter_is_found_by_the_fast_engines(images, engine):
    model = array_model(Net, field="image")
    batch = {"image": images, "label": np.arange(6) % 3}
    params = model.init(KEY, {"image": images[0]})

    def sums(engine):
        grad = dpjax.clipped_grad(classification(model), clip_norm=0.1, engine=engine)
        clipped, _ = jax.jit(grad)(params, batch, KEY)
        return clipped.total

    found = sums(engine)
    assert_close(found, sums("vmap"), rtol=1e-5, scale=float(optax.tree.norm(found)))
    assert min(float(optax.tree.norm(x)) for x in jax.tree.leaves(found)) > 0


class Normed(nnx.Module):
    """BatchNorm of statistics that are no constants of the module, and dropout."""

    def __init__(self, rngs, *, frozen):
        self.norm = nnx.BatchNorm(4, use_running_average=frozen, rngs=rngs)
        self.norm.mean[...] = jnp.arange(4.0)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(x))


ROW = {"x": np.full(4, 3.0, np.float32)}


def test_dropout_is_drawn_from_the_key_and_left_out_in_evaluation():
    model = array_model(functools.partial(Normed, frozen=True), field="x")
    params = model.init(KEY, ROW)
    assert flatten(params).keys() == {"norm/scale", "norm/bias"}
    apply, evaluate = jax.jit(model.apply), jax.jit(model.evaluating().apply)
    wanted = (3 - np.arange(4.0)) / np.sqrt(1 + 1e-5)
    draws = [apply(params, ROW, jax.random.key(i)) for i in range(20)]
    for draw in draws:
        np.testing.assert_allclose(draw, np.where(draw == 0, 0, 2 * wanted), rtol=1e-5)
    assert len({tuple(draw.tolist()) for draw in draws}) > 3
    np.testing.assert_array_equal(apply(params, ROW, jax.random.key(0)), draws[0])
    for i in range(3):
        found = evaluate(params, ROW, jax.random.key(i))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_module_that_changes_its_statistics_is_refused_with_the_fix():
    model = array_model(functools.partial(Normed, frozen=False), field="x")
    params = model.init(KEY, ROW)
    message = (
        r"changes norm/mean, norm/var: .* GroupNorm or .* use_running_average=True"
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(model.apply)(params, ROW, KEY)
