"""Say what the analysis found: one row for each parameter."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from dpjax.clipping.analysis.uses import Program, analyse
from dpjax.clipping.planning import costs
from dpjax.clipping.planning.planner import Choice, choose
from dpjax.clipping.planning.slots import Slot
from dpjax.clipping.query import Query
from dpjax.jaxprs import CALLS, callee
from dpjax.typing import Batch, Example, Key, Loss, Params

_KINDS = {
    "conv_general_dilated": "conv",
    "copy": "elementwise",
    "dot_general": "dense",
    "gather": "embedding",
}


class Row(NamedTuple):
    """How the gradient norm of one parameter is computed.

    Attributes:
        path: Which parameter.
        shape: Its shape.
        uses: How many equations use it beside data.
        rule: "dense", "conv", "embedding", "tied" (several uses of the same entries),
            "derived" (what meets data is computed from parameters), "elementwise" (a bias,
            a scale, a token: its per-example gradient costs no more than the activations),
            "number" (a penalty, say: beside its other rule, a number computed from it),
            "fallback" (no rule: per-example gradient), "frozen" or "unused".
        method: "gram", "direct", "keep", "per-example" or "none".
        flops: Float operations for one example, beyond the backward pass.
        bytes: Bytes moved for one example, likewise.
        why: In words.
    """

    path: str
    shape: tuple[int, ...]
    uses: int
    rule: str
    method: str
    flops: float
    bytes: float
    why: str


def explain(
    loss: Loss, params: Params, example: Example, *, key: Key | None = None
) -> list[Row]:
    """Print and return how the fast engines treat each parameter of a loss.

    Nothing is computed: only shapes are looked at.

    Args:
        loss: Loss of one example.
        params: Parameters, or their shapes (``jax.ShapeDtypeStruct``).
        example: ONE example without batch axis, or its shapes.
        key: A key of the kind that training will use.
    """
    if key is None:
        key = jax.random.key(0)
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *jnp.shape(x)), jnp.result_type(x)), example
    )
    batch = Batch(one, jnp.ones(1, bool), jnp.zeros(1, jnp.int32))
    program = analyse(loss, Query((params,), clip_norm=1.0), batch, key)
    choice = choose(program, 1, memory_budget=math.inf)
    rows = [_row(program, choice, slot) for slot in choice.plan.slots]
    print(_table(rows))
    return rows


def _row(program: Program, choice: Choice, slot: Slot) -> Row:
    name, shape = program.names[slot.index], program.shapes[slot.index]
    size = 4 * math.prod(shape)
    if slot.plain:
        light = {program.slot(leaf) for leaf in program.light}
        rule = "elementwise" if slot.index in light else "fallback"
        return Row(name, shape, 1, rule, "per-example", 0, 3 * size, slot.plain)
    if not slot.sites:
        used = _reads(program.closed.jaxpr, slot.index)
        rule = "frozen" if used else "unused"
        why = "no gradient reaches it" if used else "the loss does not read it"
        return Row(name, shape, 0, rule, "none", 0, 0, why)
    numbers = any(group.numbers for group in slot.groups)
    uses = len({*slot.sites, *(n for group in slot.groups for n in group.numbers)})
    if slot.materialised:
        derived = any(site.value.view is None for site in slot.sites)
        dropped = slot.index in choice.plan.dropped
        work = [
            costs.group_cost(group, "direct" if dropped else "keep")
            for group in slot.groups
        ]
        return Row(
            name,
            shape,
            uses,
            "derived" if derived else "tied",
            "direct" if dropped else "per-example",
            sum(cost.flops for cost in work),
            sum(cost.traffic for cost in work),
            slot.materialised,
        )
    work = [costs.group_cost(g, choice.plan.methods[g]) for g in slot.groups]
    several = any(len(group.sites) > 1 for group in slot.groups)
    kinds = sorted({_KINDS[site.kind] for site in slot.sites})
    methods = sorted({choice.plan.methods[group] for group in slot.groups})
    return Row(
        name,
        shape,
        uses,
        "+".join([*(["tied"] if several else kinds), *["number"] * numbers]),
        "+".join(methods),
        sum(cost.flops for cost in work),
        sum(cost.traffic for cost in work),
        "uses with cross terms: " + ", ".join(kinds)
        if several
        else "inputs x output gradients",
    )


def _reads(jaxpr: Jaxpr, index: int) -> bool:
    """Whether input ``index`` is read by an equation that is no mere call."""
    var = jaxpr.invars[index]
    for eqn in jaxpr.eqns:
        for position, atom in enumerate(eqn.invars):
            if isinstance(atom, Literal) or atom is not var:
                continue
            if eqn.primitive.name not in CALLS:
                return True
            if _reads(callee(eqn).jaxpr, position):
                return True
    return var in [atom for atom in jaxpr.outvars if not isinstance(atom, Literal)]


def _table(rows: list[Row]) -> str:
    header = ("parameter", "shape", "uses", "rule", "method", "MFLOP", "MB", "why")
    cells: list[tuple[Any, ...]] = [
        (
            row.path,
            "x".join(map(str, row.shape)) or "scalar",
            row.uses,
            row.rule,
            row.method,
            f"{row.flops / 1e6:.3g}",
            f"{row.bytes / 1e6:.3g}",
            row.why,
        )
        for row in rows
    ]
    table = [header, *(tuple(map(str, line)) for line in cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in table
    )
