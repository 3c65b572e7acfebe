"""What a step of DiceSGD or DIFF2 costs over one of DP-SGD, by the same engine.

``whole`` steps are what a run repeats: clipped sums, noise, Adam. Their ``sums`` alone say
what the engine has to do, and what remains where a step has many chunks.
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpjax.clipping import resolve_engine
from dpjax.mechanisms import DiceSgd, Diff2, DpSgd, Mechanism
from dpjax.privacy.noise import root_key
from dpjax.privacy.sampling import FullBatch
from dpjax.transforms import PrivateState, private
from dpjax.typing import Batch, Key, Loss, Params
from experiments.benchmarks.programs import Compiled, Program, compiled
from experiments.benchmarks.suite import Rows, quotient, wait
from experiments.benchmarks.workloads import build
from experiments.shared.timing import alternate, ratio, row

EXTENTS = ("sums", "whole")
BASELINE = "dp_sgd"
_CLIP_NORM = 1.0


def plans(examples: int) -> dict[str, Mechanism]:
    """Return the mechanisms; their batches are all of ``examples``."""
    shared: dict[str, Any] = {
        "clip_norm": _CLIP_NORM,
        "noise_multiplier": 1.0,
        "sampling": FullBatch(),
        "steps": 4,
        "num_examples": examples,
        "delta": 1e-5,
    }
    return {
        BASELINE: DpSgd(clip_style="flat", **shared),
        "dice_sgd": DiceSgd(
            clip_style="flat",
            error_clip_norm=_CLIP_NORM,
            error_scale="sum",
            outer_norm=None,
            **shared,
        ),
        "diff2": Diff2(
            difference_clip_norm=1.0,
            restart_every=4,
            noise_ratio=1.0,
            noisy_workers=1,
            **shared,
        ),
    }


def measure(name: str, *, engines: list[str], rounds: int) -> tuple[Rows, None]:
    """Measure the second step of each mechanism, which for DIFF2 is one of differences.

    Args:
        name: Of the workload, all of whose examples are one batch.
        engines: Names.
        rounds: How often all programs take their turn.

    Returns:
        The rows, their engine named engine/mechanism/extent, and None: each engine has a
        baseline of its own.
    """
    workload = build(name)
    batch, loss = workload.batch, workload.loss
    mechanisms = plans(batch.mask.shape[0])
    ready: dict[tuple[str, str, str], Compiled] = {}
    calls = {}
    for kind, mechanism in mechanisms.items():
        start = _after_a_step(loss, mechanism, workload.params, batch)
        for engine in engines:
            for extent in EXTENTS:
                program = step(loss, engine, mechanism, number=1, extent=extent)
                arguments = (start, batch, jax.random.key(4), jnp.float32(_CLIP_NORM))
                made = compiled(program, arguments)
                ready[engine, kind, extent] = made
                calls[engine, kind, extent] = functools.partial(
                    wait, made.run, arguments
                )
    times = alternate({"/".join(k): call for k, call in calls.items()}, rounds=rounds)
    rows = []
    for (engine, kind, extent), made in ready.items():
        plain = ready[engine, BASELINE, extent]
        own, unit = f"{engine}/{kind}/{extent}", f"{engine}/{BASELINE}/{extent}"
        rows.append(
            row(
                name,
                own,
                time_ratio=ratio(times[own], times[unit]),
                time_ms=1e3 * statistics.median(times[own]),
                temp_bytes_ratio=made.temp_bytes / plain.temp_bytes,
                flops_ratio=quotient(made.flops, plain.flops),
                compile_s=made.seconds,
                compile_ratio=made.seconds / plain.seconds,
            )
        )
    return rows, None


def step(
    loss: Loss, engine: str, mechanism: Mechanism, *, number: int, extent: str
) -> Program:
    """Return step ``number`` of a mechanism on ``(params, state)``, or its sums alone.

    The clip norm that a program takes is not used: it is the mechanism's.
    """
    run, phase = resolve_engine(engine), mechanism.phase(number)
    transform = _transform(mechanism)

    def program(
        start: tuple[Params, PrivateState], batch: Batch, key: Key, clip_norm: Any
    ) -> Any:
        del clip_norm
        params, state = start
        query = mechanism.query(phase, params, state.mechanism)
        clipped, _ = run(loss, query, batch, key)
        if extent == "sums":
            return clipped.total, clipped.residual
        updates, state = transform.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    return program


def _transform(mechanism: Mechanism) -> Any:
    # optax types know trees of arrays only, not ClippedSum.
    return private(mechanism, optax.adam(1e-3), noise_key=root_key(0))


def _after_a_step(
    loss: Loss, mechanism: Mechanism, params: Params, batch: Batch
) -> tuple[Params, PrivateState]:
    """Return parameters that have moved, and the state that knows it."""
    first = step(loss, "auto", mechanism, number=0, extent="whole")
    start = (params, _transform(mechanism).init(params))
    return jax.jit(first)(start, batch, jax.random.key(3), jnp.float32(_CLIP_NORM))
