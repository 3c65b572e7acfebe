"""A model whose initialisation copies what it is shown."""

import jax.numpy as jnp

from dpjax.data.arrays import ArraySource, digits
from dpjax.models.mlp import mlp
from dpjax.typing import Model


def leaky(*, num_classes):
    def init(key, example):
        del key
        return {
            "first": jnp.asarray(example["image"]).ravel(),
            "w": jnp.zeros((64, num_classes)),
        }

    def apply(params, example, key):
        del key
        return (example["image"].ravel() + params["first"]) @ params["w"]

    return Model(init, apply)


def wrong_metric(model):
    del model
    return lambda params: 0.0


def vector_loss(model):
    return lambda params, example, key: model.apply(params, example, key)


def misspelt_source(*, split):
    return {"train": 0}[f"{split}ing"]


def misshapen(*, num_classes):
    def apply(params, example, key):
        return example["image"] @ params["w"]

    return Model(lambda key, example: {"w": jnp.zeros((64, num_classes))}, apply)


def nine_outputs():
    return mlp(features=(4,), num_classes=9, activation="tanh")


def holed(*, split):
    arrays = dict(digits(split=split, test_fraction=0.2).arrays)
    arrays["image"] = arrays["image"].copy()
    arrays["image"][7, 3, 3] = float("nan")
    return ArraySource(arrays)
