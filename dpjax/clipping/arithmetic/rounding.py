"""What floating point does to norms and sums, and how one example stays within its bound.

Let ``u`` be the unit roundoff, and let results below the smallest normal number ``eta`` be
flushed to zero. A sum of n terms, in whatever order, is wrong by at most ``n u sum |x|``,
and by ``n eta`` for what underflows. From this follow, for each example,

- ``Norms.slack``: the true squared norm is at most ``squares + slack``, for every input;
- the *mass* ``M = sum_t |left_t| |right_t|`` of a gradient that is a sum over T positions:
  computed in another order, it is another gradient, at most ``2 T u M`` away. Where the
  gradient that was measured is not the row that is summed, ``3 T u M`` are added to its
  norm: for both roundings, and for what the example's own terms, while they pass through
  the batch's sum, make others lose. So ``M T u`` times its factor is at most the clip norm.

Norm and sum must be of the same numbers. A compiler may compute a value anew wherever it is
used, and round it otherwise (a fused multiply-add here, none there): where most of it
cancels, that is another value. So both are computed ``apart`` from what their operands are
made of. What is computed a second time on purpose, to save memory, is measured a second
time and scaled to what was measured first (``capped``).

Excess precision: a compiler (XLA's for GPUs does) may leave out a cast to bfloat16 and back.
What an example's gradient is then depends on the program, but not its bound: norm and sum
read the same arrays, of the dtype that they have behind the barrier, products of bfloat16
are exact in float32, and what is rounded on purpose is rounded by ``reduce_precision``, which
is no cast (``kernels._split``). (Argued from the operations' definitions; no GPU was at hand.)

Theorem. For every float32 input the contribution of an example, as the sum takes it up, has
an L2 norm of at most ``C (1 + 1e-6)``; an example whose norm is not finite counts as zero.
The sums of neighbouring batches of B examples differ by as much, and by what rounding may
make of the *other* examples' sum: ``n u (B C)`` for n additions, whatever the data.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.parallel.gathering import is_divided
from dpjax.privacy.sensitive import accumulation_dtype

Tree = TypeVar("Tree")
Result = TypeVar("Result")

_STAGE = 2048
"""Terms up to which one sum is as good as two sums, one of the other."""


class Norms(NamedTuple):
    """Squared norms ``[B]``, and how far rounding may have taken them below the truth."""

    squares: Float[Array, "B"]
    slack: Float[Array, "B"]

    @property
    def longest(self) -> Float[Array, "B"]:
        """The norm that the vector has at most."""
        return jnp.sqrt(self.squares + self.slack)


def of_terms(count: float, dtype: Any) -> float:
    """Return how far, relatively, ``count`` roundings in a row may be from the truth."""
    roundings = count * float(jnp.finfo(dtype).eps) / 2
    return roundings / (1 - roundings) if roundings < 0.5 else math.inf


def smallest(dtype: Any) -> float:
    """Return the smallest normal number: what is below may be flushed to zero."""
    return float(jnp.finfo(dtype).tiny)


def apart(function: Callable[[Tree], Result], operands: Tree) -> Result:
    """Return ``function(operands)``, where the operands are what others see of them.

    XLA forgets its optimization barriers on a CPU before it fuses. But a branch reads its
    operands from memory and cannot compute them anew, and that the other branch is never
    taken, XLA cannot know. Elsewhere barriers hold until after fusion (unmeasured).

    Args:
        function: Pytree of arrays -> pytree of floating-point arrays.
        operands: Not under ``vmap``, which would take both branches.
    """
    # Axes of length 1 would make the compiler compute, or copy, an operand once more.
    squeezed = jax.lax.optimization_barrier(jax.tree.map(jnp.squeeze, operands))

    def taken(squeezed: Tree) -> Result:
        shaped = jax.tree.map(lambda x, y: x.reshape(y.shape), squeezed, operands)
        return function(shaped)

    floats = [
        x for x in jax.tree.leaves(squeezed) if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    first = next((x for x in floats if x.size), None)
    if first is None or jax.default_backend() != "cpu":
        return taken(squeezed)

    def never(squeezed: Tree) -> Result:
        return jax.tree.map(_unknown, jax.eval_shape(taken, squeezed))

    always = ~(first.ravel()[0] > jnp.inf)  # Of NaN, too.
    return jax.lax.cond(always, taken, never, squeezed)


def _unknown(shape: jax.ShapeDtypeStruct) -> Array:
    unknown = jnp.full(shape.shape, jnp.nan, shape.dtype)
    # Inside shard_map, branches must agree on what differs between devices.
    kind = shape.manual_axis_type
    axes = tuple(kind.varying) if kind is not None else ()
    return jax.lax.pcast(unknown, axes, to="varying") if axes else unknown


def row_norms(rows: Float[Array, "B ..."]) -> Norms:
    """Return the norms of rows that are all there, ``[B, ...]``."""
    wide = rows.astype(accumulation_dtype(rows.dtype))
    squares, count = summed(jnp.square(wide))
    entries = math.prod(rows.shape[1:])
    lost = entries * smallest(wide.dtype)
    slack = of_terms(count + 2, wide.dtype) * squares + lost
    return Norms(squares, slack)


def summed(rows: Float[Array, "B ..."]) -> tuple[Float[Array, "B"], int]:
    """Return the sum of each row, and how many roundings a term of it goes through at most.

    A long sum is taken in two stages, between which stands what only looks like an
    operation: XLA would make one sum of both.
    """
    shape = rows.shape[1:]
    entries = math.prod(shape)
    if len(shape) > 1 and is_divided():
        # Axes that lie on several devices cannot be merged where they are.
        parts = unmerged(jnp.sum(rows, axis=-1))
        rest = jnp.sum(parts, axis=range(1, parts.ndim))
        return rest, shape[-1] + entries // max(shape[-1], 1)
    if entries <= _STAGE:
        return jnp.sum(rows.reshape(rows.shape[0], entries), axis=1), entries
    inner = _inner(shape)
    flat = rows.reshape(rows.shape[0], entries)
    missing = -entries % inner
    if missing:
        flat = jnp.pad(flat, ((0, 0), (0, missing)))
    parts = jnp.sum(flat.reshape(rows.shape[0], -1, inner), axis=2)
    return jnp.sum(unmerged(parts), axis=1), inner + parts.shape[1]


def unmerged(sums: Array) -> Array:
    """Return the same sums (inf for NaN), so that XLA does not merge them with the next."""
    return jnp.where(jnp.abs(sums) <= jnp.inf, sums, jnp.inf)


def _inner(shape: Sequence[int]) -> int:
    """Return the size of the inner stage: along axes if they are about balanced."""
    entries = math.prod(shape)
    sizes = [math.prod(shape[i:]) for i in range(1, len(shape))]
    balanced = min(sizes, key=lambda n: n + entries // n, default=entries)
    if balanced + entries // balanced <= 8 * math.isqrt(entries):
        return balanced
    return math.isqrt(entries)


def capped(
    weights: Float[Array, "B"], norms: Norms, allowed: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Return weights for vectors that were formed anew, and measured anew.

    Args:
        weights: What the vectors were to be scaled by.
        norms: Of what was formed anew.
        allowed: The norms that the weights were made for.

    Returns:
        Weights with which no scaled vector is longer than ``weights * allowed``; 0 for one
        that is not finite.
    """
    found = norms.longest
    ratio = jnp.where(found > allowed, allowed / found, 1.0)
    return jnp.where(jnp.isfinite(found), weights * ratio, 0.0)
