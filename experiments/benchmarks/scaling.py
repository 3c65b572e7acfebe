"""The page on many devices: what was counted, and a model of what it would take."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from experiments.shared import report

DEVICES: Final = 256
"""How many virtual devices there must be."""
MODELLED: Final = (8, 64, 512)
BATCH: Final = 4096
"""Examples that a batch is expected to have."""
_MODELLED_ENGINES: Final = ("plain", "auto", "auto_lean")


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


Row = Mapping[str, Any]


def modelled(rows: list[dict[str, Any]], on: Accelerator) -> Iterator[dict[str, Any]]:
    """Yield the modelled time of a step for each number of accelerators.

    Each node holds one replica, or each accelerator does: counted on a mesh of 1x8x1 and of
    8x1x1.
    """
    for layout, fsdp in (("8x1x1", 1), ("1x8x1", 8)):
        for row in rows:
            if row["layout"] != layout or row["engine"] not in _MODELLED_ENGINES:
                continue
            plain = _plain(rows, row)
            for devices in MODELLED:
                yield step_model(row, plain, devices=devices, fsdp=fsdp, on=on)


def step_model(
    row: Row, plain: Row, *, devices: int, fsdp: int, on: Accelerator
) -> dict[str, Any]:
    """Return the modelled seconds of one step, by part.

    Args:
        row: Counts of a chunk with one row on each device.
        plain: Those without privacy; how a step ends is counted there.
        devices: Accelerators.
        fsdp: How many of them share the parameters: at most a node.
        on: The hardware.
    """
    chunks = expected_chunks(BATCH, devices)
    hops = on.latency * row["collectives"] * fsdp * (fsdp > 1)
    seconds = {
        "compute": chunks * row["flops"] / on.flops,
        "exchange": chunks * (row["collective_bytes"] / on.fast + hops),
        "reduce": reduction(row["sum_bytes"], devices // fsdp, fsdp, on),
        "end": plain["end_bytes"] / on.memory,
    }
    total = sum(seconds.values())
    return {
        "workload": row["workload"],
        "engine": row["engine"],
        "devices": devices,
        "fsdp": fsdp,
        "chunks": chunks,
        "seconds": seconds | {"step": total},
        "efficiency": BATCH * plain["flops"] / on.flops / devices / total,
    }


def reduction(size: float, replicas: int, fsdp: int, on: Accelerator) -> float:
    """Return the seconds of one all-reduce over replicas: within nodes, then between them.

    Args:
        size: Bytes that each device has of a sum.
        replicas: How many sums there are.
        fsdp: Devices that share one; those of a node reduce nothing with one another.
        on: The hardware.
    """
    within = min(replicas, on.node // fsdp)
    nodes = replicas // within
    seconds = 2 * size * (within - 1) / within / on.fast
    seconds += 2 * size / within * (nodes - 1) / nodes / on.slow
    return seconds + on.latency * 2 * (within + math.ceil(math.log2(nodes)) - 1)


def expected_chunks(batch: float, rows: int) -> float:
    """Return the mean of ``ceil(K / rows)`` for a Poisson batch, K ~ N(batch, batch)."""

    def beyond(size: float) -> float:
        return math.erfc((size - batch) / math.sqrt(2 * batch)) / 2

    last = math.ceil((batch + 10 * math.sqrt(batch)) / rows)
    return sum(beyond(chunk * rows) for chunk in range(last))


def page(results: Mapping[str, Any]) -> str:
    """Return the page to read, of the results of ``--suite=scale``."""
    rows, on = results["rows"], Accelerator()
    return _PAGE.format(
        command=results["command"],
        commit=(results["git"]["commit"] or "unknown")[:7],
        versions=", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        counts=_counted(rows),
        strong=_strong(rows),
        batch=BATCH,
        assumed=", ".join(f"{k} {v:g}" for k, v in on._asdict().items()),
        model=_model_table([*modelled(rows, on)]),
    )


def _plain(rows: list[dict[str, Any]], row: Row) -> dict[str, Any]:
    same = ("workload", "layout")
    return next(
        other
        for other in rows
        if other["engine"] == "plain" and all(other[k] == row[k] for k in same)
    )


def _counted(rows: list[dict[str, Any]]) -> str:
    head = [
        *(
            "workload",
            "data x fsdp x model",
            "engine",
            "peak GB",
            "peak",
            "temporaries",
        ),
        *("FLOPs", "collectives", "largest gather / layer", "compile s"),
    ]
    lines = [
        [
            row["workload"],
            row["layout"],
            row["engine"],
            f"{row['peak_bytes'] / 1e9:.2f}",
            *(
                _ratio(row[f"{name}_ratio"])
                for name in ("peak", "temporaries", "flops")
            ),
            _ratio(row["collective_ratio"]),
            f"{row['layer_gathered']:.2f}",
            f"{row['compile_s']:.1f}",
        ]
        for row in rows
    ]
    return report.markdown(head, lines)


def _strong(rows: list[dict[str, Any]]) -> str:
    head = ["workload", "layout", "chunks", "TFLOP", "GB exchanged", "GB held"]
    lines = []
    for row in rows:
        if row["engine"] == "auto" and row["layout"][-2:] == "x1":
            chunks = expected_chunks(BATCH, row["devices"])
            lines.append(
                [
                    row["workload"],
                    row["layout"],
                    f"{chunks:.1f}",
                    f"{chunks * row['flops'] / 1e12:.0f}",
                    f"{chunks * row['collective_bytes'] / 1e9:.0f}",
                    f"{(row['peak_bytes'] - row['temporaries']) / 1e9:.2f}",
                ]
            )
    return report.markdown(head, lines)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _model_table(rows: list[dict[str, Any]]) -> str:
    head = [
        *("workload", "engine", "accelerators", "fsdp", "chunks", "compute s"),
        *("exchange s", "reduce s", "end s", "step s", "efficiency"),
    ]
    lines = [
        [
            row["workload"],
            row["engine"],
            str(row["devices"]),
            str(row["fsdp"]),
            f"{row['chunks']:.1f}",
            *(f"{seconds:.3f}" for seconds in row["seconds"].values()),
            f"{row['efficiency']:.0%}",
        ]
        for row in rows
    ]
    return report.markdown(head, lines)


_PAGE: Final = """# What more devices cost

    {command}

Commit {commit}; {versions}. Everything is read from the training loop's own programs (DP-SGD,
Adam, float32, 1024 tokens, one row of a chunk on each device or on each group that shares
products), compiled for virtual CPU devices and not run: no time was measured, and no model
was allocated. Another backend may fuse, and so count, otherwise; XLA's CPU compiler has no
reduce-scatter, so that an all-reduce stands in its place, here and without privacy.

`peak` is arguments (parameters, moments, sum, batch) and temporaries; ratios are to the same
program of the gradient without privacy on the same layout. `auto` plans for a device of 80 GB,
of which it may take half; `auto_lean` for the leanest plan there is. FLOPs count loops as
often as they turn, collectives by the bytes of their results on one device.

{counts}
- No gathered array is larger than the largest parameter of a layer, whatever the engine. The
  gradient without privacy gathers the rows of all devices for the token table, private sums
  gather none: what has an axis of examples and travels is one number for each.
- Replicas do not meet within a chunk; a step ends with one reduction over `data`.
- **One pass, or the memory of none.** With adapters `auto` costs nothing beside training
  without privacy, and little for all of GPT-2, whose layers' gradients are small beside what
  a row of 1024 tokens takes anyway. Of the larger models there is a choice, where all
  parameters are trained. One backward pass (`auto` with room, `bookkeeping`) has the FLOPs and
  collectives of training without privacy, but has to hold, for each row, the gradient or what
  it is made of until the norm is known: 4 bytes times parameters (4.4 GB of 1.1e9) or
  4 x 1024 x (inputs + outputs) for each product (31 MB for 2048 x 5632, whose gradient is 46
  MB). Two passes (`ghost`, `auto_lean`) hold neither, and gather and compute twice. 1.15 of
  the peak and 1.10 of the FLOPs at once are not to be had: the second pass alone is three
  products in four.

## Strong scaling: a batch of {batch} in chunks of one row for each device

{strong}
## A model at 8, 64 and 512 accelerators

NOT measured. FLOPs and bytes are those counted above; the hardware is assumed: {assumed} (per
second and device; `fast` links are within a node, `slow` ones beyond; latency in seconds for
each hop). Nothing overlaps, and gathers are float32: of bfloat16 models weights travel as
such, half of it. Batches are Poisson, {batch} examples expected; the last chunk is padded.
Efficiency is the time that their FLOPs without privacy would take, over the time of the step:
what is below that of `plain` is the price of privacy.

{model}"""
