"""Losses of one example, built from a model.

There is no batch axis, so nothing here can mix examples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dpjax.typing import Example, Key, Loss, Model, Params, Scalar


def classification(model: Model, *, label_smoothing: float = 0.0) -> Loss:
    """Build the softmax cross-entropy of one labelled example.

    With smoothing ``s`` the target is ``1 - s`` on the label plus ``s`` spread evenly
    over all classes, the label included.

    Args:
        model: A model with outputs ``[num_classes]``, taken as logits.
        label_smoothing: ``s``, at least 0 and below 1.

    Returns:
        A loss in nats that reads ``example["label"]``, ``int32[]``, and computes in
        float32 whatever the dtype of the logits. A label of ``num_classes`` or more
        gives NaN.

    Raises:
        ValueError: If the label smoothing is out of range.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{label_smoothing=} must be in [0, 1)")

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        logits = model.apply(params, example, key).astype(jnp.float32)
        to_label = optax.softmax_cross_entropy_with_integer_labels(
            logits, example["label"]
        )
        to_uniform = -jnp.mean(jax.nn.log_softmax(logits))
        return (1.0 - label_smoothing) * to_label + label_smoothing * to_uniform

    return loss


def regression(model: Model) -> Loss:
    """Build the squared error of one example with a number as its target.

    Args:
        model: A model with one output, ``[]``.

    Returns:
        A loss that reads ``example["y"]``, ``float32[]``, and computes in float32.
    """

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        prediction = model.apply(params, example, key).astype(jnp.float32)
        return jnp.square(prediction - example["y"])

    return loss


def augmented(
    loss: Loss, *, augment: Callable[[Key, Example], Example], views: int
) -> Loss:
    """Average a loss over random views of the same example.

    Augmentation multiplicity: the gradient of the built loss is the mean of the view
    gradients, so they are averaged before the clipping.

    Args:
        loss: The loss of one view.
        augment: Map ``(key, example)`` to a random view; jittable and vmappable.
        views: Number of views, at least 1. Time and memory of one example grow with it.

    Returns:
        A loss that draws fresh views from its key.

    Raises:
        ValueError: If there is less than one view.

    Sensitivity:
        As without views: all views belong to one example, and what is clipped is still
        one vector for one example.

    References:
        Fort et al., Drawing Multiple Augmentation Samples Per Image During Training
        Efficiently Decreases Test Error, https://arxiv.org/abs/2105.13343
        De et al., Unlocking High-Accuracy Differentially Private Image Classification
        through Scale, https://arxiv.org/abs/2204.13650
    """
    if views < 1:
        raise ValueError(f"{views=} must be at least 1")

    def augmented_loss(params: Params, example: Example, key: Key) -> Scalar:
        def view_loss(view_key: Key) -> Scalar:
            augment_key, loss_key = jax.random.split(view_key)
            return loss(params, augment(augment_key, example), loss_key)

        losses = jax.vmap(view_loss)(jax.random.split(key, views))
        if losses.shape != (views,):
            raise TypeError(
                f"loss returned an array of shape {losses.shape[1:]}; it must return one "
                "floating-point scalar for ONE example"
            )
        return jnp.mean(losses)

    return augmented_loss


def accuracy(model: Model) -> Callable[[Params, Example], Array]:
    """Build the correctness of the top class for one labelled example.

    Args:
        model: A model with outputs ``[num_classes]`` that do not depend on the key.

    Returns:
        A function of ``(params, example)``, 1.0 where the largest output is at
        ``example["label"]`` and 0.0 elsewhere, ``float32[]``.
    """

    def correct(params: Params, example: Example) -> Array:
        outputs = model.apply(params, example, jax.random.key(0))
        return (jnp.argmax(outputs) == example["label"]).astype(jnp.float32)

    return correct


def error_rate(model: Model) -> Callable[[Params, Example], Array]:
    """Build the opposite of ``accuracy``: 1.0 where the top class is wrong."""
    correct = accuracy(model)

    def wrong(params: Params, example: Example) -> Array:
        return 1.0 - correct(params, example)

    return wrong


def squared_error(model: Model) -> Callable[[Params, Example], Array]:
    """Build the squared error as a metric, whose mean is the mean squared error.

    Args:
        model: A model with one output, ``[]``, that does not depend on the key.

    Returns:
        A function of ``(params, example)``; it reads ``example["y"]``; ``float32[]``.
    """
    loss = regression(model)

    def error(params: Params, example: Example) -> Array:
        return loss(params, example, jax.random.key(0))

    return error
