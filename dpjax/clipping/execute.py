"""Run a plan: norms, clip factors, clipped sum."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpjax.clipping import kernels, layouts
from dpjax.clipping.analysis import Program, Site, analyse
from dpjax.clipping.factors import clip_factors
from dpjax.clipping.interpret import Visit, interpret
from dpjax.clipping.kernels import Factors, Norms
from dpjax.clipping.plan import Plan, Planner
from dpjax.clipping.query import Query
from dpjax.clipping.slots import Group
from dpjax.clipping.values import Evaluator, Path, bind
from dpjax.clipping.vmap import per_example
from dpjax.sensitive import ClippedSum, PerExample, accumulation_dtype
from dpjax.typing import Batch, Key, Loss

Rows = Float[Array, "B"]


def execute(
    loss: Loss, query: Query, batch: Batch, key: Key, *, planner: Planner
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum, computed as ``planner`` decides. See ``Engine``."""
    program = analyse(loss, query, batch, key)
    return run_plan(program, planner(program), query, batch, key)


def run_plan(
    program: Program, plan: Plan, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum of an analysed loss over a batch."""
    run = _Run(program, plan, query, batch, key)
    backward = run.backward()
    gradients = run.gradients(backward)
    norms = [run.norms(slot.index, backward, gradients) for slot in run.plan.slots]

    def tree(leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(program.tree, leaves)

    mask = jnp.asarray(batch.mask)
    factors = clip_factors(
        tree([norm.squares for norm in norms]),
        slack=tree([norm.slack for norm in norms]),
        mask=mask,
        clip_norm=query.clip_norm,
        style=query.style,
    )
    keep = mask & factors.finite
    weights = jax.tree.leaves(factors.leaves)
    total = tree(run.weighted_sums(weights, backward, gradients))
    residual = None
    if query.residual:
        rest = [jnp.where(keep, 1 - weight, 0.0) for weight in weights]
        residual = tree(run.weighted_sums(rest, backward, gradients))
    clipped = dataclasses.replace(query.empty(), total=total, residual=residual)
    return clipped, per_example(backward.losses, factors.norms, factors.finite, mask)


class _Backward(NamedTuple):
    """What one backward pass over all examples leaves behind.

    Attributes:
        losses: At the first point.
        factors: Of the sites that are not probed.
        plain: ``[B, ...]`` gradients of inputs that are differentiated plainly.
        probes: Squared norms of each probed slot.
    """

    losses: Rows
    factors: dict[Path, Factors]
    plain: dict[int, Array]
    probes: dict[int, Norms]


class _Gradients(NamedTuple):
    """Per-example gradients that the plan forms in full.

    Attributes:
        slots: ``[B, *parameter shape]``.
        groups: ``[B, H, K, N]`` of the groups that keep theirs.
    """

    slots: dict[int, Array]
    groups: dict[Group, Array]


class _Run:
    def __init__(
        self, program: Program, plan: Plan, query: Query, batch: Batch, key: Key
    ) -> None:
        self.program = program
        self.plan = plan
        self._batch = batch
        self._size = batch.mask.shape[0]
        self._keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.index)
        self._leaves = jax.tree.leaves(query.points)
        self._wide_leaves = [
            leaf.astype(accumulation_dtype(leaf.dtype)) for leaf in self._leaves
        ]

    def backward(self) -> _Backward:
        program, plan = self.program, self.plan
        tapped = [s for path, s in program.sites.items() if path not in plan.probed]
        probed = {program.slot(_leaf(program.sites[path])) for path in plan.probed}
        plain = {leaf: self._leaves[leaf] for leaf in program.plain}
        taps = {site.path: _zeros(site, site.eqn.outvars[0].aval) for site in tapped}
        scalars = {slot: Norms(jnp.zeros(()), jnp.zeros(())) for slot in probed}

        def loss(
            taps: Any, plain: Any, scalars: Any, example: Any, key: Any
        ) -> tuple[Array, Any]:
            def visit(site: Site, weight: Any, data: Any, extra: Any) -> tuple:
                out = _apply(site, weight, data)
                if site.path in plan.probed:
                    return _probe(site, out, data, scalars[program.slot(_leaf(site))]), ()
                return _tap(out, extra), data

            extra = taps | _loop_axes_of(program, plan.probed)
            (value, first), saved = self._forward(plain, example, key, visit, extra)
            return value, (first, saved)

        at = {site.path: len(site.loops) for site in tapped}
        nothing = dict.fromkeys(plan.probed, 0)
        (cotangents, plain, scalars), (losses, saved) = jax.vmap(
            jax.grad(loss, argnums=(0, 1, 2), has_aux=True),
            in_axes=(None, None, None, 0, 0),
            out_axes=((at, 0, 0), (0, at | nothing)),
        )(taps, plain, scalars, self._batch.examples, self._keys)
        factors = {
            site.path: layouts.factors(site, saved[site.path], cotangents[site.path])
            for site in tapped
        }
        return _Backward(losses, factors, plain, scalars)

    def gradients(self, backward: _Backward) -> _Gradients:
        """Form what the plan wants in full."""
        groups = {
            group: kernels.gradients(_joined(self.program, group, backward.factors))
            for group, method in self.plan.methods.items()
            if method == "keep"
        }
        whole = [slot for slot in self.plan.slots if slot.materialised]
        sites = {site.path: site for slot in whole for site in slot.sites}
        weights = {
            path: layouts.weight_gradient(
                site, kernels.gradients([backward.factors[path]])
            )
            for path, site in sites.items()
        }
        pulled = jax.vmap(self._to_parameters)(weights) if weights else {}
        slots = {}
        for slot in whole:
            parts = [
                _wide(gradient)
                for leaf, gradient in backward.plain.items()
                if self.program.slot(leaf) == slot.index
            ]
            if slot.index in pulled:
                parts.append(pulled[slot.index])
            slots[slot.index] = sum(parts[1:], parts[0])
        return _Gradients(slots, groups)

    def norms(self, slot: int, backward: _Backward, gradients: _Gradients) -> Norms:
        """Return squared norms of the gradient of one parameter."""
        none = jnp.zeros(self._size)
        if slot in gradients.slots:
            return Norms(_squares(gradients.slots[slot]), none)
        if slot in backward.probes:
            return backward.probes[slot]
        found = [
            _group_norms(
                self.plan.methods[group], _joined(self.program, group, backward.factors), 
                gradients.groups.get(group),
            )
            for group in self.plan.slots[slot].groups
        ]
        squares = sum((norm.squares for norm in found), none)
        return Norms(squares, sum((norm.slack for norm in found), none))

    def weighted_sums(
        self, weights: Sequence[Rows], backward: _Backward, gradients: _Gradients
    ) -> list[Array]:
        """Return for each parameter ``sum_b weights[parameter][b] gradient[b]``."""
        sums = {}
        again: dict[Path, Rows] = {}
        for slot in self.plan.slots:
            weight = weights[slot.index]
            for group in () if slot.materialised else slot.groups:
                first = group.sites[0]
                if first.path in self.plan.probed:
                    again[first.path] = weight
                elif group in gradients.groups:
                    total = _weighted(weight, gradients.groups[group])
                    sums[first.path] = layouts.weight_gradient(first, total)
                else:
                    for site in group.sites:
                        total = kernels.weighted_sum(backward.factors[site.path], weight)
                        sums[site.path] = layouts.weight_gradient(site, total)
        sums |= self._second_backward(again)
        pulled = self._to_parameters(sums)
        out = []
        for slot, shape in enumerate(self.program.shapes):
            if slot in gradients.slots:
                out.append(_weighted(weights[slot], gradients.slots[slot]))
            else:
                dtype = self._wide_leaves[slot].dtype
                out.append(pulled.get(slot, jnp.zeros(shape, dtype)))
        return out

    def _second_backward(self, weights: Mapping[Path, Rows]) -> dict[Path, Array]:
        """Sum the probed sites' gradients inside a backward pass of their own."""
        if not weights:
            return {}
        sites = {path: self.program.sites[path] for path in weights}
        sums = {
            path: jnp.zeros(site.weight_shape, accumulation_dtype(jnp.float32))
            for path, site in sites.items()
        }

        def loss(sums: Any, weights: Any, example: Any, key: Any) -> Array:
            def visit(site: Site, weight: Any, data: Any, extra: Any) -> tuple:
                return _summed(site, weight, data, extra, weights[site.path]), ()

            (value, _), _ = self._forward({}, example, key, visit, sums)
            return value

        return jax.vmap(
            jax.grad(loss), in_axes=(None, 0, 0, 0), out_axes=None
        )(sums, dict(weights), self._batch.examples, self._keys)

    def _forward(
        self, plain: Any, example: Any, key: Any, visit: Visit, extra: Any
    ) -> tuple[list[Array], dict[Path, Any]]:
        leaves = list(self._leaves)
        for leaf, value in plain.items():
            leaves[leaf] = value
        inputs = [*leaves, *jax.tree.leaves((example, key))]
        return interpret(self.program, inputs, visit=visit, extra=extra)

    def _to_parameters(self, gradients: Mapping[Path, Array]) -> dict[int, Array]:
        """Take gradients of the weights at sites back to the parameters."""
        sites = [self.program.sites[path] for path in gradients]
        if not sites:
            return {}
        viewed = [s for s in sites if s.value.view is not None]
        derived = [s for s in sites if s.value.view is None]
        slots: dict[int, Array] = {}
        for group, leaves, keep_dtype in (
            (viewed, self._wide_leaves, True),
            (derived, self._leaves, False),
        ):
            used = sorted({leaf for site in group for leaf in site.value.leaves})

            def weights(values: list[Array], group=group, used=used, leaves=leaves, keep_dtype=keep_dtype) -> list[Array]:
                known = list(leaves)
                for leaf, value in zip(used, values, strict=True):
                    known[leaf] = value
                evaluate = Evaluator(known, keep_dtype=keep_dtype)
                return [evaluate(site.value) for site in group]

            outs, pull = jax.vjp(weights, [leaves[leaf] for leaf in used])
            cotangents = [
                gradients[site.path].astype(out.dtype)
                for site, out in zip(group, outs, strict=True)
            ]
            (pulled,) = pull(cotangents)
            for leaf, gradient in zip(used, pulled, strict=True):
                slot = self.program.slot(leaf)
                wide = _wide(gradient)
                slots[slot] = slots[slot] + wide if slot in slots else wide
        return slots


def _leaf(site: Site) -> int:
    (leaf,) = site.value.leaves
    return leaf


def _apply(site: Site, weight: Any, data: Any) -> Array:
    operands = (weight, data) if site.side == 0 else (data, weight)
    return bind(site.eqn, operands)[0]


def _zeros(site: Site, aval: Any) -> Array:
    return jnp.zeros([loop.length for loop in site.loops] + [*aval.shape], aval.dtype)


def _loop_axes_of(program: Program, probed: frozenset[Path]) -> dict[Path, Array]:
    # A probe needs nothing from outside, but has to be found inside its loops.
    return {
        path: jnp.zeros([loop.length for loop in program.sites[path].loops])
        for path in probed
    }


@jax.custom_vjp
def _tap(out: Array, tap: Array) -> Array:
    """Return ``out``; the gradient with respect to ``tap`` is that of ``out``."""
    del tap
    return out


_tap.defvjp(lambda out, tap: (out, None), lambda _, g: (g, g))


def _probe(site: Site, out: Array, data: Array, scalar: Norms) -> Array:
    """Return ``out``; the gradient with respect to ``scalar`` is the norm at the site."""
    # Each iteration of a loop has weights of its own: the loops add up their squares.
    local = dataclasses.replace(site, loops=())

    @jax.custom_vjp
    def probe(out: Array, data: Array, scalar: Norms) -> Array:
        del data, scalar
        return out

    def forward(out: Array, data: Array, scalar: Norms) -> tuple[Array, Array]:
        return probe(out, data, scalar), data

    def backward(data: Array, g: Array) -> tuple:
        found = layouts.factors(local, data[None], g[None])
        norms = jax.tree.map(lambda x: x[0], kernels.gram_norms([found]))
        return g, None, norms

    probe.defvjp(forward, backward)
    return probe(out, jax.lax.stop_gradient(data), scalar)


def _summed(
    site: Site, weight: Array, data: Array, total: Array, scale: Array
) -> Array:
    """Run a site so that the gradient with respect to ``total`` is the weighted sum.

    Under ``vmap`` that sum runs over the batch, in float32 and without a per-example
    gradient; the backward pass itself is the same as the one that measured the norms.
    """
    local = dataclasses.replace(site, loops=())

    @jax.custom_batching.custom_vmap
    def contracted(data: Array, g: Array, scale: Array) -> Array:
        return over_batch(data[None], g[None], scale[None])

    def over_batch(data: Array, g: Array, scale: Array) -> Array:
        found = layouts.factors(local, data, g)
        value = kernels.weighted_sum(found, scale)
        # In a loop the site sees one slice of the weight.
        one = dataclasses.replace(
            local, value=dataclasses.replace(site.value, loops=())
        )
        return layouts.weight_gradient(one, value)

    @contracted.def_vmap
    def _rule(size: int, batched: list, *args: Array) -> tuple[Array, bool]:
        full = [
            arg if is_batched else jnp.broadcast_to(arg, (size, *arg.shape))
            for arg, is_batched in zip(args, batched, strict=True)
        ]
        return over_batch(*full), False

    @jax.custom_vjp
    def run(weight: Array, data: Array, total: Array, scale: Array) -> Array:
        del total, scale
        return _apply(site, weight, data)

    def forward(weight: Array, data: Array, total: Array, scale: Array) -> tuple:
        return run(weight, data, total, scale), (weight, data, scale)

    def backward(saved: tuple, g: Array) -> tuple:
        weight, data, scale = saved
        into_data = None
        if jnp.issubdtype(data.dtype, jnp.floating):
            _, pull = jax.vjp(lambda data: _apply(site, weight, data), data)
            (into_data,) = pull(g)
        return None, into_data, contracted(data, g, scale), None

    run.defvjp(forward, backward)
    return run(weight, data, total, scale)


def _joined(
    program: Program, group: Group, factors: Mapping[Path, Factors]
) -> list[Factors]:
    """Return the factors of a group, side by side along T."""
    by_point: dict[int, list[Factors]] = {}
    for site, swapped in zip(group.sites, group.swapped, strict=True):
        part = factors[site.path]
        point = _leaf(site) // len(program.names)
        by_point.setdefault(point, []).append(part.swapped if swapped else part)
    points = list(by_point.values())
    if len(points) == 2 and len(points[0]) == len(points[1]):
        # Uses of the two points come in the same order.
        pairs = zip(*points, strict=True)
        return kernels.concatenated([kernels.differenced(*pair) for pair in pairs])
    return kernels.concatenated([part for point in points for part in point])


def _group_norms(method: str, parts: list[Factors], kept: Array | None) -> Norms:
    if method == "gram":
        return kernels.gram_norms(parts)
    gradients = kernels.gradients(parts) if kept is None else kept
    squares = _squares(gradients)
    return Norms(squares, jnp.zeros_like(squares))


def _squares(gradients: Array) -> Rows:
    return jnp.sum(jnp.square(gradients), axis=tuple(range(1, gradients.ndim)))


def _weighted(weights: Rows, gradients: Array) -> Array:
    rows = (weights != 0).reshape(-1, *(1,) * (gradients.ndim - 1))
    used = jnp.where(rows, gradients, 0.0)
    return jnp.tensordot(weights, used, axes=1, precision=jax.lax.Precision.HIGHEST)


def _wide(array: Array) -> Array:
    return array.astype(accumulation_dtype(array.dtype))
