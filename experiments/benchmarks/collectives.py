"""What a compiled program moves between devices, with loops as often as they run."""

import math
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from experiments.benchmarks import flops

KINDS: Final = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
_BYTES: Final = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8}
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: One of ``KINDS``.
        shapes: What each device has of its results.
        size: Bytes of the results on one device.
        times: How often it runs.
        groups: The devices that take part in each; none where all do.
        name: Where it comes from in the program, as JAX calls it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    size: int
    times: int
    groups: tuple[tuple[int, ...], ...]
    name: str

    @property
    def bytes(self) -> int:
        """Bytes of all its results, over all times that it runs."""
        return self.size * self.times


def collectives(text: str) -> list[Collective]:
    """Return the collectives of an optimised HLO module, as printed by JAX.

    Of a conditional, those of all branches; a loop of unknown length counts as one turn.
    """
    computations, entry = flops.parsed(text)
    return list(_of(computations, entry, 1))


def _of(
    computations: flops.Computations, name: str, times: int
) -> Iterator[Collective]:
    for each in computations[name].values():
        kind = each.op.removesuffix("-start")
        if kind in KINDS:
            yield _read(kind, each, times)
        for called, turns in flops.called(each):
            yield from _of(computations, called, times * (turns or 1))


def _read(kind: str, each: flops.Instruction, times: int) -> Collective:
    found = [
        (_BYTES.get(dtype, 4), tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(each.type)
    ]
    if each.op.endswith("-start") and len(found) > 1:
        found = found[len(found) // 2 :]  # Operands stand before the results.
    size = sum(width * math.prod(shape) for width, shape in found)
    groups = re.search(
        r"replica_groups=(\{\{.*?\}\}|mesh\[.*?\] \{.*?\}|\[\S+?)(?:, |$)", each.rest
    )
    named = re.search(r'op_name="([^"]*)"', each.rest)
    shapes = tuple(shape for _, shape in found)
    return Collective(
        kind,
        shapes,
        size,
        times,
        _groups(groups[1]) if groups else (),
        named[1] if named else "",
    )


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Read groups of devices in each of the three ways that HLO writes them.

    ``{{0,1},{2,3}}``; ``[2,2]<=[2,2]T(1,0)``, numbers in another order of axes;
    ``mesh['a'=2,'b'=2] {'b'}``, along these axes of a mesh.
    """
    if text.startswith("{"):
        rows = re.findall(r"{([\d,]+)}", text)
        return tuple(tuple(int(n) for n in row.split(",")) for row in rows)
    if text.startswith("mesh"):
        mesh, _, along = text.partition("] ")
        sizes = {name: int(n) for name, n in re.findall(r"('\w+')=(\d+)", mesh)}
        inner = [i for i, name in enumerate(sizes) if name in along]
        outer = [i for i in range(len(sizes)) if i not in inner]
        source, order = [*sizes.values()], [*outer, *inner]
        width = math.prod(source[i] for i in inner)
    else:
        found = re.fullmatch(r"\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
        assert found is not None, text
        width, source = int(found[1]), [int(n) for n in found[2].split(",")]
        order = [int(n) for n in (found[3] or "").split(",") if n]
        order = order or [*range(len(source))]
    devices = np.arange(math.prod(source)).reshape(source).transpose(order)
    return tuple(map(tuple, devices.reshape(-1, width).tolist()))
