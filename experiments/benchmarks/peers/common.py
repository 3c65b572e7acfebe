"""Command line and results of the peers' scripts. Imports no framework."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpjax.parallel.allocator import keep_freed_memory
from experiments.shared import options, timing
from experiments.sweeps import sweep

WORKLOADS = ("mlp", "convnet", "gpt")

Measure = Callable[..., tuple[list[dict[str, Any]], str]]
"""``(workload, rounds=...)`` to rows and the name of their baseline."""


class Plan(NamedTuple):
    """What was asked for, checked."""

    workloads: list[str]
    rounds: int
    out: Path


def main(
    argv: list[str],
    measure: Measure,
    *,
    module: str,
    usage: str,
    packages: Sequence[str],
) -> int:
    """Run the command of a peer on the CPU; return its exit status."""

    def run(plan: Plan) -> int:
        return _run(plan, argv, measure, module=module, packages=packages)

    return options.command(argv, usage, _plan, run)


def _run(
    plan: Plan,
    argv: list[str],
    measure: Measure,
    *,
    module: str,
    packages: Sequence[str],
) -> int:
    keep_freed_memory()
    results: dict[str, Any] = timing.provenance(
        module=module, argv=argv, packages=packages, device="cpu"
    )
    results |= {"rounds": plan.rounds, "baselines": {}, "rows": []}
    for name in plan.workloads:
        rows, baseline = measure(name, rounds=plan.rounds)
        results["rows"] += rows
        results["baselines"][name] = baseline
        sweep.write_json(plan.out, results)
        for row in rows:
            print({key: value for key, value in row.items() if value is not None})
    return 0


def _plan(argv: list[str]) -> Plan:
    given = options.read(argv, ("out", "rounds", "workloads"))
    return Plan(
        options.choices("workloads", given.get("workloads"), WORKLOADS),
        options.positive("rounds", given.get("rounds", "5")),
        options.file("out", given.get("out"), ".json"),
    )
