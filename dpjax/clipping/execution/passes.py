"""The backward passes of the fast engines, over all examples at once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.clipping.analysis.uses import Program, Site
from dpjax.clipping.analysis.values import Evaluator, Path, dtype_of
from dpjax.clipping.arithmetic import layouts
from dpjax.clipping.arithmetic.kernels import Factors
from dpjax.clipping.arithmetic.rounding import Norms
from dpjax.clipping.execution import hooks
from dpjax.clipping.execution.interpret import Visit, interpret
from dpjax.clipping.execution.isolation import isolated
from dpjax.clipping.planning.plan import Plan
from dpjax.privacy.sensitive import accumulation_dtype
from dpjax.typing import Example, Key

Rows = Float[Array, "B"]


class Inputs(NamedTuple):
    """What a program runs on.

    Attributes:
        leaves: The parameters of all points.
        examples: Pytree ``[B, ...]``.
        keys: ``key[B]``.
    """

    leaves: Sequence[Array]
    examples: Example
    keys: Key


class Backward(NamedTuple):
    """What the first backward pass leaves behind.

    Attributes:
        losses: At the first point.
        factors: Of the sites that are not probed.
        plain: ``[B, ...]`` gradients of the inputs that are differentiated plainly.
        probes: Norms at the probed sites, ``[B, *loops]``.
        formed: Gradients at sites of ``plan.formed``, ``[*loops, B, *weight]``.
    """

    losses: Rows
    factors: dict[Path, Factors]
    plain: dict[int, Array]
    probes: dict[Path, Norms]
    formed: dict[Path, Array]


def first_backward(program: Program, plan: Plan, inputs: Inputs) -> Backward:
    """Run the loss and its gradient, keeping the factors of every site."""
    probed, formed = plan.probed, plan.formed
    apart = probed.keys() | formed
    tapped = [site for path, site in program.sites.items() if path not in apart]
    plain = {leaf: inputs.leaves[leaf] for leaf in program.plain}
    taps = {site.path: jnp.zeros(_looped(site), _dtype_of(site)) for site in tapped}
    zeros = {path: _zero_norms(program.sites[path]) for path in probed}
    blank = {path: _zero_weight(program.sites[path]) for path in formed}

    def loss(
        extras: tuple[Any, Any, Any, Any], example: Example, key: Key
    ) -> tuple[Array, Any]:
        taps, plain, zeros, blank = extras

        def visit(site: Site, weight: Array, data: Array, extra: Any) -> tuple:
            out = hooks.apply(site, weight, data)
            if site.path in formed:
                return hooks.formed(site, out, data, extra), ()
            if site.path not in probed:
                return hooks.tap(out, extra), data
            direct = probed[site.path] == "direct"
            return hooks.probe(site, out, data, extra, direct=direct), ()

        one = Inputs(_replaced(inputs.leaves, plain), example, key)
        (value, first), saved = _forward(program, one, visit, taps | zeros | blank)
        return value, (first, saved)

    # The batch axis stands after the loops, where the loops leave it anyway.
    batch_axes = {site.path: len(site.loops) for site in tapped}
    formed_axes = {path: len(program.sites[path].loops) for path in formed}
    nothing = dict.fromkeys(apart, 0)
    (cotangents, plain, norms, rows), (losses, saved) = jax.vmap(
        isolated(jax.grad(loss, has_aux=True)),
        in_axes=(None, 0, 0),
        out_axes=((batch_axes, 0, 0, formed_axes), (0, batch_axes | nothing)),
    )((taps, plain, zeros, blank), inputs.examples, inputs.keys)
    factors = {
        site.path: layouts.factors(site, saved[site.path], cotangents[site.path])
        for site in tapped
    }
    return Backward(losses, factors, plain, norms, rows)


def second_backward(
    program: Program,
    plan: Plan,
    inputs: Inputs,
    weights: Mapping[Path, Rows],
    norms: Mapping[Path, Norms],
) -> dict[Path, Array]:
    """Return the weighted sums of gradients at some sites, formed inside their loops.

    Nothing is shared with the first pass, which would keep its values alive: what comes out
    longer than the ``norms`` of then is scaled back to them, site by site.
    """
    if not weights:
        return {}
    allowed = {path: norms[path].longest for path in weights}
    examples, weights = jax.lax.optimization_barrier((inputs.examples, dict(weights)))
    sums = {path: _zero_weight(program.sites[path]) for path in weights}

    def loss(
        sums: Any, weights: Any, allowed: Any, example: Example, key: Key
    ) -> Array:
        def visit(site: Site, weight: Array, data: Array, extra: Any) -> tuple:
            direct = plan.probed[site.path] == "direct"
            operands = (weight, data, extra[0], weights[site.path], extra[1])
            return hooks.summed(site, *operands, direct=direct), ()

        one = Inputs(inputs.leaves, example, key)
        extra = {path: (sums[path], allowed[path]) for path in sums}
        (value, _), _ = _forward(program, one, visit, extra)
        return value

    run = jax.vmap(isolated(jax.grad(loss)), in_axes=(None, 0, 0, 0, 0), out_axes=None)
    return run(sums, weights, allowed, examples, inputs.keys)


def to_parameters(
    program: Program, leaves: Sequence[Array], gradients: Mapping[Path, Array]
) -> dict[int, Array]:
    """Take gradients with respect to the weights at sites back to the parameters.

    Args:
        program: Where the sites are.
        leaves: The parameters of all points.
        gradients: ``[*site.weight_shape]`` for each site.

    Returns:
        For each parameter that they reach the sum over sites and points.
    """
    views = {
        k: g for k, g in gradients.items() if program.sites[k].value.view is not None
    }
    derived = {k: g for k, g in gradients.items() if k not in views}
    wide = [leaf.astype(accumulation_dtype(leaf.dtype)) for leaf in leaves]
    found: dict[int, list[Array]] = {}
    for some, known, keep_dtype in ((views, wide, True), (derived, leaves, False)):
        for leaf, gradient in _pulled(program, known, some, keep_dtype=keep_dtype):
            if leaf in program.plain:  # It has its share of a number already.
                continue
            dtype = accumulation_dtype(gradient.dtype)
            found.setdefault(program.slot(leaf), []).append(gradient.astype(dtype))
    return {slot: sum(parts[1:], parts[0]) for slot, parts in found.items()}


def _pulled(
    program: Program,
    leaves: Sequence[Array],
    gradients: Mapping[Path, Array],
    *,
    keep_dtype: bool,
) -> list[tuple[int, Array]]:
    values = [program.sites[path].value for path in gradients]
    used = sorted({leaf for value in values for leaf in value.leaves})

    def weights(some: dict[int, Array]) -> list[Array]:
        evaluate = Evaluator(_replaced(leaves, some), keep_dtype=keep_dtype)
        return [evaluate(value) for value in values]

    outs, pull = jax.vjp(weights, {leaf: leaves[leaf] for leaf in used})
    (pulled,) = pull(
        [g.astype(out.dtype) for g, out in zip(gradients.values(), outs, strict=True)]
    )
    return [*pulled.items()]


def _forward(
    program: Program, one: Inputs, visit: Visit, extra: Mapping[Path, Any]
) -> tuple[list[Array], dict[Path, Any]]:
    # The same for both passes: the second must round as the one that measured the norms.
    # Unmeasured elsewhere than on a CPU.
    affine = program.affine if jax.default_backend() == "cpu" else {}
    values = [*one.leaves, *jax.tree.leaves((one.examples, one.keys))]
    return interpret(program, values, visit=visit, extra=extra, affine=affine)


def _replaced(leaves: Sequence[Array], some: Mapping[int, Array]) -> list[Array]:
    return [some.get(leaf, value) for leaf, value in enumerate(leaves)]


def _dtype_of(site: Site) -> Any:
    return dtype_of(site.eqn.outvars[0])


def _looped(site: Site) -> list[int]:
    return [*(loop.length for loop in site.loops), *site.out_shape]


def _zero_weight(site: Site) -> Array:
    return jnp.zeros(site.weight_shape, accumulation_dtype(_dtype_of(site)))


def _zero_norms(site: Site) -> Norms:
    loops = [loop.length for loop in site.loops]
    zeros = jnp.zeros(loops, accumulation_dtype(_dtype_of(site)))
    return Norms(zeros, zeros)
