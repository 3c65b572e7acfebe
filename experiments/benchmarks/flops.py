"""FLOPs of a compiled program, with the bodies of its loops as often as they run.

XLA's own analysis counts a loop's body once. Here products of matrices, convolutions, the
four arithmetic operations on arrays and sums of their entries count.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\("
    r"(?P<operands>[^)]*)\)(?P<rest>.*)$"
)
_ARITHMETIC = frozenset({"add", "subtract", "multiply", "divide"})
_SHAPE = re.compile(r"\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:matmul|conv|gemm)')
_WINDOW = re.compile(r"window=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line of HLO: what it does, the type and first shape of its result, and the rest."""

    op: str
    type: str
    shape: list[int]
    operands: list[str]
    rest: str


Computations = Mapping[str, Mapping[str, Instruction]]
"""Instructions by their name, by the name of the computation."""


class _Window(NamedTuple):
    """How a kernel moves along one axis of the data."""

    stride: int
    low: int
    data_dilation: int
    kernel_dilation: int


class _UnknownError(Exception):
    pass


def count(text: str) -> float | None:
    """Return the FLOPs of an optimised HLO module.

    None if it has a loop whose number of turns the compiler does not know, or calls a
    library for products, as on a GPU, or has a convolution in groups of its batch.

    Args:
        text: As printed by ``jax.stages.Compiled.as_text``.
    """
    computations, entry = parsed(text)
    try:
        return _of(computations, entry, {})
    except _UnknownError:
        return None


def parsed(text: str) -> tuple[Computations, str]:
    """Return the computations of an HLO module, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            inside = computations.setdefault(found[1], {})
            entry = found[1] if line.startswith("ENTRY") else entry
        elif inside is not None and (found := _INSTRUCTION.match(line)):
            shape = _SHAPE.search(found["type"])
            sizes = [int(n) for n in shape[1].split(",") if n] if shape else []
            operands = re.findall(r"%?([A-Za-z_][\w.-]*)(?=,|$)", found["operands"])
            inside[found["name"]] = Instruction(
                found["op"], found["type"], sizes, operands, found["rest"]
            )
    return computations, entry


def _of(computations: Computations, name: str, known: dict[str, float]) -> float:
    if name not in known:
        body = computations[name]
        known[name] = sum(
            _of_instruction(computations, body, each, known) for each in body.values()
        )
    return known[name]


def _of_instruction(
    computations: Computations,
    body: Mapping[str, Instruction],
    instruction: Instruction,
    known: dict[str, float],
) -> float:
    op, rest = instruction.op, instruction.rest
    if op == "dot":
        return _of_dot(instruction, body)
    if op == "convolution":
        return _of_convolution(instruction, body)
    if op in _ARITHMETIC:
        return math.prod(instruction.shape)
    if op == "reduce":
        return math.prod(body[instruction.operands[0]].shape)
    if op == "custom-call" and _LIBRARY.search(rest):
        raise _UnknownError
    inner = [
        (_of(computations, each, known), turns) for each, turns in called(instruction)
    ]
    if any(turns is None and cost for cost, turns in inner):
        raise _UnknownError
    costs = [cost * (turns or 0) for cost, turns in inner]
    return max(costs, default=0.0) if op == "conditional" else sum(costs)


def called(instruction: Instruction) -> list[tuple[str, int | None]]:
    """Return the computations that an instruction calls, and how often.

    None where the compiler does not know.
    """
    names = _CALLED.findall(instruction.rest)
    if branches := _BRANCHES.search(instruction.rest):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    turns: int | None = 1
    if instruction.op == "while":
        trips = _TRIPS.search(instruction.rest)
        turns = int(trips[1]) if trips else None
    return [(name, turns) for name in names]


def _of_dot(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    left = body[instruction.operands[0]].shape
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    contracted = [int(n) for n in found[1].split(",") if n] if found else []
    return 2.0 * math.prod(instruction.shape) * math.prod(left[i] for i in contracted)


def _of_convolution(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Count what XLA counts: products with padding and between dilated entries are none."""
    rest = instruction.rest
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert found is not None
    if "batch_group_count" in rest:
        raise _UnknownError
    of_data, of_kernel, of_out = found.groups()
    data, kernel = (body[name].shape for name in instruction.operands[:2])
    out = instruction.shape
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")]
    total *= kernel[of_kernel.index("i")]
    for axis, window in enumerate(_windows(rest, len(data) - 2)):
        label = str(axis)
        total *= _met(
            data[of_data.index(label)],
            kernel[of_kernel.index(label)],
            out[of_out.index(label)],
            window,
        )
    return total


def _windows(rest: str, spatial: int) -> list[_Window]:
    found = _WINDOW.search(rest)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(name: str, default: str) -> list[str]:
        return fields.get(name, "x".join([default] * spatial)).split("x")

    rows = zip(
        values("stride", "1"),
        (pad.split("_")[0] for pad in values("pad", "0_0")),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    )
    return [_Window(*map(int, row)) for row in rows]


def _met(size: int, kernel: int, out: int, window: _Window) -> int:
    """Return how many pairs of an output position and an offset meet an entry."""
    starts = (o * window.stride - window.low for o in range(out))
    places = [s + k * window.kernel_dilation for s in starts for k in range(kernel)]
    gap = window.data_dilation
    return sum(0 <= place <= (size - 1) * gap and place % gap == 0 for place in places)
