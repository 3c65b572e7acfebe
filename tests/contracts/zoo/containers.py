"""Pytrees, classes and arrays of all kinds that hold parameters and data."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import (
    B,
    Case,
    case,
    dense,
    draw_data,
    draw_params,
    elementwise,
    register,
    score,
    x,
)


class Pair(NamedTuple):
    w: Any
    b: Any


@case(
    {
        "layers": [Pair(dense(3, 4), elementwise(4)), Pair(dense(4, 4), elementwise(4))],
        "rest": (dense(4, 2), {"deep": [elementwise(2)], "none": None, "empty": {}}),
    },
    (x(5, 3), [x(5)], {"none": None}),
)  # fmt: skip
def nested_pytrees(p, e, key):
    hidden, (weights,), _ = e
    for w, b in p["layers"]:
        hidden = jnp.tanh(hidden @ w + b[None])
    head, rest = p["rest"]
    return score((hidden @ head + rest["deep"][0][None]) * weights[:, None])


@case([dense(3, 4), dense(4, 2)], x(5, 3))
def parameters_in_a_list_and_a_bare_example(p, e, key):
    return score(jnp.tanh(e @ p[0]) @ p[1])


@case({"w": dense(3, 4), "again": dense(3, 4)}, {"x": x(5, 3)})
def two_parameters_of_the_same_values(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) + e["x"] @ p["again"])


@register
def one_array_under_two_names(rng):
    """The same object twice in the pytree is two parameters."""

    def loss(p, e, key):
        return score(jnp.tanh(e["x"] @ p["a"]) + e["x"] @ p["b"])

    w = draw_params(rng, dense(3, 4))
    rules = {"a": "dense", "b": "dense"}
    return Case(loss, {"a": w, "b": w}, draw_data(rng, {"x": x(5, 3)}), rules)


@register
def numpy_parameters_and_examples(rng):
    def loss(p, e, key):
        return score(e["x"] @ p["w"] + p["b"])

    params = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.float32(0.5)}
    examples = {"x": rng.normal(size=(B, 3)).astype(np.float32)}
    return Case(loss, params, examples, {"w": "dense", "b": "elementwise"})


@register
def random_keys_among_the_data(rng):
    def loss(p, e, key):
        keep = jax.random.bernoulli(e["key"], 0.5, (5, 4))
        return score(jnp.where(keep, e["x"] @ p["w"], 0.0))

    examples = draw_data(rng, {"x": x(5, 3)})
    examples["key"] = jax.random.split(jax.random.key(1), B)
    return Case(loss, draw_params(rng, {"w": dense(3, 4)}), examples, {"w": "dense"})


@register
def a_pytree_class_holds_the_parameters(rng):
    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=[]
    )
    class Layer:  # fmt: skip
        def __init__(self, w):
            self.w = w

    def loss(p, e, key):
        return score(e["x"] @ p.w)

    w = draw_params(rng, dense(3, 4))
    return Case(loss, Layer(w), draw_data(rng, {"x": x(5, 3)}), {"w": "dense"})
