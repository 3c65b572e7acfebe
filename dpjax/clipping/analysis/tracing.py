"""Trace the loss of one example, and refuse what cannot be clipped per example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jaxtyping import Array

from dpjax.typing import Batch, Example, Key, Loss, Params


def check_loss(loss: Loss, params: Params, batch: Batch, key: Key) -> None:
    """Raise TypeError, at trace time, unless ``loss`` can be clipped per example."""
    check_params(params)
    trace(scalar(loss), params, *one_example(batch, key))


def check_params(params: Params) -> None:
    """Raise TypeError, with its name, for a parameter that is not floating point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"parameter {name} has dtype {jnp.result_type(leaf)}; parameters must be "
                "floating point (keep integer state out of params)"
            )


def check_key(key: Key) -> None:
    """Raise TypeError for a key that is no typed one, or mixes examples."""
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(
            f"key has dtype {jnp.result_type(key)}; make it by jax.random.key(seed), not by "
            "jax.random.PRNGKey"
        )
    if jnp.shape(key):
        raise TypeError(
            f"key has shape {jnp.shape(key)}; one key is wanted, from which each example "
            "gets its own"
        )
    if (kind := str(jax.random.key_impl(key))) in ("rbg", "unsafe_rbg"):
        raise TypeError(
            f"key is of the kind {kind!r}, by which jax.vmap draws for all examples from "
            "the key of the first: without it the others would draw otherwise; make it by "
            "jax.random.key(seed, impl='threefry2x32')"
        )


def scalar(loss: Loss) -> Loss:
    """Return ``loss`` with a check that its value is one floating-point scalar."""

    def checked(params: Params, example: Example, key: Key) -> Array:
        value = loss(params, example, key)
        if not _is_scalar(value):
            raise TypeError(
                f"loss returned {jax.tree.map(jax.typeof, value)}; it must return one "
                "floating-point scalar for ONE example (no batch axis, no auxiliary "
                "outputs)"
            )
        return jnp.asarray(value)

    return checked


def _is_scalar(value: Any) -> bool:
    # None is a tree without leaves, which treedef_is_leaf takes for one.
    if value is None or not jax.tree_util.treedef_is_leaf(jax.tree.structure(value)):
        return False
    return jnp.shape(value) == () and jnp.issubdtype(
        jnp.result_type(value), jnp.floating
    )


def one_example(batch: Batch, key: Key) -> tuple[Any, Any]:
    """Return shapes of one example of the batch and of its key."""
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.examples
    )
    return example, jax.ShapeDtypeStruct((), key.dtype)


def below_float32(jaxpr: Jaxpr) -> bool:
    """Whether any value is computed in a floating dtype narrower than float32."""
    return any(narrow(eqn) for eqn in jaxpr.eqns)


def narrow(eqn: JaxprEqn) -> bool:
    """Whether an equation takes or gives floating values narrower than float32."""
    for var in (*eqn.invars, *eqn.outvars):
        dtype = getattr(var.aval, "dtype", jnp.dtype(bool))  # Tokens have none.
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            return True
    return any(below_float32(inner) for inner in jaxprs_in_params(eqn.params))


def trace(function: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """Return the jaxpr of ``function`` on values shaped like ``args``.

    Raises:
        TypeError: It has side effects or reads a mapped axis.
    """
    try:
        closed = jax.make_jaxpr(function)(*args)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise TypeError(
            f"the loss reads a mapped axis ({error}); it sees ONE example, and there is "
            "no batch axis to mix examples over"
        ) from error
    if closed.effects:
        effects = ", ".join(sorted(str(effect) for effect in closed.effects))
        raise TypeError(
            f"the loss has side effects ({effects}); it must be a pure function: callbacks "
            "and prints would see private examples, an unknown number of times"
        )
    return closed
