"""Two backward passes: norms without keeping anything, then the clipped sum."""

from dpjax.clipping.analysis import Program
from dpjax.clipping.bookkeeping import method
from dpjax.clipping.execute import execute
from dpjax.clipping.plan import Plan
from dpjax.clipping.query import Query
from dpjax.clipping.slots import Slot, find_slots
from dpjax.sensitive import ClippedSum, PerExample
from dpjax.typing import Batch, Key, Loss


def ghost(
    loss: Loss, query: Query, batch: Batch, key: Key
) -> tuple[ClippedSum, PerExample]:
    return execute(loss, query, batch, key, planner=_plan)


def _plan(program: Program) -> Plan:
    slots = find_slots(program)
    probed = frozenset(slot.sites[0].path for slot in slots if can_probe(slot))
    methods = {
        group: method(group)
        for slot in slots
        if not slot.materialised and not can_probe(slot)
        for group in slot.groups
    }
    return Plan(tuple(slots), methods, probed)


def can_probe(slot: Slot) -> bool:
    """Whether the norm is known where the only site of the parameter stands."""
    if slot.materialised or len(slot.sites) != 1:
        return False
    (site,) = slot.sites
    return site.loops == site.value.loops
