"""Measure what clipping costs, against the fastest gradient without privacy.

    python -m experiments.benchmark --suite=clipping|compiling|mechanisms|throughput|scale
        --out=FILE.json [--workloads=A,B] [--engines=A,B] [--device=cpu|gpu]
        [--rounds=N] [--plot=FILE.png]

--suite=clipping    clipped gradient sums of every engine
--suite=compiling   how long the engines take to be traced and compiled
--suite=mechanisms  steps of DP-SGD, DiceSGD and DIFF2, whole and their clipped sums alone,
                    relative to DP-SGD by the same engine
--suite=throughput  examples per second of every engine, and the largest batch; GPU only
--suite=scale       what one of 8 to 256 devices holds, computes and exchanges, of models up
                    to 8e9 parameters; compiled for virtual CPU devices, never run
--out=FILE.json   receives the rows and how they were measured
--workloads=A,B   all that suit the device if not given
--engines=A,B     all if not given; in clipping, vmap is always measured as the reference
--device=cpu|gpu  what JAX prefers if not given
--rounds=N        rounds of alternating measurements; 7 if not given
--plot=FILE.png   a bar chart of the times, of clipping

Times are medians of the ratios, round by round, to the fastest of several programs for the
gradient without privacy; temporary memory, FLOPs and compile time are relative to plain
`grad`. Compile times are medians in compiling, and of one compilation each elsewhere.
A name such as vmap_mb64 means microbatches of 64. max_rel_error compares sum and norms with
vmap's, at a clip norm that clips half of the examples.

Exit status: 0 done, 2 wrong arguments or input.
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.scaling import DEVICES
from experiments.shared import options

_OPTIONS = ("suite", "out", "workloads", "engines", "device", "rounds", "plot")
_SUITES = ("clipping", "compiling", "mechanisms", "throughput", "scale")
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}


class Plan(NamedTuple):
    """What was asked for, checked."""

    suite: str
    workloads: list[str]
    engines: list[str]
    rounds: int
    out: Path
    plot: Path | None


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    return options.command(argv, __doc__, _plan, lambda plan: _run(plan, argv))


def _run(plan: Plan, argv: list[str]) -> int:
    from dpjax.parallel.allocator import keep_freed_memory
    from dpjax.training.about import device
    from experiments.benchmarks import scale, scaling, steps, suite, throughput
    from experiments.shared import report, timing
    from experiments.sweeps import sweep

    keep_freed_memory()
    results: dict[str, Any] = timing.provenance(
        module="experiments.benchmark",
        argv=argv,
        packages=("jax", "jaxlib", "dpjax"),
        device=device(),
    )
    results |= {"suite": plan.suite, "rounds": plan.rounds, "baselines": {}, "rows": []}
    measure = {
        "clipping": suite.measure,
        "compiling": suite.measure_compiling,
        "mechanisms": steps.measure,
        "throughput": throughput.measure,
        "scale": scale.measure,
    }[plan.suite]
    for name in plan.workloads:
        rows, baseline = measure(name, engines=plan.engines, rounds=plan.rounds)
        results["rows"] += rows
        results["baselines"][name] = baseline
        # After each, for a later one may run out of memory or patience.
        sweep.write_json(plan.out, results)
        report.print_table(rows)
    if plan.suite == "scale":
        plan.out.with_suffix(".md").write_text(scaling.page(results))
        print(plan.out.with_suffix(".md"))
    if plan.plot is not None:
        report.draw(results["rows"]).savefig(plan.plot, dpi=150)
        print(plan.plot)
    print(plan.out)
    return 0


def _plan(argv: list[str]) -> Plan:
    """Check what can be checked before anything is computed."""
    given = options.read(argv, _OPTIONS)
    if "suite" not in given:
        raise ValueError("--suite=clipping is missing; see --help")
    name = options.choices("suite", given["suite"], _SUITES)[0]
    if name != given["suite"]:
        raise ValueError(f"--suite={given['suite']} must be one suite")
    if name != "clipping" and "plot" in given:
        raise ValueError(f"--plot is for --suite=clipping, not {name}")
    rounds = options.positive("rounds", given.get("rounds", "7"))
    out = options.file("out", given.get("out"), ".json")
    plot = options.file("plot", given["plot"], ".png") if "plot" in given else None
    device = given.get("device")
    if name == "scale" and device not in (None, "cpu"):
        raise ValueError(
            f"--device={device}: --suite=scale counts on virtual CPU devices"
        )
    _prepare_jax("cpu" if name == "scale" else device)
    if name == "scale":
        os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
        from experiments.benchmarks import scale

        workloads = options.choices(
            "workloads", given.get("workloads"), scale.WORKLOADS
        )
        engines = options.choices("engines", given.get("engines"), scale.ENGINES)
        return Plan(name, workloads, engines, rounds, out, plot)

    from dpjax.clipping import ENGINES
    from experiments.benchmarks.workloads import GPU_ONLY, WORKLOADS

    workloads = options.choices("workloads", given.get("workloads"), WORKLOADS)
    engines = options.choices("engines", given.get("engines"), ENGINES)
    if _backend(device) == "cpu":
        if name == "throughput":
            raise ValueError("--suite=throughput needs a GPU")
        if "workloads" in given and (heavy := set(GPU_ONLY) & set(workloads)):
            raise ValueError(f"--workloads={heavy.pop()} needs a GPU")
        workloads = [w for w in workloads if w not in GPU_ONLY]
    return Plan(name, workloads, engines, rounds, out, plot)


def _prepare_jax(device: str | None) -> None:
    """Set what JAX reads once, when it is imported."""
    if device is not None:
        options.choices("device", device, _PLATFORMS)
        os.environ["JAX_PLATFORMS"] = _PLATFORMS[device]
    # What an earlier run compiled would seem to compile at once.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def _backend(device: str | None) -> str:
    import jax

    try:
        return jax.default_backend()
    except RuntimeError as error:
        raise ValueError(f"--device={device}: JAX finds no such device") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
