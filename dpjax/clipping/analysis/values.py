"""Values that depend on parameters only, and how they are made from them.

While the loss of one example is analysed, every variable is either ``DATA`` (it may depend
on the example) or a ``ParamValue``. A ``ParamValue`` can be computed once for the whole
batch, outside the program that it was found in: values inside a loop get one leading axis
for each loop that they vary with. Its transpose takes gradients with respect to the value
back to the parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import Array

from dpjax.clipping.analysis.tracing import narrow
from dpjax.jaxprs import bind
from dpjax.parallel.gathering import MODEL

Path = tuple[int, ...]
"""Where an equation stands: its index at each level of nesting."""


class Loop(NamedTuple):
    """One ``lax.scan`` of the program, by its place and its number of iterations."""

    path: Path
    length: int


class _Data:
    """The tag of a value that may depend on the example."""


DATA: Final = _Data()


@dataclasses.dataclass(frozen=True, eq=False)
class ParamValue:
    """A value that no example can change.

    Attributes:
        leaves: Indices of the parameters it depends on; none for a constant.
        loops: Loops whose iterations it varies with, outermost first. ``compute`` returns
            one leading axis for each.
        compute: The value, from an ``Evaluator``.
        view: If its entries are entries of one parameter, each at most once: which ones, as
            a numpy view of a buffer shaped like the parameter that nobody reads. Numpy's
            own rules for shapes, strides and shared memory then answer what overlaps.
        scale: By what the entries of the view are multiplied.
        known: Whether it depends on no input of the loss at all.
        pieces: Views that it is put together from, side by side on one axis.
        narrow: Whether it is made from the parameters in less than float32 somewhere.
        divided: Of a view that devices share along an axis: its stride, and its size.
        linear: Whether its gradient goes back to the parameters linearly: a backward pass of
            the loss's own (``own_backward``) need not.
    """

    leaves: frozenset[int]
    loops: tuple[Loop, ...]
    compute: Callable[["Evaluator"], Any]
    view: np.ndarray | None = None
    scale: float = 1.0
    known: bool = False
    pieces: tuple["Piece", ...] = ()
    narrow: bool = False
    divided: tuple[int, int] | None = None
    linear: bool = True


Tag = ParamValue | _Data


class Piece(NamedTuple):
    """A view that stands from ``start`` on along one axis (without loops) of a value."""

    value: ParamValue
    axis: int
    start: int
    size: int


class Evaluator:
    """Compute ``ParamValue``s from parameters; shared parts once."""

    def __init__(self, leaves: Sequence[Array], *, keep_dtype: bool = False) -> None:
        """Take the parameters.

        Args:
            leaves: The parameters, in the order that ``ParamValue.leaves`` counts.
            keep_dtype: Skip the casts between floating dtypes, and scales. Only for views:
                it makes their transpose exact for gradients that are wider than the
                parameters, and factors of sites are scaled already.
        """
        self.leaves = leaves
        self.keep_dtype = keep_dtype
        self._done: dict[Any, Any] = {}

    def __call__(self, value: ParamValue) -> Any:
        """Return the value, ``[loops..., *shape]``."""
        return self.once(value, lambda: value.compute(self))

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` returned at its first call under this key."""
        if key not in self._done:
            self._done[key] = compute()
        return self._done[key]


def constant(value: Any) -> ParamValue:
    """Tag a value that depends on nothing."""
    known = not isinstance(value, jax.core.Tracer)
    return ParamValue(frozenset(), (), lambda _: value, known=known)


def counter(start: ParamValue, step: int, loop: Loop, *, reverse: bool) -> ParamValue:
    """Tag an integer that starts as a known one and grows by ``step`` an iteration."""
    turns = np.arange(loop.length)[:: -1 if reverse else 1]
    numbers = now(start) + step * turns.astype(now(start).dtype)
    return ParamValue(frozenset(), (loop,), lambda _: jnp.asarray(numbers), known=True)


def parameter(index: int, buffer: np.ndarray) -> ParamValue:
    """Tag a parameter; ``buffer`` is shaped like it and stands for its memory."""
    return ParamValue(
        frozenset([index]), (), lambda evaluator: evaluator.leaves[index], buffer
    )


def shape_of(atom: Any) -> tuple[int, ...]:
    """Return the shape of a variable or literal of a jaxpr."""
    return atom.aval.shape


def dtype_of(atom: Any) -> Any:
    """Return the dtype of a variable or literal of a jaxpr."""
    return atom.aval.dtype


def derive(eqn: JaxprEqn, inputs: Sequence[ParamValue]) -> list[ParamValue]:
    """Tag the results of an equation whose inputs no example can change."""
    loops = tuple(sorted({loop for value in inputs for loop in value.loops}))
    leaves = frozenset().union(*(value.leaves for value in inputs))
    nothing: frozenset[int] = frozenset()
    flow = [leaves if differentiable(eqn, var) else nothing for var in eqn.outvars]
    views, scaled = _views(eqn, inputs), _scaled(eqn, inputs)
    known = all(value.known for value in inputs)

    def run(evaluator: Evaluator) -> list[Any]:
        values = [evaluator(value) for value in inputs]
        # Where a weight lies while the loss is computed is not where its gradient belongs.
        skipped = {"sharding_constraint"}
        if evaluator.keep_dtype:
            skipped.add("convert_element_type")
        if eqn.primitive.name in skipped:
            return values
        if evaluator.keep_dtype and scaled is not None:
            return [values[scaled.side]]

        def mapped(args: Sequence[Any]) -> list[Any]:
            return bind(eqn, args)

        for loop in reversed(loops):
            axes = [0 if loop in value.loops else None for value in inputs]
            mapped = jax.vmap(mapped, in_axes=(axes,))
        return mapped(values)

    def output(index: int) -> Callable[[Evaluator], Any]:
        return lambda evaluator: evaluator.once(run, lambda: run(evaluator))[index]

    below = any(value.narrow for value in inputs) or narrow(eqn)
    linear = all(value.linear for value in inputs) and not own_backward(eqn)
    pieces = _pieces(eqn, inputs)
    scale = inputs[0].scale if inputs else 1.0  # A view is made of one value.
    if scaled is not None:
        views, scale = [inputs[scaled.side].view], scaled.scale
    return [
        ParamValue(
            flow[i],
            loops,
            output(i),
            view,
            1.0 if view is None else scale,
            known=known,
            pieces=pieces,
            narrow=below,
            divided=None if view is None else _divided(eqn, inputs[0]),
            linear=linear,
        )
        for i, view in enumerate(views)
    ]


def _divided(eqn: JaxprEqn, source: ParamValue) -> tuple[int, int] | None:
    """Return along which axis of a view devices share products, by its stride and size."""
    if eqn.primitive.name != "sharding_constraint" or source.view is None:
        return source.divided
    spec = getattr(eqn.params["sharding"], "spec", ())
    if MODEL not in spec:
        return None
    axis = len(source.loops) + spec.index(MODEL)
    return source.view.strides[axis], source.view.shape[axis]


def _pieces(eqn: JaxprEqn, inputs: Sequence[ParamValue]) -> tuple[Piece, ...]:
    if eqn.primitive.name == "convert_element_type":
        if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
            return ()
        below = inputs[0].narrow or narrow(eqn)
        return tuple(
            piece._replace(value=dataclasses.replace(piece.value, narrow=below))
            for piece in inputs[0].pieces
        )
    alike = all(value.view is not None for value in inputs)
    if eqn.primitive.name != "concatenate" or not alike:
        return ()
    if any(value.loops != inputs[0].loops for value in inputs):
        return ()
    axis = eqn.params["dimension"]
    sizes = [shape_of(atom)[axis] for atom in eqn.invars]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(map(Piece, inputs, [axis] * len(sizes), starts, sizes))


class _Scaled(NamedTuple):
    """Which operand is a view that an equation scales, and its scale afterwards."""

    side: int
    scale: float


def _scaled(eqn: JaxprEqn, inputs: Sequence[ParamValue]) -> _Scaled | None:
    name = eqn.primitive.name
    if name == "neg" and inputs[0].view is not None:
        return _Scaled(0, -inputs[0].scale)
    if name not in ("mul", "div"):
        return None
    for side, by in ((0, 1), (1, 0)):
        # One number: in a loop over constants it is another one in each iteration.
        number = shape_of(eqn.invars[by]) == () and not inputs[by].loops
        number = number and inputs[by].known
        if inputs[side].view is None or not number or (name == "div" and by == 0):
            continue
        by_what = float(now(inputs[by]))
        scale = by_what if name == "mul" else np.divide(1.0, by_what)
        if np.isfinite(scale):
            return _Scaled(side, inputs[side].scale * float(scale))
    return None


def now(value: ParamValue) -> np.ndarray:
    """Return a value that is known, while the loss is analysed."""
    with jax.ensure_compile_time_eval():
        return np.asarray(Evaluator(())(value))


def differentiable(eqn: JaxprEqn, var: Any) -> bool:
    """Whether a gradient can flow back from this result of an equation."""
    dtype = getattr(var.aval, "dtype", jnp.dtype(bool))  # Tokens have none.
    return eqn.primitive.name != "stop_gradient" and jnp.issubdtype(dtype, jnp.inexact)


def own_backward(eqn: JaxprEqn) -> bool:
    """Whether an equation, or one inside it, has a backward pass of the loss's own.

    That (``custom_vjp``) need not be linear in the gradient: it may clip, for instance.
    """
    if eqn.primitive.name.startswith(("custom_vjp", "custom_transpose", "linear_call")):
        return True
    inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves([*eqn.params.values()])]
    return any(own_backward(e) for x in inner if isinstance(x, Jaxpr) for e in x.eqns)


def _views(eqn: JaxprEqn, inputs: Sequence[ParamValue]) -> Sequence[np.ndarray | None]:
    nothing: list[None] = [None] * len(eqn.outvars)
    if eqn.primitive.name == "dynamic_slice":
        return [_cut(eqn, *inputs)]
    rule = _VIEW_RULES.get(eqn.primitive.name)
    if rule is None or len(inputs) != 1 or inputs[0].view is None:
        return nothing
    source, lead = inputs[0].view, len(inputs[0].loops)
    try:
        views = rule(source, lead, eqn)
    except _NotAViewError:
        return nothing
    return views


def _cut(eqn: JaxprEqn, source: ParamValue, *starts: ParamValue) -> np.ndarray | None:
    """Return the view of a slice from known places on; None if it is none.

    Where a loop walks over an axis, a row at a time and in even steps, that axis becomes
    the one of the loop.
    """
    view, sizes = source.view, eqn.params["slice_sizes"]
    if view is None or not all(start.known for start in starts):
        return None
    lead = len(source.loops)
    cut: list[slice] = [slice(None)] * lead
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        where = np.clip(now(start), 0, view.shape[lead + axis] - size)
        even = _even_steps(where, size)
        if even is None:
            return None
        cut.append(even)
    walked = [axis for axis, start in enumerate(starts) if start.loops]
    loops = [*source.loops, *(starts[axis].loops[0] for axis in walked)]
    if len({*loops}) < len(loops):
        return None
    axes = [*range(lead), *(lead + axis for axis in walked)]
    front = [axes[i] for i in sorted(range(len(loops)), key=lambda i: loops[i])]
    rest = [axis for axis in range(view.ndim) if axis not in axes]
    view = view[tuple(cut)].transpose(*front, *rest)
    return np.expand_dims(view, tuple(len(loops) + axis for axis in walked))


def _even_steps(where: np.ndarray, size: int) -> slice | None:
    """Return the slice that meets, once each, what starts at these places; None if none."""
    if not where.ndim:
        return slice(int(where), int(where) + size)
    steps = np.unique(np.diff(where)) if where.size > 1 else np.ones(1, int)
    if where.ndim > 1 or not where.size or size > 1 or len(steps) > 1 or not steps[0]:
        return None
    step = int(steps[0])
    end = int(where[-1]) + (1 if step > 0 else -1)
    return slice(int(where[0]), end if end >= 0 else None, step)


class _NotAViewError(Exception):
    pass


def _reshaped(view: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    try:
        return view.reshape(shape, copy=False)
    except ValueError as error:
        raise _NotAViewError from error


def _reshape(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    return [_reshaped(view, view.shape[:lead] + shape_of(eqn.outvars[0]))]


def _same(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    del lead, eqn
    return [view]


def _convert(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    del lead
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise _NotAViewError
    return [view]


def _broadcast(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    shape = eqn.params["shape"]
    if np.prod(shape) != np.prod(view.shape[lead:]):
        raise _NotAViewError  # An entry would appear twice.
    return _reshape(view, lead, eqn)  # The order of dimensions is kept.


def _transpose(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    moved = [lead + axis for axis in eqn.params["permutation"]]
    return [view.transpose([*range(lead), *moved])]


def _slice(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    cut = tuple(map(slice, starts, limits, strides))
    return [view[(slice(None),) * lead + cut]]


def _split(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    return np.split(view, ends, axis=lead + eqn.params["axis"])


def _reverse(view: np.ndarray, lead: int, eqn: JaxprEqn) -> list[np.ndarray]:
    return [np.flip(view, tuple(lead + axis for axis in eqn.params["dimensions"]))]


_VIEW_RULES: dict[str, Callable[[np.ndarray, int, JaxprEqn], list[np.ndarray]]] = {
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "optimization_barrier": _same,
    "reshape": _reshape,
    "rev": _reverse,
    "sharding_constraint": _same,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "transpose": _transpose,
}
