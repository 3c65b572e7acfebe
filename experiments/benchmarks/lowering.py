"""The training loop's own programs, compiled for devices that need not be there, never run."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dpjax
from dpjax.clipping import Engine
from dpjax.models.partition import partition
from dpjax.parallel.sharding import Layout
from dpjax.privacy.noise import root_key
from dpjax.training.experiment import Experiment
from dpjax.training.state import TrainState
from dpjax.training.step import make_train_step
from dpjax.transforms import PrivateState, private
from dpjax.typing import Batch, Loss, Params

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
        seconds: Wall time of tracing and compiling ``chunk``.
    """

    chunk: Any
    end: Any
    seconds: float


def lowered(
    loss: Loss,
    params: Params,
    batch: Batch,
    *,
    layout: Layout,
    engine: Engine,
    train: tuple[str, ...] = (".*",),
    ends: bool = True,
) -> Lowered:
    """Compile DP-SGD with Adam.

    Args:
        loss: Of one example.
        params: Shapes of all parameters.
        batch: Shapes of one chunk.
        layout: The devices.
        engine: Which sums.
        train: Patterns of the parameters that are trained.
        ends: Whether to compile the end of a step, too.
    """
    optimizer = optax.adam(1e-3)
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
        optimizer=optimizer,
        source=nothing,
        held_out=nothing,
        data_fingerprint="",
        inspection=nothing,
    )
    config = {
        "run": {"log_sensitive": False},
        "evaluation": {"ema_decay": 0.0},
        "compute": {"physical_batch_size": batch.mask.shape[0]},
    }
    transform = private(MECHANISM, optimizer, noise_key=root_key(0))
    trained, frozen = partition(params, train)
    step: Any = make_train_step(config, experiment, transform)
    state = _state(trained, optimizer)
    state = placed(state, layout.of_state(state, trained))
    frozen = placed(frozen, layout.of_params(frozen))
    chunk = placed(batch, layout.by_row)
    begin = step.begin.lower("gradient", state).compile()
    sums = placed(begin.out_info, begin.output_shardings)
    start = time.perf_counter()
    accumulate = step.accumulate.lower("gradient", state, sums, chunk, frozen).compile()
    seconds = time.perf_counter() - start
    end = step.finish.lower(state, sums).compile() if ends else None
    return Lowered(accumulate, end, seconds)


def placed(tree: Any, sharding: Any) -> Any:
    """Give shapes a sharding, or a tree of them; on one device they need none."""
    if sharding is None:
        return tree
    each = sharding
    if isinstance(sharding, jax.sharding.Sharding):
        each = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        each,
    )


def _state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    def make() -> Any:
        key = jax.random.key(0)
        return {
            "step": jnp.zeros((), jnp.int32),
            "keys": jax.random.split(key),
            "released": jnp.zeros((), jnp.uint32),
            "key": key,
            "seed": jnp.zeros(4, jnp.uint32),
        }

    shapes = jax.eval_shape(make)
    return TrainState(
        params=params,
        private=PrivateState(
            step=shapes["step"],
            noise_key=shapes["keys"],
            released=shapes["released"],
            mechanism=(),
            optimizer=jax.eval_shape(optimizer.init, params),
        ),
        average=(),
        loss_key=shapes["key"],
        init_key=shapes["key"],
        sampling_seed=shapes["seed"],
    )
