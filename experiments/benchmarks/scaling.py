"""Count what a training step costs each device, and model it for many accelerators.

    python -m experiments.benchmarks.scaling --out=FILE.json [--workloads=A,B]

--out=FILE.json   receives the counts and the model; FILE.md beside it, the page to read
--workloads=A,B   gpt,wrn16_4 if not given; see experiments/benchmarks/workloads.py

The step is the training loop's own, compiled for 1, 2, 4 and 8 virtual CPU devices and not
run: FLOPs, bytes and collectives are read from the compiled programs. Wall time is not
measured. Exit status: 0 done, 2 wrong arguments.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from experiments.shared import options

WORKLOADS: Final = ("gpt", "wrn16_4")
ROWS: Final = 16
"""Rows of a chunk over all devices (strong scaling)."""
ROWS_EACH: Final = 2
"""Rows of a chunk on each device (weak scaling)."""
MODELLED: Final = (8, 64, 512)


class Accelerator(NamedTuple):
    """Assumptions about the hardware; none of them was measured.

    Attributes:
        flops: Per second, as sustained on models like these.
        memory: Bytes per second of the device's memory.
        node: Devices that the fast links join.
        fast, slow: Bytes per second of one device, within a node and beyond it.
        latency: Seconds for each hop of a collective.
    """

    flops: float = 120e12
    memory: float = 1.5e12
    node: int = 8
    fast: float = 200e9
    slow: float = 20e9
    latency: float = 10e-6


class Plan(NamedTuple):
    """A run whose cost is modelled: batches expected, and rows of a chunk on a device."""

    batch: int
    rows: int


PLANS: Final = {"gpt": Plan(4096, 16), "wrn16_4": Plan(4096, 16)}


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _asked, lambda asked: _run(argv, *asked))


def _asked(argv: list[str]) -> tuple[list[str], Path]:
    given = options.read(argv, ("out", "workloads"))
    out = options.file("out", given.get("out"), ".json")
    return options.choices("workloads", given.get("workloads"), WORKLOADS), out


def _run(argv: list[str], names: list[str], out: Path) -> int:
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from experiments.shared import timing
    from experiments.sweeps import sweep

    results: dict[str, Any] = timing.provenance(
        module="experiments.benchmarks.scaling",
        argv=argv,
        packages=("jax", "jaxlib", "dpjax"),
        device="cpu, virtual devices",
    )
    results["counts"] = [
        count(name, mesh, rows) for name in names for mesh, rows in settings()
    ]
    results["assumptions"] = Accelerator()._asdict()
    results["model"] = [
        row
        for name in names
        for row in modelled([c for c in results["counts"] if c["workload"] == name])
    ]
    sweep.write_json(out, results)
    out.with_suffix(".md").write_text(page(results))
    print(out.with_suffix(".md"))
    return 0


def settings() -> Iterator[tuple[tuple[int, int], int]]:
    """Yield each mesh (data, fsdp) and the rows of its chunks."""
    found = {
        (mesh, rows): None
        for devices in (1, 2, 4, 8)
        for mesh in ((devices, 1), (1, devices))
        for rows in (ROWS, ROWS_EACH * devices)
    }
    yield from found


def count(name: str, mesh: tuple[int, int], rows: int) -> dict[str, Any]:
    """Return what one chunk, and the end of a step, cost each of the devices."""
    import jax

    chunk, end, params = programs(name, mesh, rows)
    leaves = jax.tree.leaves(params)
    size = 4 * sum(leaf.size for leaf in leaves)
    return {
        "workload": name,
        "data": mesh[0],
        "fsdp": mesh[1],
        "rows": rows,
        "params_bytes": size,
        "chunk": costs(chunk),
        "end": costs(end),
    }


def programs(name: str, mesh: tuple[int, int], rows: int) -> tuple[Any, Any, Any]:
    """Compile the loop's ``accumulate`` and ``finish``; nothing is allocated.

    Returns:
        Both programs, and the shapes of the parameters.
    """
    import jax

    from dpjax.clipping import bookkeeping
    from dpjax.parallel.sharding import make_layout
    from experiments.benchmarks import lowering
    from experiments.benchmarks.workloads import WORKLOADS as RECIPES

    recipe = RECIPES[name]()
    layout = make_layout(
        data=mesh[0], fsdp=mesh[1], model=1, rules=((".*", "largest"),)
    )
    params, batch = jax.eval_shape(recipe.arrays)
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.examples
    )
    made = lowering.lowered(
        recipe.loss, params, example, rows=rows, layout=layout, engine=bookkeeping
    )
    return made.chunk, made.end, params


def costs(program: Any) -> dict[str, Any]:
    """Return FLOPs, bytes and collectives of one device in a compiled program."""
    analysis, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "flops": analysis["flops"],
        "bytes_accessed": analysis["bytes accessed"],
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": by_kind(program.as_text()),
    }


def by_kind(text: str) -> dict[str, dict[str, int]]:
    """Return for each kind of collective how often one runs, and the bytes they yield."""
    from experiments.benchmarks.collectives import collectives

    found: dict[str, dict[str, int]] = {}
    for each in collectives(text):
        entry = found.setdefault(each.kind, {"count": 0, "bytes": 0})
        entry["count"] += each.times
        entry["bytes"] += each.bytes
    return found


def modelled(counts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the modelled time of a step for each number of accelerators.

    FLOPs and bytes are those counted on one device, for each row or each parameter.
    """
    (one,) = [c for c in counts if c["data"] * c["fsdp"] == 1 and c["rows"] == ROWS]
    for devices in MODELLED:
        for fsdp in (1, 8):
            yield step_model(one, PLANS[one["workload"]], devices, fsdp, Accelerator())


def step_model(
    one: dict[str, Any], plan: Plan, devices: int, fsdp: int, on: Accelerator
) -> dict[str, Any]:
    """Return the modelled seconds of one step, by part.

    Args:
        one: Counts of one device.
        plan: The batches.
        devices: Accelerators, of which ``fsdp`` share the parameters.
        fsdp: At most a node.
        on: The hardware.
    """
    chunks = expected_chunks(plan.batch, plan.rows * devices)
    compute = chunks * plan.rows * one["chunk"]["flops"] / one["rows"] / on.flops
    size = one["params_bytes"]
    # A ring: all but one part of what is gathered goes over the links of a device.
    gather = (size * (fsdp - 1) / fsdp / on.fast + on.latency * fsdp) * (fsdp > 1)
    end = one["end"]["bytes_accessed"] / fsdp / on.memory
    seconds = {
        "compute": compute,
        "gather": chunks * gather,
        "reduce": reduction(size, devices, on),
        "end": end,
    }
    total = sum(seconds.values())
    ideal = plan.batch * one["chunk"]["flops"] / one["rows"] / on.flops / devices
    return {
        "workload": one["workload"],
        "devices": devices,
        "fsdp": fsdp,
        "chunks": chunks,
        "seconds": seconds | {"step": total},
        "efficiency": ideal / total,
        "in_each_chunk": ideal / (total + (chunks - 1) * reduction(size, devices, on)),
    }


def reduction(size: int, devices: int, on: Accelerator) -> float:
    """Return the seconds of one all-reduce: within nodes, then between them."""
    within = min(devices, on.node)
    nodes = devices // within
    seconds = 2 * size * (within - 1) / within / on.fast
    seconds += 2 * size / within * (nodes - 1) / nodes / on.slow
    return seconds + on.latency * 2 * (within + math.ceil(math.log2(nodes)) - 1)


def expected_chunks(batch: float, rows: int) -> float:
    """Return the mean of ``ceil(K / rows)`` for a Poisson batch, K ~ N(batch, batch)."""

    def beyond(size: float) -> float:
        return math.erfc((size - batch) / math.sqrt(2 * batch)) / 2

    last = math.ceil((batch + 10 * math.sqrt(batch)) / rows)
    return sum(beyond(chunk * rows) for chunk in range(last))


def page(results: dict[str, Any]) -> str:
    """Return the page to read."""
    strong, weak = (_count_table(results["counts"], kind) for kind in (True, False))
    assumed = ", ".join(f"{k} {v:g}" for k, v in results["assumptions"].items())
    return _PAGE.format(
        command=results["command"],
        commit=(results["git"]["commit"] or "unknown")[:7],
        versions=", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        rows=ROWS,
        each=ROWS_EACH,
        strong=strong,
        weak=weak,
        assumed=assumed,
        model=_model_table(results["model"]),
    )


def _count_table(counts: list[dict[str, Any]], strong: bool) -> str:  # noqa: FBT001
    lines = [
        "| workload | data x fsdp | rows of each | chunk: GFLOP | gathered MB | "
        "end: MFLOP | reduced MB (collectives) | parameters, moments, sum: MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in counts:
        devices = c["data"] * c["fsdp"]
        if c["rows"] != (ROWS if strong else ROWS_EACH * devices):
            continue
        chunk, end = c["chunk"], c["end"]
        gathered = sum(v["bytes"] for v in chunk["collectives"].values())
        reduced = sum(v["bytes"] for v in end["collectives"].values())
        number = sum(v["count"] for v in end["collectives"].values())
        lines.append(
            f"| {c['workload']} | {c['data']}x{c['fsdp']} | {c['rows'] // devices} | "
            f"{chunk['flops'] / 1e9:.2f} | {gathered / 1e6:.1f} | "
            f"{end['flops'] / 1e6:.0f} | {reduced / 1e6:.1f} ({number}) | "
            f"{end['arguments'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def _model_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| workload | accelerators | data x fsdp | chunks | compute ms | gather ms | "
        "reduce ms | end ms | step ms | efficiency | reduced in each chunk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        parts = " | ".join(f"{1e3 * s:.2f}" for s in row["seconds"].values())
        lines.append(
            f"| {row['workload']} | {row['devices']} | "
            f"{row['devices'] // row['fsdp']}x{row['fsdp']} | {row['chunks']:.2f} | "
            f"{parts} | {row['efficiency']:.0%} | {row['in_each_chunk']:.0%} |"
        )
    return "\n".join(lines)


_PAGE: Final = """# What more devices cost

    {command}

Commit {commit}; {versions}. Counts are read from the compiled programs of the training loop
(DP-SGD, Adam, engine bookkeeping, float32) for virtual CPU devices. No time was measured: two
cores cannot tell how devices scale. Another backend may fuse, and so count, otherwise.

A step is some chunks, each without any communication but the gathering of split parameters
(fsdp), and one end: the reduction, the noise, the update. Numbers are of one device.

## Strong scaling: {rows} rows in a chunk

{strong}

FLOPs of a chunk fall as rows are shared. With fsdp, noise, update and memory fall too. What is
reduced is one gradient, whatever the number of devices or chunks, and some scalars.

## Weak scaling: {each} rows on each device

{weak}

## A model at 8, 64 and 512 accelerators

NOT measured. FLOPs and bytes are those counted on one device; the hardware is assumed:
{assumed}
(per second and device; `fast` links are within a node, `slow` ones beyond; latency in seconds
for each hop). Parameters are gathered and sums reduced along rings, in float32,
and nothing overlaps. Batches are Poisson, 4096 examples expected, in chunks of 16 rows on
each device; `chunks` is the expected number, the last of them padded. Efficiency is the time
that the expected examples would take if only their own FLOPs counted, over the time of the
step.

{model}

- The last column is the efficiency if every chunk were reduced, as accumulation under plain
  `jit` does. Where a step is one or two chunks there is little to gain; with many there is.
- At 512 accelerators one chunk holds 8192 rows, and most of it is padding: fewer rows on a
  device, or larger batches, are what helps. That choice changes no privacy.
- The end is bound by memory, and counted as the CPU backend reads and writes, which fuses
  little of the noise: on an accelerator it should be several times shorter.
- Each device keeps one whole partial sum, and one copy of the whole parameters while it works
  on a chunk: fsdp saves moments, averages and noise, not these.
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
