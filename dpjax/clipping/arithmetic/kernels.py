"""Norms and weighted sums of per-example gradients, from their two factors.

At a site the gradient of example b with respect to the weight is, up to the order of axes,
``W[h, b, k, n] = sum_t left[h, b, t, k] right[h, b, t, n]`` with h: axes that weight, data
and output share; t: positions that share the weight; k: contracted axes; n: axes that only
weight and output have. Everything here is accumulated in at least float32; what is
multiplied in bfloat16, and what norms allow for that, says ``weighted_sum``; what norms
allow for rounding, and why, says ``rounding``.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpjax.clipping.arithmetic import multiples
from dpjax.clipping.arithmetic.multiples import Multiple
from dpjax.clipping.arithmetic.rounding import (
    Norms,
    apart,
    capped,
    of_terms,
    row_norms,
    smallest,
    summed,
    unmerged,
)
from dpjax.parallel.gathering import (
    is_divided,
    summed_where_rows_are,
    whole_along,
)
from dpjax.privacy.sensitive import accumulation_dtype

_EXACT = jax.lax.Precision.HIGHEST
_BFLOAT16 = 2.0**-8
"""Unit roundoff."""
TERMS: Final = {"gram": 1, "direct": 2}
"""For how many terms of bfloat16 the norms of each kind allow: see ``weighted_sum``."""
EXACT: Final = 3
"""So many terms hold all digits of float32."""
_SMALL = 2**16
"""Entries up to which rows are copied to be summed together with others."""
_LARGE = 2**20
"""Entries from which on a copy of an array costs more than its sum."""
FEW_POSITIONS = 32
"""Positions up to which the patches of an image are best taken all at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Factors of dots and convolutions.

    Attributes:
        left: ``[H, B, T, K]`` blocks; W is their results side by side on the axis K.
        right: ``[H, B, T, N]``.
    """

    left: tuple[Float[Array, "H B T K"], ...]
    right: Float[Array, "H B T N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lookup:
    """Factors of row lookups: ``left`` is one-hot and kept as its index.

    Attributes:
        rows: ``[H, B, T]``, in bounds.
        right: ``[H, B, T, N]``; zeros where no row was found.
        size: K, the number of rows of the table.
    """

    rows: Int[Array, "H B T"]
    right: Float[Array, "H B T N"]
    size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """Factors of a convolution, whose patches are cut out when they are needed.

    Attributes:
        image: ``[H', B, ...]``.
        right: ``[H, B, T, N]``.
        cut: From an image to the ``left`` of ``Dense``, for any B.
    """

    image: Float[Array, "..."]
    right: Float[Array, "H B T N"]
    cut: Callable[[Array], tuple[Array, ...]] = dataclasses.field(
        metadata={"static": True}
    )

    @property
    def dense(self) -> Dense:
        """All patches at once: as many times the image as the kernel has offsets."""
        return Dense(self.cut(self.image), self.right)

    @property
    def offsets(self) -> int:
        """How many patches a pixel is in at most."""
        blocks = jax.eval_shape(self.cut, self.image)
        entries = sum(block.shape[-1] for block in blocks)
        groups = self.right.shape[0] // self.image.shape[0]
        return entries * groups // self.image.shape[-1]


Factors = Dense | Lookup | Patches
Part = Factors | Multiple
"""What a gradient may be the sum of."""


def oriented(part: Factors, *, swapped: bool) -> Factors:
    """Return factors of the transposed weight, if asked."""
    if not swapped:
        return part
    assert isinstance(part, Dense), "lookups come first in their group"
    (left,) = part.left
    return Dense((part.right,), left)


def concatenated(parts: Sequence[Factors]) -> list[Factors]:
    """Join factors of the same weight along T, as far as they are of one kind."""
    if len(parts) == 1:
        return [*parts]
    parts = [_cut(part) for part in parts]
    dense = [part for part in parts if isinstance(part, Dense)]
    lookups = [part for part in parts if isinstance(part, Lookup)]
    joined: list[Factors] = []
    if len({len(part.left) for part in dense}) > 1:
        whole = [jnp.concatenate(part.left, axis=3) for part in dense]
        dense = [Dense((x,), p.right) for x, p in zip(whole, dense, strict=True)]
    if dense:
        blocks = zip(*(part.left for part in dense), strict=True)
        joined.append(
            Dense(
                tuple(jnp.concatenate(block, axis=2) for block in blocks),
                jnp.concatenate([part.right for part in dense], axis=2),
            )
        )
    if lookups:
        joined.append(
            Lookup(
                jnp.concatenate([part.rows for part in lookups], axis=2),
                jnp.concatenate([part.right for part in lookups], axis=2),
                lookups[0].size,
            )
        )
    return joined


def differenced(first: Factors, second: Factors) -> Factors:
    """Join two nearly opposite factors so that their sum loses no digits.

    ``a g + b h = (a - b) g + b (g + h)``: exact for any factors, and where the points of a
    gradient difference are close, ``a - b`` and ``g + h`` are small before they are
    multiplied.
    """
    if isinstance(first, Lookup) and isinstance(second, Lookup):
        same = (first.rows == second.rows)[..., None]
        both = first.right + jnp.where(same, second.right, 0.0)
        alone = jnp.where(same, 0.0, second.right)
        first = dataclasses.replace(first, right=both)
        (joined,) = concatenated([first, dataclasses.replace(second, right=alone)])
        return joined
    first, second = _floating(_cut(first)), _floating(_cut(second))
    change = tuple(a - b for a, b in zip(first.left, second.left, strict=True))
    (joined,) = concatenated(
        [Dense(change, first.right), Dense(second.left, first.right + second.right)]
    )
    return joined


def _floating(part: Factors) -> Dense:
    """Return dense factors without whole numbers: bytes wrap around in sums."""
    assert isinstance(part, Dense)
    wide = accumulation_dtype(jnp.result_type(*part.left, part.right))

    def floating(array: Array) -> Array:
        inexact = jnp.issubdtype(array.dtype, jnp.inexact)
        return array if inexact else array.astype(wide)

    return jax.tree.map(floating, part)


def gram_norms(parts: Sequence[Part]) -> Norms:
    """Return norms of the summed gradient, without the gradient.

    ``|W|^2 = sum_ts <left_t, left_s> <right_t, right_s>``; each pair of factors of
    different kinds counts twice. Costs ``O(T^2 (K + N))``.
    """
    cut = [_cut(part) for part in parts if not isinstance(part, Multiple)]
    numbers = [part for part in parts if isinstance(part, Multiple)]
    products, lengths, low = [], [], []
    for i, first in enumerate(cut):
        for second in cut[: i + 1]:
            lefts, rights = _left_gram(first, second), _right_gram(first, second)
            product = unmerged(jnp.sum(lefts * rights, axis=-1))
            if first is second:
                products.append(product)
                lengths.append(_lengths_of_gram(first, lefts, rights))
                if _low(first):
                    low.append(_rounded_once(lefts, rights))
            else:
                products.append(2 * product)
    for i, number in enumerate(numbers):
        lengths.append(number.lengths)
        products += [2 * _across(number, part) for part in cut]
        products += [2 * number.product(other) for other in numbers[:i]]
        products.append(number.product(number))
    # [H, B, all T], the squares and the products that may cancel between positions.
    terms = jnp.moveaxis(jnp.concatenate(products, axis=-1), 1, 0)
    squares, count = summed(terms)
    slack = _gram_slack(cut, lengths, count + sum(map(multiples.roundings, numbers)))
    slack += multiples.underflow(numbers, lengths)
    found = _allowing(Norms(jnp.maximum(squares, 0.0), slack), low)
    return _allowing(found, [_summing_apart(lengths)])


def direct_norms(parts: Sequence[Part]) -> Norms:
    """Return norms by way of the per-example gradients, which are dropped."""
    found = row_norms(gradients(parts))
    cut = [_cut(part) for part in parts if not isinstance(part, Multiple)]
    low = [_lengths(part) for part in cut if _low(part)]
    # Two terms are right to a squared roundoff of each entry, whatever its position.
    terms = [_BFLOAT16**2 * jnp.sum(x * y, axis=(0, 2)) for x, y in low]
    # Formed for the norm, for the sum, and once more in passing through the batch's sum.
    roundings = 3 * sum(map(_positions, parts)) + 8
    mass = _total([_mass(part) for part in parts])
    return _allowing(found, [*terms, of_terms(roundings, mass.dtype) * mass])


def own_norms(parts: Sequence[Factors], *, direct: bool) -> Norms:
    """Return norms for a sum that measures again what it sums: see ``again``."""
    return row_norms(gradients(parts)) if direct else gram_norms(parts)


def again(
    parts: Sequence[Factors],
    weights: Float[Array, "B"],
    allowed: Float[Array, "B"],
    *,
    direct: bool,
) -> Float[Array, "H K N"]:
    """Return the weighted sum of gradients whose factors were computed anew.

    Args:
        parts: Factors; they may be rounded otherwise than those that were measured.
        weights: What the gradients that were measured are to be scaled by.
        allowed: The norms of those at most.
        direct: Form the gradients, instead of Gram matrices.
    """

    def by_rows(operands: Any) -> Array:
        rows, weights, allowed = operands
        return weighted_rows(rows, capped(weights, row_norms(rows), allowed))

    def by_gram(operands: Any) -> Array:
        parts, weights, allowed = operands
        weights = capped(weights, gram_norms(parts), allowed)
        return weighted_sum(parts, weights, terms=TERMS["gram"])

    if direct:
        return apart(by_rows, (gradients(parts), weights, allowed))
    return apart(by_gram, (parts, weights, allowed))


def gradients(parts: Sequence[Part]) -> Float[Array, "B H K N"]:
    """Return the per-example gradients themselves."""
    return _total([_gradients(part) for part in parts])


def computed_once(parts: Sequence[Part]) -> bool:
    """Whether ``gradients`` are results that XLA copies into no fusion.

    Such are products of matrices, not those of a vector: they are made elementwise.
    """
    first, *others = parts
    if others or not isinstance(first, Dense | Patches):
        return False
    part = _cut(first)
    assert isinstance(part, Dense)
    return min(*part.right.shape[2:], *(x.shape[3] for x in part.left)) > 1


def weighted_sum(
    parts: Sequence[Part], weights: Float[Array, "B"], *, terms: int = EXACT
) -> Float[Array, "H K N"]:
    """Return ``sum_b weights[b] W[b]`` without any W.

    Where a weight is 0, whatever stands there (NaN, inf) counts for nothing.

    Args:
        parts: Factors.
        weights: One for each example.
        terms: Where factors are bfloat16 and products of it are much faster than those of
            float32, the weighted right factor, which has more digits, is taken for the
            sum of so many terms of bfloat16. Unless they are ``EXACT``, norms must have
            allowed for it (see ``TERMS``): rounding takes contributions beyond the clip
            norm.
    """
    numbers = [part.total(weights) for part in parts if isinstance(part, Multiple)]
    factors = [part for part in parts if not isinstance(part, Multiple)]

    def of_rows(operands: tuple[list[Factors], Array]) -> Array:
        parts, weights = operands
        return _total([_weighted_sum(part, weights, terms=terms) for part in parts])

    if factors:
        operands, axes = (factors, weights), ([1] * len(factors), 0)
        rows = weights.shape[0]
        numbers.append(summed_where_rows_are(of_rows, operands, axes, rows=rows))
    return _total(numbers)


def prefers_bfloat16() -> bool:
    """Whether products of bfloat16 are several times faster than those of float32."""
    return jax.default_backend() != "cpu"


def weighted_rows(
    rows: Float[Array, "B ..."], weights: Float[Array, "B"]
) -> Float[Array, "..."]:
    """Return ``sum_b weights[b] rows[b]``; rows of weight 0 count for nothing."""
    used = (weights != 0).reshape(-1, *(1,) * (rows.ndim - 1))
    if prefers_turns() and rows.shape[0] <= 64 and rows.size >= _LARGE:
        # One pass over the rows: masking them first would copy them all.
        each = zip(used, weights, rows, strict=True)
        return _total([jnp.where(u, w * row, 0.0) for u, w, row in each])
    # What lies on several devices cannot be made flat where it is.
    if jax.default_backend() == "cpu" and not is_divided():
        # As in weighted_sum, so that a bias shares the weighted outputs of its layer.
        flat = rows.reshape(1, rows.shape[0], 1, -1)
        ones = jnp.ones_like(flat[..., :1])
        total = _weighted_sum(Dense((ones,), flat), weights, terms=EXACT)
        return total.reshape(rows.shape[1:])
    # No product: it would want the masked rows in memory.
    scale = weights.reshape(used.shape)
    return jnp.sum(jnp.where(used, scale * rows, 0.0), axis=0)


def weighted_together(
    parts: Sequence[Float[Array, "B ..."]], weights: Float[Array, "B"]
) -> list[Float[Array, "..."]]:
    """Return ``weighted_rows`` of each part; of small ones of one dtype in one go.

    A model may have dozens of gains and biases: each alone would take the compiler two
    kernels.
    """
    totals: dict[int, Array] = {}
    small: dict[Any, list[int]] = {}
    for i, rows in enumerate(parts):
        if rows.size <= _SMALL:
            small.setdefault(rows.dtype, []).append(i)
        else:
            totals[i] = weighted_rows(rows, weights)
    for some in small.values():
        flat = [parts[i].reshape(parts[i].shape[0], -1) for i in some]
        joined = weighted_rows(jnp.concatenate(flat, axis=1), weights)
        ends = np.cumsum([rows.shape[1] for rows in flat])[:-1]
        for i, total in zip(some, jnp.split(joined, ends), strict=True):
            totals[i] = total.reshape(parts[i].shape[1:])
    return [totals[i] for i in range(len(parts))]


def _positions(part: Part) -> int:
    return 1 if isinstance(part, Multiple) else part.right.shape[2]


def _cut(part: Dense | Lookup | Patches) -> Dense | Lookup:
    return part.dense if isinstance(part, Patches) else part


def _weighted_sum(
    part: Factors, weights: Array, *, terms: int
) -> Float[Array, "H K N"]:
    part = _cut(part)
    used = (weights != 0)[None, :, None, None]
    right = jnp.where(used, _wide(part.right) * weights[None, :, None, None], 0.0)
    if isinstance(part, Lookup):
        return jax.vmap(lambda r, x: _scattered(part.size, r, x))(part.rows, right)
    rights = _split(right, terms) if _low(part) else [right]
    blocks = []
    for left in part.left:
        kept = jnp.where(used, left.astype(rights[0].dtype), 0)
        blocks.append(_total([_dot("hbtk,hbtn->hkn", kept, x) for x in rights]))
    return jnp.concatenate(blocks, axis=1)


def _low(part: Factors) -> bool:
    """Whether factors are multiplied in bfloat16."""
    low = isinstance(part, Dense) and part.left[0].dtype == jnp.bfloat16
    return low and prefers_bfloat16()


def _split(array: Float[Array, "..."], terms: int) -> list[Array]:
    """Return so many bfloat16 arrays; what their sum misses is another roundoff less."""
    found = []
    for _ in range(terms):
        # A cast and back would be simplified away.
        rounded = jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        found.append(rounded.astype(jnp.bfloat16))
        array = array - rounded
    return found


def _rounded_once(
    lefts: Float[Array, "H B T T"], rights: Float[Array, "H B T T"]
) -> Float[Array, "B"]:
    """Bound what one term misses, in L2: ``sum_t left_t x e_t`` with ``|e_t| <= u |right_t|``.

    Its square is ``sum_ts <left_t, left_s> <e_t, e_s>``, whatever the e_t are.
    """
    lengths = jnp.sqrt(_diagonal(rights))
    most = jnp.einsum("hbts,hbt,hbs->b", jnp.abs(lefts), lengths, lengths)
    return _BFLOAT16 * jnp.sqrt(most)


def _allowing(norms: Norms, apart: Sequence[Float[Array, "B"]]) -> Norms:
    """Return norms of what may lie so far apart from what was measured, in L2."""
    if not apart:
        return norms
    off = _total(apart)
    return norms._replace(slack=norms.slack + (2 * norms.longest + off) * off)


def _total(parts: Sequence[Array]) -> Array:
    return sum(parts[1:], parts[0])


def _gradients(part: Part) -> Float[Array, "B H K N"]:
    if isinstance(part, Multiple):
        return part.rows
    if isinstance(part, Lookup):
        one = jax.vmap(lambda r, x: _scattered(part.size, r, x))
        return jax.vmap(one, in_axes=1)(part.rows, _wide(part.right))
    if isinstance(part, Patches):
        many = part.right.shape[1] > 1 and part.right.shape[2] > FEW_POSITIONS
        if many and prefers_turns():
            return in_turn(lambda one: _gradients(one)[0], part)
        part = part.dense
    if part.right.shape[0] == 1:
        # XLA's CPU compiler copies the factors for the sake of an axis of length 1.
        (right,) = part.right
        blocks = [_dot("btk,btn->bkn", left[0], right)[:, None] for left in part.left]
    else:
        blocks = [_dot("hbtk,hbtn->bhkn", left, part.right) for left in part.left]
    return jnp.concatenate(blocks, axis=2)


def in_turn(function: Callable[[Any], Any], factors: Any) -> Any:
    """Return ``vmap(function)(factors)`` by a loop over the examples.

    One example's patches and gradients stay in the cache of a CPU. Over several devices a
    loop would gather the examples, and a GPU wants them all at once: see ``prefers_turns``.

    Args:
        function: Of a pytree of factors with B = 1; its results have no B.
        factors: Pytree of factors.
    """
    one, examples = _one_by_one(function, factors)
    put = functools.partial(
        jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False
    )

    def turn(i: Array, done: Any) -> Any:
        return jax.tree.map(lambda x, y: put(x, y, i), done, one(i))

    shapes = jax.eval_shape(one, 0)
    # Every row is overwritten. Of zeros, XLA would make one array for all loops and copy it.
    start = jax.tree.leaves(factors)[0].ravel()[0]
    results = jax.tree.map(
        lambda x: jnp.full((examples, *x.shape), start, x.dtype), shapes
    )
    return jax.lax.fori_loop(0, examples, turn, results)


def total_in_turn(
    function: Callable[[Any], Any], factors: Any, weights: Any, allowed: Any
) -> Any:
    """Return ``weighted_rows`` of the results of ``in_turn``, which are never all there.

    Args:
        function: As for ``in_turn``.
        factors: Likewise.
        weights: ``[B]`` for each array that ``function`` returns.
        allowed: Likewise, the norms that the weights were made for.
    """
    one, examples = _one_by_one(function, factors)

    def added(operands: tuple[Array, ...]) -> Array:
        total, row, weight, allowed = operands
        (weight,) = capped(weight[None], row_norms(row[None]), allowed[None])
        return total + jnp.where(weight != 0, weight * row, 0.0)

    def turn(i: Array, totals: Any) -> Any:
        of_one = jax.tree.map(lambda rows: _row(rows, i), (weights, allowed))
        operands = (totals, one(i), *of_one)
        return apart(
            lambda operands: jax.tree.map(lambda *x: added(x), *operands), operands
        )

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, examples, turn, zeros)


# Of indices that may be out of bounds, XLA makes several kernels more for each loop.
_row = functools.partial(
    jax.lax.dynamic_index_in_dim, axis=0, keepdims=False, allow_negative_indices=False
)


def _one_by_one(
    function: Callable[[Any], Any], factors: Any
) -> tuple[Callable[[Any], Any], int]:
    """Return index of an example -> result of ``function``, and the number of examples."""
    leaves, treedef = jax.tree.flatten(factors)
    examples = leaves[0].shape[1]
    # Flat rows: XLA would copy an array before a loop for the sake of axes of length 1.
    rows = [jnp.moveaxis(x, 1, 0).reshape(examples, -1) for x in leaves]

    @jax.jit  # Traced once, for shapes and for the loop.
    def one(i: Array) -> Any:
        parts = [
            _row(row, i).reshape(x.shape[0], 1, *x.shape[2:])
            for row, x in zip(rows, leaves, strict=True)
        ]
        return function(treedef.unflatten(parts))

    return one, examples


def prefers_turns() -> bool:
    """Whether examples are better taken one by one: on one CPU, not on several devices."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _scattered(size: int, rows: Array, values: Array) -> Float[Array, "K N"]:
    width = values.shape[-1]
    flat = values.reshape(rows.size, width)
    return jnp.zeros((size, width), flat.dtype).at[rows.ravel()].add(flat)


def _left_gram(first: Factors, second: Factors) -> Float[Array, "H B T S"]:
    match first, second:
        case Dense(), Dense():
            blocks = zip(first.left, second.left, strict=True)
            return _total([_dot("hbtk,hbsk->hbts", a, b) for a, b in blocks])
        case Lookup(), Lookup():
            equal = first.rows[..., :, None] == second.rows[..., None, :]
            return equal.astype(accumulation_dtype(first.right.dtype))
        case Lookup(), Dense():
            left = whole_along(3, second.left[0])
            columns = jnp.take_along_axis(left, first.rows[:, :, None, :], axis=3)
            return jnp.swapaxes(_wide(columns), 2, 3)
    return jnp.swapaxes(_left_gram(second, first), 2, 3)


def _across(number: Multiple, part: Dense | Lookup) -> Float[Array, "H B T"]:
    """Return the inner products of a number's gradient with each position's."""
    if isinstance(part, Lookup):
        matrix = whole_along(1, number.matrix)
        through = jax.vmap(lambda matrix, rows: matrix[rows])(matrix, part.rows)
    else:
        ends = np.cumsum([block.shape[-1] for block in part.left])[:-1]
        blocks = jnp.split(number.matrix, ends, axis=1)
        pairs = zip(part.left, blocks, strict=True)
        through = _total([_dot("hbtk,hkn->hbtn", left, block) for left, block in pairs])
    inner = unmerged(jnp.sum(through * _wide(part.right), axis=-1))
    return inner * number.coefficient[None, :, None]


def _right_gram(first: Factors, second: Factors) -> Float[Array, "H B T S"]:
    return _dot("hbtn,hbsn->hbts", first.right, second.right)


Lengths = tuple[Float[Array, "H B T"], Float[Array, "H B T"]]
"""``|left_t|`` and ``|right_t|``, or more."""


def _lengths(part: Dense | Lookup) -> Lengths:
    right = jnp.sum(jnp.square(_wide(part.right)), axis=-1)
    if isinstance(part, Lookup):
        return jnp.ones_like(right), jnp.sqrt(right)
    left = _total([jnp.sum(jnp.square(_wide(x)), axis=-1) for x in part.left])
    return jnp.sqrt(left), jnp.sqrt(right)


def _lengths_of_gram(part: Dense | Lookup, lefts: Array, rights: Array) -> Lengths:
    tiny = smallest(lefts.dtype)
    widths = _width(part), part.right.shape[-1]
    diagonals = [_diagonal(gram) for gram in (lefts, rights)]
    # As long as what underflowed in the sum of its squares may have been.
    left, right = (
        jnp.sqrt(x + n * tiny) for x, n in zip(diagonals, widths, strict=True)
    )
    return left, right


def _diagonal(gram: Float[Array, "H B T T"]) -> Float[Array, "H B T"]:
    if not is_divided():
        return jnp.diagonal(gram, axis1=2, axis2=3)
    # It is a gather, on which XLA's partitioner may abort the process.
    own = jnp.eye(gram.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(own, gram, 0.0), axis=-1)


def _width(part: Dense | Lookup) -> int:
    return 1 if isinstance(part, Lookup) else sum(x.shape[-1] for x in part.left)


def _gram_slack(
    parts: Sequence[Dense | Lookup], lengths: Sequence[Lengths], count: int
) -> Float[Array, "B"]:
    """Bound how far rounding may have lowered a Gram norm: see ``rounding``.

    Each term of the Gram sum is at most ``|left_t||left_s||right_t||right_s|``, and wrong
    by ``K + N`` roundings of that. They add up to ``(sum_t |left_t||right_t|)^2``, whatever
    the order, as may the roundings of the sum itself. What underflows in an entry of one
    Gram matrix is multiplied by one of the other.

    Args:
        parts: All factors of one gradient.
        lengths: Of each.
        count: Roundings that a row of the sum goes through.
    """
    dtype = lengths[0][0].dtype
    k, n = max(map(_width, parts)), parts[0].right.shape[-1]
    positions = [left.shape[-1] for left, _ in lengths]
    roundings = k + n + max(positions) + count + 4
    mass = _total([jnp.sum(left * right, axis=-1) for left, right in lengths])
    total_left, total_right = (
        _total([jnp.sum(pair[side], axis=-1) for pair in lengths]) for side in (0, 1)
    )
    tiny = smallest(dtype)
    lost = tiny * n * jnp.square(total_left) + tiny * k * jnp.square(total_right)
    lost += tiny * sum(positions) ** 2
    return jnp.sum(of_terms(roundings, dtype) * jnp.square(mass) + lost, axis=0)


def _summing_apart(lengths: Sequence[Lengths]) -> Float[Array, "B"]:
    """Bound how far a sum over positions is from the truth, in L2, twice.

    Once for itself, and once for what others lose while it passes through their sum.
    """
    roundings = 2 * sum(left.shape[-1] for left, _ in lengths) + 4
    mass = _total([jnp.sum(left * right, axis=(0, 2)) for left, right in lengths])
    return of_terms(roundings, mass.dtype) * mass


def _mass(part: Part) -> Float[Array, "B"]:
    """Return ``sum_t |left_t| |right_t|``, or more."""
    if isinstance(part, Multiple):
        return jnp.abs(part.coefficient) * row_norms(part.matrix[None]).longest
    if not isinstance(part, Patches):
        left, right = _lengths(part)
        return jnp.sum(left * right, axis=(0, 2))

    # Every offset of the kernel meets a pixel once at most.
    def squares(x: Array) -> Float[Array, "B"]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        return jnp.sum(jnp.square(_wide(x)), axis=axes)

    return jnp.sqrt(part.offsets * squares(part.image)) * jnp.sqrt(squares(part.right))


def _dot(spec: str, first: Array, second: Array) -> Array:
    # The default precision of some accelerators would round norms and sums to bfloat16.
    wide = accumulation_dtype(jnp.promote_types(first.dtype, second.dtype))
    return jnp.einsum(
        spec, first, second, precision=_EXACT, preferred_element_type=wide
    )


def _wide(array: Array) -> Array:
    return array.astype(accumulation_dtype(array.dtype))
