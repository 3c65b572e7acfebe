"""Remat, and scans over layers."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tests.contracts.zoo.cases import (
    case,
    conv,
    convolve,
    dense,
    derived,
    elementwise,
    embedding,
    entropy,
    fallback,
    ids,
    score,
    tied,
    x,
)


@case({"w": dense(3, 4), "v": dense(4, 2), "b": elementwise(4)}, {"x": x(5, 3)})
def remat(p, e, key):
    @jax.checkpoint
    def block(p, data):
        return jnp.tanh(data @ p["w"] + p["b"][None])

    return score(block(p, e["x"]) @ p["v"])


@case({"w": tied(3, 3)}, {"x": x(5, 3)})
def remat_twice_with_one_weight(p, e, key):
    block = jax.checkpoint(lambda w, data: jnp.tanh(data @ w))
    return score(block(p["w"], block(p["w"], e["x"])))


@case({"w": dense(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def remat_with_a_policy_of_names(p, e, key):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    @functools.partial(jax.checkpoint, policy=policy)
    def block(p, data):
        hidden = checkpoint_name(data @ p["w"], "hidden")
        return jnp.tanh(hidden) @ p["v"]

    return score(block(p, e["x"]))


def run_layers(p, data, *, wrap=lambda f: f, **options):
    def body(hidden, layer):
        return jnp.tanh(hidden @ layer["w"] + layer["b"][None]), None

    return jax.lax.scan(wrap(body), data, p, **options)[0]


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def scan_over_layers(p, e, key):
    return score(run_layers(p, e["x"]))


@case({"w": dense(4, 4, 4), "b": elementwise(4, 4)}, {"x": x(4, 4)})
def scan_over_layers_all_equal(p, e, key):
    return score(run_layers(p, e["x"], reverse=True))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(4)})
def scan_over_layers_of_a_vector(p, e, key):
    return score(run_layers(p, e["x"][None]))


@case({"w": dense(4, 3, 3), "b": elementwise(4, 3)}, {"x": x(5, 3)})
def scan_unrolled_and_reversed(p, e, key):
    return score(run_layers(p, e["x"], reverse=True, unroll=2))


@case({"w": dense(1, 3, 3), "b": elementwise(1, 3)}, {"x": x(5, 3)})
def scan_of_length_one(p, e, key):
    return score(run_layers(p, e["x"]))


@case({"w": dense(0, 3, 3), "b": elementwise(0, 3)}, {"x": x(5, 3)})
def scan_of_length_zero(p, e, key):
    return score(run_layers(p, e["x"]))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def scan_with_remat_body(p, e, key):
    return score(run_layers(p, e["x"], wrap=jax.checkpoint))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def scan_with_remat_body_that_saves_dots(p, e, key):
    wrap = functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_saveable,
        prevent_cse=False,
    )
    return score(run_layers(p, e["x"], wrap=wrap))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def remat_of_a_scan_with_remat_body(p, e, key):
    block = jax.checkpoint(lambda p, data: run_layers(p, data, wrap=jax.checkpoint))
    return score(block(p, e["x"]))


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_over_layers_with_one_used_outside(p, e, key):
    hidden = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], p["w"])[0]
    return score(hidden @ p["w"][1])


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_over_layers_twice(p, e, key):
    def run(hidden):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, p["w"])[0]

    return score(run(run(e["x"])))


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_over_layers_forwards_and_backwards(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w), None

    hidden = jax.lax.scan(body, e["x"], p["w"])[0]
    return score(jax.lax.scan(body, hidden, p["w"], reverse=True)[0])


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_whose_body_uses_a_layer_twice(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w) @ w.T, None

    return score(jax.lax.scan(body, e["x"], p["w"])[0])


@case({"w": dense(4, 3, 4)}, {"x": x(5, 4)})
def scan_over_a_transposed_stack(p, e, key):
    stack = jnp.moveaxis(p["w"], 1, 0)
    return score(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], stack)[0])


@case({"w": dense(12, 4)}, {"x": x(5, 4)})
def scan_over_a_reshaped_matrix(p, e, key):
    stack = p["w"].reshape(3, 4, 4)
    return score(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], stack)[0])


@case({"w": tied(4, 3, 3)}, {"x": x(5, 3)})
def scan_over_slices_that_overlap(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w), None

    hidden = jax.lax.scan(body, e["x"], p["w"][:3])[0]
    return score(jax.lax.scan(body, hidden, p["w"][1:])[0])


@case({"a": derived(3, 3), "b": derived(3, 3)}, {"x": x(5, 3)})
def scan_over_weights_stacked_in_the_loss(p, e, key):
    stack = jnp.stack([p["a"], p["b"], p["a"]])
    return score(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], stack)[0])


@case({"w": dense(3, 3, 3), "c": dense(3, 3), "s": elementwise(3)}, {"x": x(5, 3)})
def scan_with_layers_and_a_shared_weight(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w + jnp.sin(h) @ p["c"]) * p["s"][None], h

    hidden, outputs = jax.lax.scan(body, e["x"], p["w"])
    return score(hidden) + score(outputs)


@case({"w": derived(3, 3)}, {"x": x(5, 3)})
def scan_over_parameters_alone(p, e, key):
    """A power of the weight, before it meets data."""
    power = jax.lax.scan(lambda m, _: (m @ p["w"], None), jnp.eye(3), length=3)[0]
    return score(e["x"] @ power)


@case({"w": dense(3, 4, 4)}, {"x": x(5, 4)})
def fori_loop_indexes_the_stack(p, e, key):
    return score(jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), e["x"]))


@case({"w": dense(3, 4, 4), "b": tied(3, 4)}, {"x": x(5, 4)})
def fori_loop_indexes_the_stack_from_its_end(p, e, key):
    def layer(i, h):
        return jnp.tanh(h @ p["w"][2 - i] + p["b"][i][None])

    out = jax.lax.fori_loop(0, 2, layer, e["x"])
    return score(out @ p["b"].T)


@case({"w": dense(3, 4, 4), "v": dense(3, 2, 4, 4)}, {"x": x(5, 4)})
def fori_loops_index_a_grid(p, e, key):
    def outer(i, h):
        def inner(j, h):
            return jnp.tanh(h @ p["w"][i] + h @ p["v"][i, j])

        return jax.lax.fori_loop(0, 2, inner, h)

    return score(jax.lax.fori_loop(0, 3, outer, e["x"]))


@case({"w": dense(5, 4, 4)}, {"x": x(5, 4)})
def reversed_scan_counts_and_hands_the_number_on(p, e, key):
    def layer(carry, _):
        h, i = carry
        return (jnp.tanh(h @ p["w"][i]), i + 2), None

    start = e["x"], 0
    (h, i), _ = jax.lax.scan(layer, start, None, length=2, reverse=True)
    return score(h @ p["w"][i - 1])


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_over_a_stack_and_fori_loop_over_part_of_it(p, e, key):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], p["w"])
    return score(jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"][i + 1]), h))


@case({"w": fallback(3, 4, 4)}, {"x": x(5, 4)})
def fori_loop_beyond_the_end_of_the_stack(p, e, key):
    return score(jax.lax.fori_loop(0, 5, lambda i, h: jnp.tanh(h @ p["w"][i]), e["x"]))


@case({"w": fallback(4, 4)}, {"x": x(5, 4)})
def fori_loop_scales_a_weight_by_its_number(p, e, key):
    def layer(i, h):
        return jnp.tanh(h @ (p["w"] * (i + 1.0)))

    return score(jax.lax.fori_loop(0, 3, layer, e["x"]))


@case({"w": dense(3, 3)}, {"x": x(5, 3)})
def fori_loop_with_static_bounds(p, e, key):
    return score(jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"] + i), e["x"]))


@case({"w": dense(2, 3, 3, 3)}, {"x": x(5, 3)})
def scan_in_scan_over_a_grid_of_layers(p, e, key):
    def outer(h, stack):
        return jax.lax.scan(lambda v, w: (jnp.tanh(v @ w), None), h, stack)

    return score(jax.lax.scan(outer, e["x"], p["w"])[0])


@case({"k": conv(2, 3, 2, 2), "b": elementwise(2, 2)}, {"x": x(6, 2)})
def scan_over_convolutions(p, e, key):
    def body(h, layer):
        return jnp.tanh(convolve(h, layer["k"]) + layer["b"][None]), None

    return score(jax.lax.scan(body, e["x"], p)[0])


@case({"table": embedding(3, 5, 4)}, {"ids": ids(5, 6)})
def scan_over_tables(p, e, key):
    def body(h, table):
        return jnp.sin(h + table[e["ids"]]), None

    return score(jax.lax.scan(body, jnp.zeros((6, 4)), p["table"])[0])


@case({"table": tied(7, 3)}, {"ids": ids(7, 6)})
def chunked_head_with_remat(p, e, key):
    hidden = jnp.tanh(p["table"][e["ids"]])

    @jax.checkpoint
    def chunk(loss, both):
        rows, labels = both
        return loss + entropy(rows @ p["table"].T, labels), None

    chunks = (hidden.reshape(3, 2, 3), e["ids"].reshape(3, 2))
    return jax.lax.scan(chunk, 0.0, chunks)[0]


@case({"q": dense(2, 3, 4), "kv": dense(2, 2, 4)}, {"x": x(5, 3), "memory": x(6, 2)})
def scan_of_cross_attention_to_one_memory(p, e, key):
    """What the weights of every layer meet is the same: a constant of the loop."""

    def body(h, layer):
        keys = e["memory"] @ layer["kv"]
        logits = (h @ layer["q"]) @ keys.T
        return h + jax.nn.softmax(logits) @ keys[:, :3], None

    return score(jax.lax.scan(body, e["x"], p)[0])
