"""Multi-layer perceptrons."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from dpjax.models.linen import image_model
from dpjax.typing import Model

_ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


class _Mlp(nn.Module):
    features: tuple[int, ...]
    num_classes: int
    activation: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = nn.Dense(width, name=f"dense_{i}")(x)
            x = _ACTIVATIONS[self.activation](x)
        return nn.Dense(self.num_classes, name="head")(x)


def mlp(*, features: tuple[int, ...], num_classes: int, activation: str) -> Model:
    """Build a fully connected classifier of the flattened image.

    Kernels start LeCun normal, biases at zero. ``features=()`` is multinomial logistic
    regression.

    Args:
        features: Widths of the hidden layers, from the input up.
        num_classes: Number of classes.
        activation: "relu" or "tanh", after each hidden layer.

    Returns:
        A model from ``example["image"]``, ``float32[H, W, C]``, to logits
        ``float32[num_classes]``.

    Raises:
        ValueError: If the activation is unknown.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{activation=} is unknown; choose from {[*_ACTIVATIONS]}")
    return image_model(_Mlp(tuple(features), num_classes, activation))
