"""Where what is data and what a parameter changes on the way."""

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import (
    case,
    dense,
    derived,
    elementwise,
    fallback,
    frozen,
    ids,
    score,
    tied,
    x,
)


@case({"w": elementwise(3)}, {"h": x(3), "x": x(5, 3)})
def carry_turns_from_data_into_a_parameter(p, e, key):
    carry, ys = jax.lax.scan(lambda c, x: (p["w"], score(c * x)), e["h"], e["x"])
    return jnp.sum(ys) + score(carry * e["h"])


@case({"w": dense(3, 3), "h0": elementwise(3)}, {"h": x(3), "x": x(4, 6, 3)})
def recurrent_state_is_reset_to_a_learned_one(p, e, key):
    def segment(h, xs):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), h, xs)
        return p["h0"], h

    return score(jax.lax.scan(segment, e["h"], e["x"])[1])


@case({"w": elementwise(4, 3, 3)}, {"x": x(3), "w0": x(3, 3)})
def each_layer_hands_its_weights_to_the_next(p, e, key):
    def body(carry, w):
        h, before = carry
        return (jnp.tanh(h @ before + h @ w), w), None

    (h, last), _ = jax.lax.scan(body, (e["x"], e["w0"]), p["w"])
    return score(h @ last)


@case({"w": elementwise(3, 3)}, {"x": x(2, 4, 3), "w0": x(3, 3)})
def weight_handed_on_by_the_inner_of_two_loops(p, e, key):
    def outer(w, xs):
        def inner(w, x):
            return jnp.tanh(p["w"]), x @ w

        return jax.lax.scan(inner, w, xs)

    last, ys = jax.lax.scan(outer, e["w0"], e["x"], reverse=True)
    return score(ys) + score(last @ e["x"][0, 0])


@case({"w": elementwise(3, 3), "v": dense(3, 3)}, {"x": x(4, 3), "w0": x(3, 3)})
def carries_that_change_places(p, e, key):
    def body(carry, x):
        first, second, third = carry
        return (second, third, p["w"]), jnp.tanh(x @ first) @ p["v"]

    start = (e["w0"], 2 * e["w0"], jnp.zeros((3, 3)))
    return score(jax.lax.scan(body, start, e["x"])[1])


@case({"w": fallback(3, 3), "v": fallback(3, 3)}, {"x": x(5, 3), "w0": x(3, 3)})
def branches_that_return_data_or_parameters(p, e, key):
    w, v = jax.lax.cond(
        e["x"][0, 0] > 0, lambda: (e["w0"], p["v"]), lambda: (p["w"], e["w0"])
    )
    return score(e["x"] @ w) + score(e["x"] @ v)


@case({"w": dense(3, 3), "s": frozen(3)}, {"x": x(5, 3), "n": ids(4)})
def parameter_in_a_while_loop_without_gradient(p, e, key):
    def body(state):
        i, s = state
        return i + 1, s * p["s"] + e["x"][0]

    _, s = jax.lax.while_loop(lambda state: state[0] < e["n"], body, (0, p["s"]))
    return score(e["x"] @ p["w"] + jax.lax.stop_gradient(s)[None])


@case({"m": tied(5, 5)}, {"i": ids(5, 4), "j": ids(5, 3)})
def rows_and_columns_of_one_table(p, e, key):
    return score(p["m"][e["i"]]) + score(p["m"].T[e["j"]])


@case({"m": tied(5, 5)}, {"i": ids(5, 4), "j": ids(5, 3), "x": x(2, 5)})
def rows_columns_and_a_product_of_one_table(p, e, key):
    looked = score(p["m"][e["i"]]) + score(p["m"].T[e["j"]])
    return looked + score(e["x"] @ p["m"])


@case({"w": dense(3, 4), "s": elementwise(4)}, {"x": x(5, 3)})
def product_of_integers_made_of_a_parameter(p, e, key):
    q = jnp.round(p["w"] * 20).astype(jnp.int32)
    x = jnp.round(e["x"] * 20).astype(jnp.int32)
    rounded = (x @ q).astype(jnp.float32) / 400
    return score(rounded * p["s"][None]) + score(e["x"] @ p["w"])


@case({"m": derived(5, 4), "w": dense(4, 3)}, {"ids": ids(5, 6), "x": x(6, 4)})
def lookup_in_a_thresholded_parameter(p, e, key):
    hard = (p["m"] > 0)[e["ids"]]
    soft = jax.nn.sigmoid(p["m"])[e["ids"]]
    return score(jnp.where(hard, e["x"], 0.1 * e["x"]) @ p["w"]) + score(e["x"] * soft)


@case({"w": dense(4, 3), "b": frozen(4)}, {"x": x(5, 4)})
def parameter_that_data_are_compared_with(p, e, key):
    return score(jnp.where(e["x"] > p["b"][None], e["x"], 0) @ p["w"])


@case({"k": frozen(9, 2, 3), "w": dense(2, 3)}, {"x": x(6, 2)})
def convolution_without_outputs(p, e, key):
    form = {"dimension_numbers": ("NWC", "WIO", "NWC")}
    out = jax.lax.conv_general_dilated(e["x"][None], p["k"], (1,), "VALID", **form)
    return score(out) + score(e["x"] @ p["w"])


@case({"w": elementwise(3, 4)}, {"x": x(5, 3)})
def weight_times_a_function_of_data(p, e, key):
    return score(e["x"] @ (p["w"] * jnp.exp(e["x"][0, :, None])))
