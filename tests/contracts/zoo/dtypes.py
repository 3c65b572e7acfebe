"""Arithmetic in other dtypes than float32."""

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import (
    BF16,
    case,
    conv,
    convolve,
    dense,
    derived,
    elementwise,
    entropy,
    ids,
    score,
    tied,
    x,
)
from tests.contracts.zoo.loops import run_layers


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_cast_to_bfloat16(p, e, key):
    return score(e["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16))


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_cast_there_and_back(p, e, key):
    return score(e["x"] @ p["w"].astype(jnp.bfloat16).astype(jnp.float32))


@case({"w": derived(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_with_reduced_precision(p, e, key):
    return score(e["x"] @ jax.lax.reduce_precision(p["w"], 8, 7))


@case({"k": conv(3, 2, 4)}, {"x": x(6, 2)}, tolerance=BF16, dtype="bfloat16")
def conv_in_bfloat16(p, e, key):
    return score(convolve(e["x"].astype(jnp.bfloat16), p["k"].astype(jnp.bfloat16)))


@case({"table": tied(7, 4)}, {"ids": ids(7, 5)}, tolerance=BF16, dtype="bfloat16")
def tied_head_scaled_and_cast(p, e, key):
    table = p["table"].astype(jnp.bfloat16)
    hidden = jnp.tanh(2 * table[e["ids"]])
    logits = (hidden @ table.T).astype(jnp.float32) / 2
    return entropy(logits, e["ids"])


@case(
    {
        "layers": {"w": dense(3, 4, 4), "b": elementwise(3, 4)},
        "head": dense(4, 2),
    },
    {"x": x(5, 4)},
    tolerance=BF16,
    dtype="bfloat16",
)
def mixed_precision_scan(p, e, key):
    low = jax.tree.map(lambda v: v.astype(jnp.bfloat16), p)
    hidden = run_layers(low["layers"], e["x"].astype(jnp.bfloat16), wrap=jax.checkpoint)
    return score(hidden @ low["head"])


@case(
    {"w": dense(3, 4, dtype=jnp.bfloat16), "b": elementwise(4, dtype=jnp.bfloat16)},
    {"x": x(5, 3)},
    tolerance=BF16,
    dtype="bfloat16",
)
def parameters_in_bfloat16(p, e, key):
    return score(e["x"].astype(jnp.bfloat16) @ p["w"] + p["b"][None])


@case(
    {"w": dense(3, 4, dtype=jnp.bfloat16), "v": dense(4, 2), "table": tied(7, 3)},
    {"x": x(5, 3), "ids": ids(7, 5)},
    tolerance=BF16,
    dtype="bfloat16",
)
def parameters_of_two_dtypes(p, e, key):
    hidden = jnp.tanh((e["x"] + p["table"][e["ids"]]) @ p["w"])
    head = p["table"].astype(jnp.bfloat16).T
    return score(hidden @ p["v"]) + score(e["x"].astype(jnp.bfloat16) @ head)


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def loss_in_bfloat16(p, e, key):
    return score(e["x"] @ p["w"]).astype(jnp.bfloat16)


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def loss_summed_in_bfloat16(p, e, key):
    out = e["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    return jnp.sum(jnp.sin(out))


@case({"w": dense(3, 4), "b": elementwise(4)}, {"x": x(5, 3)}, tolerance=3e-3,
      dtype="float16")  # fmt: skip
def arithmetic_in_float16(p, e, key):
    low = jax.tree.map(lambda v: v.astype(jnp.float16), p)
    return score(e["x"].astype(jnp.float16) @ low["w"] + low["b"][None])


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_times_a_number_in_bfloat16(p, e, key):
    x = e["x"].astype(jnp.bfloat16)
    return score(jnp.tanh(x @ (p["w"] / 3).astype(jnp.bfloat16) * 3))


@case(
    {"a": dense(3, 4), "b": dense(3, 2)},
    {"x": x(5, 3)},
    tolerance=BF16,
    dtype="bfloat16",
)
def fused_weights_in_bfloat16(p, e, key):
    fused = jnp.concatenate([p["a"], p["b"]], axis=1).astype(jnp.bfloat16)
    return score(jnp.tanh(e["x"].astype(jnp.bfloat16) @ fused))
