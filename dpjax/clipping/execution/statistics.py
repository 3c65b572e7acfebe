"""The private statistics of a batch that every engine hands back."""

import jax.numpy as jnp
from jaxtyping import Array

from dpjax.privacy.sensitive import PerExample


def per_example(losses: Array, norms: Array, finite: Array, mask: Array) -> PerExample:
    """Return the private statistics of a batch, zero on padding."""
    return PerExample(
        losses=jnp.where(mask, losses, 0.0),
        norms=jnp.where(mask, norms, 0.0),
        nonfinite=mask & ~finite,
        mask=mask,
    )
