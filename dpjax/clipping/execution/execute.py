"""Run a plan: norms, clip factors, clipped sum."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpjax.clipping.analysis.uses import Program, Site
from dpjax.clipping.analysis.values import Path
from dpjax.clipping.arithmetic import kernels, layouts
from dpjax.clipping.arithmetic.factors import centred_count, clip_factors
from dpjax.clipping.arithmetic.kernels import Factors, Part, Patches
from dpjax.clipping.arithmetic.multiples import Multiple
from dpjax.clipping.arithmetic.rounding import Norms, apart, capped, row_norms
from dpjax.clipping.execution import layered
from dpjax.clipping.execution.keys import example_keys
from dpjax.clipping.execution.numbers import multiples
from dpjax.clipping.execution.passes import (
    Backward,
    Inputs,
    Rows,
    first_backward,
    second_backward,
    to_parameters,
)
from dpjax.clipping.execution.statistics import per_example
from dpjax.clipping.planning.plan import Plan
from dpjax.clipping.planning.slots import Group, Slot
from dpjax.clipping.query import Query
from dpjax.privacy.sensitive import ClippedSum, PerExample, accumulation_dtype
from dpjax.typing import Batch, Key


def run_plan(
    program: Program, plan: Plan, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    """Return the clipped sum of an analysed loss over a batch.

    Sensitivity: ``query.clip_norm`` under add/remove-one. Each parameter's part of an
    example's contribution is scaled by one factor, which comes from norms of that very
    gradient plus what rounding may have hidden (see ``rounding``).
    """
    keys = example_keys(key, batch)
    inputs = Inputs(jax.tree.leaves(query.points), batch.examples, keys)
    mask = jnp.asarray(batch.mask)
    known = _collect(program, plan, inputs)

    def tree(leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(program.tree, leaves)

    factors = clip_factors(
        tree([norm.squares for norm in known.norms]),
        slack=tree([norm.slack for norm in known.norms]),
        mask=mask,
        clip_norm=query.clip_norm,
        style=query.style,
        outer_norm=query.outer_norm,
    )
    weights = jax.tree.leaves(factors.leaves)
    sums = functools.partial(_weighted_sums, program, plan, inputs, known)
    if query.residual:
        rest = jax.tree.leaves(factors.rest)
        both = _of_both(sums, weights, rest)
        total, residual = (tree([leaf[i] for leaf in both]) for i in (0, 1))
    else:
        total, residual = tree(sums(weights)), None
    count = None
    if query.count:
        count = centred_count(factors.norms, mask=mask, clip_norm=query.clip_norm)
    clipped = dataclasses.replace(
        query.empty(), total=total, residual=residual, count=count
    )
    losses = known.backward.losses
    return clipped, per_example(losses, factors.norms, factors.finite, mask)


class _Values(NamedTuple):
    """What norms and sums are made of.

    Attributes:
        losses: Of each example; not summed.
        factors: Of each group, by its place in ``plan.methods``, in the axes of its first
            site.
        kept: ``[B, H, K, N]``, per-example gradients of groups that keep them instead.
        measured: Norms of those that keep what is computed only once.
        slots: ``[B, ...]``, per-example gradients of parameters that are formed in full.
        dropped: Norms of those that are dropped again.
        probes: Norms at probed sites.
    """

    losses: Rows
    factors: dict[int, list[Part]]
    kept: dict[int, Array]
    measured: dict[int, Norms]
    slots: dict[int, Array]
    dropped: dict[int, Norms]
    probes: dict[Path, Norms]


class _Known(NamedTuple):
    """What is known of every example after the first backward pass.

    Attributes:
        backward: What the pass returned.
        values: What norms and sums are made of.
        once: Gradients like ``values.kept``, which no compiler computes anew.
        norms: Of each parameter.
    """

    backward: Backward
    values: _Values
    once: dict[int, Array]
    norms: list[Norms]


def _collect(program: Program, plan: Plan, inputs: Inputs) -> _Known:
    backward = first_backward(program, plan, inputs)
    factors: dict[int, list[Part]] = {
        i: [
            *_joined(program, group, backward.factors),
            *multiples(program, inputs.leaves, group, backward.factors),
        ]
        for i, group in enumerate(plan.methods)
        if group.sites[0].path not in plan.formed
    }
    kept, once = _kept(plan, factors)
    slots = [slot for slot in plan.slots if slot.materialised]
    pulled = _pulled_back(program, plan, inputs, backward)
    whole = {
        slot.index: _formed(program, slot, backward.plain, pulled)
        for slot in slots
        if slot.index not in plan.dropped
    }
    dropped = {index: pulled[index] for index in plan.dropped}
    measured = {i: row_norms(rows) for i, rows in once.items()}
    place = {group.sites[0].path: i for i, group in enumerate(plan.methods)}
    for path, rows in backward.formed.items():
        loops = len(program.sites[path].loops)
        measured[place[path]] = layered.formed_norms(rows, loops=loops)
    values = _Values(
        backward.losses, factors, kept, measured, whole, dropped, backward.probes
    )
    norms = apart(functools.partial(_all_norms, plan), values)
    return _Known(backward, values, once, norms)


def _kept(
    plan: Plan, factors: dict[int, list[Part]]
) -> tuple[dict[int, Array], dict[int, Array]]:
    """Move gradients that are kept out of the factors; apart what is computed once."""
    kept: dict[int, Array] = {}
    once: dict[int, Array] = {}
    for i, method in enumerate(plan.methods.values()):
        if method == "keep" and i in factors:
            parts = factors.pop(i)
            found = once if kernels.computed_once(parts) else kept
            found[i] = jax.lax.optimization_barrier(kernels.gradients(parts))
    return kept, once


def _all_norms(plan: Plan, values: _Values) -> list[Norms]:
    return [_norms(slot, plan, values) for slot in plan.slots]


def _pulled_back(
    program: Program, plan: Plan, inputs: Inputs, backward: Backward
) -> dict[int, Any]:
    """Return ``[B, ...]`` gradients of parameters, from those of weights at sites.

    Of those that are dropped: their norms.
    """

    def norms(leaf: Array) -> Norms:
        return jax.tree.map(lambda x: x[0], row_norms(leaf[None]))

    def known(leaves: Mapping[int, Array]) -> dict[int, Any]:
        return {
            index: norms(leaf) if index in plan.dropped else leaf
            for index, leaf in leaves.items()
        }

    found: dict[int, Any] = {}
    for sites in _sharing(plan.slots, program):
        factors = {path: backward.factors[path] for path in sites}
        of_one, of_all = _ways_back(program, inputs, sites, known)
        if _prefers_turns(factors):
            found |= kernels.in_turn(of_one, factors)
        else:
            found |= of_all(factors)
    return found


def _sums_of_dropped(
    program: Program,
    plan: Plan,
    inputs: Inputs,
    known: _Known,
    weights: Sequence[Rows],
) -> dict[int, Array]:
    """Form the gradients of examples again, for their sum.

    A sum over examples must not be taken back as one: where the way back cancels most of it
    (a mean is subtracted, say), what is rounded is in proportion to the whole batch, and
    may be more than one example's contribution. What is formed again may be rounded
    otherwise than it was measured, and is scaled back to that.
    """

    def dropped(leaves: Mapping[int, Array]) -> dict[int, Array]:
        return {index: leaves[index] for index in leaves.keys() & plan.dropped}

    found: dict[int, Array] = {}
    for sites in _sharing([plan.slots[i] for i in sorted(plan.dropped)], program):
        factors = {path: known.backward.factors[path] for path in sites}
        of_one, of_all = _ways_back(program, inputs, sites, dropped)
        reached = {
            program.slot(leaf) for s in sites.values() for leaf in s.value.leaves
        }
        indices = reached & plan.dropped
        rows = {index: weights[index] for index in indices}
        allowed = {index: known.norms[index].longest for index in indices}
        if _prefers_turns(factors):
            found |= kernels.total_in_turn(of_one, factors, rows, allowed)
        else:
            # Else XLA would keep what it formed for the norms.
            factors, rows = jax.lax.optimization_barrier((factors, rows))
            found |= apart(_capped_sums, (of_all(factors), rows, allowed))
    return found


def _capped_sums(operands: tuple[dict[int, Array], ...]) -> dict[int, Array]:
    formed, weights, allowed = operands
    return {
        i: kernels.weighted_rows(rows, capped(weights[i], row_norms(rows), allowed[i]))
        for i, rows in formed.items()
    }


def _sharing(slots: Sequence[Slot], program: Program) -> list[dict[Path, Site]]:
    """Return the sites of materialised slots, together where they share parameters."""
    found: list[tuple[set[int], dict[Path, Site]]] = []
    for slot in slots:
        for site in slot.sites if slot.materialised else ():
            reached = {program.slot(leaf) for leaf in site.value.leaves}
            sites = {site.path: site}
            apart = []
            for some, theirs in found:
                if some & reached:
                    reached, sites = some | reached, theirs | sites
                else:
                    apart.append((some, theirs))
            found = [*apart, (reached, sites)]
    return [sites for _, sites in found]


def _ways_back(
    program: Program,
    inputs: Inputs,
    sites: Mapping[Path, Site],
    finish: Callable[[Mapping[int, Array]], dict[int, Array]],
) -> tuple[Callable[[Any], dict[int, Array]], Callable[[Any], dict[int, Array]]]:
    """Return ``finish`` of the gradients of parameters, from factors of sites.

    The first function takes factors of one example (B = 1) and its result has no B; the
    second takes all of them.
    """

    def of_weights(factors: Mapping[Path, Factors]) -> dict[Path, Array]:
        return {
            path: layouts.weight_gradient(sites[path], kernels.gradients([part]))
            for path, part in factors.items()
        }

    def to_leaves(weights: Mapping[Path, Array]) -> dict[int, Array]:
        return finish(to_parameters(program, inputs.leaves, weights))

    def of_one(factors: Mapping[Path, Factors]) -> dict[int, Array]:
        return to_leaves(jax.tree.map(lambda x: x[0], of_weights(factors)))

    def of_all(factors: Mapping[Path, Factors]) -> dict[int, Array]:
        return jax.vmap(to_leaves)(of_weights(factors))

    return of_one, of_all


def _prefers_turns(factors: Mapping[Path, Factors]) -> bool:
    patches = all(isinstance(part, Patches) for part in factors.values())
    return patches and kernels.prefers_turns()


def _joined(
    program: Program, group: Group, factors: Mapping[Path, Factors]
) -> list[Factors]:
    """Return the factors of a group, side by side along T."""
    lists = _by_point(program, group, factors)
    if len(lists) == 2 and len(lists[0]) == len(lists[1]):
        # The uses of the two points come in the same order.
        pairs = zip(*lists, strict=True)
        return kernels.concatenated([kernels.differenced(*pair) for pair in pairs])
    return kernels.concatenated([part for parts in lists for part in parts])


def _by_point(
    program: Program, group: Group, factors: Mapping[Path, Factors]
) -> list[list[Factors]]:
    points: dict[int, list[Factors]] = {}
    for site, swapped in zip(group.sites, group.swapped, strict=True):
        (leaf,) = site.value.leaves
        part = kernels.oriented(factors[site.path], swapped=swapped)
        points.setdefault(leaf // len(program.names), []).append(part)
    return list(points.values())


def _formed(
    program: Program,
    slot: Slot,
    plain: Mapping[int, Array],
    pulled: Mapping[int, Array],
) -> Array:
    """Add up all parts of one parameter's per-example gradient."""
    parts = [
        gradient.astype(accumulation_dtype(gradient.dtype))
        for leaf, gradient in plain.items()
        if program.slot(leaf) == slot.index
    ]
    if slot.index in pulled:
        parts.append(pulled[slot.index])
    return sum(parts[1:], parts[0])


def _norms(slot: Slot, plan: Plan, values: _Values) -> Norms:
    """Return norms of the gradient of one parameter."""
    if slot.index in values.slots:
        return row_norms(values.slots[slot.index])
    if slot.index in values.dropped:
        return values.dropped[slot.index]
    place = {group: i for i, group in enumerate(plan.methods)}
    none = jnp.zeros_like(values.losses)
    found = [Norms(none, none)]
    for group in slot.groups:
        path = group.sites[0].path
        if path in plan.probed:
            found.append(_over_loops(values.probes[path]))
        elif place[group] in values.measured:
            found.append(values.measured[place[group]])
        elif plan.methods[group] == "keep":
            found.append(row_norms(values.kept[place[group]]))
        else:
            direct = plan.methods[group] == "direct"
            norms = kernels.direct_norms if direct else kernels.gram_norms
            found.append(norms(values.factors[place[group]]))
    squares, slack = (sum(column[1:], column[0]) for column in zip(*found, strict=True))
    return Norms(squares, slack)


def _over_loops(norms: Norms) -> Norms:
    """Return the norms over all iterations, each of which has weights of its own."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=tuple(range(1, x.ndim))), norms)


def _of_both(
    sums: Callable[[Sequence[Rows]], list[Array]],
    weights: Sequence[Rows],
    rest: Sequence[Rows],
) -> list[Float[Array, "2 ..."]]:
    """Return sums with two sets of weights: they share all passes but the contractions."""
    # Parameters that share their weights go on sharing them.
    stacked = {id(w): jnp.stack([w, r]) for w, r in zip(weights, rest, strict=True)}
    return jax.vmap(lambda rows: sums([rows[id(w)] for w in weights]))(stacked)


def _contracted(
    parts: list[Part], weights: Rows, *, terms: int, layers: int
) -> Float[Array, "H K N"]:
    """Return ``kernels.weighted_sum``, which ``vmap`` over weights does in one go.

    Args:
        parts: Factors.
        weights: Of the examples.
        terms: See ``kernels.weighted_sum``.
        layers: Into how many weights the first axis of the factors falls.
    """

    @jax.custom_batching.custom_vmap
    def contracted(parts: list[Factors], weights: Rows) -> Float[Array, "H K N"]:
        return layered.weighted_sum(parts, weights, terms=terms, layers=layers)

    @contracted.def_vmap
    def _(
        size: int,
        batched: list[Any],
        parts: list[Factors],
        weights: Float[Array, "R B"],
    ) -> tuple[Float[Array, "R H K N"], bool]:
        """Contract once, with R weighted copies of ``right``: ``left`` is read once."""
        assert not any(jax.tree.leaves(batched[0])), (
            "one batch, several sets of weights"
        )

        def copies(right: Array) -> Array:
            wide = right.astype(accumulation_dtype(right.dtype))
            each = [row[None, :, None, None] * wide for row in weights]
            return jnp.concatenate(each, axis=-1)

        wider = [dataclasses.replace(part, right=copies(part.right)) for part in parts]
        used = (weights != 0).any(axis=0).astype(weights.dtype)
        total = layered.weighted_sum(wider, used, terms=terms, layers=layers)
        return jnp.stack(jnp.split(total, size, axis=-1)), True

    numbers = [part.total(weights) for part in parts if isinstance(part, Multiple)]
    rest = [part for part in parts if not isinstance(part, Multiple)]
    return sum(numbers, contracted(rest, weights))


def _weighted_sums(
    program: Program,
    plan: Plan,
    inputs: Inputs,
    known: _Known,
    weights: Sequence[Rows],
) -> list[Array]:
    """Return for each parameter ``sum_b weights[parameter][b] gradient[b]``."""
    distinct = {id(w): w for w in weights}
    which = [[*distinct].index(id(w)) for w in weights]
    of_values = functools.partial(_sums_of_values, plan, which)
    sums, formed = apart(of_values, (known.values, [*distinct.values()]))
    slot_of = {group: slot.index for slot in plan.slots for group in slot.groups}
    for i, group in enumerate(plan.methods):
        if i in known.once:
            total = layered.weighted_rows(
                known.once[i], weights[slot_of[group]], layers=layered.layers(group)
            )
            first = group.sites[0]
            sums[first.path] = layouts.weight_gradient(first, total)
    for path, rows in known.backward.formed.items():
        slot = program.slot(*program.sites[path].value.leaves)
        loops = len(program.sites[path].loops)
        sums[path] = layered.formed_sum(rows, weights[slot], loops=loops)
    again = {
        group.sites[0].path: weights[slot.index]
        for slot in plan.slots
        if not slot.materialised
        for group in slot.groups
        if group.sites[0].path in plan.probed
    }
    sums |= second_backward(program, plan, inputs, again, known.backward.probes)
    pulled = to_parameters(program, inputs.leaves, sums) if sums else {}
    pulled |= _sums_of_dropped(program, plan, inputs, known, weights)
    pulled |= formed

    def total_of(slot: Slot) -> Array:
        if slot.index in pulled:
            return pulled[slot.index]
        dtype = accumulation_dtype(inputs.leaves[slot.index].dtype)
        return jnp.zeros(program.shapes[slot.index], dtype)

    return [total_of(slot) for slot in plan.slots]


def _sums_of_values(
    plan: Plan, which: Sequence[int], operands: tuple[_Values, list[Rows]]
) -> tuple[dict[Path, Array], dict[int, Array]]:
    """Return sums at sites, by their path, and sums of formed gradients, by parameter."""
    values, distinct = operands
    weights = [distinct[i] for i in which]
    place = {group: i for i, group in enumerate(plan.methods)}
    sums: dict[Path, Array] = {}
    for slot in plan.slots:
        rows = weights[slot.index]
        for group in () if slot.materialised else slot.groups:
            first = group.sites[0]
            if first.path in plan.probed or place[group] in values.measured:
                continue
            method = plan.methods[group]
            if method == "keep":
                kept = values.kept[place[group]]
                total = layered.weighted_rows(kept, rows, layers=layered.layers(group))
            else:
                terms = kernels.TERMS[method]
                factors = values.factors[place[group]]
                layers = layered.layers(group)
                total = _contracted(factors, rows, terms=terms, layers=layers)
            sums[first.path] = layouts.weight_gradient(first, total)
    formed: dict[int, Array] = {}
    for rows in distinct:
        mine = [i for i in values.slots if weights[i] is rows]
        totals = kernels.weighted_together([values.slots[i] for i in mine], rows)
        formed |= zip(mine, totals, strict=True)
    return sums, formed
