"""Find every use of every parameter in the jaxpr of a one-example loss, and classify it.

The loss is traced on ONE example, so "depends on the example" needs no bookkeeping of batch
axes. A *site* is an equation that is linear in a parameter-only value and whose other
operand is data: the per-example gradient with respect to that value is a product of two
factors that training has anyway, the data and the gradient of the output. Parameters that
meet data anywhere else get ordinary per-example automatic differentiation, alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from dpjax.clipping.analysis.complete import unaccounted
from dpjax.clipping.analysis.convolutions import cuts_well
from dpjax.clipping.analysis.lookups import picking
from dpjax.clipping.analysis.sites import Site
from dpjax.clipping.analysis.tracing import (
    check_params,
    one_example,
    scalar,
    trace,
)
from dpjax.clipping.analysis.values import (
    DATA,
    Loop,
    ParamValue,
    Path,
    Piece,
    Tag,
    constant,
    counter,
    derive,
    differentiable,
    dtype_of,
    now,
    own_backward,
    parameter,
    shape_of,
)
from dpjax.clipping.query import Query
from dpjax.jaxprs import CALLS, bind, callee, scan_counts
from dpjax.parallel.gathering import product_parts
from dpjax.privacy.sensitive import accumulation_dtype
from dpjax.typing import Batch, Key, Loss, Params


class Affine(NamedTuple):
    """The variables of ``data * scale + shift``; the latter two repeat over positions."""

    data: Any
    scale: Any
    shift: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The analysed loss of one example, over all points of a query.

    Its inputs are the leaves of point 0, of point 1, ..., then those of the example and the
    key; its outputs the signed sum of the losses and the loss at point 0. A difference of
    gradients is thus the gradient of one program that uses each parameter twice.

    Attributes:
        closed: The jaxpr.
        names: Path of each parameter of one point.
        shapes: Shape of each.
        sites: By path, all sites of parameters that are not in ``plain``.
        plain: Inputs that get ordinary per-example differentiation -> why.
        light: Those of them that meet data entry by entry and are no larger than what comes
            out, so that their per-example gradients cost no more than activations.
        affine: Where one of these shifts scaled data, behind more than one site.
        num_params: How many of the inputs are parameters.
        tree: Structure of one point.
    """

    closed: ClosedJaxpr
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sites: dict[Path, Site]
    plain: dict[int, str]
    light: frozenset[int]
    affine: dict[Path, Affine]
    num_params: int
    tree: Any

    def slot(self, leaf: int) -> int:
        """Return which parameter this input is a point of."""
        return leaf % len(self.names)


@dataclasses.dataclass
class _Record:
    sites: dict[Path, Site] = dataclasses.field(default_factory=dict)
    plain: dict[int, str] = dataclasses.field(default_factory=dict)
    affine: dict[Path, Affine] = dataclasses.field(default_factory=dict)
    parts: frozenset[int] = frozenset()
    """Parameters that meet data in parts or numbers only, which are sites of their own."""
    whole: set[int] = dataclasses.field(default_factory=set)
    """Parameters that are plain for what they do as a whole."""
    numbers: set[int] = dataclasses.field(default_factory=set)
    """Parameters of which numbers are computed that meet data."""
    beside: dict[int, int] = dataclasses.field(default_factory=dict)
    """How many entries the largest value has that a parameter makes with data entrywise."""

    def update(self, other: "_Record") -> None:
        self.sites |= other.sites
        for leaf, why in other.plain.items():
            self.plain.setdefault(leaf, why)
        self.whole |= other.whole
        self.numbers |= other.numbers
        for leaf, size in other.beside.items():
            self.beside[leaf] = max(size, self.beside.get(leaf, 0))


def analyse(loss: Loss, query: Query, batch: Batch, key: Key) -> Program:
    """Trace ``loss`` on one example of ``batch`` and find the sites of its parameters.

    Nothing is computed: only shapes and dtypes are looked at.

    Raises:
        TypeError: The loss is not a pure scalar function, or a parameter is not floating.
    """
    check_params(query.points[0])
    single = scalar(loss)

    def combined(points: tuple[Params, ...], example: Any, key: Key) -> Any:
        # The points share the example and its key: same augmentation, same dropout.
        values = [single(point, example, key) for point in points]
        values = [v.astype(accumulation_dtype(v.dtype)) for v in values]
        signed = [
            v if sign == 1 else sign * v
            for sign, v in zip(query.signs, values, strict=True)
        ]
        return sum(signed[1:], signed[0]), values[0]

    closed = trace(combined, query.points, *one_example(batch, key))

    leaves = jax.tree_util.tree_leaves_with_path(query.points[0])
    names = tuple(
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
    )
    shapes = tuple(leaf.shape for _, leaf in leaves)
    # Never read or written: memory that the operating system does not even provide.
    buffers = [np.empty(shape, np.int8) for shape in shapes]
    params = [
        parameter(k * len(buffers) + j, buffer)
        for k in range(len(query.points))
        for j, buffer in enumerate(buffers)
    ]
    inputs: list[Tag] = [*params]
    inputs += [DATA] * (len(closed.jaxpr.invars) - len(inputs))

    def walked(parts: frozenset[int]) -> _Record:
        record = _Record(parts=parts)
        out = _walk(closed.jaxpr, closed.consts, inputs, (), (), record)
        _differentiate_plainly(out[:1], "is part of the loss without data", record)
        return record

    record = walked(frozenset())
    others = _leaves(*(site.value for site in record.sites.values()))
    # A number is worth a site where its parameters need not be formed for anything else.
    whole = record.whole | record.numbers - others
    if parts := record.plain.keys() - whole:
        record = walked(frozenset(parts))
    _drop_sites_of_plain_leaves(record)
    _complete(closed, len(params), record)
    _divide(record)
    return Program(
        closed=closed,
        names=names,
        shapes=shapes,
        sites=record.sites,
        plain=record.plain,
        light=frozenset(
            leaf
            for leaf, most in record.beside.items()
            if math.prod(shapes[leaf % len(shapes)]) <= most
        ),
        affine=record.affine,
        num_params=len(params),
        tree=jax.tree.structure(query.points[0]),
    )


def _complete(closed: ClosedJaxpr, num_params: int, record: _Record) -> None:
    """Differentiate plainly whatever the record does not account for."""
    while True:
        missing = unaccounted(closed, num_params, record.sites) - record.plain.keys()
        if not missing:
            return
        record.plain |= dict.fromkeys(missing, "reaches the loss by a way of its own")
        _drop_sites_of_plain_leaves(record)


def _divide(record: _Record) -> None:
    """Note at which products devices share a weight that nothing but products sees."""
    parts = product_parts()
    if parts == 1:
        return
    others = [s.value for s in record.sites.values() if s.kind != "dot_general"]
    others += [s.value for s in record.sites.values() if s.value.divided is None]
    seen = _leaves(*others)
    for path, site in record.sites.items():
        if not site.value.leaves & seen:
            record.sites[path] = dataclasses.replace(site, blocks=parts)


def _drop_sites_of_plain_leaves(record: _Record) -> None:
    while True:
        # Pieces of one weight stay together.
        stems = {
            path[:-1] if site.piece else path
            for path, site in record.sites.items()
            if _is_spoilt(site, record.plain)
        }
        dropped = {
            path: site
            for path, site in record.sites.items()
            if (path[:-1] if site.piece else path) in stems
        }
        if not dropped:
            return
        for path, site in dropped.items():
            del record.sites[path]
            why = "shares a weight with a parameter that no rule covers"
            _differentiate_plainly([site.value], why, record)


def _is_spoilt(site: Site, plain: Mapping[int, str]) -> bool:
    """Whether a site is of no use if these parameters are differentiated plainly."""
    if site.is_number:  # Each parameter has its share, whatever becomes of the others.
        return site.value.leaves <= plain.keys()
    return bool(site.value.leaves & plain.keys())


def _differentiate_plainly(
    tags: Sequence[Tag],
    why: str,
    record: _Record,
    *,
    beside: int = 0,
    whole: bool = True,
) -> None:
    for tag in tags:
        if isinstance(tag, ParamValue):
            record.whole |= tag.leaves if whole else frozenset()
            for leaf in tag.leaves:
                record.plain.setdefault(leaf, why)
                record.beside[leaf] = max(beside, record.beside.get(leaf, 0))


def _entries(atoms: Sequence[Any], loops: Sequence[Loop]) -> int:
    """Return how many entries all these have, over all iterations."""
    times = math.prod(loop.length for loop in loops)
    return times * sum(math.prod(shape_of(atom)) for atom in atoms)


def _walk(
    jaxpr: Jaxpr,
    consts: Sequence[Any] | Sequence[Tag],
    inputs: Sequence[Tag],
    path: Path,
    loops: tuple[Loop, ...],
    record: _Record,
) -> list[Tag]:
    """Tag every variable of ``jaxpr``; record sites and plain parameters.

    No path from a parameter to the loss is lost: a variable is a ``ParamValue`` that names
    the parameter, or ``DATA``, and where it turns from the first into the second

    - the gradient with respect to the ``ParamValue`` is that of a site, or
    - the parameter is recorded as plain, or
    - no gradient flows back: integers and ``stop_gradient`` (in ``derive``, and below).

    It turns where an equation gives ``DATA`` although it reads a ``ParamValue``
    (``_equation``), and where tags are merged: the carry of a scan (``_scan``). Every other
    primitive, known or not, with jaxprs inside (``cond``, ``while``, ``custom_vjp``) or
    without, is one equation: all that it reads ends there. A ``ParamValue`` in the loss
    itself ends in ``analyse``. ``complete`` checks this without any tag.
    """
    tags: dict[Any, Tag] = {}
    made: dict[Any, JaxprEqn] = {}

    def read(atom: Any) -> Tag:
        return constant(atom.val) if isinstance(atom, Literal) else tags[atom]

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        tags[var] = constant(const)
    tags.update(zip(jaxpr.invars, inputs, strict=True))
    for index, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        here = (*path, index)
        out = _equation(eqn, operands, here, loops, record)
        tags.update(zip(eqn.outvars, out, strict=True))
        made.update(dict.fromkeys(eqn.outvars, eqn))
        affine = _affine(eqn, operands, made)
        # Behind the last site that a backward pass reaches, nothing more is in store.
        several = len(record.sites) > 1 and not loops
        # A part of a parameter is looked at where it enters an equation.
        if affine and several and not _leaves(*map(read, affine[1:])) & record.parts:
            record.affine[here] = affine
    return [read(atom) for atom in jaxpr.outvars]


def _pieces(
    eqn: JaxprEqn, side: int, weight: ParamValue, path: Path, loops: tuple[Loop, ...]
) -> list[Site]:
    """Return a site for each piece of a weight that lie side by side on a free axis."""
    if eqn.primitive.name != "dot_general" or not weight.pieces:
        return []
    if free_axis(eqn, side, weight.pieces[0].axis) is None:
        return []

    def site(number: int, piece: Piece) -> Site:
        avals = [jax.ShapeDtypeStruct(shape_of(a), dtype_of(a)) for a in eqn.invars]
        shape = [*avals[side].shape]
        shape[piece.axis] = piece.size
        avals[side] = avals[side].update(shape=tuple(shape))
        (part,) = jax.make_jaxpr(lambda *operands: bind(eqn, operands))(*avals).eqns
        key = (*path, ~side, number)
        return Site(key, part, side, piece.value, loops, piece)

    return [site(number, piece) for number, piece in enumerate(weight.pieces)]


def free_axis(eqn: JaxprEqn, side: int, axis: int) -> int | None:
    """Return which axis of a product is this axis of one side; None if it is contracted."""
    contract, batch = eqn.params["dimension_numbers"]
    taken = [{*contract[i], *batch[i]} for i in (0, 1)]
    free = [
        [a for a in range(len(shape_of(eqn.invars[i]))) if a not in taken[i]]
        for i in (0, 1)
    ]
    if axis not in free[side]:
        return None
    before = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    return before + free[side].index(axis)


def _leaves(*tags: Tag) -> set[int]:
    return {leaf for tag in tags if isinstance(tag, ParamValue) for leaf in tag.leaves}


def _is_number(tag: ParamValue, atom: Any) -> bool:
    """Whether a value is one number, computed from parameters, and linear on the way back."""
    one = math.prod(shape_of(atom)) == 1
    return one and tag.view is None and tag.linear and not tag.loops


def _is_part(tag: ParamValue, loops: tuple[Loop, ...]) -> bool:
    """Whether a value is a part of one parameter, another one in each iteration."""
    if tag.view is None or tag.view.base is None or {*tag.loops} != {*loops}:
        return False
    return tag.view.size < tag.view.base.size


def _copied(eqn: JaxprEqn, atom: Any) -> JaxprEqn:
    return eqn.replace(
        invars=[atom], outvars=[atom], primitive=jax.lax.copy_p, params={}
    )


_ENTRYWISE: Final = frozenset(
    {
        "add", "add_any", "atan2", "clamp", "concatenate", "div", "dynamic_update_slice",
        "max", "min", "mul", "nextafter", "pad", "pow", "rem", "scatter", "scatter-add",
        "select_n", "sub",
    }
)  # fmt: skip
"""Primitives of whose results each entry is made of few entries of each operand."""

_INLINE: Final = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Calls of parameters only that are looked into: they may be mere views."""


def _equation(
    eqn: JaxprEqn,
    operands: list[Tag],
    path: Path,
    loops: tuple[Loop, ...],
    record: _Record,
) -> list[Tag]:
    values = [tag for tag in operands if isinstance(tag, ParamValue)]
    weights = [tag for tag in values if tag.leaves]
    name = eqn.primitive.name
    if name in _INLINE and weights and len(values) == len(operands):
        inner = callee(eqn)
        return _walk(inner.jaxpr, inner.consts, operands, path, loops, record)
    if len(values) == len(operands):
        if any(set(loops) - set(tag.loops) for tag in weights) and own_backward(eqn):
            # Outside of the loop it would be called once, for the sum over iterations.
            why = f"has a backward pass of its own in {name}, inside a loop"
            _differentiate_plainly(weights, why, record)
            return [DATA] * len(eqn.outvars)
        derived = derive(eqn, values)
        if weights and _is_made_anew(derived[0], weights):
            # Its gradient would be as many times as large as the loop is long.
            _differentiate_plainly(weights, f"meets a loop's numbers in {name}", record)
            return [DATA] * len(eqn.outvars)
        return [*derived]
    if weights and len(weights) == 1 and _is_site(eqn, operands.index(weights[0])):
        side = operands.index(weights[0])
        if sites := _pieces(eqn, side, weights[0], path, loops):
            record.sites |= {site.path: site for site in sites}
            return [DATA]
        record.sites[path] = Site(path, eqn, side, weights[0], loops)
        return [DATA]
    if weights and name in CALLS:
        inner = callee(eqn)
        return _walk(inner.jaxpr, inner.consts, operands, path, loops, record)
    if weights and name == "scan":
        return _scan(eqn, operands, path, loops, record)
    if any(differentiable(eqn, var) for var in eqn.outvars):
        beside = _entries(eqn.outvars, loops) if name in _ENTRYWISE else 0
        for side, tag in enumerate(operands):
            if isinstance(tag, ParamValue) and tag.leaves:
                atom, key = eqn.invars[side], (*path, ~side)
                number = _is_number(tag, atom)
                part = number or _is_part(tag, loops)
                record.numbers |= tag.leaves if number else frozenset()
                if part and tag.leaves & record.parts:
                    copied = _copied(eqn, atom)
                    record.sites[key] = Site(key, copied, 0, tag, loops)
                    continue
                why = f"meets data in {name}"
                _differentiate_plainly(
                    [tag], why, record, beside=beside, whole=not part
                )
    return [DATA] * len(eqn.outvars)


def _is_made_anew(derived: ParamValue, weights: Sequence[ParamValue]) -> bool:
    """Whether a value, which is no view, varies with a loop for known numbers alone."""
    if derived.view is not None or not derived.leaves:
        return False
    return bool({*derived.loops} - {loop for tag in weights for loop in tag.loops})


CARRIED: Final = "is carried by a loop that changes it"


def _scan(
    eqn: JaxprEqn,
    operands: list[Tag],
    path: Path,
    loops: tuple[Loop, ...],
    record: _Record,
) -> list[Tag]:
    body = eqn.params["jaxpr"]
    num_consts, num_carry = scan_counts(eqn)
    loop = Loop(path, eqn.params["length"])
    consts, carry, xs = (
        operands[:num_consts],
        operands[num_consts : num_consts + num_carry],
        operands[num_consts + num_carry :],
    )
    counts = _counts(eqn, carry)
    for i, (start, step) in counts.items():
        carry[i] = counter(start, step, loop, reverse=eqn.params["reverse"])
    inside = [_iterated(tag, loop) for tag in xs]
    beside = _entries(eqn.outvars[:num_carry], (*loops, loop))
    while True:
        # A value that a loop changes cannot be computed outside of it.
        trial = _Record(parts=record.parts)
        out = _walk(
            body.jaxpr,
            body.consts,
            [*consts, *carry, *inside],
            path,
            (*loops, loop),
            trial,
        )
        changed = [
            i
            for i, tag in enumerate(carry)
            if isinstance(tag, ParamValue) and out[i] is not tag and i not in counts
        ]
        if not changed:
            break
        merged = [carry[i] for i in changed]
        _differentiate_plainly(merged, CARRIED, record, beside=beside)
        for i in changed:
            carry[i] = DATA
    record.update(trial)
    # What goes on as data came in as data: a parameter that is handed on ends here.
    handed = [out[i] for i, tag in enumerate(carry) if tag is DATA]
    _differentiate_plainly(handed, CARRIED, record, beside=beside)
    stacked = [_stacked(tag, loop) for tag in out[num_carry:]]
    for i, (start, step) in counts.items():
        carry[i] = constant(now(start) + step * loop.length)
    return [*carry, *stacked]


def _counts(eqn: JaxprEqn, carry: Sequence[Tag]) -> dict[int, tuple[ParamValue, int]]:
    """Return which carries are known integers that grow by a number: start and number."""
    body = eqn.params["jaxpr"].jaxpr
    num_consts, num_carry = scan_counts(eqn)
    made = {var: e for e in body.eqns for var in e.outvars}
    found = {}
    for i in range(num_carry):
        tag, before, after = carry[i], body.invars[num_consts + i], body.outvars[i]
        last = None if isinstance(after, Literal) else made.get(after)
        if (
            not isinstance(tag, ParamValue)
            or not tag.known
            or tag.loops
            or last is None
        ):
            continue
        by = [atom.val for atom in last.invars if isinstance(atom, Literal)]
        whole = shape_of(before) == () and jnp.issubdtype(dtype_of(before), jnp.integer)
        if last.primitive.name == "add" and before in last.invars and by and whole:
            found[i] = tag, int(by[0])
    return found


def _iterated(tag: Tag, loop: Loop) -> Tag:
    """Tag what one iteration sees of a stacked input."""
    if not isinstance(tag, ParamValue):
        return DATA
    return _looped(tag, (*tag.loops, loop), -1)


def _looped(value: ParamValue, loops: tuple[Loop, ...], shift: int) -> ParamValue:
    """Return a value whose first axis has become a loop (``shift`` -1), or was one (1)."""
    pieces = [
        piece._replace(
            value=_looped(piece.value, loops, shift), axis=piece.axis + shift
        )
        for piece in value.pieces
        if piece.axis + shift >= 0
    ]
    return dataclasses.replace(value, loops=loops, pieces=tuple(pieces))


def _stacked(tag: Tag, loop: Loop) -> Tag:
    """Tag a stacked output."""
    if not isinstance(tag, ParamValue):
        return DATA
    if loop in tag.loops:
        outer = tuple(other for other in tag.loops if other != loop)
        return _looped(tag, outer, 1)

    def repeated(evaluator: Any) -> Any:
        axis = len(tag.loops)
        return jnp.repeat(jnp.expand_dims(evaluator(tag), axis), loop.length, axis)

    return ParamValue(
        tag.leaves, tag.loops, repeated, narrow=tag.narrow, linear=tag.linear
    )


def _affine(
    eqn: JaxprEqn, operands: Sequence[Tag], made: dict[Any, JaxprEqn]
) -> Affine | None:
    """Return what scales and shifts data position by position, as norms do at their end."""
    if eqn.primitive.name != "add":
        return None
    for side, tag in enumerate(operands):
        shift, scaled = eqn.invars[side], eqn.invars[1 - side]
        product = None if isinstance(scaled, Literal) else made.get(scaled)
        if not isinstance(tag, ParamValue) or not tag.leaves or product is None:
            continue
        if _repeats(shift, eqn) and not _repeats(scaled, eqn):
            scales = [atom for atom in product.invars if _repeats(atom, product)]
            if product.primitive.name == "mul" and len(scales) == 1:
                (data,) = [atom for atom in product.invars if atom is not scales[0]]
                return Affine(data, scales[0], shift)
    return None


def _repeats(atom: Any, eqn: JaxprEqn) -> bool:
    """Whether an operand stands at several positions of the result."""
    shape = shape_of(atom)
    return len(shape) > 0 and shape != shape_of(eqn.outvars[0])


def _is_site(eqn: JaxprEqn, side: int) -> bool:
    rule = _SITE_RULES.get(eqn.primitive.name)
    found = rule is not None and rule(eqn, side)
    return found and differentiable(eqn, eqn.outvars[0])


def _dot_site(eqn: JaxprEqn, side: int) -> bool:
    del eqn, side
    return True


def _conv_site(eqn: JaxprEqn, side: int) -> bool:
    # Without an output there are no patches to cut.
    some = 0 not in shape_of(eqn.outvars[0])
    one = side == 1 and eqn.params["batch_group_count"] == 1
    return one and some and cuts_well(eqn)


def _gather_site(eqn: JaxprEqn, side: int) -> bool:
    return side == 0 and picking(eqn) is not None


_SITE_RULES = {
    "dot_general": _dot_site,
    "conv_general_dilated": _conv_site,
    "dynamic_slice": _gather_site,
    "gather": _gather_site,
}
