"""Scans over time, recurrent networks, loops that carry parameters."""

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import (
    case,
    dense,
    elementwise,
    fallback,
    ids,
    score,
    tied,
    x,
)


@case({"w": dense(3, 3), "u": dense(2, 3), "b": elementwise(3)}, {"x": x(5, 2)})
def scan_over_time(p, e, key):
    def step(h, token):
        h = jnp.tanh(token @ p["u"] + h @ p["w"] + p["b"])
        return h, h

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[1])


@case({"w": tied(3, 3)}, {"x": x(5, 3)})
def weight_shared_inside_and_outside_a_scan(p, e, key):
    def step(h, token):
        return jnp.tanh(token + h @ p["w"]), None

    hidden = jax.lax.scan(step, jnp.zeros(3), e["x"])[0]
    return score(hidden @ p["w"]) + score(e["x"] @ p["w"].T)


@case({"w": dense(5, 2, 3)}, {"x": x(5, 2)})
def scan_over_time_with_a_weight_for_each_step(p, e, key):
    def step(h, both):
        token, w = both
        return jnp.tanh(h + token @ w), None

    return score(jax.lax.scan(step, jnp.zeros(3), (e["x"], p["w"]))[0])


@case({"w": dense(3, 3)}, {"x": x(5, 3)})
def scan_with_the_parameter_in_the_carry(p, e, key):
    def step(carry, token):
        h, w = carry
        return (jnp.tanh(token + h @ w), w), None

    (hidden, _), _ = jax.lax.scan(step, (jnp.zeros(3), p["w"]), e["x"])
    return score(hidden)


@case({"w": elementwise(3, 3), "v": elementwise(3, 3)}, {"x": x(4, 3)})
def scan_whose_carry_swaps_two_parameters(p, e, key):
    def step(carry, token):
        h, w, v = carry
        return (jnp.tanh(token + h @ w), v, w), None

    carry = (jnp.zeros(3), p["w"], p["v"])
    return score(jax.lax.scan(step, carry, e["x"])[0][0])


@case({"w": elementwise(3, 3)}, {"x": x(4, 3)})
def scan_whose_carry_transposes_the_parameter(p, e, key):
    def step(carry, token):
        h, w = carry
        return (jnp.tanh(token + h @ w), w.T), None

    return score(jax.lax.scan(step, (jnp.zeros(3), p["w"]), e["x"])[0][0])


@case({"w": elementwise(3, 3)}, {"x": x(5, 3)})
def scan_that_changes_the_weight_by_data(p, e, key):
    """Fast weights: the carry starts as the parameter and becomes data."""

    def step(w, token):
        out = jnp.tanh(token @ w)
        return w + 0.1 * jnp.outer(token, out), out

    w, outputs = jax.lax.scan(step, p["w"], e["x"])
    return score(outputs) + score(w)


@case({"w": dense(2, 3, 3), "u": dense(2, 3, 3)}, {"x": x(5, 3)})
def scan_in_scan_recurrent_layers(p, e, key):
    """Each layer of the outer scan is shared by the steps of the inner one."""

    def layer(tokens, q):
        def step(h, token):
            h = jnp.tanh(token @ q["u"] + h @ q["w"])
            return h, h

        return jax.lax.scan(step, jnp.zeros(3), tokens)[1], None

    return score(jax.lax.scan(layer, e["x"], p)[0])


@case({"w": dense(2, 3, 3), "c": dense(3, 3)}, {"x": x(4, 3)})
def scan_in_scan_layers_inside_time(p, e, key):
    """The inner scan runs over layers, again at each step of the outer one."""

    def step(h, token):
        inner = jax.lax.scan(lambda v, w: (jnp.tanh(v @ w), v), h + token, p["w"])
        return inner[0] @ p["c"], inner[1]

    hidden, outputs = jax.lax.scan(step, jnp.zeros(3), e["x"])
    return score(hidden) + score(outputs)


@case({"table": tied(7, 3), "w": dense(3, 3)}, {"ids": ids(7, 5)})
def scan_that_feeds_tokens_and_predicts_the_next(p, e, key):
    """Lookup and head of one table, both inside the loop over time."""

    def step(carry, token):
        h, loss = carry
        log = jax.nn.log_softmax(h @ p["table"].T)
        return (jnp.tanh(p["table"][token] + h @ p["w"]), loss - log[token]), None

    return jax.lax.scan(step, (jnp.zeros(3), 0.0), e["ids"])[0][1]


@case({"w": fallback(3, 3)}, {"x": x(5, 3)})
def scan_with_a_cond_in_its_body(p, e, key):
    def step(h, token):
        out = jax.lax.cond(token[0] > 0, lambda: jnp.tanh(h @ p["w"]), lambda: h)
        return out + token, None

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[0])


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def map_over_tokens(p, e, key):
    return score(jax.lax.map(lambda token: jnp.tanh(token @ p["w"]), e["x"]))


@case({"a": elementwise(3)}, {"x": x(6, 3)})
def associative_scan(p, e, key):
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"])[None], (6, 3))

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return score(jax.lax.associative_scan(combine, (decay, e["x"]))[1])


def _gru_step(p, h, token):
    gates = jax.nn.sigmoid(token @ p["u"] + h @ p["w"] + p["b"])
    z, r = jnp.split(gates, 2)
    new = jnp.tanh(token @ p["v"] + (r * h) @ p["q"])
    return (1 - z) * h + z * new


@case(
    {
        "u": dense(2, 6),
        "w": dense(3, 6),
        "b": elementwise(6),
        "v": dense(2, 3),
        "q": dense(3, 3),
    },
    {"x": x(5, 2)},
)
def gru(p, e, key):
    def step(h, token):
        return _gru_step(p, h, token), None

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[0])


@case(
    {"w": [dense(5, 3), dense(5, 3), dense(5, 3), dense(5, 3)], "b": elementwise(12)},
    {"x": x(4, 2)},
)  # fmt: skip
def lstm_with_concatenated_kernels(p, e, key):
    kernel = jnp.concatenate(p["w"], axis=1)

    def step(carry, token):
        h, c = carry
        gates = jnp.concatenate([token, h]) @ kernel + p["b"]
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    start = (jnp.zeros(3), jnp.zeros(3))
    return score(jax.lax.scan(step, start, e["x"])[0][0])


@case({"w": dense(3, 12), "u": dense(2, 12)}, {"x": x(4, 2)})
def lstm_with_kernels_sliced_in_the_loop(p, e, key):
    def step(carry, token):
        h, c = carry
        i, f, g, o = (
            token @ p["u"][:, n : n + 3] + h @ p["w"][:, n : n + 3]
            for n in (0, 3, 6, 9)
        )
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    start = (jnp.zeros(3), jnp.zeros(3))
    return score(jax.lax.scan(step, start, e["x"])[0][0])
