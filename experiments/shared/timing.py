"""Alternating measurements and where they were taken. Imports no framework."""

import datetime
import math
import os
import platform
import random
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpjax.training.about import checkout, versions

_BLOCK_SECONDS = 0.1
_MAX_REPEATS = 10

COLUMNS = (
    "workload",
    "engine",
    "time_ratio",
    "time_ms",
    "temp_bytes_ratio",
    "flops_ratio",
    "compile_s",
    "compile_ratio",
    "max_rel_error",
)


def row(workload: str, engine: str, **values: float | None) -> dict[str, Any]:
    """Return a result with all ``COLUMNS``; None where there is no value."""
    unknown = values.keys() - COLUMNS
    if unknown:
        raise KeyError(f"no such columns: {', '.join(sorted(unknown))}")
    named = {"workload": workload, "engine": engine}
    return dict.fromkeys(COLUMNS) | named | values


def alternate(
    calls: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; a call must wait for its result.

    Candidates take turns, so that a slow phase of the machine meets them all; their
    order changes from round to round, since one that leaves the caches and the allocator
    in a bad state would otherwise always burden the same successor. Calls shorter than
    a tenth of a second are repeated within their turn.
    """
    for call in calls.values():
        call()
    repeats = {name: _repeats(_seconds(call)) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        order = list(calls)
        random.Random(i).shuffle(order)
        for name in order:
            block = [_seconds(calls[name]) for _ in range(repeats[name])]
            times[name].append(statistics.fmean(block))
    return times


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """Return the name with the lowest median."""
    return min(times, key=lambda name: statistics.median(times[name]))


def ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median of the ratios of each round."""
    return statistics.median(t / b for t, b in zip(times, baseline, strict=True))


def provenance(
    *, module: str, argv: Sequence[str], packages: Sequence[str], device: str
) -> dict[str, Any]:
    """Return what a reader needs to judge and to repeat a measurement."""
    clone = checkout(untracked=True)
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": {
            "commit": clone and clone.commit,
            "dirty": clone and clone.changed,
        },
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "device": device,
            # On a loaded machine PyTorch's threads wait for each other.
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "versions": {"python": platform.python_version()} | versions(packages),
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _repeats(seconds: float) -> int:
    return min(_MAX_REPEATS, max(1, math.ceil(_BLOCK_SECONDS / seconds)))


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()
