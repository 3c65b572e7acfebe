"""All that a run needs to go on: how it begins, and what of it is evaluated."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.models.partition import merge
from dpjax.optimizers import evaluation_params
from dpjax.parallel import processes
from dpjax.privacy.entropy import entropy
from dpjax.training.experiment import Experiment
from dpjax.training.startup import starts
from dpjax.transforms import PrivateState
from dpjax.typing import Key, Params


class TrainState(NamedTuple):
    """All that a run needs to go on. Secret: it holds keys and the sampling seed.

    Attributes:
        params: The parameters that are trained.
        private: State of mechanism and optimizer; its ``step`` is the only counter.
        average: Moving average of what the optimizer says is evaluated, the params by
            default, in float32 at least; () if none is kept.
        loss_key: Randomness inside the loss (dropout, augmentation).
        init_key: Randomness of the starting parameters; the frozen ones, which are not
            kept here, are made from it again.
        sampling_seed: ``uint32[4]``, 128 bits.
    """

    params: Params
    private: PrivateState
    average: Params | tuple[()]
    loss_key: Key
    init_key: Key
    sampling_seed: jax.Array

    def __repr__(self) -> str:
        return "TrainState(secret: holds keys and the sampling seed)"


def init_state(
    config: Mapping[str, Any],
    experiment: Experiment,
    transform: Any,
) -> TrainState:
    """Return the state before the first step; its secrets are fresh unless seeded."""
    seed, layout = config["run"]["seed"], experiment.layout
    init_key = _key("init", seed)
    params = _placed_start(experiment, init_key, part=0)
    keeps_average = config["evaluation"]["ema_decay"] > 0
    state = TrainState(
        params=params,
        private=transform.init(params),
        average=jax.tree.map(_wide_copy, params) if keeps_average else (),
        loss_key=_key("loss", seed),
        init_key=init_key,
        sampling_seed=processes.of_first(
            jnp.asarray(np.frombuffer(entropy("sampling", seed=seed), np.uint32))
        ),
    )
    return layout.put(state, params)


def frozen_params(experiment: Experiment, state: TrainState) -> Params:
    """Return the parameters that are not trained; the same ones whenever a run goes on."""
    return _placed_start(experiment, state.init_key, part=1)


def sampling_seed(state: TrainState) -> int:
    """Return the 128-bit seed of the sampler. Secret."""
    return int.from_bytes(np.asarray(state.sampling_seed).tobytes(), "big")


def evaluated_params(state: TrainState, frozen: Params) -> Params:
    """Return what is evaluated and exported: all, the moving average if one is kept."""
    if jax.tree.leaves(state.average):
        trained = jax.tree.map(
            lambda mean, x: mean.astype(x.dtype), state.average, state.params
        )
    else:
        trained = evaluation_params(state.private.optimizer, state.params)
    return merge(trained, frozen)


def _placed_start(experiment: Experiment, key: Key, *, part: int) -> Params:
    """Return one part of the starting parameters, where the layout has them."""
    shapes = jax.eval_shape(lambda key: starts(experiment, key)[part], key)
    shardings = experiment.layout.of_params(shapes)
    start = jax.jit(lambda key: starts(experiment, key)[part], out_shardings=shardings)
    return start(key)


def _wide_copy(leaf: jax.Array) -> jax.Array:
    # In bfloat16 a slow average would not move.
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def _key(purpose: str, seed: int | None) -> Key:
    words = np.frombuffer(entropy(purpose, seed=seed), np.uint32)[:2]
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return processes.of_first(key)
