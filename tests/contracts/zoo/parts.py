"""Weights times a number, parts of a parameter, weights put together from several."""

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import (
    case,
    conv,
    convolve,
    dense,
    dense_and_elementwise,
    derived,
    elementwise,
    fallback,
    frozen,
    ids,
    score,
    tied,
    x,
)


@case({"w": tied(3, 4), "v": dense(4, 3)}, {"x": x(5, 3)})
def weights_times_numbers(p, e, key):
    up = e["x"] @ (p["w"] * (1 / jnp.sqrt(3.0)))
    return score(jnp.tanh(up) @ -p["v"] @ (2 * p["w"] / -7))


@case({"table": tied(7, 4), "k": conv(3, 4, 2)}, {"ids": ids(7, 6)})
def tables_and_kernels_times_numbers(p, e, key):
    out = convolve((p["table"] * 2.0)[e["ids"]], 0.3 * p["k"])
    return score(out) + score(jnp.ones((2, 4)) * e["ids"][0] @ (-0.5 * p["table"]).T)


@case({"w": dense(2, 3, 3), "b": elementwise(2, 3)}, {"x": x(5, 3)})
def scan_over_layers_times_a_number(p, e, key):
    def step(h, layer):
        w, b = layer
        return jnp.tanh(h @ (w / 3) + b[None]), None

    return score(jax.lax.scan(step, e["x"], (p["w"] * 2, p["b"]))[0])


@case({"w": derived(2, 3, 3)}, {"x": x(5, 3)})
def scan_over_layers_times_a_number_for_each(p, e, key):
    def step(h, layer):
        w, number = layer
        return jnp.tanh(h @ (w * number)), None

    return score(jax.lax.scan(step, e["x"], (p["w"], jnp.array([2.0, -0.5])))[0])


@case({"w": frozen(3, 4), "v": dense(3, 4)}, {"x": x(5, 3)})
def weight_times_zero(p, e, key):
    return score(e["x"] @ (0 * p["w"]) + e["x"] @ p["v"])


# --- Parts of one parameter ----------------------------------------------------------------


@case({"w": dense_and_elementwise(4, 4)}, {"x": x(5, 3)})
def weight_and_bias_in_one_matrix(p, e, key):
    return score(e["x"] @ p["w"][:-1] + p["w"][-1:])


@case({"flat": dense_and_elementwise(34)}, {"x": x(5, 3)})
def network_of_a_flat_vector(p, e, key):
    flat = p["flat"]
    hidden = jnp.tanh(e["x"] @ flat[:12].reshape(3, 4) + flat[12:16][None])
    return score(hidden @ flat[16:32].reshape(4, 4)[:, :2] * flat[32] + flat[33])


@case({"w": dense_and_elementwise(2, 4, 3)}, {"x": x(5, 3)})
def scan_over_layers_with_their_biases(p, e, key):
    def step(h, w):
        return jnp.tanh(h @ w[:3] + w[3:]), None

    return score(jax.lax.scan(step, e["x"], p["w"])[0])


@case({"w": elementwise(4, 3), "v": dense(3, 3)}, {"x": x(5, 3)})
def scan_over_time_with_a_bias_of_a_part(p, e, key):
    def step(h, x):
        return jnp.tanh(h @ p["v"] + x @ p["w"][:3] + p["w"][3]), None

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[0])


@case({"w": tied(4, 3)}, {"x": x(5, 3)})
def parts_that_overlap_a_weight(p, e, key):
    return score(e["x"] @ p["w"][:3] + p["w"][2:3]) + score(e["x"] * p["w"][3:])


@case({"w": elementwise(4, 3)}, {"x": x(5, 3)})
def parts_and_the_whole_of_a_weight(p, e, key):
    both = e["x"] @ p["w"][:3] + p["w"][3:]
    return score(both) + score(jnp.sum(e["x"]) * jnp.sin(p["w"]))


@case({"c": tied(2, 3), "w": dense(3, 3)}, {"x": x(5, 3)})
def scales_and_shifts_of_one_parameter(p, e, key):
    def normed(h, c):
        h = h - jnp.mean(h, -1, keepdims=True)
        return h * c[:1] + c[1:]

    return score(normed(jnp.tanh(normed(e["x"], p["c"]) @ p["w"]), 0.5 * p["c"]))


# --- Weights put together from several -----------------------------------------------------


@case({"q": dense(3, 4), "k": dense(3, 4), "v": dense(3, 2)}, {"x": x(5, 3)})
def fused_queries_keys_and_values(p, e, key):
    fused = jnp.concatenate([p["q"], p["k"] / 2, p["v"]], axis=1)
    q, k, v = jnp.split(e["x"] @ fused, [4, 8], axis=-1)
    return score(jax.nn.softmax(q @ k.T) @ v)


@case({"a": dense(2, 3, 4), "b": dense(2, 3, 2)}, {"x": x(5, 3)})
def scan_over_layers_with_fused_weights(p, e, key):
    def step(h, layer):
        out = h @ jnp.concatenate(layer, axis=1)
        return jnp.tanh(out[:, :3] + out[:, 3:]), None

    return score(jax.lax.scan(step, e["x"], (p["a"], p["b"]))[0])


@case({"a": dense(2, 3, 4), "b": dense(2, 3, 2)}, {"x": x(5, 3)})
def scan_over_weights_fused_before_it(p, e, key):
    def step(h, layer):
        out = h @ layer
        return jnp.tanh(out[:, :3] + out[:, 3:]), None

    fused = jnp.concatenate([p["a"], p["b"]], axis=2)
    return score(jax.lax.scan(step, e["x"], fused)[0])


@case({"a": derived(1, 3, 3), "b": derived(2, 3, 3)}, {"x": x(3, 5)})
def scan_over_layers_of_two_stacks(p, e, key):
    def step(h, layer):
        return jnp.tanh(layer @ h), None

    layers = jnp.concatenate([p["a"], p["b"]])
    return score(jax.lax.scan(step, e["x"], layers)[0])


@case({"a": dense(5, 3, 4), "b": dense(5, 2, 4)}, {"x": x(6, 4)})
def weights_fused_in_a_scan_and_stacked(p, e, key):
    fuse = lambda h, layer: (jnp.sin(h), jnp.concatenate(layer))  # noqa: E731
    h, stack = jax.lax.scan(fuse, e["x"], (p["a"], p["b"]))
    return score(jnp.tensordot(h, stack, ((1,), (2,))))


@case({"a": derived(4, 3), "b": derived(2, 3)}, {"x": x(5, 3)})
def fused_weights_transposed(p, e, key):
    return score(e["x"] @ jnp.concatenate([p["a"], p["b"]]).T)


@case({"a": dense(4, 3), "b": dense(2, 3)}, {"x": x(5, 3)})
def fused_weights_on_the_left(p, e, key):
    return score(jnp.concatenate([p["a"], p["b"]]) @ e["x"].T)


@case({"a": dense(2, 3, 4), "b": dense(2, 3, 5)}, {"x": x(5, 2, 3)})
def fused_weights_per_head(p, e, key):
    fused = jnp.concatenate([p["a"], p["b"]], axis=2)
    return score(
        jnp.einsum("thk,hkn->tnh", e["x"], fused) * jnp.arange(18.0).reshape(1, 9, 2)
    )


@case({"a": tied(3, 4), "b": dense(3, 2)}, {"x": x(5, 3)})
def fused_weights_with_one_twice(p, e, key):
    out = e["x"] @ jnp.concatenate([p["a"], p["b"], p["a"]], axis=1)
    return score(out) + score(jnp.tanh(out[:, :4]) @ p["a"].T)


@case({"a": fallback(3, 4), "b": fallback(3, 2)}, {"x": x(5, 3), "i": ids(2)})
def fused_weights_one_of_which_has_no_rule(p, e, key):
    out = e["x"] @ jnp.concatenate([p["a"], p["b"]], axis=1)
    return score(out) + jnp.sum(jax.lax.dynamic_slice_in_dim(p["a"], e["i"], 2))


@case({"a": derived(3, 4), "b": derived(2, 4)}, {"x": x(5, 3), "y": x(5, 2)})
def fused_weights_of_two_inputs(p, e, key):
    return score(
        jnp.concatenate([e["x"], e["y"]], 1) @ jnp.concatenate([p["a"], p["b"]])
    )
