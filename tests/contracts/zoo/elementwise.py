"""Parameters that meet data entry by entry: scales, biases, norms."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import (
    bits,
    case,
    dense,
    derived,
    elementwise,
    entropy,
    fallback,
    frozen,
    ids,
    score,
    x,
)


@case({"s": elementwise(3), "b": elementwise(3)}, {"x": x(5, 3)})
def scale_and_bias(p, e, key):
    return score(e["x"] * p["s"][None] + p["b"][None])


@case({"s": elementwise(), "t": elementwise(), "c": elementwise()}, {"x": x(5, 3)})
def scalars(p, e, key):
    return score(e["x"] * p["s"] + jnp.tanh(p["t"]) * p["c"])


@case({"w": dense(3, 4), "t": elementwise()}, {"x": x(5, 3), "y": ids(4, 5)})
def temperature_and_cross_entropy(p, e, key):
    return entropy(e["x"] @ p["w"] / jnp.exp(p["t"]), e["y"])


@case({"w": dense(3, 4), "table": elementwise(6, 4)}, {"x": x(5, 3)})
def positional_table(p, e, key):
    return score(e["x"] @ p["w"] + p["table"][:5])


@case({"cls": elementwise(3), "w": dense(3, 4)}, {"x": x(5, 3)})
def class_token(p, e, key):
    tokens = jnp.concatenate([p["cls"][None], e["x"]])
    attention = jax.nn.softmax(tokens @ tokens.T)
    return score((attention @ tokens)[0] @ p["w"])


@case({"a": elementwise(3)}, {"x": x(5, 3)})
def prelu(p, e, key):
    return score(jnp.where(e["x"] > 0, e["x"], p["a"][None] * e["x"]))


@case({"w": dense(2, 6), "b": elementwise(6)}, {"x": x(5, 3), "c": x(2)})
def film(p, e, key):
    scale, shift = jnp.split(e["c"] @ p["w"] + p["b"], 2)
    return score(e["x"] * (1 + scale)[None] + shift[None])


@case({"s": elementwise(6), "b": elementwise(6), "w": dense(6, 2)}, {"x": x(5, 6)})
def layer_norm(p, e, key):
    mean = jnp.mean(e["x"], axis=-1, keepdims=True)
    variance = jnp.var(e["x"], axis=-1, keepdims=True)
    normal = (e["x"] - mean) * jax.lax.rsqrt(variance + 1e-3)
    return score((normal * p["s"][None] + p["b"][None]) @ p["w"])


@case({"s": elementwise(6), "w": dense(6, 2)}, {"x": x(5, 6)})
def rms_norm(p, e, key):
    power = jnp.mean(jnp.square(e["x"]), axis=-1, keepdims=True)
    return score(e["x"] * jax.lax.rsqrt(power + 1e-3) * p["s"][None] @ p["w"])


@case({"s": derived(5, shift=0.5), "w": dense(3, 2)}, {"x": x(5, 3)})
def weight_of_each_token(p, e, key):
    return score(jax.nn.softmax(p["s"]) @ (e["x"] @ p["w"]))


@case({"p": elementwise(3, shift=2.0, scale=0.1)}, {"x": x(5, 3)})
def power_of_data(p, e, key):
    return score((jnp.abs(e["x"]) + 0.5) ** p["p"][None])


@case({"c": elementwise(4)}, {"x": x(5)})
def polynomial(p, e, key):
    return score(jnp.polyval(p["c"], e["x"]))


@case({"bias": elementwise(9, 2), "w": dense(3, 2, 4)}, {"x": x(5, 3)})
def relative_position_bias(p, e, key):
    q = jnp.einsum("tk,khn->htn", e["x"], p["w"])
    distance = np.arange(5)[:, None] - np.arange(5)[None] + 4
    logits = jnp.einsum("htn,hsn->hts", q, q) + jnp.transpose(
        p["bias"][distance], (2, 0, 1)
    )
    return score(jax.nn.softmax(logits))


@case({"w": elementwise(3, 4)}, {"x": x(5, 3)})
def maximum_with_a_parameter(p, e, key):
    return score(jnp.maximum(e["x"][:, :, None], p["w"][None]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def maximum_over_a_parameter(p, e, key):
    return score(e["x"] @ jnp.max(p["w"], axis=1))


@case({"a": elementwise(3, 4), "b": elementwise(3, 4)}, {"m": bits(3, 4), "x": x(3)})
def where_data_picks_between_parameters(p, e, key):
    return score(e["x"] @ jnp.where(e["m"], p["a"], p["b"]))


@case({"w": dense(3, 4), "gate": frozen(4)}, {"x": x(5, 3)})
def parameter_that_only_decides(p, e, key):
    return score(jnp.where(p["gate"][None] > 0, e["x"] @ p["w"], 0.0))


@case({"w": elementwise(3, 4)}, {"x": x(3)})
def dropout_of_weights(p, e, key):
    keep = jax.random.bernoulli(key, 0.7, (3, 4))
    return score(e["x"] @ jnp.where(keep, p["w"], 0.0))


@case({"w": elementwise(3, 4)}, {"x": x(3)})
def noise_on_weights(p, e, key):
    return score(e["x"] @ (p["w"] + 0.1 * jax.random.normal(key, (3, 4))))


@case({"w": elementwise(4, 3)}, {"ids": ids(4, 6), "x": x(6, 3)})
def parameter_that_data_scatters_into(p, e, key):
    return score(p["w"].at[e["ids"]].add(jnp.sin(e["x"])) ** 2)


@case({"w": fallback(6, 3)}, {"ids": ids(4, 6)})
def parameter_scattered_by_data(p, e, key):
    return score(jnp.zeros((4, 3)).at[e["ids"]].add(p["w"]) ** 2)


@case({"w": elementwise(3, 3)}, {"x": x(5, 3)})
def sort_of_parameter_plus_data(p, e, key):
    return score(jnp.sort(e["x"][:3] + p["w"], axis=0) * jnp.arange(9.0).reshape(3, 3))


@case({"y": elementwise(5)}, {"x": x(6)})
def interpolation_of_a_table(p, e, key):
    return score(jnp.interp(e["x"], jnp.linspace(-2.0, 2.0, 5), p["y"]))
