"""Parameters that are split over devices, put together where they are used and no earlier.

Left to itself, XLA moves activations between devices wherever that looks cheaper than moving
weights: rows of examples are then no longer where they were. Here every use says that it
wants the whole weight. Inside a scan over layers that is one layer's; inside ``remat`` it is
put together again for the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec

from dpjax.jaxprs import CALLS, bind, callee, scan_counts
from dpjax.typing import Params

FSDP = "fsdp"
"""The axis of the mesh whose devices share rows, and keep a part of each weight."""
MODEL = "model"
"""The axis of the mesh whose devices share the products with a weight."""


def sharers() -> int:
    """Return among how many devices the rows of the program that is traced are divided.

    By XLA: what ``jax.shard_map`` divides, the program sees a part of only.
    """
    return _parts(FSDP)


def product_parts() -> int:
    """Return among how many devices the products with a weight are divided, likewise."""
    return _parts(MODEL)


def _parts(axis: str) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if kinds.get(axis) is AxisType.Auto else 1


def is_divided() -> bool:
    """Return whether XLA divides the program that is traced among devices at all."""
    return sharers() > 1 or product_parts() > 1


def summed_where_rows_are(
    function: Callable[[Any], jax.Array], operands: Any, axes: Any, *, rows: int
) -> jax.Array:
    """Return ``function(operands)``, a sum over rows, without moving any of them.

    Left to itself, XLA gathers all rows on each device where they are written to places of
    a table.

    Args:
        function: Of a tree whose arrays have rows -> the sum over them.
        operands: The tree.
        axes: Which axis the rows are, for all arrays below each node of ``operands``.
        rows: How many there are; of a single one, nothing is divided.
    """
    if rows % sharers() or sharers() == 1:
        return function(operands)
    specs = jax.tree.map(lambda axis: PartitionSpec(*[None] * axis, FSDP), axes)
    return jax.shard_map(
        lambda local: jax.lax.psum(function(local), FSDP),
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        axis_names={FSDP},
        check_vma=False,
    )(operands)


def whole_along(axis: int, array: jax.Array) -> jax.Array:
    """Return an array that is not split along an axis, to be indexed there.

    XLA's partitioner aborts the process on some gathers along split axes.
    """
    if not is_divided():
        return array
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * array.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*spec))


def gathering(
    function: Callable[..., Any], spec_of: Callable[[Params], Sequence[PartitionSpec]]
) -> Callable[..., Any]:
    """Return a function of parameters that are split over devices; its values are the same.

    Weights are put together along ``FSDP`` where they are used; along other axes they stay
    split. Where no program is divided it is the function itself.

    Args:
        function: Of parameters and other trees, such as a loss of one example.
        spec_of: How each leaf of the parameters is split.

    Raises:
        ValueError: See ``check_divisible``; by what is returned, where it is divided.
    """

    def gathered(params: Params, *others: Any) -> Any:
        args = (params, *others)
        if not is_divided():
            return function(*args)
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        check_divisible(closed.jaxpr)
        specs = [spec if any(spec) else None for spec in spec_of(params)]
        values = jax.tree.leaves(args)
        specs += [None] * (len(values) - len(specs))
        out = _run(closed, values, specs)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return gathered


def check_divisible(jaxpr: Jaxpr) -> None:
    """Raise ValueError if XLA's partitioner would divide a loss of one example wrongly.

    Of a convolution it returns wrong gradients for all examples but those of the first
    device, without a word: see tests/parallel/test_gathering.py.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            raise ValueError(
                "fsdp and model must be 1 for a loss with convolutions, whose gradients XLA "
                "does not divide rightly; data=None takes all devices"
            )
        for inner in jaxprs_in_params(eqn.params):
            check_divisible(inner)


def _run(
    closed: ClosedJaxpr,
    inputs: Sequence[Any],
    specs: Sequence[PartitionSpec | None],
) -> list[Any]:
    env: dict[Any, Any] = {}
    split: dict[Any, PartitionSpec] = {}
    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, inputs, strict=True))
    for var, spec in zip(closed.jaxpr.invars, specs, strict=True):
        if spec is not None:
            split[var] = spec

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    def spec_of(atom: Any) -> PartitionSpec | None:
        return None if isinstance(atom, Literal) else split.get(atom)

    for eqn in closed.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        found = [spec_of(atom) for atom in eqn.invars]
        first = found[0] if found else None
        if first is not None and _narrows(eqn):
            # Half of the bytes travel if the cast comes first.
            split[eqn.outvars[0]] = first
            out = bind(eqn, values)
        elif _picks(eqn):
            out = [_picked(eqn, *map(_whole, values, found))]
        else:
            out = _equation(eqn, values, found)
        env.update(zip(eqn.outvars, out, strict=True))
    return [_whole(read(x), spec_of(x)) for x in closed.jaxpr.outvars]


def _equation(
    eqn: JaxprEqn,
    values: list[Any],
    specs: list[PartitionSpec | None],
) -> list[Any]:
    indexes = _indexes_inside(eqn)
    if any(spec is not None for spec in specs) or indexes:
        if eqn.primitive.name == "scan":
            return _scan(eqn, values, specs)
        if eqn.primitive.name in CALLS:
            return _call(eqn, values, specs)
    if indexes and product_parts() > 1:
        # XLA's partitioner aborts the process where an axis that is indexed is split (in a
        # program that is written for one of several replicas). Inside of a loop that ends
        # by a condition, a branch or a derivative of one's own nothing may be split at all.
        return [*map(_undivided, bind(eqn, [*map(_undivided, values)]))]
    values = [*map(_whole, values, specs)]
    if _indexes(eqn) and product_parts() > 1:
        values = [
            _undivided(value) if spec is None else value
            for value, spec in zip(values, specs, strict=True)
        ]
    return bind(eqn, values)


def _call(
    eqn: JaxprEqn,
    values: list[Any],
    specs: list[PartitionSpec | None],
) -> list[Any]:
    def call(values: list[Any]) -> list[Any]:
        return _run(callee(eqn), values, specs)

    if "prevent_cse" in eqn.params:
        call = jax.checkpoint(
            call,
            prevent_cse=eqn.params["prevent_cse"],
            policy=eqn.params["policy"],
        )
    return call(values)


def _scan(
    eqn: JaxprEqn,
    values: list[Any],
    specs: list[PartitionSpec | None],
) -> list[Any]:
    consts, carry = scan_counts(eqn)
    first = consts + carry
    for i, spec in enumerate(specs):
        # What is carried changes, and a split axis of the loop is no loop's.
        if spec is not None and (consts <= i < first or (i >= first and spec[0])):
            values[i], specs[i] = _whole(values[i], spec), None
    inside = [*specs[:first], *(s and PartitionSpec(*s[1:]) for s in specs[first:])]

    def step(carried: list[Any], slices: list[Any]) -> tuple[list, list]:
        inputs = [*values[:consts], *carried, *slices]
        out = _run(eqn.params["jaxpr"], inputs, inside)
        return out[:carry], out[carry:]

    carried, ys = jax.lax.scan(
        step,
        values[consts:first],
        values[first:],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carried, *ys]


def _whole(value: Any, spec: PartitionSpec | None) -> Any:
    if spec is None:
        return value
    rest = (None if axis == FSDP else axis for axis in spec)
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*rest))


def _undivided(value: Any) -> Any:
    """Constrain an array not to be split; rows, which ``vmap`` adds later, may be."""
    if not jnp.ndim(value) or not jnp.issubdtype(value.dtype, np.number):
        return value
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*[None] * value.ndim))


def _indexes(eqn: JaxprEqn) -> bool:
    """Whether an equation, its batched form or its derivative is a gather or scatter."""
    name = eqn.primitive.name
    return name in _INDEXING or name.startswith("scatter")


_INDEXING = {"gather", "dynamic_slice", "dynamic_update_slice", "sort", "top_k"}


def _indexes_inside(eqn: JaxprEqn) -> bool:
    inner = [e for jaxpr in jaxprs_in_params(eqn.params) for e in jaxpr.eqns]
    return any(_indexes(e) or _indexes_inside(e) for e in inner)


def _picks(eqn: JaxprEqn) -> bool:
    """Whether an equation takes one number along one axis, as cross-entropies do."""
    if eqn.primitive.name != "gather" or any(n != 1 for n in eqn.params["slice_sizes"]):
        return False
    how = eqn.params["dimension_numbers"]
    operand: Any = eqn.invars[0].aval
    return (
        how.start_index_map == how.collapsed_slice_dims
        and len(how.start_index_map) == 1
        and not how.offset_dims
        and jnp.issubdtype(operand.dtype, jnp.inexact)
    )


def _picked(eqn: JaxprEqn, operand: jax.Array, starts: jax.Array) -> jax.Array:
    """Take the entry by comparing all places with the one that is asked for.

    Where the axis is split over devices, XLA's partitioner aborts the process on the gather
    (in a program that is written for one of several replicas).
    """
    how, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    (axis,) = how.start_index_map
    size = operand.shape[axis]
    places = starts[..., 0]
    if size > jnp.iinfo(places.dtype).max:  # Bytes, say, among 300 classes.
        places = places.astype(jnp.int32)
    # [indices..., size]: axes that the operand has no share in are repeated.
    shared = how.operand_batching_dims
    where = how.start_indices_batching_dims
    ordered = operand.transpose(*(shared[i] for i in np.argsort(where)), axis)
    rest = [i for i in range(places.ndim) if i not in where]
    rows = jnp.broadcast_to(jnp.expand_dims(ordered, rest), (*places.shape, size))
    known = (places >= 0) & (places < size)
    fill = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    if not fill:
        places, known = jnp.clip(places, 0, size - 1), True
    every = jax.lax.broadcasted_iota(places.dtype, rows.shape, rows.ndim - 1)
    chosen = places[..., None] == every
    found = jnp.sum(jnp.where(chosen, rows, 0), axis=-1, dtype=operand.dtype)
    if not fill:
        return found
    return jnp.where(known, found, eqn.params["fill_value"])


def _narrows(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "convert_element_type":
        return False
    before: Any = eqn.invars[0].aval
    return eqn.params["new_dtype"].itemsize < before.dtype.itemsize
