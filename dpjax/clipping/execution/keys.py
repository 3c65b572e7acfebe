"""Whose randomness is whose: the key of each example, from the example itself."""

import jax

from dpjax.privacy.fingerprint import combined_fingerprint
from dpjax.typing import Batch, Key


def example_keys(key: Key, batch: Batch) -> Key:
    """Return the key of each example, ``key[B]``: ``key`` folded with the example's bits.

    Never with its place in the data or in the batch. When one example is removed the
    places of all later ones move; keyed by them, the others would draw other dropout
    masks, and sums of neighbouring data would lie many clip norms apart for whoever knows
    ``key``. Keyed by what it is, an example contributes one and the same vector to every
    data set that it is in, so that the bound on what one example moves holds for every
    ``key``, a public one too. Equal examples share a key.

    Args:
        key: A typed key; fold the step into it, so that no two steps share masks.
        batch: B examples, of any dtypes.
    """
    return jax.vmap(lambda x: jax.random.fold_in(key, combined_fingerprint(x)))(
        batch.examples
    )
