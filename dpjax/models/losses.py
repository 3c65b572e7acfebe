"""Losses of one example, built from a model.

There is no batch axis, so nothing here can mix examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dpjax.checks import check_model, check_number, check_positive_int
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
    check_model(model)
    check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{label_smoothing=} must be in [0, 1)")

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        logits = model.apply(params, example, key).astype(jnp.float32)
        label = _one_number(example, "label")
        if not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(
                f"'label' is {label.dtype}; the number of a class is wanted"
            )
        to_label = optax.softmax_cross_entropy_with_integer_labels(logits, label)
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
    check_model(model)

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        prediction = model.apply(params, example, key).astype(jnp.float32)
        if prediction.shape:
            raise ValueError(
                f"the model's output has shape {prediction.shape}, and a regression wants "
                "one number for ONE example, of shape ()"
            )
        return jnp.square(prediction - _one_number(example, "y"))

    return loss


def causal_lm(model: Model) -> Loss:
    """Build the cross-entropy of the next tokens of one example, averaged inside it.

    ``sum_t w_t * nll(token t) / sum_t w_t`` over the tokens after the first. An example
    without any weight there has loss 0.

    Args:
        model: A model with outputs ``[T, V]``: row t is about token t + 1.

    Returns:
        A loss in nats that reads ``tokens``, ``int32[T]``, and for the weights ``w_t``
        of being predicted ``weights``, ``float32[T]`` or ``bool[T]``; if there are none,
        ``mask``, ``bool[T]``; if that is not there either, 1. It computes in float32
        whatever the dtype of the logits.
    """
    check_model(model)

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        tokens = example["tokens"]
        logits = model.apply(params, example, key)
        # The last row predicts nothing; to give it no weight is cheaper than to cut it off.
        weights = _token_weights(example).at[0].set(0.0)
        return _token_loss(logits, jnp.roll(tokens, -1), jnp.roll(weights, -1))

    return loss


def masked_lm(model: Model, *, mask_token: int, rate: float) -> Loss:
    """Build the cross-entropy of tokens that are hidden from the model.

    Each token that counts is replaced by ``mask_token`` with probability ``rate``, drawn
    anew in every step from the loss's key; the loss is the mean over those replaced, and 0
    if none is. Unlike BERT, no chosen token is left as it is or replaced by another one.

    Args:
        model: A model with outputs ``[T, V]``: row t is about token t.
        mask_token: The id of the mask token.
        rate: Probability, in (0, 1].

    Returns:
        A loss in nats that reads what that of ``causal_lm`` reads; here tokens of weight 0
        are never hidden, and others are averaged with their weights.

    Raises:
        ValueError: If the rate is out of range.

    References:
        Devlin et al., BERT, https://arxiv.org/abs/1810.04805
    """
    check_model(model)
    check_number("rate", rate)
    if not isinstance(mask_token, int):
        raise ValueError(f"{mask_token=} must be the number of a token")
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{rate=} must be in (0, 1]")

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        choice_key, model_key = jax.random.split(key)
        tokens, weights = example["tokens"], _token_weights(example)
        chosen = jax.random.bernoulli(choice_key, rate, tokens.shape) & (weights > 0)
        hidden = {**example, "tokens": jnp.where(chosen, mask_token, tokens)}
        logits = model.apply(params, hidden, model_key)
        return _token_loss(logits, tokens, jnp.where(chosen, weights, 0.0))

    return loss


def _one_number(example: Example, key: str) -> Array:
    """Return ``example[key]``; an array of one number would be broadcast, not compared."""
    value = jnp.asarray(example[key])
    if value.shape:
        raise ValueError(
            f"{key!r} of an example has shape {value.shape}, and one number is wanted: give "
            f"the source an array [N], as {key}[:, 0] is for [N, 1]"
        )
    return value


def _token_weights(example: Example) -> Array:
    given = example.get("weights", example.get("mask"))
    if given is None:
        given = jnp.ones(example["tokens"].shape)
    return jnp.asarray(given, jnp.float32)


def _token_loss(
    logits: Float[Array, "T V"], targets: Int[Array, "T"], weights: Float[Array, "T"]
) -> Scalar:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
    total = jnp.sum(weights)
    mean = jnp.sum(weights * losses) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, mean, 0.0)


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
    check_positive_int("views", views)

    def augmented_loss(params: Params, example: Example, key: Key) -> Scalar:
        def view_loss(view_key: Key) -> Scalar:
            augment_key, loss_key = jax.random.split(view_key)
            value = loss(params, augment(augment_key, example), loss_key)
            _check_scalar(value)
            return value

        return jnp.mean(jax.vmap(view_loss)(jax.random.split(key, views)))

    return augmented_loss


def _check_scalar(value: Any) -> None:
    # A mean over views would hide an integer, whose gradient is zero.
    if not hasattr(value, "shape") and not isinstance(value, float):
        found = f"a {type(value).__name__}"
    elif jnp.shape(value):
        found = f"an array of shape {jnp.shape(value)}"
    elif not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        found = f"a scalar of dtype {jnp.result_type(value)}"
    else:
        return
    raise TypeError(
        f"loss returned {found}; it must return one floating-point scalar for ONE example"
    )


def accuracy(model: Model) -> Callable[[Params, Example], Array]:
    """Build the correctness of the top class for one labelled example.

    Args:
        model: A model with outputs ``[num_classes]``; its ``evaluate`` is taken.

    Returns:
        A function of ``(params, example)``, 1.0 where the largest output is at
        ``example["label"]`` and 0.0 elsewhere, ``float32[]``.
    """
    check_model(model)
    model = model.evaluating()

    def correct(params: Params, example: Example) -> Array:
        outputs = model.apply(params, example, jax.random.key(0))
        return (jnp.argmax(outputs) == _one_number(example, "label")).astype(
            jnp.float32
        )

    return correct


def token_nats(model: Model) -> Callable[[Params, Example], Array]:
    """Build the mean cross-entropy of the next tokens of one example, as a metric.

    Args:
        model: As for ``causal_lm``; its ``evaluate`` is taken.

    Returns:
        A function of ``(params, example)``, ``float32[]`` in nats: divided by ``log(2)``
        it is bits per token, and its exponential is a perplexity.
    """
    loss = causal_lm(model.evaluating())

    def nats(params: Params, example: Example) -> Array:
        return loss(params, example, jax.random.key(0))

    return nats


def error_rate(model: Model) -> Callable[[Params, Example], Array]:
    """Build the opposite of ``accuracy``: 1.0 where the top class is wrong."""
    correct = accuracy(model)

    def wrong(params: Params, example: Example) -> Array:
        return 1.0 - correct(params, example)

    return wrong


def squared_error(model: Model) -> Callable[[Params, Example], Array]:
    """Build the squared error as a metric, whose mean is the mean squared error.

    Args:
        model: A model with one output, ``[]``; its ``evaluate`` is taken.

    Returns:
        A function of ``(params, example)``; it reads ``example["y"]``; ``float32[]``.
    """
    loss = regression(model.evaluating())

    def error(params: Params, example: Example) -> Array:
        return loss(params, example, jax.random.key(0))

    return error


def hidden_token_nats(
    model: Model, *, mask_token: int, rate: float
) -> Callable[[Params, Example], Array]:
    """Build the loss of ``masked_lm`` as a metric: one draw of hidden places for all.

    Args:
        model: As for ``masked_lm``; its ``evaluate`` is taken.
        mask_token: Likewise.
        rate: Likewise.

    Returns:
        A function of ``(params, example)``, ``float32[]`` in nats.
    """
    loss = masked_lm(model.evaluating(), mask_token=mask_token, rate=rate)

    def nats(params: Params, example: Example) -> Array:
        return loss(params, example, jax.random.key(0))

    return nats
