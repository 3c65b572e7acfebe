"""The training loop's own programs, compiled for devices that need not be there, never run."""

import time
from typing import Any, NamedTuple

import optax

import dpjax
from dpjax.clipping import Engine
from dpjax.models.partition import partition
from dpjax.parallel.sharding import Layout
from dpjax.training import memory
from dpjax.training.experiment import Experiment
from dpjax.typing import Example, Loss, Params

MECHANISM = dpjax.DpSgd(
    clip_norm=1.0,
    clip_style="flat",
    noise_multiplier=1.0,
    sampling=dpjax.Poisson(rate=0.01),
    steps=1000,
    num_examples=100_000,
    delta=1e-6,
)


class Lowered(NamedTuple):
    """Compiled programs of one step.

    Attributes:
        chunk: ``TrainStep.accumulate``.
        end: ``TrainStep.finish``; None if it was not asked for.
        sum_bytes: What one device has of a partial sum.
        seconds: Wall time of tracing and compiling ``chunk``.
    """

    chunk: Any
    end: Any
    sum_bytes: float
    seconds: float


def lowered(
    loss: Loss,
    params: Params,
    example: Example,
    *,
    rows: int,
    layout: Layout,
    engine: Engine,
    train: tuple[str, ...] = (".*",),
    ends: bool = True,
) -> Lowered:
    """Compile DP-SGD with Adam.

    Args:
        loss: Of one example.
        params: Shapes of all parameters.
        example: Shapes of one example.
        rows: Of a chunk.
        layout: The devices.
        engine: Which sums.
        train: Patterns of the parameters that are trained.
        ends: Whether to compile the end of a step, too.
    """
    nothing: Any = None
    experiment = Experiment(
        mechanism=MECHANISM,
        layout=layout,
        train=train,
        engine=engine,
        model=nothing,
        loss=layout.gathering(loss),
        evaluation_loss=loss,
        metric=nothing,
        optimizer=optax.adam(1e-3),
        source=nothing,
        held_out=nothing,
        data_fingerprint="",
        inspection=nothing,
    )
    config = {
        "run": {"log_sensitive": False},
        "evaluation": {"ema_decay": 0.0},
        "compute": {"physical_batch_size": rows},
    }
    shapes = partition(params, train)
    step, arguments = memory.lowering(config, experiment, shapes, example)
    start = time.perf_counter()
    chunk = step.accumulate.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    _, state, sums, *_ = arguments
    end = step.finish.lower(state, sums).compile() if ends else None
    size = memory.needed(config, experiment, shapes).sums
    return Lowered(chunk, end, size, seconds)
