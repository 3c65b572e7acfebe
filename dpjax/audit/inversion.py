"""Gradient inversion: what of an example can be read from a released sum.

The attacks get the release itself, noise, clipping, batch and all, of the code that ships.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import NDArray

from dpjax.typing import Key, Loss, Params


def invert_linear(
    weight: Float[np.ndarray, "D P"], bias: Float[np.ndarray, "P"]
) -> NDArray[np.float64]:
    """Return the input of a dense first layer, in closed form, for each of its P units.

    The gradient of the weights into unit p is the input times that of its bias, so their
    ratio is the input: exactly for one example, a mixture for more (Phong et al. 2017).

    Args:
        weight: Of the release: the gradient of the layer's kernel.
        bias: Of the release: the gradient of its bias.

    Returns:
        ``float64[P, D]``, guesses by falling size of the bias' gradient.
    """
    weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    order = np.argsort(-np.abs(bias))
    safe = np.where(np.abs(bias) > 1e-30, bias, 1e-30)
    return (weight / safe).T[order]


def invert_by_descent(
    loss: Loss,
    params: Params,
    release: Params,
    examples: Any,
    *,
    inputs: str,
    steps: int,
    learning_rate: float,
    key: Key,
) -> Float[Array, "B ..."]:
    """Return inputs whose gradients point where the release points.

    Minimises the cosine distance between the sum of the examples' gradients and the
    release, by Adam over the inputs (Geiping et al. 2020, arXiv 2003.14053, without the
    prior on images).

    Args:
        loss: Of one example.
        params: At which the release was made.
        release: Like params.
        examples: Pytree ``[B, ...]``: labels as they are (the attack knows them); what is
            in ``inputs`` only gives the shape.
        inputs: Key of the attacked input.
        steps: Of Adam.
        learning_rate: Of Adam.
        key: Where the guess starts: uniform in [0, 1].
    """
    guess = jax.random.uniform(key, examples[inputs].shape, jnp.float32)
    optimizer = optax.adam(learning_rate)

    def distance(guess: Array, known: Any) -> Array:
        params, release, examples = known

        def total(params: Params) -> Array:
            rows = {**examples, inputs: guess}
            each = jax.vmap(loss, in_axes=(None, 0, None))(params, rows, key)
            return each.sum()

        gradient = jax.grad(total)(params)
        dot = optax.tree.vdot(gradient, release)
        norms = optax.tree.norm(gradient) * optax.tree.norm(release)
        return jnp.asarray(1 - dot / (norms + 1e-12))

    @jax.jit
    def run(guess: Array, known: Any) -> Array:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            guess, state = carry
            update: Any = optimizer.update
            updates, state = update(jax.grad(distance)(guess, known), state)
            return (jnp.clip(guess + updates, 0, 1), state), None

        start = (guess, optimizer.init(guess))
        (guess, _), _ = jax.lax.scan(step, start, length=steps)
        return guess

    # Arguments, not constants: a program may be kept in a cache, and nobody's data with it.
    return run(guess, (params, release, examples))


def best_correlation(
    guesses: Float[np.ndarray, "G ..."], truths: Float[np.ndarray, "B ..."]
) -> float:
    """Return the highest correlation of any guess with any true input: 1 is exact."""
    one, two = (
        np.asarray(x, np.float64).reshape(len(x), -1) for x in (guesses, truths)
    )
    one, two = (x - x.mean(axis=1, keepdims=True) for x in (one, two))
    norms = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(two, axis=1)
    return float((one @ two.T / np.maximum(norms, 1e-300)).max())
