"""What an engine does at each site."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from dpjax.clipping.analysis.uses import Program
from dpjax.clipping.analysis.values import Path
from dpjax.clipping.planning.slots import Group, Slot

Method = Literal["gram", "direct", "keep"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the clipped sum of a program is computed.

    Attributes:
        slots: One for each parameter.
        methods: How each group of a slot that is neither materialised nor probed gets its
            norms: from Gram matrices, from per-example gradients that are dropped, or from
            ones that are kept for the sum.
        probed: Sites that only say their norm during a first backward pass, and how ("gram"
            or "direct"); they get their sum from a second one.
        dropped: Materialised slots whose per-example gradients are dropped when their norms
            are known, and formed again for the sum.
    """

    slots: tuple[Slot, ...]
    methods: Mapping[Group, Method]
    probed: Mapping[Path, Method]
    dropped: frozenset[int]

    @property
    def formed(self) -> frozenset[Path]:
        """Sites in loops at which gradients that are kept are formed, turn by turn."""
        return frozenset(
            group.sites[0].path
            for group, method in self.methods.items()
            if method == "keep" and is_formed_inside(group)
        )


Planner = Callable[[Program], Plan]


def make_plan(
    slots: Sequence[Slot],
    cost: Callable[[Group, Method], float],
    *,
    probing: Callable[[Group, Method], float] | None = None,
) -> Plan:
    """Choose the cheapest method of each group.

    Args:
        slots: All parameters.
        cost: What to minimise.
        probing: The same for probes, of every parameter that has a single site; None to
            probe none, and so do with one backward pass.
    """
    methods: dict[Group, Method] = {}
    probed: dict[Path, Method] = {}
    for slot in slots:
        for group in () if slot.materialised else slot.groups:
            if probing is not None and can_probe(slot):
                kinds: tuple[Method, ...] = ("gram", "direct")
                method = min(kinds, key=lambda m, group=group: probing(group, m))
                probed[group.sites[0].path] = method
            else:
                kinds = ("gram", "direct", "keep")
                methods[group] = min(kinds, key=lambda m, group=group: cost(group, m))
    whole = [slot for slot in slots if slot.materialised and not slot.plain]
    dropped = {slot.index for slot in whole if _drops(slot, len(slots), cost)}
    return Plan(tuple(slots), methods, probed, frozenset(dropped))


def _drops(slot: Slot, count: int, cost: Callable[[Group, Method], float]) -> bool:
    if any(site.value.narrow for site in slot.sites):
        return False  # Formed again, they might be rounded otherwise than their norm.
    points = {leaf // count for site in slot.sites for leaf in site.value.leaves}
    if len(points) > 1:
        # The gradients of two points nearly cancel: another way to sum them would round
        # otherwise than their norm, by more than the clip norm.
        return False
    keep, direct = (sum(cost(g, m) for g in slot.groups) for m in ("keep", "direct"))
    return direct <= keep


def can_probe(slot: Slot) -> bool:
    """Whether the norm is known where the only site of the parameter stands."""
    if slot.materialised or len(slot.sites) != 1 or slot.groups[0].numbers:
        return False
    (site,) = slot.sites
    return site.loops == site.value.loops


def is_formed_inside(group: Group) -> bool:
    """Whether a gradient that is kept is whole after one turn of the loops around it.

    Its factors are then not kept until the loops have ended. (Patches of images are cut one
    example after the other, and a table is long: these stay outside.)
    """
    site = group.sites[0]
    alone = len(group.sites) == 1 and not group.numbers
    simple = site.kind in ("dot_general", "copy") and not site.is_number
    return alone and simple and bool(site.loops) and site.loops == site.value.loops
