"""Gradients of a number that parameters make: one for all examples, times a number for each.

A penalty such as ``sum(w ** 2)`` meets the loss of an example as one number. What flows back
into it, an example's *coefficient*, is a number too; from there to the parameters the way is
the same for all examples, and linear. So the gradient of example b is ``coefficient[b]``
times a ``matrix`` that is computed once.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.clipping.arithmetic.rounding import row_norms, smallest, summed, unmerged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multiple:
    """Multiples of one gradient.

    Attributes:
        coefficient: ``[B]``.
        matrix: ``[H, K, N]``, in the axes of the factors that it is added to.
    """

    coefficient: Float[Array, "B"]
    matrix: Float[Array, "H K N"]

    @property
    def rows(self) -> Float[Array, "B H K N"]:
        """The gradients themselves."""
        return self.coefficient[:, None, None, None] * self.matrix[None]

    @property
    def lengths(self) -> tuple[Float[Array, "H B 1"], Float[Array, "H B 1"]]:
        """Return the coefficients' sizes, and those of the matrix, or more."""
        left = jnp.abs(self.coefficient)[None, :, None]
        right = row_norms(self.matrix).longest[:, None, None]
        shape = (right.shape[0], left.shape[1], 1)
        return jnp.broadcast_to(left, shape), jnp.broadcast_to(right, shape)

    def total(self, weights: Float[Array, "B"]) -> Float[Array, "H K N"]:
        """Return the weighted sum; where a weight is 0, nothing counts."""
        scaled = jnp.where(weights != 0, weights * self.coefficient, 0.0)
        return jnp.sum(scaled) * self.matrix

    def product(self, other: "Multiple") -> Float[Array, "H B 1"]:
        """Return the inner products with other multiples."""
        inner, _ = summed(self.matrix * other.matrix)
        product = unmerged(inner)[:, None] * self.coefficient[None]
        return (product * other.coefficient[None])[..., None]


def differenced(first: Multiple, second: Multiple) -> list[Multiple]:
    """Return multiples with the same sum, small where the two nearly cancel."""
    return [
        Multiple(first.coefficient, first.matrix - second.matrix),
        Multiple(first.coefficient + second.coefficient, second.matrix),
    ]


def roundings(part: Multiple) -> int:
    """Return how many roundings a term of ``part.product`` goes through at most."""
    _, count = summed(part.matrix)
    return count + 3


def underflow(
    parts: Sequence[Multiple], lengths: Sequence[tuple[Array, Array]]
) -> Float[Array, "B"] | float:
    """Bound what underflows in the products of multiples with all factors, in L2 squared.

    An entry of ``left_t matrix`` misses K smallest numbers at most, the product with
    ``right_t`` N more, and each is then multiplied by one or two of the lengths; so is what
    an inner product of matrices misses, by coefficients.

    Args:
        parts: All multiples in a gradient.
        lengths: Of all its factors, ``[H, B, T]`` twice each.
    """
    if not parts:
        return 0.0
    longest = jnp.ones_like(parts[0].coefficient)
    longest += sum(jnp.sum(x, axis=(0, 2)) for pair in lengths for x in pair)
    _, k, n = parts[0].matrix.shape
    positions = sum(left.shape[0] * left.shape[2] for left, _ in lengths)
    few = 4 * smallest(longest.dtype) * len(parts) * (k * n + 1)
    return few * positions * jnp.square(longest)
