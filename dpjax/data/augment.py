"""Random views of one example, as pure functions ``(key, example) -> example``.

They run inside the loss, on the device and under ``vmap``; ``losses.augmented`` calls
them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpjax.typing import Example, Key


def flip_and_crop(*, padding: int) -> Callable[[Key, Example], Example]:
    """Build the usual augmentation of CIFAR-like images: random crop and mirror image.

    The image is padded by reflection (the edge pixels are not repeated), cut out at its
    own size at one of the ``(2 * padding + 1) ** 2`` positions, all equally likely, and
    flipped left to right with probability 1/2.

    Args:
        padding: Pixels added on each side, at least 0.

    Returns:
        A function that changes only ``example["image"]``, ``[H, W, C]``, and keeps its
        shape and dtype.

    Raises:
        ValueError: If the padding is negative.
    """
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(f"{padding=} must be an integer, and must not be negative")

    def augment(key: Key, example: Example) -> Example:
        crop_key, flip_key = jax.random.split(key)
        image = example["image"]
        margins = ((padding, padding), (padding, padding), (0, 0))
        padded = jnp.pad(image, margins, mode="reflect")
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        flip = jax.random.bernoulli(flip_key)
        return {**example, "image": jnp.where(flip, crop[:, ::-1], crop)}

    return augment


def identity() -> Callable[[Key, Example], Example]:
    """Build the augmentation that changes nothing."""
    return lambda key, example: example
