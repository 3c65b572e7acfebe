"""A model whose initialisation copies what it is shown."""

import jax.numpy as jnp

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
