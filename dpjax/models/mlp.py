"""Multi-layer perceptrons."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from dpjax.checks import check_positive_int
from dpjax.models.linen import array_model, image_model
from dpjax.typing import Model

_ACTIVATIONS = {"relu": jax.nn.relu, "softplus": jax.nn.softplus, "tanh": jnp.tanh}


class _Mlp(nn.Module):
    features: tuple[int, ...]
    outputs: int
    activation: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = nn.Dense(width, name=f"dense_{i}")(x)
            x = _ACTIVATIONS[self.activation](x)
        return nn.Dense(self.outputs, name="head")(x)


def mlp(*, features: tuple[int, ...], num_classes: int, activation: str) -> Model:
    """Build a fully connected classifier of the flattened image.

    Kernels start LeCun normal, biases at zero. ``features=()`` is multinomial logistic
    regression.

    Args:
        features: Widths of the hidden layers, from the input up.
        num_classes: Number of classes.
        activation: "relu", "softplus" or "tanh", after each hidden layer.

    Returns:
        A model from ``example["image"]``, ``float32[H, W, C]``, to logits
        ``float32[num_classes]``.

    Raises:
        ValueError: If the activation is unknown, or a width is no positive integer.
    """
    return image_model(_module(features, num_classes, activation))


def regression_mlp(*, features: tuple[int, ...], activation: str) -> Model:
    """Build a fully connected predictor of one number.

    Args:
        features: Widths of the hidden layers, from the input up.
        activation: As of ``mlp``.

    Returns:
        A model from ``example["x"]``, ``float32[D]``, to a prediction ``float32[]``.

    Raises:
        ValueError: If the activation is unknown, or a width is no positive integer.
    """
    vector = array_model(_module(features, 1, activation), field="x")

    return vector.around(lambda apply: lambda *args: apply(*args)[0])


def _module(features: tuple[int, ...], outputs: int, activation: str) -> _Mlp:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{activation=} is unknown; choose from {[*_ACTIVATIONS]}")
    if isinstance(features, str | int):
        raise ValueError(f"{features=} must be a tuple of widths")
    for width in features:
        check_positive_int("features", width)
    check_positive_int("num_classes", outputs)
    return _Mlp(tuple(features), outputs, activation)
