"""Mixtures, attention, whole models."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import (
    case,
    dense,
    elementwise,
    embedding,
    entropy,
    ids,
    score,
    tied,
    x,
)


@case({"router": dense(3, 4), "w": dense(4, 3, 2)}, {"x": x(5, 3)})
def mixture_over_all_experts(p, e, key):
    gates = jax.nn.softmax(e["x"] @ p["router"])
    return score(jnp.einsum("te,tk,ekn->tn", gates, e["x"], p["w"]))


@case({"router": dense(3, 4), "w": embedding(4, 3, 2)}, {"x": x(5, 3)})
def mixture_gathers_the_weights_of_the_best_expert(p, e, key):
    logits = e["x"] @ p["router"]
    best = jnp.argmax(logits, axis=-1)
    gate = jnp.max(jax.nn.softmax(logits), axis=-1)
    out = jnp.einsum("tk,tkn->tn", e["x"], p["w"][best])
    return score(out * gate[:, None])


@case({"router": dense(3, 4), "w": dense(4, 3, 2)}, {"x": x(5, 3)})
def mixture_dispatches_tokens_to_the_best_expert(p, e, key):
    gates = jax.nn.softmax(e["x"] @ p["router"])
    sent = jax.nn.one_hot(jnp.argmax(gates, axis=-1), 4)
    inputs = jnp.einsum("te,tk->etk", sent, e["x"])
    outputs = jnp.einsum("etk,ekn->etn", inputs, p["w"])
    return score(jnp.einsum("etn,te->tn", outputs, sent * gates))


@case(
    {"latents": dense(2, 4), "w": dense(3, 4), "o": dense(3, 2)},
    {"x": x(5, 3)},
)
def attention_with_learned_queries(p, e, key):
    logits = p["latents"] @ (e["x"] @ p["w"]).T
    return score(jax.nn.softmax(logits) @ e["x"] @ p["o"])


@case({"keys": dense(6, 3), "values": dense(6, 2)}, {"x": x(5, 3)})
def attention_to_a_learned_memory(p, e, key):
    return score(jax.nn.softmax(e["x"] @ p["keys"].T) @ p["values"])


@case({"memory": tied(6, 3)}, {"x": x(5, 3)})
def hopfield_memory_is_keys_and_values(p, e, key):
    return score(jax.nn.softmax(e["x"] @ p["memory"].T) @ p["memory"])


@case({"prototypes": elementwise(6, 3)}, {"x": x(5, 3)})
def distances_to_prototypes(p, e, key):
    difference = e["x"][:, None, :] - p["prototypes"][None]
    return jnp.sum(jax.nn.logsumexp(-jnp.sum(jnp.square(difference), -1), axis=-1))


@case({"prototypes": elementwise(6, 3)}, {"x": x(5, 3)})
def distances_to_prototypes_expanded(p, e, key):
    """The square of the prototypes is a bias made from the weight."""
    cross = e["x"] @ p["prototypes"].T
    squares = jnp.sum(jnp.square(p["prototypes"]), axis=-1)
    return jnp.sum(jax.nn.logsumexp(2 * cross - squares[None], axis=-1))


@case(
    {
        "table": tied(7, 4),
        "position": elementwise(5, 4),
        "layers": {
            "norm": elementwise(2, 4, shift=1.0),
            "qkv": dense(2, 4, 3, 2, 2),
            "out": dense(2, 2, 2, 4),
            "up": dense(2, 4, 6),
            "down": dense(2, 6, 4),
        },
    },
    {"ids": ids(7, 6)},
)
def language_model_tied_scanned_and_remat(p, e, key):
    inputs, labels = e["ids"][:-1], e["ids"][1:]
    hidden = p["table"][inputs] * 2 + p["position"]
    causal = np.tril(np.ones((5, 5), bool))

    @jax.checkpoint
    def block(h, q):
        power = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
        normal = h * jax.lax.rsqrt(power + 1e-3) * q["norm"][None]
        queries, keys, values = jnp.einsum("td,dahn->ahtn", normal, q["qkv"])
        logits = jnp.einsum("htn,hsn->hts", queries, keys)
        attention = jax.nn.softmax(jnp.where(causal[None], logits, -1e9))
        h = h + jnp.einsum("hts,hsn,hnd->td", attention, values, q["out"])
        return h + jax.nn.gelu(h @ q["up"]) @ q["down"], None

    hidden = jax.lax.scan(block, hidden, p["layers"])[0]
    return entropy(hidden @ p["table"].T, labels)
