"""One training step: clip, accumulate over chunks, release, update."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpjax.clipping import Query
from dpjax.data.batches import StepBatch
from dpjax.models.partition import with_frozen
from dpjax.optimizers import evaluation_params
from dpjax.privacy.sensitive import ClippedSum, PerExample
from dpjax.training.experiment import Experiment
from dpjax.training.state import TrainState
from dpjax.typing import Batch, Key, Params, Scalar


class Released(NamedTuple):
    """What one step made public: its number, fingerprint, norm of the update, clip norm.

    The noise is a multiple of the clip norm, which therefore has to follow from releases.
    """

    step: Scalar
    fingerprint: Scalar
    update_norm: Scalar
    clip_norm: Scalar


class TrainStep(NamedTuple):
    """One training step: query, accumulate over chunks, release, update.

    A batch of any size is a number of chunks of one shape, so each function is compiled
    once for each phase, whatever sizes the sampler draws. Each replica has a partial sum of
    its own until all chunks are in.

    Attributes:
        place: Spreads the rows of a chunk over the devices.
        phase: Step number -> phase, a static argument of the next two.
        begin: ``(phase, state) -> `` for each replica the sum over no examples.
        accumulate: ``(phase, state, sums, batch, frozen) -> `` sums and statistics.
        finish: ``(state, sums) -> `` the next state and what was released.
        frozen: Parameters that are not trained.
    """

    place: Callable[[Batch], Batch]
    phase: Callable[[int], str]
    begin: Callable[..., ClippedSum]
    accumulate: Callable[..., tuple[ClippedSum, PerExample | None]]
    finish: Callable[..., tuple[TrainState, Released]]
    frozen: Params

    def __call__(
        self, state: TrainState, batch: StepBatch
    ) -> tuple[TrainState, Released, list[PerExample | None]]:
        """Return the next state, what was released, and statistics of each chunk."""
        phase = self.phase(batch.step)
        sums, statistics = self.begin(phase, state), []
        for chunk in batch.chunks:
            rows = self.place(chunk)
            sums, per_example = self.accumulate(phase, state, sums, rows, self.frozen)
            statistics.append(per_example)
        state, released = self.finish(state, sums)
        return state, released, statistics


def make_train_step(
    config: Mapping[str, Any],
    experiment: Experiment,
    transform: Any,  # optax types know trees of arrays only, not ClippedSum
    frozen: Params = (),
) -> TrainStep:
    """Compile the parts of a training step. A state is donated to the next one."""
    mechanism, layout = experiment.mechanism, experiment.layout
    keep_statistics = config["run"]["log_sensitive"]
    decay = config["evaluation"]["ema_decay"]

    def query(phase: str, state: TrainState) -> Query:
        return mechanism.query(phase, state.params, state.private.mechanism)

    def add(
        shared: tuple[Query, Key, Params], split: tuple[ClippedSum, Batch]
    ) -> tuple[ClippedSum, PerExample | None]:
        (asked, key, frozen), (sums, batch) = shared, split
        total = sums.only()
        # A radius that is computed from the state may be rounded otherwise in another
        # program: all chunks are clipped to the one of the empty sum.
        asked = dataclasses.replace(asked, clip_norm=total.l2_bound)

        loss = with_frozen(experiment.loss, frozen)
        clipped, per_example = experiment.engine(loss, asked, batch, key)
        sums = total.merge(clipped).stacked(1)
        sums = layout.keep_sums(sums, asked.points[0], lead=None)
        return sums, per_example if keep_statistics else None

    @functools.partial(jax.jit, static_argnums=0)
    def begin(phase: str, state: TrainState) -> ClippedSum:
        sums = query(phase, state).empty().stacked(layout.replicas)
        return layout.keep_sums(sums, state.params, lead="data")

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def accumulate(
        phase: str,
        state: TrainState,
        sums: ClippedSum,
        batch: Batch,
        frozen: Params = (),
    ) -> tuple[ClippedSum, PerExample | None]:
        key = jax.random.fold_in(state.loss_key, state.private.step)
        # Frozen parameters are arguments: constants would be copied into the program.
        shared = (query(phase, state), key, frozen)
        return layout.on_each(add)(shared, (sums, batch))

    @functools.partial(jax.jit, donate_argnums=0)
    def finish(state: TrainState, sums: ClippedSum) -> tuple[TrainState, Released]:
        step = state.private.step
        # The only time that anything as large as a gradient is reduced over devices.
        total = sums.merged()
        updates, after = transform.update(total, state.private, state.params)
        params = optax.apply_updates(state.params, updates)
        evaluated = evaluation_params(after.optimizer, params)
        average = _moving_average(state.average, evaluated, decay=decay, step=step)
        norm = optax.tree.norm(updates)
        released = Released(step, after.released, norm, total.l2_bound)
        state = state._replace(params=params, private=after, average=average)
        return layout.keep(state, params), released

    def place(chunk: Batch) -> Batch:
        return layout.place(chunk, config["compute"]["physical_batch_size"])

    return TrainStep(place, mechanism.phase, begin, accumulate, finish, frozen)


def _moving_average(
    average: Params | tuple[()], params: Params, *, decay: float, step: Scalar
) -> Params | tuple[()]:
    if not jax.tree.leaves(average):
        return average
    # Short memory at first, so that the initial parameters are soon forgotten
    # (De et al. 2022, arXiv 2204.13650, appendix C).
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, average, 1 - rate)
