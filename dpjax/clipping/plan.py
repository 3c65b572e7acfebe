"""What an engine does at each site."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from dpjax.clipping.analysis import Program
from dpjax.clipping.slots import Group, Slot
from dpjax.clipping.values import Path

Method = Literal["gram", "direct", "keep"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the clipped sum of a program is computed.

    Attributes:
        slots: One for each parameter.
        methods: How each group of a slot that is not materialised gets its norms: from Gram
            matrices, from per-example gradients that are dropped, or from ones that are
            kept for the sum.
        probed: Sites that only say their norm during a first backward pass and get their
            sum from a second one.
    """

    slots: tuple[Slot, ...]
    methods: Mapping[Group, Method]
    probed: frozenset[Path]


Planner = Callable[[Program], Plan]
