"""The equations at which a parameter meets data in a way that a rule covers."""

import dataclasses

from jax.extend.core import JaxprEqn

from dpjax.clipping.values import Loop, ParamValue, Path, shape_of


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An equation that is linear in a parameter-only operand; the other one is data.

    Attributes:
        path: Where it stands.
        eqn: The equation: dot_general, conv_general_dilated or gather.
        side: Which operand the parameter-only value is.
        value: That operand.
        loops: All loops around it, outermost first. The data and the gradient of the
            output have one leading axis for each.
    """

    path: Path
    eqn: JaxprEqn
    side: int
    value: ParamValue
    loops: tuple[Loop, ...]

    @property
    def kind(self) -> str:
        """The name of the primitive."""
        return self.eqn.primitive.name

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the data operand of one example, without loops."""
        return shape_of(self.eqn.invars[1 - self.side])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output of one example, without loops."""
        return shape_of(self.eqn.outvars[0])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter-only operand, with the loops it varies with."""
        lead = tuple(loop.length for loop in self.value.loops)
        return lead + shape_of(self.eqn.invars[self.side])
