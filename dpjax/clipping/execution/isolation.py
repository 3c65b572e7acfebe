"""Keep the examples of a batch apart, whatever stands in them.

Under ``vmap`` an operation of JAX computes each row of its result from one row of each
operand: dots batch, scatters and gathers index, control flow selects, decompositions loop.
There is one exception. A convolution whose image *and* kernel depend on the example, such as
the gradient of a kernel, becomes one of as many groups as there are examples, and a backend
may compute groups as one convolution with zeros between them (XLA does, by the dtype and the
kind of group). Zero times NaN or inf is NaN, so that one example could spoil all others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jaxtyping import Array, Bool

from dpjax.jaxprs import bind

_CONVOLUTION = "conv_general_dilated"
_OPAQUE = ("custom_vmap_call", "shard_map")
"""Primitives that say themselves what ``vmap`` makes of them, or see several devices."""


def isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, ready for ``vmap`` over examples: none can reach another.

    Convolutions of two values of an example are given rows without NaN and inf only, and
    the results of the other rows are NaN: what a backend multiplies by zero is finite.
    (An overflow inside of a row stays there: products with zeros do not overflow.)

    Args:
        function: Not differentiated any more: a gradient rather than a loss.
    """

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        out = _run(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return run


def _run(closed: ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = {}
    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == _CONVOLUTION:
            out = [_convolved(eqn, *values)]
        else:
            out = bind(_opened(eqn), values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _opened(eqn: JaxprEqn) -> JaxprEqn:
    """Return an equation whose inner programs keep examples apart, too."""
    if eqn.primitive.name in _OPAQUE or not _convolves(eqn):
        return eqn
    return eqn.replace(params=jax.tree.map(_rewritten, eqn.params, is_leaf=_is_program))


def _rewritten(param: Any) -> Any:
    if not _is_program(param):
        return param
    closed = param if isinstance(param, ClosedJaxpr) else ClosedJaxpr(param, ())
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in closed.jaxpr.invars
    ]
    new = jax.make_jaxpr(lambda *inputs: _run(closed, inputs))(*shapes)
    if isinstance(param, ClosedJaxpr):
        return new
    assert not new.consts, "a program without constants has gained some"
    return new.jaxpr


def _is_program(param: Any) -> bool:
    return isinstance(param, ClosedJaxpr | Jaxpr)


def _convolves(eqn: JaxprEqn) -> bool:
    return any(
        inner.primitive.name == _CONVOLUTION or _convolves(inner)
        for jaxpr in jaxprs_in_params(eqn.params)
        for inner in jaxpr.eqns
    )


def _convolved(eqn: JaxprEqn, image: Array, kernel: Array) -> Array:
    """Run a convolution such that ``vmap`` keeps its rows apart."""

    def of_one(image: Array, kernel: Array) -> Array:
        return bind(eqn, [image, kernel])[0]

    many = _by_feature_groups(eqn) if image.dtype.itemsize <= 4 else of_one

    @jax.custom_batching.custom_vmap
    def convolved(image: Array, kernel: Array) -> Array:
        return of_one(image, kernel)

    @convolved.def_vmap
    def _(
        size: int, batched: list[bool], image: Array, kernel: Array
    ) -> tuple[Array, bool]:
        del size
        axes = [0 if is_batched else None for is_batched in batched]
        if None in axes:
            return jax.vmap(of_one, axes)(image, kernel), True
        finite = _finite(image) & _finite(kernel)
        rows = [jnp.where(_like(finite, x), x, 0) for x in (image, kernel)]
        out = jax.vmap(many)(*rows)
        return jnp.where(_like(finite, out), out, jnp.nan), True

    return convolved(image, kernel)


def _by_feature_groups(eqn: JaxprEqn) -> Callable[[Array, Array], Array]:
    """Return a convolution whose groups are all groups of features.

    JAX takes the gradient of a grouped kernel by groups of the "batch": XLA would compute it
    as one convolution, with zeros between groups and then between examples, and so as many
    times as there are of both. Float64 aside, it has convolutions for groups of features.
    """
    groups = eqn.params["batch_group_count"]
    if groups == 1:
        return lambda image, kernel: bind(eqn, [image, kernel])[0]
    batch, features = eqn.params["dimension_numbers"].lhs_spec[:2]
    params = eqn.params | {"batch_group_count": 1, "feature_group_count": groups}
    regrouped = eqn.replace(params=params)

    def convolved(image: Array, kernel: Array) -> Array:
        shape = list(image.shape)
        shape[batch] //= groups
        split = image.reshape(*shape[:batch], groups, *shape[batch:])
        moved = jnp.moveaxis(split, batch, features)  # Just before the features.
        shape[features] *= groups
        return bind(regrouped, [moved.reshape(shape), kernel])[0]

    return convolved


def _finite(rows: Array) -> Bool[Array, "B"]:
    return jnp.all(jnp.isfinite(rows), axis=range(1, rows.ndim))


def _like(rows: Bool[Array, "B"], array: Array) -> Bool[Array, "B ..."]:
    return rows.reshape(-1, *(1,) * (array.ndim - 1))
