"""Public random directions of zeroth-order methods: anyone with the seed can redraw them.

They are no noise and protect nothing. Their seed is written in configs and on cards, and
gives other keys than those of noise, sampling and losses, whatever numbers are chosen.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.privacy.entropy import entropy
from dpjax.privacy.sensitive import accumulation_dtype
from dpjax.typing import Params, Scalar


def gaussian_direction(like: Params, *, seed: int, step: int | Scalar) -> Params:
    """Return independent N(0, 1) entries, shaped ``like`` params, at least float32.

    A pure function of (seed, step, leaf), the same for every sharding.

    Args:
        like: Pytree of floating-point arrays.
        seed: Public.
        step: Which direction of this seed.
    """
    words = np.frombuffer(entropy("direction", seed=seed), np.uint32)[:2]
    root = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    key = jax.random.fold_in(root, step)
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        [
            jax.random.normal(
                jax.random.fold_in(key, index),
                leaf.shape,
                accumulation_dtype(leaf.dtype),
            )
            for index, leaf in enumerate(leaves)
        ]
    )
