"""What happens to inputs before a model sees them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpjax.typing import Example, Key, Model, Params


def resized(model: Model, *, size: int) -> Model:
    """Feed a model images of ``size`` x ``size`` pixels, resized bilinearly.

    Args:
        model: Reads ``example["image"]``, ``float32[size, size, C]``.
        size: Side of the images it sees.

    Raises:
        ValueError: If the size is not positive.
    """
    if size < 1:
        raise ValueError(f"{size=} must be at least 1")

    def scaled(example: Example) -> Example:
        image = jnp.asarray(example["image"])
        shape = (size, size, image.shape[-1])
        return {**example, "image": jax.image.resize(image, shape, "bilinear")}

    return _fed(model, scaled)


def standardized(model: Model, *, mean: Sequence[float], std: Sequence[float]) -> Model:
    """Feed a model ``(image - mean) / std`` instead of ``image``.

    Args:
        model: Reads ``example["image"]``, ``float32[H, W, C]``.
        mean: One value for each channel. Public constants: statistics computed from
            the private data itself would need noise.
        std: One positive value for each channel, likewise.

    Raises:
        ValueError: If a standard deviation is not positive, or there are more of one kind.
    """
    if not (isinstance(mean, Sequence) and isinstance(std, Sequence)):
        raise ValueError(
            f"{mean=} and {std=} must be tuples of a number for each channel"
        )
    if len(mean) != len(std) or not std:
        raise ValueError(f"{mean=} and {std=} must have one number for each channel")
    if min(std) <= 0:
        raise ValueError(f"std={tuple(std)} must be positive")

    def scaled(example: Example) -> Example:
        shift, scale = (jnp.asarray(values)[None, None] for values in (mean, std))
        image = (example["image"] - shift) / scale
        return {**example, "image": image}

    return _fed(model, scaled)


def _fed(model: Model, scaled: Callable[[Example], Example]) -> Model:
    def init(key: Key, example: Example) -> Params:
        return model.init(key, scaled(example))

    def fed(apply: Callable[..., Array]) -> Callable[..., Array]:
        return lambda params, example, key: apply(params, scaled(example), key)

    return model.around(fed)._replace(init=init)
