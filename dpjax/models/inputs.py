"""What happens to inputs before a model sees them."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from dpjax.typing import Example, Key, Model, Params


def standardized(model: Model, *, mean: Sequence[float], std: Sequence[float]) -> Model:
    """Feed a model ``(image - mean) / std`` instead of ``image``.

    Args:
        model: Reads ``example["image"]``, ``float32[H, W, C]``.
        mean: One value for each channel. Public constants: statistics computed from
            the private data itself would need noise.
        std: One positive value for each channel, likewise.

    Raises:
        ValueError: If a standard deviation is not positive.
    """
    if min(std) <= 0:
        raise ValueError(f"std={tuple(std)} must be positive")

    def scaled(example: Example) -> Example:
        shift, scale = (jnp.asarray(values)[None, None] for values in (mean, std))
        image = (example["image"] - shift) / scale
        return {**example, "image": image}

    def init(key: Key, example: Example) -> Params:
        return model.init(key, scaled(example))

    def apply(params: Params, example: Example, key: Key) -> Array:
        return model.apply(params, scaled(example), key)

    return Model(init, apply)
