"""What private training costs each of many devices, read from compiled programs.

The loop's own programs are compiled for virtual devices and never run, so that no model has
to fit anywhere. Each is compared with the same program, on the same layout, of the gradient
without privacy.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dpjax.clipping import Engine, bookkeeping, ghost, plain, planned
from dpjax.clipping.planning.planner import MemoryBudgetError
from dpjax.models.gpt2 import gpt2_small
from dpjax.models.llama import llama
from dpjax.models.losses import causal_lm
from dpjax.models.partition import flatten
from dpjax.models.peft import lora
from dpjax.parallel.rules import VOCABULARY
from dpjax.parallel.sharding import AXES, Layout, make_layout
from dpjax.typing import Model, Params
from experiments.benchmarks import flops, lowering
from experiments.benchmarks.collectives import Collective, collectives

LENGTH: Final = 1024
"""Tokens of an example."""
BUDGET: Final = 40e9
"""Bytes that "auto" plans with, half the memory of a device of 80 GB, and "auto_lean" not: it
takes the leanest plan there is, and a quarter more."""
ENGINES: Final[dict[str, Engine]] = {
    "plain": plain,
    "ghost": ghost,
    "bookkeeping": bookkeeping,
    "auto": planned(memory_budget=BUDGET),
    "auto_lean": planned(),
}
LAYOUTS: Final = (
    *((8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 4, 2)),
    *((1, 64, 1), (8, 8, 1), (8, 4, 2), (32, 8, 1)),
)
"""Meshes of data x fsdp x model."""


class Workload(NamedTuple):
    """A model, and which of its parameters are trained."""

    model: Model
    train: tuple[str, ...]


def llama_1b() -> Workload:
    """Return the shape of TinyLlama, all 1.1e9 parameters trained."""
    sizes = {"vocab_size": 32000, "layers": 22, "width": 2048, "heads": 32}
    return Workload(_llama(**sizes, kv_heads=4, hidden=5632), (".*",))


def llama_8b() -> Workload:
    """Return the shape of Llama 3 8B, all parameters trained."""
    return Workload(_llama_8b(), (".*",))


def llama_8b_lora() -> Workload:
    """Return the same, of which adapters of rank 16 are trained."""
    model = lora(_llama_8b(), rank=16, scale=2.0, targets=(".*(attention|mlp)/.*",))
    return Workload(model, (r".*/lora_[ab]",))


def gpt2_124m() -> Workload:
    """Return GPT-2 small, with its vocabulary padded to what devices can share."""
    model = gpt2_small(
        vocab_size=50304, length=LENGTH, dtype="float32", scan=True, remat=True
    )
    return Workload(model, (".*",))


WORKLOADS: Final[dict[str, Callable[[], Workload]]] = {
    "gpt2_124m": gpt2_124m,
    "llama_1b": llama_1b,
    "llama_8b": llama_8b,
    "llama_8b_lora": llama_8b_lora,
}


def measure(
    name: str, *, engines: Sequence[str], rounds: int
) -> tuple[list[dict[str, Any]], str]:
    """Compile one workload by each engine on each layout.

    Args:
        name: Of the workload.
        engines: Names, of ``ENGINES``; "plain" is compiled in any case.
        rounds: Not used: each program is compiled once.

    Returns:
        Rows, none for an engine without a plan within its budget, and the name of what they
        are relative to. ``peak_bytes`` is what one device holds at most, arguments and
        temporaries; ``temporaries`` without the former. Ratios are to the row of "plain".
        ``collective_bytes`` are those of the results of collectives on one device, in one
        chunk of one row for each device. ``layer_gathered`` is the largest gathered array
        over the largest parameter of one layer; ``rows_moved`` bytes of what has an axis of
        examples, and more than a number for each, and travels between devices that do not
        share the examples; ``data_reductions`` collectives between replicas in a chunk.
        Of "plain" also ``end_bytes``, what the end of a step reads and writes.
    """
    del rounds
    workload, rows = WORKLOADS[name](), []
    for mesh in LAYOUTS:
        layout = make_layout(
            data=mesh[0], fsdp=mesh[1], model=mesh[2], rules=VOCABULARY
        )
        found = {}
        for engine in dict.fromkeys(["plain", *engines]):
            with contextlib.suppress(MemoryBudgetError):
                found[engine] = compiled(workload, layout, engine)
        base = found["plain"]
        rows += [
            {
                "workload": name,
                "layout": "x".join(map(str, mesh)),
                "engine": engine,
                "devices": layout.devices,
                "peak_ratio": _ratio(row, base, "peak_bytes"),
                "temporaries_ratio": _ratio(row, base, "temporaries"),
                "flops_ratio": _ratio(row, base, "flops"),
                "collective_ratio": _ratio(row, base, "collective_bytes"),
                **row,
            }
            for engine, row in found.items()
        ]
    return rows, "plain"


def _ratio(row: dict[str, Any], base: dict[str, Any], key: str) -> float | None:
    return row[key] / base[key] if base[key] else None


def compiled(workload: Workload, layout: Layout, engine: str) -> dict[str, Any]:
    """Return what one chunk costs a device: one row for each that shares them."""
    examples = layout.row_parts
    example = {"tokens": np.zeros(LENGTH, np.int32)}
    params = jax.eval_shape(workload.model.init, jax.random.key(0), example)
    made = lowering.lowered(
        causal_lm(workload.model),
        params,
        example,
        rows=examples,
        layout=layout,
        engine=ENGINES[engine],
        train=workload.train,
        ends=engine == "plain",
    )
    text, memory = made.chunk.as_text(), made.chunk.memory_analysis()
    moved = collectives(text)
    gathered = [
        size
        for c in moved
        if c.kind == "all-gather"
        for size in map(math.prod, c.shapes)
    ]
    return {
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "flops": flops.count(text),
        "collective_bytes": sum(c.bytes for c in moved),
        "collectives": sum(c.times for c in moved),
        "sum_bytes": made.sum_bytes,
        "end_bytes": made.end and made.end.cost_analysis()["bytes accessed"],
        "layer_gathered": max(gathered, default=0) / largest_layer(params),
        "rows_moved": sum(c.bytes for c in moved if moves_rows(c, layout, examples)),
        "data_reductions": sum("data" in meets(c, layout) for c in moved),
        "compile_s": made.seconds,
    }


def largest_layer(params: Params) -> int:
    """Return the entries of the largest parameter of one layer."""
    return max(
        leaf.size // (leaf.shape[0] if name.startswith("layers/") else 1)
        for name, leaf in flatten(params).items()
    )


def moves_rows(collective: Collective, layout: Layout, examples: int) -> bool:
    """Whether examples, and more than a number of each, go to where they are not."""
    if not meets(collective, layout) & {"data", "fsdp"}:
        return False
    held = examples // layout.replicas
    return any(
        len(shape) > 1 and held in shape and LENGTH in shape
        for shape in collective.shapes
    )


def meets(collective: Collective, layout: Layout) -> set[str]:
    """Return along which axes of the mesh the devices of a collective differ."""
    places = {device.id: place for place, device in np.ndenumerate(layout.mesh.devices)}
    found: set[str] = set()
    for group in collective.groups or [tuple(places)]:
        axes = np.array([places[i] for i in group])
        differ = (axes != axes[0]).any(axis=0)
        found |= {name for name, yes in zip(AXES, differ, strict=True) if yes}
    return found


def _llama(**sizes: int) -> Model:
    return llama(
        **sizes,
        length=LENGTH,
        rotary_base=1e4,
        epsilon=1e-5,
        tied=False,
        dtype="float32",
        scan=True,
        remat=True,
    )


def _llama_8b() -> Model:
    sizes = {"vocab_size": 128256, "layers": 32, "width": 4096, "heads": 32}
    return _llama(**sizes, kv_heads=8, hidden=14336)
