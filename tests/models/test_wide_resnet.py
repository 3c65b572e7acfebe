import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.models.wide_resnet import standardize, wide_resnet

BASE = {
    "depth": 10,
    "width": 1,
    "num_classes": 4,
    "groups": 16,
    "weight_standardization": True,
    "dtype": "float32",
}


def count_params(model, shape=(32, 32, 3)):
    example = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    params = jax.eval_shape(model.init, jax.random.key(0), example)
    return sum(x.size for x in jax.tree.leaves(params))


def formula(depth, width, standardized, num_classes=10):
    """Count kernels, then the vectors: bias (and gain), scale and bias of each norm."""
    per_filter = 2 if standardized else 1

    def conv(size, d, p):
        return size**2 * d * p + per_filter * p

    total, d = conv(3, 3, 16), 16
    for p in (16 * width, 32 * width, 64 * width):
        total += 2 * d + conv(1, d, p)
        for _ in range((depth - 4) // 6):
            total += 2 * d + conv(3, d, p) + 2 * p + conv(3, p, p)
            d = p
    return total + 2 * d + d * num_classes + num_classes


@pytest.mark.parametrize(
    ("depth", "width", "standardized", "expected"),
    [
        (16, 4, True, 2_753_818),
        (16, 4, False, 2_751_562),
        (40, 4, True, 8_961_306),
        (28, 10, True, 36_500_378),
    ],
)
def test_parameters_of_the_papers_networks(depth, width, standardized, expected):
    model = wide_resnet(
        depth=depth,
        width=width,
        num_classes=10,
        groups=16,
        weight_standardization=standardized,
        dtype="float32",
    )
    assert formula(depth, width, standardized) == expected
    assert count_params(model) == expected


def draw_params(model, example):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), shapes
    )


@pytest.mark.parametrize("standardized", [True, False])
def test_only_standardised_kernels_forget_their_scale_and_mean(standardized):
    model = wide_resnet(**BASE | {"weight_standardization": standardized})
    rng = np.random.default_rng(0)
    example = {"image": rng.normal(size=(6, 6, 3)).astype(np.float32)}
    params = draw_params(model, example)

    def change(x):
        if x.ndim != 4:
            return x
        scale, shift = rng.uniform(0.5, 2.0, size=(2, x.shape[-1]))
        return (x * scale + shift).astype(np.float32)

    apply = jax.jit(model.apply)
    before = apply(params, example, jax.random.key(0))
    after = apply(jax.tree.map(change, params), example, jax.random.key(0))
    assert np.allclose(before, after, rtol=1e-3, atol=1e-3) == standardized


def test_standardize_gives_mean_zero_and_sum_of_squares_one():
    kernel = np.random.default_rng(0).normal(1.0, size=(3, 3, 4, 5))
    standard = np.asarray(standardize(jnp.asarray(kernel, jnp.float32)))
    np.testing.assert_allclose(standard.mean((0, 1, 2)), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose((standard**2).sum((0, 1, 2)), np.ones(5), rtol=1e-5)


def test_gradient_at_a_constant_kernel_is_finite():
    kernel = jnp.ones((3, 3, 4, 5))
    slope = jnp.arange(kernel.size, dtype=jnp.float32).reshape(kernel.shape)
    gradient = jax.grad(lambda k: jnp.vdot(standardize(k), slope))(kernel)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0.0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"depth": 18}, r"depth=18 must be 6n \+ 4"),
        ({"depth": 4}, r"depth=4 must be 6n \+ 4"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"groups": 0}, "groups=0 must divide 16"),
        ({"groups": 3}, "groups=3 must divide 16"),
    ],
)
def test_impossible_networks_raise(option, message):
    with pytest.raises(ValueError, match=message):
        wide_resnet(**BASE | option)
