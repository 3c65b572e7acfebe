"""How many examples per second the engines clip, and how many fit: for accelerators.

Times as in ``suite``: alternating, against plain ``grad`` of the same batch. The largest
batch follows from what the compiler allocates for two sizes: a program's memory is a part
that stays and a part for each example. An engine that goes over to microbatches, as ``auto``
does before memory ends, hardly grows between them: its figure is huge and says only that.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import programs, suite
from experiments.benchmarks.programs import Program
from experiments.benchmarks.workloads import Workload, build
from experiments.shared.timing import alternate, ratio

BASELINE = "grad"
REFERENCE = "vmap"
COLUMNS = (
    "workload",
    "engine",
    "batch",
    "examples_per_s",
    "throughput_ratio",
    "largest_batch",
    "largest_batch_ratio",
    "max_rel_error",
)
_SLICES = 4
"""vmap runs in so many microbatches: a whole batch of its gradients would not fit."""
_UNTUNED: dict[str, bool | str] = {"xla_gpu_autotune_level": "0"}
"""For what is compiled only to learn what it allocates."""


def measure(
    name: str, *, engines: Sequence[str], rounds: int
) -> tuple[list[dict[str, Any]], str]:
    """Measure the engines on one workload.

    Args:
        name: Of the workload.
        engines: Names; vmap is measured in any case, for it is what errors refer to.
        rounds: How often all candidates take their turn.

    Returns:
        The rows, with ``COLUMNS``, and the name of the baseline.
    """
    workload = build(name)
    batch = workload.batch.mask.shape[0]
    private = functools.partial(programs.private, workload.loss)
    whole = {BASELINE: programs.mean_gradient(workload.loss)} | {
        engine: private(engine) for engine in engines if engine != REFERENCE
    }
    sliced = private(REFERENCE, microbatch_size=batch // _SLICES)
    with ThreadPoolExecutor() as pool:

        def compiled(
            program: Program, size: int, options: dict[str, bool | str] | None = None
        ) -> Callable[[], jax.stages.Compiled]:
            lowered = functools.partial(_compiled, program, workload, size, options)
            return pool.submit(lowered).result

        timed = {n: compiled(p, batch) for n, p in whole.items()}
        timed |= {REFERENCE: compiled(sliced, batch)}
        sizes = {
            n: [(size, compiled(p, size, _UNTUNED)) for size in (batch, 2 * batch)]
            for n, p in whole.items()
        }
        # At the size of the others the compiler would look long for what does not fit.
        sizes[REFERENCE] = [
            (size, compiled(private(REFERENCE), size, _UNTUNED))
            for size in (batch // 8, batch // 4)
        ]
        ready = {n: wait() for n, wait in timed.items()}
        largest = {
            n: _largest([(size, wait()) for size, wait in found])
            for n, found in sizes.items()
        }

    norms = ready[REFERENCE](*suite.arguments_of(workload, jnp.float32(1.0)))[1]
    arguments = suite.arguments_of(workload, jnp.median(norms))
    calls = {
        n: functools.partial(suite.wait, run, arguments) for n, run in ready.items()
    }
    times = alternate(calls, rounds=rounds)
    truth = calls[REFERENCE]()
    rows = []
    for engine, call in calls.items():
        error = None
        if engine != BASELINE:
            error = programs.relative_error(call(), truth)
        values = (
            name,
            engine,
            batch,
            batch / statistics.median(times[engine]),
            ratio(times[BASELINE], times[engine]),
            largest[engine],
            largest[engine] / largest[BASELINE],
            error,
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows, BASELINE


def memory() -> int:
    """Return the bytes that the device lends to JAX."""
    return (jax.local_devices()[0].memory_stats() or {})["bytes_limit"]


def _largest(found: Sequence[tuple[int, jax.stages.Compiled]]) -> int:
    """Return the number of examples for which the device has room."""
    (size, one), (larger, two) = ((size, _allocated(c)) for size, c in found)
    each = (two - one) / (larger - size)
    return int((memory() - (one - size * each)) // each)


def _allocated(compiled: jax.stages.Compiled) -> int:
    analysis: Any = compiled.memory_analysis()
    return (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
    )


def _compiled(
    program: Program,
    workload: Workload,
    size: int,
    options: dict[str, bool | str] | None,
) -> jax.stages.Compiled:
    def resized(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)

    params, batch, *rest = jax.eval_shape(
        lambda: suite.arguments_of(workload, jnp.float32(1.0))
    )
    arguments = params, jax.tree.map(resized, batch), *rest
    return jax.jit(program).lower(*arguments).compile(options)
