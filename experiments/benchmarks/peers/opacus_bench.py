"""Measure Opacus on PyTorch copies of the workloads of the benchmark, on CPU.

    python -m experiments.benchmarks.peers.opacus_bench --out=FILE.json
        [--workloads=A,B] [--rounds=N]

In the root of the repository, with the Python of an environment made from opacus.txt.
The baseline is the gradient of the same PyTorch model without Opacus. max_rel_error
compares the clipped sum with that of opacus_hooks. On a machine with other work set
OMP_NUM_THREADS=1, or the threads of PyTorch spend most of the time waiting.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.peers import common
from experiments.shared import timing

BASELINE = "torch_grad"


def measure(name: str, *, rounds: int) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of one workload and the name of their baseline."""
    from experiments.benchmarks.peers import opacus_programs as programs

    model, inputs, targets = programs.workload(name)
    clip_norm = programs.median_norm(model, inputs, targets)
    calls: dict[str, Callable[[], Any]] = {
        BASELINE: programs.plain(model, inputs, targets),
        "opacus_hooks": programs.hooks(model, inputs, targets, clip_norm=clip_norm),
        "opacus_ghost": programs.ghost(model, inputs, targets, clip_norm=clip_norm),
    }
    truth = calls["opacus_hooks"]()
    errors = {
        engine: programs.relative_error(calls[engine](), truth)
        for engine in calls
        if engine != BASELINE
    }
    times = timing.alternate(calls, rounds=rounds)
    rows = [
        timing.row(
            name,
            engine,
            time_ratio=timing.ratio(times[engine], times[BASELINE]),
            time_ms=1e3 * statistics.median(times[engine]),
            max_rel_error=errors.get(engine),
        )
        for engine in calls
    ]
    return rows, BASELINE


main = functools.partial(
    common.main,
    measure=measure,
    module="experiments.benchmarks.peers.opacus_bench",
    usage=__doc__,
    packages=("torch", "opacus"),
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
