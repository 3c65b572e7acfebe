"""Equations that pick whole rows of a table, and which of its entries are a row."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Bool, Int

from dpjax.clipping.analysis.values import shape_of


@dataclasses.dataclass(frozen=True)
class Picking:
    """How rows are picked by a ``gather`` or a ``dynamic_slice``.

    A row may be numbered by several axes of the table, in any place.

    Attributes:
        table: Shape of the table.
        starts: The axis of the table that each number of an index vector is for.
        batch: Axes of the table that the indices share.
        shared: Which axes of the indices these are.
        rows: Axes that number the rows: of each, one entry is picked.
        rest: Axes of a row: all of each is picked.
        offset: Axes of the result that a row has; those of ``rows`` may be left in, with
            size 1.
        fill: Whether no row is picked where an index is out of bounds, instead of the
            nearest.
    """

    table: tuple[int, ...]
    starts: tuple[int, ...]
    batch: tuple[int, ...]
    shared: tuple[int, ...]
    rows: tuple[int, ...]
    rest: tuple[int, ...]
    offset: tuple[int, ...]
    fill: bool

    def numbers(
        self, vectors: Int[Array, "... I"]
    ) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
        """Return for each index vector the number of its row, and whether there is one."""
        if vectors.dtype.itemsize < 4:
            vectors = vectors.astype(jnp.int32)  # 8 bits cannot count a longer table.
        row = jnp.zeros(vectors.shape[:-1], vectors.dtype)
        found = jnp.ones(vectors.shape[:-1], bool)
        for place, axis in enumerate(self.starts):
            last = self.table[axis] - 1 if axis in self.rows else 0
            index = vectors[..., place]
            found &= (index >= 0) & (index <= last)
            after = [other for other in self.rows if other > axis]
            stride = math.prod(self.table[other] for other in after)
            row += jnp.clip(index, 0, last) * stride
        return row, found if self.fill else jnp.ones_like(found)


def picking(eqn: JaxprEqn) -> Picking | None:
    """Return how an equation picks whole rows of its first operand; None if it does not."""
    if eqn.primitive.name not in ("gather", "dynamic_slice"):
        return None
    table, sizes = shape_of(eqn.invars[0]), eqn.params["slice_sizes"]
    axes = range(len(table))
    starts, offset = tuple(axes), tuple(axes)
    batch = shared = collapsed = ()
    fill = False
    if eqn.primitive.name == "gather":
        form = eqn.params["dimension_numbers"]
        starts, offset = form.start_index_map, form.offset_dims
        batch, shared = form.operand_batching_dims, form.start_indices_batching_dims
        collapsed = form.collapsed_slice_dims
        fill = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    single = [a for a in axes if a in collapsed or sizes[a] == 1 < table[a]]
    rows = tuple(a for a in single if a not in batch)
    rest = tuple(a for a in axes if a not in (*rows, *batch))
    if not table or any(sizes[a] != table[a] for a in rest):
        return None
    return Picking(table, starts, batch, shared, rows, rest, offset, fill)
