"""Which sites make up the gradient of each parameter, and how they overlap."""

import dataclasses
import itertools
import math

import numpy as np

from dpjax.clipping.analysis.uses import Program, Site
from dpjax.clipping.arithmetic import layouts


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Sites of one and the same weight: their gradients add up.

    Attributes:
        sites: At least one.
        swapped: For each, whether it sees the weight transposed, compared to the first.
        numbers: Sites of numbers that are computed from the whole parameter, and so add to
            this gradient, too.
    """

    sites: tuple[Site, ...]
    swapped: tuple[bool, ...]
    numbers: tuple[Site, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """The gradient of one parameter.

    Attributes:
        index: Which parameter.
        groups: Groups of sites that see disjoint parts of it: squared norms add up.
        materialised: Why its per-example gradient is formed in full, or "" if it is not.
        plain: Why it needs ordinary differentiation, or "".
    """

    index: int
    groups: tuple[Group, ...]
    materialised: str
    plain: str

    @property
    def sites(self) -> list[Site]:
        """All sites of all groups, without numbers."""
        return [site for group in self.groups for site in group.sites]


def find_slots(program: Program) -> list[Slot]:
    """Return one slot for each parameter of one point."""
    count = len(program.names)
    sites: list[list[Site]] = [[] for _ in range(count)]
    for site in program.sites.values():
        for slot in {*map(program.slot, site.value.leaves - program.plain.keys())}:
            sites[slot].append(site)
    plain = {program.slot(leaf): why for leaf, why in program.plain.items()}
    groups = [_groups(found) for found in sites]
    whole = {
        slot: why
        for slot in range(count)
        if (
            why := plain.get(slot)
            or _why_whole(sites[slot], groups[slot], program.shapes[slot])
        )
    }
    # A parameter that shares a derived weight with another one is formed along with it.
    _spread(whole, program)
    return [
        Slot(
            i,
            tuple(groups[i] if i in whole else _with_numbers(groups[i])),
            whole.get(i, ""),
            plain.get(i, ""),
        )
        for i in range(count)
    ]


def _groups(sites: list[Site]) -> list[Group]:
    found: dict[object, list[tuple[Site, bool]]] = {}
    # Lookups first: the other sites of a table are then seen in its own axes.
    for site in sorted(sites, key=lambda site: site.kind != "gather"):
        key = layouts.identity(site)
        if key is None:
            found[site] = [(site, False)]
            continue
        h, k, n = key
        # One-hot factors have no transpose: rows and columns of a table are two groups.
        if (h, n, k) in found and k != n and site.kind != "gather":
            found[h, n, k].append((site, True))
        else:
            found.setdefault((h, k, n), []).append((site, False))
    return [
        Group(*map(tuple, zip(*members, strict=True))) for members in found.values()
    ]


def _with_numbers(groups: list[Group]) -> list[Group]:
    numbers = tuple(g.sites[0] for g in groups if g.sites[0].is_number)
    rest = [group for group in groups if not group.sites[0].is_number]
    return [dataclasses.replace(group, numbers=numbers) for group in rest]


def _why_whole(sites: list[Site], groups: list[Group], shape: tuple[int, ...]) -> str:
    views = [g.sites[0].value.view for g in groups if not g.sites[0].is_number]
    if any(view is None for view in views):
        return "its weights are computed from parameters"
    if any(itertools.starmap(_overlap, itertools.combinations(views, 2))):
        return "its uses overlap in part"
    numbers = any(site.is_number for site in sites)
    if numbers and sum(view.size for view in views if view is not None) < math.prod(
        shape
    ):
        return "a number is computed from more of it than meets data"
    return ""


def _overlap(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    assert first is not None
    assert second is not None
    try:
        return np.shares_memory(first, second, max_work=10_000)  # pyrefly: ignore
    except np.exceptions.TooHardError:
        return True


def _spread(whole: dict[int, str], program: Program) -> None:
    while True:
        before = len(whole)
        for site in program.sites.values():
            if site.is_number:
                continue
            slots = {program.slot(leaf) for leaf in site.value.leaves}
            if slots & whole.keys():
                for slot in slots:
                    whole.setdefault(slot, "shares a derived weight")
        if len(whole) == before:
            return
