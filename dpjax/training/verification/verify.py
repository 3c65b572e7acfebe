"""The start of every run: its own program on two real examples, ``run.verify=True``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax.clipping import vmap
from dpjax.clipping.analysis.tracing import below_float32, one_example, trace
from dpjax.data.batches import read_steps
from dpjax.models.partition import with_frozen
from dpjax.privacy.sensitive import ClippedSum
from dpjax.training.experiment import Experiment
from dpjax.training.verification.self_check import SelfCheckError
from dpjax.typing import Batch, Params

_EXACT, _ROUNDED = 2e-3, 0.05
"""Of a gradient's norm. A wrong rule is wrong by more; float32 includes the slack of fast
norms."""


def verify(
    experiment: Experiment, train_step: Any, state: Any, *, physical_batch_size: int
) -> None:
    """Compare the clipped gradients of two real examples with per-example gradients.

    What is run is the very program of the steps that follow, on a chunk of which one row
    counts, so nothing is compiled for it but the gradient of one example.

    Args:
        experiment: Of the run.
        train_step: Its ``TrainStep``, whose layer is above this one.
        state: Its ``TrainState``.
        physical_batch_size: Rows of a chunk.

    Raises:
        SelfCheckError: The engine's vector is not that of ``vmap``. The parameter is
            named; values and examples are not.
    """
    source, size = experiment.source, physical_batch_size
    phase = experiment.mechanism.phase(0)
    # At the first row and at the last: what is wrong may be so on other devices only.
    for index, row in ((0, 0), (len(source) // 2, size - 1)):
        stream = read_steps(
            source,
            lambda step, index=index: np.array([index]),
            steps=range(1),
            physical_batch_size=size,
            prefetch=0,
        )
        # Every process reads this one example; all other rows are copies of it.
        ((whole,),) = (batch.chunks for batch in stream)
        whole = whole._replace(mask=np.arange(size) == row)
        rows = experiment.layout.rows(size)
        chunk = whole if rows is None else jax.tree.map(lambda x, r=rows: x[r], whole)
        sums, _ = train_step.accumulate(
            phase,
            state,
            train_step.begin(phase, state),
            train_step.place(chunk),
            train_step.frozen,
        )
        alone = jax.tree.map(lambda x, at=row: x[at : at + 1], whole)
        _compare(experiment, phase, state, train_step.frozen, alone, sums)


def _compare(
    experiment: Experiment,
    phase: str,
    state: Any,
    frozen: Params,
    alone: Batch,
    sums: ClippedSum,
) -> None:
    mechanism, loss = experiment.mechanism, experiment.loss
    layout = experiment.layout

    def query(state: Any) -> Any:
        return mechanism.query(phase, state.params, state.private.mechanism)

    def reference(shared: tuple[Any, Params, Any], alone: Batch) -> ClippedSum:
        asked, frozen, key = shared
        clipped, _ = vmap(with_frozen(loss, frozen), asked, alone, key)
        return layout.keep_sums(clipped.stacked(1), asked.points[0], lead=None)

    @jax.jit
    def norms(state: Any, frozen: Params, alone: Batch, sums: ClippedSum) -> Any:
        key = jax.random.fold_in(state.loss_key, state.private.step)
        # Each replica has the same example.
        truth = layout.on_each(reference)((query(state), frozen, key), alone).merged()
        true = jax.tree.map(lambda x: x / layout.replicas, truth.total)
        apart = jax.tree.map(jnp.subtract, sums.merged().total, true)
        return _lengths(apart), _lengths(true), truth.l2_bound

    apart, true, bound = norms(state, frozen, layout.to_each(alone), sums)
    whole = optax.tree.norm(true)
    if query(state).slope is not None:
        whole = whole + 10 * bound  # a difference of losses, each of which is rounded
    closed = trace(
        with_frozen(loss, frozen), state.params, *one_example(alone, state.loss_key)
    )
    # Other devices round the factors of float32 products, too.
    exact = jax.default_backend() == "cpu" and not below_float32(closed.jaxpr)
    rtol = _EXACT if exact else _ROUNDED
    paths = jax.tree_util.tree_leaves_with_path(apart)
    for (path, error), norm in zip(paths, jax.tree.leaves(true), strict=True):
        if not error <= rtol * (norm + whole / 10):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise SelfCheckError(
                f"the engine's clipped gradient of parameter {name!r} is not that of "
                "per-example gradients, on one of two examples of the data: do not train "
                "with it; use config.compute.engine='vmap' and report the loss "
                "(config.run.verify=False skips this check)"
            )


def _lengths(tree: Params) -> Params:
    # Not by ravel, which would gather what is split over devices.
    return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x))), tree)
