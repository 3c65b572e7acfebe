"""Norms and sums of weights that a loop over layers uses in turn, a layer at a time."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.clipping.arithmetic import kernels
from dpjax.clipping.arithmetic.kernels import Factors
from dpjax.clipping.arithmetic.rounding import Norms, of_terms, row_norms
from dpjax.clipping.planning.slots import Group
from dpjax.parallel.gathering import sharers

Rows = Float[Array, "B"]


def layers(group: Group) -> int:
    """Return how many weights of one layer a group has: its loops turn so often."""
    return math.prod(loop.length for loop in group.sites[0].value.loops)


def weighted_sum(
    parts: list[Factors], weights: Rows, *, terms: int, layers: int
) -> Float[Array, "H K N"]:
    """Return ``kernels.weighted_sum``; of rows that devices share, for a layer at a time.

    Each of these devices has a whole sum before it is reduced and taken apart: no more than
    one layer's.
    """
    if layers == 1 or sharers() == 1:
        return kernels.weighted_sum(parts, weights, terms=terms)

    def of_layer(parts: list[Factors]) -> Array:
        return kernels.weighted_sum(parts, weights, terms=terms)

    split = jax.tree.map(lambda x: x.reshape(layers, -1, *x.shape[1:]), parts)
    sums = jax.lax.map(of_layer, split)
    return sums.reshape(-1, *sums.shape[2:])


def weighted_rows(
    rows: Float[Array, "B H K N"], weights: Rows, *, layers: int
) -> Float[Array, "H K N"]:
    """Return ``kernels.weighted_rows`` in the way of ``weighted_sum``."""
    if layers == 1 or sharers() == 1:
        return kernels.weighted_rows(rows, weights)
    size = rows.shape[1] // layers

    def of_layer(i: Array) -> Array:
        layer = jax.lax.dynamic_slice_in_dim(rows, i * size, size, axis=1)
        return kernels.weighted_rows(layer, weights)

    sums = jax.lax.map(of_layer, jnp.arange(layers))
    return sums.reshape(-1, *sums.shape[2:])


def formed_norms(rows: Array, *, loops: int) -> Norms:
    """Return the norms of gradients, ``[*loops, B, *weight]``, formed in ``loops``."""
    turns = _turns(rows, loops)
    each = jax.lax.map(row_norms, turns)
    squares, slack = (jnp.sum(x, axis=0) for x in each)
    # The turns add up with as many roundings.
    return Norms(squares, slack + of_terms(len(turns), squares.dtype) * squares)


def formed_sum(rows: Array, weights: Rows, *, loops: int) -> Float[Array, "..."]:
    """Return the weighted sum of such gradients, ``[*loops, *weight]``."""
    sums = jax.lax.map(
        lambda turn: kernels.weighted_rows(turn, weights), _turns(rows, loops)
    )
    return sums.reshape(*rows.shape[:loops], *rows.shape[loops + 1 :])


def _turns(rows: Array, loops: int) -> Array:
    return rows.reshape(-1, *rows.shape[loops:])
