import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpjax
from dpjax.losses import classification
from dpjax.models.nnx import array_model
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
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_other_variables_than_parameters_are_named_with_the_fix():
    with pytest.raises(
        ValueError, match=r"keeps drop/rngs/.*, norm/mean, .* use GroupNorm"
    ):
        array_model(Normed, field="image")
