"""The equations at which a parameter meets data in a way that a rule covers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from dpjax.clipping.analysis.values import (
    Loop,
    ParamValue,
    Path,
    Piece,
    dtype_of,
    shape_of,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An equation that is linear in a parameter-only operand; the other one is data.

    Or a copy of a part of a parameter, or of a number that parameters make, just before it
    meets data in any other equation: its path is that of this equation and then ``~`` the
    place of the operand.

    Or a part of a product with a weight that is put together from several: its equation is
    the product with one piece, and its path that of the whole product, then ``~`` the side
    of the weight, then the number of the piece.

    Attributes:
        path: Where it stands.
        eqn: dot_general, conv_general_dilated, gather, dynamic_slice or copy.
        side: Which operand the parameter-only value is.
        value: That operand.
        loops: All loops around it, outermost first. The data and the gradient of the
            output have one leading axis for each.
        piece: Which part of the weight it is, if the weight is put together.
        blocks: Among how many devices the products with the weight are divided, along the
            axis that ``value.divided`` says; 1 if they are not, or if lookups see it, too.
    """

    path: Path
    eqn: JaxprEqn
    side: int
    value: ParamValue
    loops: tuple[Loop, ...]
    piece: Piece | None = None
    blocks: int = 1

    @property
    def kind(self) -> str:
        """The name of the primitive; a slice that begins anywhere is a "gather"."""
        name = self.eqn.primitive.name
        return "gather" if name == "dynamic_slice" else name

    @property
    def is_number(self) -> bool:
        """Whether it is a copy of a number that is computed from parameters."""
        return self.kind == "copy" and self.value.view is None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the data operand of one example, without loops; () for a copy."""
        if self.kind == "copy":
            return ()
        if self.eqn.primitive.name == "dynamic_slice":
            return (len(self.eqn.invars) - 1,)
        return shape_of(self.eqn.invars[1 - self.side])

    def data_of(self, operands: Sequence[Any]) -> Any:
        """Return the data operand: of a slice, all its starts as one vector; of a copy, 1."""
        if self.kind == "copy":
            return jnp.ones((), dtype_of(self.eqn.invars[0]))
        if self.eqn.primitive.name == "dynamic_slice":
            return jnp.stack([*operands[1:]])
        return operands[1 - self.side]

    def operands(self, weight: Any, data: Any) -> list[Any]:
        """Return the operands of the equation."""
        if self.eqn.primitive.name == "dynamic_slice":
            return [weight, *data]
        if self.kind == "copy":
            return [weight]
        return [weight, data] if self.side == 0 else [data, weight]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output of one example, without loops."""
        return shape_of(self.eqn.outvars[0])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter-only operand, with the loops it varies with."""
        lead = tuple(loop.length for loop in self.value.loops)
        return lead + shape_of(self.eqn.invars[self.side])
