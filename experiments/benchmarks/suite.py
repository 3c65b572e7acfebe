"""The suites: what is compared on one workload, measured in one process."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import programs
from experiments.benchmarks.programs import Compiled, Program
from experiments.benchmarks.workloads import Workload, build
from experiments.shared.timing import alternate, fastest, ratio, row

REFERENCE = "vmap"
_SCREENING_ROUNDS = 2
_PLAUSIBLE = 1.5  # slower than the fastest by this factor: cannot be the baseline

Rows = list[dict[str, Any]]


def measure(
    name: str, *, engines: Sequence[str], rounds: int
) -> tuple[Rows, str | None]:
    """Measure the engines on one workload.

    Args:
        name: Of the workload.
        engines: Names; vmap is measured in any case.
        rounds: How often all candidates take their turn.

    Returns:
        The rows, and the name of the fastest program without privacy; None if the
        workload is only compiled.
    """
    workload = build(name)
    private = functools.partial(programs.private, workload.loss)
    whole = {e: private(e) for e in dict.fromkeys([REFERENCE, *engines])}
    if workload.compile_only:
        return measure_compiling(name, engines=[*whole], rounds=rounds)
    sliced = {
        f"{REFERENCE}_mb{size}": private(REFERENCE, microbatch_size=size)
        for size in slice_sizes(workload)
    }
    return compare(workload, whole, sliced, rounds=rounds)


def measure_compiling(
    name: str, *, engines: Sequence[str], rounds: int
) -> tuple[Rows, None]:
    """Measure how long the engines take to be traced and compiled, in turn with ``grad``.

    Args:
        name: Of the workload.
        engines: Names.
        rounds: How often each is compiled for a time.

    Returns:
        The rows; None, as nothing runs.
    """
    workload = build(name)
    private = functools.partial(programs.private, workload.loss)
    candidates = {"grad": programs.mean_gradient(workload.loss)}
    candidates |= {engine: private(engine) for engine in engines}
    arguments = arguments_of(workload, jnp.float32(1.0))
    ready: dict[str, Compiled] = {}

    def make(name: str) -> None:
        ready[name] = programs.compiled(candidates[name], arguments)

    calls = {name: functools.partial(make, name) for name in candidates}
    compiling = alternate(calls, rounds=rounds)
    return _rows(name, ready, compiling=compiling), None


def compare(
    workload: Workload,
    whole: dict[str, Program],
    sliced: dict[str, Program],
    *,
    rounds: int,
) -> tuple[Rows, str]:
    """Measure private programs against the fastest one without privacy.

    Args:
        workload: What they were made for.
        whole: Programs of clipped sums; what the first computes is taken for true.
        sliced: Further ones, in microbatches, of which only the fastest is kept.
        rounds: How often all candidates take their turn.

    Returns:
        The rows, and the name of the fastest program without privacy.
    """
    nonprivate = _nonprivate(workload)
    ready = _compile(nonprivate | whole | sliced, workload)
    calls = {name: _call(c, workload, jnp.float32(1.0)) for name, c in ready.items()}
    reference = next(iter(whole))
    clip_norm = jnp.median(calls[reference]()[1])
    calls = {name: _call(c, workload, clip_norm) for name, c in ready.items()}

    screened = alternate(
        {n: calls[n] for n in [*nonprivate, *sliced]}, rounds=_SCREENING_ROUNDS
    )
    kept = _plausible({n: screened[n] for n in nonprivate})
    private = [*whole, *([fastest({n: screened[n] for n in sliced})] if sliced else [])]
    times = alternate({n: calls[n] for n in kept + private}, rounds=rounds)
    # Chosen in the final rounds: the winner of the screening may have been lucky.
    baseline = fastest({n: times[n] for n in kept})
    truth = calls[reference]()
    errors = {n: programs.relative_error(calls[n](), truth) for n in private}
    finalists = {n: ready[n] for n in times}
    rows = _rows(
        workload.name, finalists, times=times, baseline=baseline, errors=errors
    )
    return rows, baseline


def slice_sizes(workload: Workload) -> list[int]:
    """Return the sizes of microbatches to try."""
    size = workload.batch.mask.shape[0]
    return [size // parts for parts in (4, 16, 64) if size % parts == 0]


def _nonprivate(workload: Workload) -> dict[str, Program]:
    """Return the programs that may be the fastest without privacy, grad first."""
    kinds = {"grad": programs.mean_gradient, "vmap_mean": programs.mean_of_gradients}
    whole = {name: make(workload.loss) for name, make in kinds.items()}
    return whole | {
        f"{name}_mb{size}": make(workload.loss, microbatch_size=size)
        for name, make in kinds.items()
        for size in slice_sizes(workload)[:2]
    }


def _compile(candidates: dict[str, Program], workload: Workload) -> dict[str, Compiled]:
    arguments = arguments_of(workload, jnp.float32(1.0))
    # The first to be compiled would pay for what all of them use.
    programs.compiled(next(iter(candidates.values())), arguments)
    return {name: programs.compiled(p, arguments) for name, p in candidates.items()}


def _call(
    compiled: Compiled, workload: Workload, clip_norm: jax.Array
) -> Callable[[], Any]:
    return functools.partial(wait, compiled.run, arguments_of(workload, clip_norm))


def wait(run: Program, arguments: tuple[Any, ...]) -> Any:
    """Run a program until its results are there."""
    return jax.block_until_ready(run(*arguments))


def arguments_of(workload: Workload, clip_norm: jax.Array) -> tuple[Any, ...]:
    """Return what a program takes."""
    return workload.params, workload.batch, jax.random.key(4), clip_norm


def _plausible(times: dict[str, list[float]]) -> list[str]:
    limit = _PLAUSIBLE * min(times[fastest(times)])
    return [name for name in times if name == "grad" or min(times[name]) <= limit]


def _rows(
    workload: str,
    ready: dict[str, Compiled],
    *,
    compiling: dict[str, list[float]] | None = None,
    times: dict[str, list[float]] | None = None,
    baseline: str = "",
    errors: dict[str, float] | None = None,
) -> Rows:
    """Return one row for each program; without times and errors if there are none."""
    grad = ready["grad"]
    compiling = compiling or {name: [made.seconds] for name, made in ready.items()}
    rows = []
    for name, compiled in ready.items():
        values = {
            "temp_bytes_ratio": compiled.temp_bytes / grad.temp_bytes,
            "flops_ratio": quotient(compiled.flops, grad.flops),
            "compile_s": statistics.median(compiling[name]),
            "compile_ratio": ratio(compiling[name], compiling["grad"]),
            "max_rel_error": (errors or {}).get(name),
        }
        if times is not None:
            values["time_ratio"] = ratio(times[name], times[baseline])
            values["time_ms"] = 1e3 * statistics.median(times[name])
        rows.append(row(workload, name, **values))
    return rows


def quotient(value: float | None, unit: float | None) -> float | None:
    """Return value / unit; None if one of them is not known, or the unit is zero."""
    return None if value is None or not unit else value / unit
