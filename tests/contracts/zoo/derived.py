"""Weights that are computed from parameters before they meet data."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import (
    case,
    dense,
    derived,
    elementwise,
    fallback,
    frozen,
    score,
    tied,
    x,
)


@case({"w": derived(3, 4), "g": derived(4)}, {"x": x(5, 3)})
def weight_norm(p, e, key):
    size = jnp.sqrt(jnp.sum(jnp.square(p["w"]), axis=0, keepdims=True))
    return score(e["x"] @ (p["w"] / size * p["g"][None]))


@case({"w": derived(6, 4)}, {"x": x(5, 6)})
def standardised_dense(p, e, key):
    centred = p["w"] - jnp.mean(p["w"], axis=0, keepdims=True)
    return score(
        e["x"] @ (centred * jax.lax.rsqrt(jnp.var(p["w"], axis=0, keepdims=True)))
    )


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def spectral_norm_with_a_frozen_vector(p, e, key):
    u = jax.lax.stop_gradient(jnp.sin(p["w"]) @ jnp.ones(4))
    return score(e["x"] @ (p["w"] / jnp.sqrt(jnp.sum(jnp.square(u @ p["w"])) + 1)))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_through_softplus(p, e, key):
    return score(e["x"] @ jax.nn.softplus(p["w"]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_clipped(p, e, key):
    return score(e["x"] @ jnp.clip(p["w"], -0.4, 0.4))


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def weight_scaled_by_a_constant(p, e, key):
    return score(e["x"] @ (p["w"] / np.sqrt(3)))


@case({"w": derived(5, 5)}, {"x": x(5, 3)})
def weight_causally_masked(p, e, key):
    return score(jnp.tril(p["w"]) @ e["x"])


@case({"w": derived(3, 3)}, {"x": x(5, 3)})
def weight_made_symmetric(p, e, key):
    return score(e["x"] @ (p["w"] + p["w"].T))


@case({"a": derived(3, 4), "b": derived(3, 4)}, {"x": x(5, 3)})
def product_of_parameters(p, e, key):
    return score(e["x"] @ (p["a"] * p["b"]))


@case({"a": derived(3), "b": derived(4)}, {"x": x(5, 3)})
def outer_product_of_parameters(p, e, key):
    return score(e["x"] @ jnp.outer(p["a"], p["b"]))


@case({"a": derived(3, 2), "b": derived(2, 4)}, {"x": x(5, 3)})
def low_rank_weight_multiplied_first(p, e, key):
    return score(e["x"] @ (p["a"] @ p["b"]))


@case({"a": dense(3, 2), "b": dense(2, 4)}, {"x": x(5, 3)})
def lora_not_merged(p, e, key):
    return score(e["x"] @ BASE + 0.5 * (e["x"] @ p["a"] @ p["b"]))


@case({"a": derived(3, 2), "b": derived(2, 4)}, {"x": x(5, 3)})
def lora_merged(p, e, key):
    return score(e["x"] @ (BASE + 0.5 * (p["a"] @ p["b"])))


@case({"base": frozen(3, 4), "a": derived(3, 2), "b": derived(2, 4)}, {"x": x(5, 3)})
def lora_merged_into_a_frozen_parameter(p, e, key):
    base = jax.lax.stop_gradient(p["base"])
    return score(e["x"] @ (base + 0.5 * (p["a"] @ p["b"])))


BASE = np.cos(np.arange(12.0)).reshape(3, 4).astype(np.float32)


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def straight_through_sign(p, e, key):
    w = p["w"]
    return score(e["x"] @ (w + jax.lax.stop_gradient(jnp.sign(w) - w)))


@case({"w": frozen(3, 4), "v": dense(3, 4)}, {"x": x(5, 3)})
def weight_rounded_to_integers(p, e, key):
    rounded = (10 * p["w"]).astype(jnp.int8).astype(jnp.float32)
    return score(e["x"] @ rounded * (e["x"] @ p["v"]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_pruned_by_its_own_size(p, e, key):
    return score(e["x"] @ (p["w"] * (jnp.abs(p["w"]) > 0.3)))


@case({"a": derived(3, 4), "b": tied(3, 4)}, {"x": x(5, 3)})
def derived_and_plain_use_of_two_weights(p, e, key):
    return score(jnp.tanh(e["x"] @ (p["a"] + 0.0)) + e["x"] @ p["b"]) + score(
        e["x"][:2] @ p["b"]
    )


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def derived_and_plain_use_of_one_weight(p, e, key):
    return score(e["x"] @ p["w"]) + score(e["x"] @ jnp.tanh(p["w"]))


@case({"h": dense(2, 12), "b": elementwise(12)}, {"x": x(5, 3), "z": x(2)})
def weight_made_from_data(p, e, key):
    w = (e["z"] @ p["h"] + p["b"]).reshape(3, 4)
    return score(e["x"] @ w)


@case({"kernel": fallback(6)}, {"x": x(6)})
def long_convolution_by_fourier_transform(p, e, key):
    product = jnp.fft.rfft(e["x"]) * jnp.fft.rfft(p["kernel"])
    return score(jnp.fft.irfft(product, 6))


@case({"w": dense(6, 4), "v": dense(3, 2)}, {"x": x(6)})
def fourier_transform_of_activations(p, e, key):
    spectrum = jnp.fft.rfft(jnp.tanh(e["x"] @ p["w"]))
    return score(jnp.abs(spectrum + 3) @ p["v"])


@case({"w": fallback(3, 3)}, {"x": x(3)})
def solve_with_a_parameter(p, e, key):
    return score(jnp.linalg.solve(p["w"] + 4 * jnp.eye(3), e["x"]))


@case({"w": derived(3, 3)}, {"x": x(5, 3)})
def inverse_of_a_parameter(p, e, key):
    return score(e["x"] @ jnp.linalg.inv(p["w"] + 4 * jnp.eye(3)))


@case({"w": fallback(3, 3)}, {"x": x(3)})
def triangular_solve_and_determinant(p, e, key):
    factor = jnp.tril(p["w"]) + 3 * jnp.eye(3)
    white = jax.scipy.linalg.solve_triangular(factor, e["x"], lower=True)
    return jnp.sum(jnp.square(white)) + jnp.sum(jnp.log(jnp.diag(factor)))


@case({"w": derived(3, 3)}, {"x": x(3)})
def cholesky_of_a_parameter(p, e, key):
    factor = jnp.linalg.cholesky(p["w"] @ p["w"].T + jnp.eye(3))
    return score(factor @ e["x"])
