"""Check that an analysis accounts for every path from a parameter to the loss.

The walk of ``uses`` decides what is data and what a parameter, and records sites on its
way. This check shares none of that. It knows equations only: what they read may flow to what
they give. A site accounts for what flows through its weight, so there, and nowhere else, the
flow of parameters is cut; whatever still arrives at the loss is not accounted for.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from dpjax.clipping.analysis.sites import Site
from dpjax.clipping.analysis.values import Loop, Path, shape_of
from dpjax.jaxprs import CALLS, callee, scan_counts

_DATA: Final = "data"
Mark = int | str | Loop
Marks = frozenset[Mark]
"""What a value may depend on: the gradient of parameters (their indices), the example
(``_DATA``), the iteration of loops."""
_NOTHING: Final[Marks] = frozenset()


def unaccounted(
    closed: ClosedJaxpr, num_params: int, sites: Mapping[Path, Site]
) -> set[int]:
    """Return the parameters whose gradient is more than what their sites say.

    Those that reach the first output other than through the weight of a site, and those of
    sites that are not what they claim: another equation, a weight that depends on the
    example, on more parameters or on more loops than it names.

    Args:
        closed: The loss of one example; its inputs are parameters, then data.
        num_params: How many are parameters.
        sites: By path.
    """
    flow = _Flow(sites)
    inputs = [
        frozenset([i if i < num_params else _DATA])
        for i in range(len(closed.jaxpr.invars))
    ]
    loss, *_ = flow.through(closed.jaxpr, inputs, ())
    unseen = [site for path, site in sites.items() if path not in flow.seen]
    return _leaves(loss) | flow.wrong | _leaves(*(s.value.leaves for s in unseen))


class _Flow:
    def __init__(self, sites: Mapping[Path, Site]) -> None:
        self.sites = sites
        self.pieces: dict[Path, list[Site]] = {}
        for path, site in sites.items():
            if site.piece is not None:
                self.pieces.setdefault(path[:-1], []).append(site)
        self.seen: set[Path] = set()
        self.wrong: set[int] = set()

    def through(self, jaxpr: Jaxpr, inputs: Sequence[Marks], path: Path) -> list[Marks]:
        """Return the marks of the outputs of a jaxpr."""
        marks: dict[Any, Marks] = dict.fromkeys(jaxpr.constvars, _NOTHING)
        marks.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Marks:
            return _NOTHING if isinstance(atom, Literal) else marks[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            out = self._out(eqn, [read(atom) for atom in eqn.invars], (*path, index))
            for var, flowing in zip(eqn.outvars, out, strict=True):
                marks[var] = flowing if _differentiable(eqn, var) else _still(flowing)
        return [read(atom) for atom in jaxpr.outvars]

    def _out(self, eqn: JaxprEqn, operands: list[Marks], path: Path) -> list[Marks]:
        name = eqn.primitive.name
        for side in range(len(operands)):
            if (*path, ~side) in self.pieces:
                operands[side] = self._cut_pieces((*path, ~side), eqn, operands[side])
            if (*path, ~side) in self.sites:
                operands[side] = self._cut((*path, ~side), eqn, side, operands[side])
        if path in self.sites:
            side = self.sites[path].side
            operands[side] = self._cut(path, eqn, side, operands[side])
        elif name in CALLS:
            return self.through(callee(eqn).jaxpr, operands, path)
        elif name == "scan":
            return self._scan(eqn, operands, path)
        joined = _NOTHING.union(*operands)
        return [joined] * len(eqn.outvars)

    def _cut(self, path: Path, eqn: JaxprEqn, side: int, weight: Marks) -> Marks:
        """Return what a weight still depends on where its site accounts for gradients."""
        self.seen.add(path)
        site = self.sites[path]
        if path[-1] < 0:
            itself = site.kind == "copy" and site.eqn.invars == [eqn.invars[side]]
        else:
            itself = site.eqn is eqn
        still = _still(weight)
        self.wrong |= _leaves(weight) - site.value.leaves
        if site.path != path or not itself or still - {*site.value.loops}:
            self.wrong |= site.value.leaves
        return still

    def _cut_pieces(self, path: Path, eqn: JaxprEqn, weight: Marks) -> Marks:
        """Return the same of a weight that is put together from those of several sites."""
        pieces, still = self.pieces[path], _still(weight)
        side = ~path[-1]
        self.seen |= {site.path for site in pieces}
        claimed = _leaves(*(site.value.leaves for site in pieces))
        self.wrong |= _leaves(weight) - claimed
        whole = math.prod(shape_of(eqn.invars[side]))
        found = [math.prod(shape_of(site.eqn.invars[side])) for site in pieces]
        alike = all(site.eqn.primitive is eqn.primitive for site in pieces)
        beyond = any(still - {*site.value.loops} for site in pieces)
        if sum(found) != whole or not alike or beyond:
            self.wrong |= claimed
        return still

    def _scan(self, eqn: JaxprEqn, operands: list[Marks], path: Path) -> list[Marks]:
        body = eqn.params["jaxpr"].jaxpr
        first, count = scan_counts(eqn)
        loop = Loop(path, eqn.params["length"])
        consts, carry = operands[:first], operands[first : first + count]
        xs = [marks | {loop} for marks in operands[first + count :]]
        kept = body.invars[first : first + count]
        while True:
            out = self.through(body, [*consts, *carry, *xs], path)
            # What a loop hands on may be another value at each iteration.
            after = [
                old if given is var else old | new | {loop}
                for old, new, given, var in zip(
                    carry, out[:count], body.outvars[:count], kept, strict=True
                )
            ]
            if after == carry:
                return [marks - {loop} for marks in carry + out[count:]]
            carry = after


def _differentiable(eqn: JaxprEqn, var: Any) -> bool:
    """Whether a gradient can flow back from this result of an equation."""
    dtype = getattr(var.aval, "dtype", jnp.dtype(bool))  # Tokens have none.
    return eqn.primitive.name != "stop_gradient" and jnp.issubdtype(dtype, jnp.inexact)


def _leaves(*marks: Iterable[Mark]) -> set[int]:
    return {mark for some in marks for mark in some if isinstance(mark, int)}


def _still(marks: Collection[Mark]) -> Marks:
    """Return the marks without those of gradients."""
    return frozenset(mark for mark in marks if not isinstance(mark, int))
