"""Calls: jit, custom derivatives, cond, vmap."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import (
    case,
    conv,
    convolve,
    dense,
    derived,
    elementwise,
    fallback,
    ids,
    score,
    tied,
    x,
)


@jax.jit
def _layer(w, data):
    return jnp.tanh(data @ w)


@case({"w": tied(3, 3)}, {"x": x(5, 3)})
def jitted_layer_twice_with_one_weight(p, e, key):
    return score(_layer(p["w"], _layer(p["w"], e["x"])))


@case({"w": dense(3, 3), "v": dense(3, 3)}, {"x": x(5, 3)})
def jitted_layer_twice_with_two_weights(p, e, key):
    """One jaxpr object, the same variables, two calls."""
    return score(_layer(p["w"], _layer(p["v"], e["x"])))


@case({"w": tied(3, 3)}, {"x": x(3, 3)})
def jitted_layer_with_its_arguments_swapped(p, e, key):
    """One jaxpr: first w is the weight and x the data, then the other way round."""
    return score(_layer(p["w"], e["x"]) + 0.1 * (_layer(e["x"], p["w"])))


@case({"w": dense(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def jit_that_hands_parameters_through(p, e, key):
    @jax.jit
    def prepare(p, data):
        return p["w"], jnp.sin(data), p["v"].T, p["w"]

    w, data, v, _ = prepare(p, e["x"])
    return score(jnp.tanh(data @ w) @ v.T)


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def jit_in_jit_in_jit(p, e, key):
    inner = jax.jit(lambda w: w.T)
    middle = jax.jit(lambda w, data: (data @ inner(w).T, w))
    out, _ = jax.jit(lambda data: middle(p["w"], data))(e["x"])
    return score(out)


@jax.custom_vjp
def _reversed_dense(w, data):
    return data @ w


_reversed_dense.defvjp(
    lambda w, data: (data @ w, (w, data)),
    lambda saved, g: (-2 * jnp.sin(saved[1].T @ g), g @ saved[0].T),
)


@case({"w": fallback(3, 4), "v": dense(2, 3)}, {"x": x(5, 2)})
def custom_vjp_that_is_not_the_derivative(p, e, key):
    return score(_reversed_dense(p["w"], e["x"] @ p["v"]))


@jax.custom_vjp
def _clip_backward(value):
    return value


_clip_backward.defvjp(
    lambda value: (value, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),)
)


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def custom_vjp_on_activations(p, e, key):
    return score(_clip_backward(e["x"] @ p["w"]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def custom_vjp_on_the_weight(p, e, key):
    """Looks like a view, and is none: the gradient changes on the way back."""
    return score(e["x"] @ _clip_backward(p["w"]))


@case({"w": fallback(4, 4)}, {"x": x(5, 4)})
def custom_vjp_on_a_weight_in_a_loop(p, e, key):
    """Its backward pass clips what each iteration sends back, not their sum."""
    carry = jnp.zeros(4)
    for w in (p["w"], jnp.sin(p["w"])):
        step = functools.partial(_clipped_recurrence, w)
        carry, _ = jax.lax.scan(step, carry, e["x"])
    return score(carry)


@case({"w": fallback(2, 4, 4), "v": derived(2, 4, 4)}, {"x": x(5, 4)})
def custom_vjp_on_a_weight_in_nested_loops(p, e, key):
    """Each iteration of the outer loop has a weight of its own, that of the inner none."""

    def outer(carry, layer):
        w, v = layer
        carry = jnp.tanh(carry @ _clip_backward(v))
        return jax.lax.scan(functools.partial(_clipped_recurrence, w), carry, e["x"])

    carry, _ = jax.lax.scan(outer, jnp.ones(4), (p["w"], p["v"]))
    return score(carry)


def _clipped_recurrence(w, carry, data):
    return jnp.tanh(carry @ _clip_backward(w) + data), None


@case({"w": derived(4, 4)}, {"x": x(5, 4)})
def custom_vjp_on_a_weight_before_a_loop(p, e, key):
    w = _clip_backward(p["w"])
    return score(
        jax.lax.scan(lambda c, d: (jnp.tanh(c @ w + d), None), jnp.ones(4), e["x"])[0]
    )


@case({"w": dense(3, 4), "s": fallback(4)}, {"x": x(5, 3)})
def custom_vjp_that_closes_over_data(p, e, key):
    @jax.custom_vjp
    def gate(value, data):
        return value * jnp.sum(data)

    gate.defvjp(
        lambda value, data: (gate(value, data), data),
        lambda data, g: (g * jnp.cos(jnp.sum(data)), jnp.zeros_like(data)),
    )
    return score(gate(e["x"] @ p["w"], e["x"]) + gate(p["s"], e["x"])[None])


@jax.custom_jvp
def _odd_tanh(value):
    return jnp.tanh(value)


_odd_tanh.defjvp(lambda v, t: (jnp.tanh(v[0]), jnp.cos(v[0]) * t[0]))


@case({"w": dense(3, 4), "v": derived(4, 2)}, {"x": x(5, 3)})
def custom_jvp_on_activations_and_weights(p, e, key):
    return score(_odd_tanh(e["x"] @ p["w"]) @ _odd_tanh(p["v"]))


@case({"w": fallback(3, 4)}, {"x": x(5, 3)})
def custom_jvp_with_a_dense_layer_inside(p, e, key):
    @jax.custom_jvp
    def layer(w, data):
        return data @ w

    @layer.defjvp
    def _(primals, tangents):
        (w, data), (dw, ddata) = primals, tangents
        return data @ w, 3 * (data @ dw) + ddata @ w

    return score(layer(p["w"], e["x"]))


@case({"w": dense(3, 4), "v": dense(4, 2), "b": elementwise(4)}, {"x": x(5, 3)})
def activations_with_custom_derivatives(p, e, key):
    hidden = jax.nn.gelu(e["x"] @ p["w"] + p["b"][None])
    return jax.nn.logsumexp(jax.nn.relu(hidden) @ p["v"]) + score(jax.nn.silu(hidden))


@case({"w": fallback(3, 4), "v": fallback(3, 4)}, {"x": x(5, 3)})
def cond_on_data_with_parameters_in_the_branches(p, e, key):
    out = jax.lax.cond(
        e["x"][0, 0] > 0,
        lambda: jnp.tanh(e["x"] @ p["w"]),
        lambda: jnp.sin(e["x"] @ p["v"]),
    )
    return score(out)


@case({"w": fallback(3, 4), "v": fallback(3, 4)}, {"x": x(5, 3)})
def cond_on_data_picks_a_weight(p, e, key):
    w = jax.lax.cond(e["x"][0, 0] > 0, lambda: p["w"], lambda: p["v"])
    return score(e["x"] @ w)


@case({"w": fallback(3, 3), "u": dense(3, 2)}, {"x": x(5, 3)})
def cond_on_the_key_drops_a_layer(p, e, key):
    hidden = jax.lax.cond(
        jax.random.bernoulli(key),
        lambda h: h + jnp.tanh(h @ p["w"]),
        lambda h: h,
        e["x"],
    )
    return score(hidden @ p["u"])


@case({"w": fallback(3, 4), "b": fallback(4)}, {"x": x(5, 3), "i": ids(3)})
def switch_with_parameters_in_the_branches(p, e, key):
    branches = [
        lambda: e["x"] @ p["w"],
        lambda: e["x"] @ jnp.sin(p["w"]) + p["b"][None],
        lambda: jnp.ones((5, 4)),
    ]
    return score(jax.lax.switch(e["i"], branches))


@case({"w": dense(3, 4), "v": dense(4, 2)}, {"x": x(5, 3), "i": ids(2)})
def cond_on_activations_only(p, e, key):
    hidden = jax.lax.cond(e["i"] > 0, jnp.tanh, jnp.sin, e["x"] @ p["w"])
    return score(hidden @ p["v"])


@case({"w": dense(3, 4), "b": elementwise(4)}, {"x": x(5, 3)})
def vmap_over_tokens(p, e, key):
    return score(jax.vmap(lambda token: jnp.tanh(token @ p["w"] + p["b"]))(e["x"]))


@case({"w": dense(2, 3, 4), "b": elementwise(2, 4)}, {"x": x(5, 3)})
def vmap_over_an_ensemble(p, e, key):
    def member(p):
        return jnp.tanh(e["x"] @ p["w"] + p["b"][None])

    return score(jnp.mean(jax.vmap(member)(p), axis=0))


@case({"w": dense(5, 3, 4)}, {"x": x(5, 3)})
def vmap_with_a_weight_for_each_token(p, e, key):
    return score(jax.vmap(jnp.dot)(e["x"], p["w"]))


@case({"w": dense(3, 4, 2)}, {"x": x(2, 5, 3)})
def vmap_over_odd_axes(p, e, key):
    out = jax.vmap(jnp.dot, in_axes=(0, 2), out_axes=1)(e["x"], p["w"])
    return score(out * jnp.arange(40.0).reshape(5, 2, 4) / 10)


@case({"k": conv(2, 3, 2, 3)}, {"x": x(6, 2)})
def vmap_over_kernels(p, e, key):
    return score(jax.vmap(lambda k: convolve(e["x"], k))(p["k"]))


@case({"k": conv(2, 3, 2, 3)}, {"x": x(2, 6, 2)})
def vmap_over_kernels_and_images(p, e, key):
    return score(jax.vmap(convolve)(e["x"], p["k"]))


@case({"w": dense(3, 3)}, {"x": x(4, 5, 3)})
def vmap_of_a_scan(p, e, key):
    def run(tokens):
        return jax.lax.scan(
            lambda h, t: (jnp.tanh(h @ p["w"] + t), None), jnp.zeros(3), tokens
        )[0]

    return score(jax.vmap(run)(e["x"]))


@case({"w": elementwise(3, 3)}, {"x": x(5, 3)})
def vmap_of_a_cond(p, e, key):
    def one(token):
        return jax.lax.cond(token[0] > 0, lambda t: t @ p["w"], jnp.sin, token)

    return score(jax.vmap(one)(e["x"]))
