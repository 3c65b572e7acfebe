"""Parameters outside the data path, and data outside the parameters'."""

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import (
    case,
    conv_and_number,
    convolve,
    dense,
    dense_and_number,
    elementwise,
    fallback,
    frozen,
    ids,
    score,
    unused,
    x,
)


@case({"w": dense_and_number(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def l2_regulariser(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) @ p["v"]) + jnp.sum(jnp.square(p["w"]))


@case(
    {
        "k": conv_and_number(3, 3, 4),
        "b": elementwise(4),
        "w": dense_and_number(4, 2),
    },
    {"x": x(5, 3), "s": x()},
)
def weight_decay_of_all_parameters(p, e, key):
    """Its strength is the example's, and all parameters make one number."""
    out = score(jnp.tanh(convolve(e["x"], p["k"]) + p["b"][None]) @ p["w"])
    size = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(p))
    return out * jnp.sqrt(size) + e["s"] * size


@case({"w": fallback(3, 4)}, {"x": x(3)})
def loss_of_parameters_only(p, e, key):
    return score(p["w"])


@case({"c": fallback()}, {"x": x(3)})
def loss_that_is_the_parameter(p, e, key):
    return p["c"]


@case({"w": unused(3)}, {"x": x(3)})
def loss_that_is_a_number(p, e, key):
    return 1.0 + jnp.zeros(())


@case({"w": unused(3)}, {"x": x()})
def loss_that_is_the_example(p, e, key):
    return e["x"]


@case({"w": dense(3, 4), "spare": unused(2), "more": unused()}, {"x": x(3), "y": x(2)})
def parameters_and_data_not_used(p, e, key):
    return score(e["x"] @ p["w"])


@case({"w": frozen(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def frozen_first_layer(p, e, key):
    return score(jnp.tanh(e["x"] @ jax.lax.stop_gradient(p["w"])) @ p["v"])


@case({"w": frozen(3, 3), "v": dense(3, 2)}, {"x": x(3)})
def frozen_parameter_in_a_while_loop(p, e, key):
    w = jax.lax.stop_gradient(p["w"])

    def body(state):
        step, vector = state
        return step + 1, jnp.tanh(vector @ w)

    start = (0, jax.lax.stop_gradient(e["x"]))
    _, vector = jax.lax.while_loop(lambda s: s[0] < 3, body, start)
    return score(vector @ p["v"])


@case({"w": dense(3, 2)}, {"x": x(3), "n": ids(5)})
def while_loop_on_data(p, e, key):
    def body(state):
        step, vector = state
        return step + 1, vector * 0.5 + 1

    _, vector = jax.lax.while_loop(lambda s: s[0] < e["n"], body, (0, e["x"]))
    return score(vector @ p["w"])


@case({"w": dense(3, 2)}, {"x": x(3), "n": ids(5)})
def fori_loop_of_a_length_from_data(p, e, key):
    vector = jax.lax.fori_loop(0, e["n"], lambda i, v: jnp.sin(v + i), e["x"])
    return score(vector @ p["w"])
