"""What is added at a site so that a backward pass says more than it would.

Each hook runs the site unchanged and takes an extra input on which the output does not
depend. The gradient "with respect to" that input is what we want to know.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpjax.clipping.analysis.uses import Site
from dpjax.clipping.arithmetic import kernels, layouts
from dpjax.clipping.arithmetic.rounding import Norms
from dpjax.jaxprs import bind


def apply(site: Site, weight: Array, data: Array) -> Array:
    """Run a site as it is."""
    return bind(site.eqn, site.operands(weight, data))[0]


@jax.custom_vjp
def tap(out: Array, extra: Array) -> Array:
    """Return ``out``; the gradient with respect to ``extra`` is that of ``out``."""
    del extra
    return out


tap.defvjp(lambda out, _: (out, None), lambda _, g: (g, g))


def affine(data: Array, scale: Array, shift: Array) -> Array:
    """Return ``data * scale + shift``; on the way back the gradient of ``shift`` is first.

    It is a sum over positions, which XLA's CPU scheduler would put after the whole backward
    pass: up to there the gradient of the result would live. So what goes back to ``data``
    waits for it. ``scale`` gets a term that is zero whatever the sum, as no compiler can
    tell. (Optimization barriers are gone before the scheduler runs.)
    """

    def backward(
        saved: tuple[Array, Array, Array], g: Array
    ) -> tuple[Array, Array, Array]:
        data, scale, shift = saved
        into_shift = _summed_to(shift.shape, g)
        beyond = jnp.max(jnp.abs(into_shift)) > jnp.inf
        later = scale + jnp.where(beyond, jnp.ones_like(scale), 0)
        return g * later, _summed_to(scale.shape, g * data), into_shift

    def run(data: Array, scale: Array, shift: Array) -> Array:
        return data * scale + shift

    ordered = jax.custom_vjp(run)
    ordered.defvjp(lambda *operands: (run(*operands), operands), backward)
    return ordered(data, scale, shift)


def _summed_to(shape: tuple[int, ...], array: Array) -> Array:
    axes = [i for i, size in enumerate(shape) if size != array.shape[i]]
    return jnp.sum(array, axis=axes, keepdims=True)


def probe(site: Site, out: Array, data: Array, extra: Norms, *, direct: bool) -> Array:
    """Return ``out``; the gradient with respect to ``extra`` is the norm at the site.

    Args:
        site: In loops, each iteration must have weights of its own: squares add up.
        out: Output of the site.
        data: Its data operand.
        extra: Two scalars.
        direct: Form the gradient of one example instead of Gram matrices.
    """
    local = dataclasses.replace(site, loops=())

    @jax.custom_vjp
    def probed(out: Array, data: Array, extra: Norms) -> Array:
        del data, extra
        return out

    def forward(out: Array, data: Array, extra: Norms) -> tuple[Array, Array]:
        return probed(out, data, extra), data

    def backward(data: Array, g: Array) -> tuple[Array, None, Norms]:
        parts = [layouts.factors(local, data[None], g[None])]
        # Rows allow for nothing: the second pass measures the very ones that it sums.
        norms = kernels.own_norms(parts, direct=direct)
        return g, None, jax.tree.map(lambda x: x[0], norms)

    probed.defvjp(forward, backward)
    return probed(out, jax.lax.stop_gradient(data), extra)


def formed(site: Site, out: Array, data: Array, extra: Array) -> Array:
    """Return ``out``; the gradient with respect to ``extra`` is that of the weight.

    Args:
        site: Each iteration of its loops must have weights of its own.
        out: Output of the site.
        data: Its data operand.
        extra: Zeros like the weight, at least float32.
    """
    inner = _without_loops(site)

    @jax.custom_vjp
    def kept(out: Array, data: Array, extra: Array) -> Array:
        del data, extra
        return out

    def forward(out: Array, data: Array, extra: Array) -> tuple[Array, Array]:
        return kept(out, data, extra), data

    def backward(data: Array, g: Array) -> tuple[Array, None, Array]:
        parts = [layouts.factors(inner, data[None], g[None])]
        return g, None, layouts.weight_gradient(inner, kernels.gradients(parts))[0]

    kept.defvjp(forward, backward)
    return kept(out, jax.lax.stop_gradient(data), extra)


def _without_loops(site: Site) -> Site:
    value = dataclasses.replace(site.value, loops=())
    return dataclasses.replace(site, loops=(), value=value)


def summed(
    site: Site,
    weight: Array,
    data: Array,
    extra: Array,
    scale: Array,
    allowed: Array,
    *,
    direct: bool,
) -> Array:
    """Run a site; the gradient with respect to ``extra`` is its weighted gradient.

    Under ``vmap`` it is the sum over the batch of ``scale`` times the gradient of the
    weight, at least float32. The backward pass that feeds it is not weighted: it is the
    pass that measured the norms, computed again, and perhaps rounded otherwise.

    Args:
        site: Each iteration of its loops must have weights of its own.
        weight: The parameter-only operand.
        data: The data operand.
        extra: Zeros like the weight, at least float32.
        scale: Weight of this example, a scalar.
        allowed: The norm at this site that the weight was made for, a scalar: what turns
            out longer is scaled back to it.
        direct: As the norm was found: see ``probe``.
    """
    inner = _without_loops(site)

    def over_batch(data: Array, g: Array, scale: Array, allowed: Array) -> Array:
        parts = [layouts.factors(inner, data, g)]
        total = kernels.again(parts, scale, allowed, direct=direct)
        return layouts.weight_gradient(inner, total)

    @jax.custom_batching.custom_vmap
    def contracted(data: Array, g: Array, scale: Array, allowed: Array) -> Array:
        return over_batch(data[None], g[None], scale[None], allowed[None])

    @contracted.def_vmap
    def _(size: int, batched: list[bool], *args: Array) -> tuple[Array, bool]:
        full = [
            arg if is_batched else jnp.broadcast_to(arg, (size, *arg.shape))
            for arg, is_batched in zip(args, batched, strict=True)
        ]
        return over_batch(*full), False

    @jax.custom_vjp
    def run(
        weight: Array, data: Array, extra: Array, scale: Array, allowed: Array
    ) -> Array:
        del extra, scale, allowed
        return apply(site, weight, data)

    def forward(weight: Array, data: Array, extra: Array, *rows: Array) -> tuple:
        return run(weight, data, extra, *rows), (weight, data, *rows)

    def backward(saved: tuple[Array, ...], g: Array) -> tuple[Any, ...]:
        weight, data, scale, allowed = saved
        into_data = None
        if jnp.issubdtype(data.dtype, jnp.inexact):
            _, pull = jax.vjp(lambda data: apply(site, weight, data), data)
            (into_data,) = pull(g)
        return None, into_data, contracted(data, g, scale, allowed), None, None

    run.defvjp(forward, backward)
    return run(weight, data, extra, scale, allowed)
