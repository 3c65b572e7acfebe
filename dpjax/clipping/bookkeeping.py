"""One backward pass: norms and the clipped sum from saved inputs and output gradients."""

from dpjax.clipping import layouts
from dpjax.clipping.analysis import Program
from dpjax.clipping.execute import execute
from dpjax.clipping.plan import Method, Plan
from dpjax.clipping.query import Query
from dpjax.clipping.slots import Group, find_slots
from dpjax.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def bookkeeping(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    return execute(loss, query, batch, key, planner=_plan)


def _plan(program: Program) -> Plan:
    slots = find_slots(program)
    methods = {
        group: method(group)
        for slot in slots
        if not slot.materialised
        for group in slot.groups
    }
    return Plan(tuple(slots), methods, frozenset())


def method(group: Group) -> Method:
    first = layouts.sizes(group.sites[0])
    t = sum(layouts.sizes(site).t for site in group.sites)
    if t == 1 or t * (first.k + first.n) <= first.k * first.n:
        return "gram"
    return "keep"
