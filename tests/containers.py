"""A model whose parameters are in every kind of container, and parts that do not fit."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax.data.arrays import ArraySource, digits
from dpjax.typing import Model


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Half:
    """As one half of a module that is split into arrays and the rest."""

    scale: Any
    dropped: Any  # None: in the other half
    activation: Callable = dataclasses.field(metadata={"static": True})


def anything(*, num_classes):
    def init(key, example):
        first, second = jax.random.split(key)
        return {
            "mlp/~/linear_0": Layer(0.1 * jax.random.normal(first, (64, 8)), None),
            "blocks": [
                (Half(jnp.ones(8, jnp.bfloat16), None, jnp.tanh), jnp.zeros(8)),
                {1: jnp.ones((), jnp.bfloat16), 12: jnp.zeros(8)},
            ],
            "head": Layer(
                0.1 * jax.random.normal(second, (8, num_classes)), jnp.zeros(10)
            ),
        }

    def apply(params, example, key):
        (half, shift), block = params["blocks"]
        x = example["image"].ravel() @ params["mlp/~/linear_0"].kernel
        x = half.activation(x * half.scale + shift) * block[1] + block[12]
        return x @ params["head"].kernel + params["head"].bias

    return Model(init, apply)


NAMES = [
    "blocks/0/0/scale",
    "blocks/0/1",
    "blocks/1/1",
    "blocks/1/12",
    "head/kernel",
    "head/bias",
    "mlp/~/linear_0/kernel",
]


def bare(*, num_classes):
    return Model(
        init=lambda key, example: jnp.zeros((64, num_classes)),
        apply=lambda params, example, key: example["image"].ravel() @ params,
    )


def pair(*, num_classes):
    model = bare(num_classes=num_classes)
    return model.init, model.apply


def empty(*, num_classes):
    def apply(params, example, key):
        return jnp.zeros(num_classes)

    return Model(lambda key, example: {"head": {}, "rest": None}, apply)


def colliding(*, num_classes):
    def init(key, example):
        weights = jnp.zeros((64, num_classes))
        return {"head/kernel": weights, "head": {"kernel": weights}}

    def apply(params, example, key):
        return example["image"].ravel() @ params["head/kernel"]

    return Model(init, apply)


def counting(*, num_classes, dtype):
    def init(key, example):
        return {"w": jnp.zeros((64, num_classes)), "seen": jnp.zeros((), dtype)}

    return Model(
        init, lambda params, example, key: example["image"].ravel() @ params["w"]
    )


def dropping(*, num_classes, evaluated):
    """Logistic regression on inputs of which half are dropped."""

    def scores(params, image):
        return image.ravel() @ params["w"]

    def apply(params, example, key):
        keep = jax.random.bernoulli(key, 0.5, example["image"].shape)
        return scores(params, 2 * keep * example["image"])

    return Model(
        init=lambda key, example: {"w": jax.random.normal(key, (64, num_classes))},
        apply=apply,
        evaluate=(lambda params, example, key: scores(params, example["image"]))
        if evaluated
        else None,
    )


def largest_score(model):
    """A metric of the user's, who thinks of no dropout."""

    def largest(params, example):
        return jnp.max(model.apply(params, example, jax.random.key(0)))

    return largest


def held_out(*, size, label):
    """Digits of ``size`` pixels a side, without labels if asked."""
    arrays = dict(digits(split="test", test_fraction=0.2).arrays)
    arrays["image"] = np.resize(arrays["image"], (360, size, size, 1)).astype(
        np.float32
    )
    if not label:
        arrays["target"] = arrays.pop("label")
    return ArraySource(arrays)


def cropped():
    return lambda key, example: {**example, "image": example["picture"][1:-1]}


def plateau(*, learning_rate):
    return optax.chain(optax.sgd(learning_rate), optax.contrib.reduce_on_plateau())


def rate(*, learning_rate):
    return learning_rate


class Doubled(NamedTuple):
    """An optimizer's state that says what is evaluated."""

    count: jax.Array

    def evaluation_params(self, params):
        return jax.tree.map(lambda x: 2 * x, params)


def doubled(*, learning_rate):
    def update(updates, state, params=None):
        return updates, Doubled(state.count + 1)

    own = optax.GradientTransformation(lambda params: Doubled(jnp.zeros(())), update)
    return optax.chain(own, optax.sgd(learning_rate))


def growing(*, learning_rate):
    """An optimizer that keeps every gradient: no step has the program of the one before."""

    def update(updates, state, params=None):
        return updates, (*state, updates)

    return optax.chain(
        optax.GradientTransformation(lambda params: (), update),
        optax.sgd(learning_rate),
    )


class Summed(NamedTuple):
    count: jax.Array

    def evaluation_params(self, params):
        return jax.tree.map(jnp.sum, params)


def summed(*, learning_rate):
    del learning_rate
    return optax.GradientTransformation(
        lambda params: Summed(jnp.zeros(())),
        lambda updates, state, params=None: (updates, state),
    )
