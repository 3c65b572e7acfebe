"""Canaries in one real run: through the configured engine and the loop's own step.

A canary takes part or not by a fair coin, and the auditor guesses the coins from the
releases: what is left of them once the known sum over the real examples is taken away is
explained by the gradients of the canaries. Of the mechanisms whose step releases
the sum itself (``DpSgd``), for models small enough that all canaries' gradients fit in
memory.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from numpy.typing import NDArray

from dpjax.checks import check_positive_int
from dpjax.data.batches import batches
from dpjax.mechanisms import DpSgd
from dpjax.models.partition import with_frozen
from dpjax.privacy.noise import root_key
from dpjax.privacy.sampling import FullBatch, Poisson, secret_seed
from dpjax.privacy.sensitive import ClippedSum
from dpjax.training.experiment import Experiment
from dpjax.training.state import frozen_params, init_state
from dpjax.training.step import make_train_step
from dpjax.transforms import private
from dpjax.typing import Batch, Example, Key, Loss, Params

Kind = Literal["dirac", "random", "per_layer", "input"]
KINDS: tuple[str, ...] = get_args(Kind)


class Canaries(NamedTuple):
    """Examples made to be found.

    Attributes:
        loss: Of one canary.
        examples: Pytree of arrays ``[m, ...]``.
    """

    loss: Loss
    examples: Any


class CanaryScores(NamedTuple):
    """``[m]`` each: how much of each canary the releases show, and its coin."""

    scores: NDArray[np.float64]
    members: NDArray[np.bool_]


def make_canaries(
    experiment: Experiment, params: Params, *, kind: str, count: int, seed: int
) -> Canaries:
    """Return ``count`` canaries.

    Kinds:
        - "dirac": gradients along one coordinate each, all different. Their scores are
          independent, as the noise on different coordinates is.
        - "random": random signs on all coordinates.
        - "per_layer": random signs on one leaf, a different one for the next canary.
        - "input": training examples with the label of their neighbour, whose gradients
          are whatever the model's are.

    Raises:
        ValueError: An unknown kind, or more Diracs than coordinates.
    """
    check_positive_int("canaries", count)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    if kind == "input":
        return Canaries(experiment.loss, _mislabelled(experiment, count))
    leaves, treedef = jax.tree.flatten(params)
    sizes = [leaf.size for leaf in leaves]
    total = sum(sizes)
    if kind == "dirac":
        if count > total:
            raise ValueError(
                f"canaries={count} exceed the {total} parameters, of which each Dirac "
                "canary needs one"
            )
        where = np.arange(count) * total // count
        flat = jnp.zeros((count, total)).at[np.arange(count), where].set(1.0)
    else:
        flat = jax.random.rademacher(jax.random.key(seed), (count, total), jnp.float32)
        if kind == "per_layer":
            leaf_of = np.repeat(np.arange(len(sizes)), sizes)
            flat = flat * (leaf_of[None] == (np.arange(count) % len(sizes))[:, None])
    parts = jnp.split(flat, np.cumsum(sizes)[:-1], axis=1)
    vectors = [
        p.reshape(count, *leaf.shape) for p, leaf in zip(parts, leaves, strict=True)
    ]
    return Canaries(_linear_loss, treedef.unflatten(vectors))


def canary_scores(
    config: Mapping[str, Any],
    experiment: Experiment,
    *,
    kind: str,
    count: int,
    seed: int,
) -> CanaryScores:
    """Train once, for all planned steps, with about half of ``count`` canaries in.

    The engine, the loop's step and the mechanism's release are the configured ones. Steps
    are those of plain gradient descent with learning rate ``1 / steps``, which moves little:
    the optimizer is post-processing, and the auditor's choice.

    Args:
        config: As for ``dpjax.training.train.train``.
        experiment: Built from it.
        kind: See ``make_canaries``.
        count: m.
        seed: Of the coins and of ``make_canaries``. Noise and batches are secret.

    Raises:
        ValueError: The mechanism is not ``DpSgd``, or its sampling does not draw canaries
            as independent coins.
    """
    mechanism = experiment.mechanism
    if not isinstance(mechanism, DpSgd):
        raise ValueError(
            f"mechanism={type(mechanism).__name__} does not release the sum of one step, in "
            "which canaries are looked for; use DpSgd"
        )
    if not isinstance(mechanism.sampling, Poisson | FullBatch):
        raise ValueError(
            f"sampling={mechanism.sampling}: canaries are drawn by coins of their own, "
            "as Poisson and FullBatch do"
        )
    plain = dataclasses.replace(experiment, optimizer=optax.sgd(1 / mechanism.steps))
    transform = private(
        mechanism, plain.optimizer, noise_key=root_key(config["run"]["seed"])
    )
    state = init_state(config, plain, transform)
    loss = with_frozen(experiment.loss, frozen_params(experiment, state))
    plain = dataclasses.replace(plain, loss=loss)
    canaries = make_canaries(plain, state.params, kind=kind, count=count, seed=seed)
    members = np.asarray(jax.random.bernoulli(jax.random.key(seed + 1), shape=(count,)))
    hidden = dataclasses.replace(plain, loss=canaries.loss)
    step_real = make_train_step(config, plain, transform)
    step_canary = make_train_step(config, hidden, transform)
    scores, own_seed = np.zeros(count), secret_seed(config["run"]["seed"])
    # From parameters before and after a step to the released sum.
    scale = mechanism.expected_batch_size * mechanism.steps
    spread = jnp.float32(mechanism.noise_stddev)
    for batch in _real_batches(config, plain):
        phase = step_real.phase(batch.step)
        # The step gives its old state away.
        before = jax.tree.map(jnp.copy, state.params)
        sums = step_real.begin(phase, state)
        for chunk in batch.chunks:
            sums, _ = step_real.accumulate(phase, state, sums, step_real.place(chunk))
        known, bound = _merged(sums)
        drawn = mechanism.sampling.draw(batch.step, num_examples=count, seed=own_seed)
        taken = members & np.isin(np.arange(count), drawn)
        for chunk in _chunks(canaries, taken, config["compute"]["physical_batch_size"]):
            sums, _ = step_canary.accumulate(
                phase, state, sums, step_canary.place(chunk)
            )
        state, _ = step_real.finish(state, sums)
        rest = _rest(before, state.params, known, scale)
        scores += np.asarray(
            _decoded(canaries.loss, before, canaries.examples, rest, bound, spread)
        )
    return CanaryScores(scores, members)


def _real_batches(config: Mapping[str, Any], experiment: Experiment) -> Any:
    rows = config["compute"]["physical_batch_size"]
    return batches(
        experiment.source,
        experiment.mechanism,
        seed=secret_seed(config["run"]["seed"]),
        physical_batch_size=rows,
        rows=experiment.layout.rows(rows),
    )


def _chunks(canaries: Canaries, taken: NDArray[np.bool_], rows: int) -> list[Batch]:
    """Return the canaries that take part, in chunks padded to ``rows``."""
    chosen = np.flatnonzero(taken)
    found = []
    for start in range(0, len(chosen), rows):
        part = chosen[start : start + rows]
        index = np.resize(part, rows).astype(np.int32)
        examples = jax.tree.map(lambda x, i=index: np.asarray(x)[i], canaries.examples)
        found.append(Batch(examples, np.arange(rows) < len(part), index))
    return found


# A program each, not one per operation: of programs that are reduced over virtual devices,
# XLA's CPU client waits for ever when too many are under way.
@jax.jit
def _merged(sums: ClippedSum) -> tuple[Params, Array]:
    merged = sums.merged()
    return merged.total, merged.l2_bound


@jax.jit
def _rest(before: Params, after: Params, known: Params, scale: float) -> Params:
    """Return the released sum of one step less the clipped sum of the real examples."""
    return jax.tree.map(lambda x, y, k: (x - y) * scale - k, before, after, known)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(
    loss: Loss, params: Params, examples: Any, rest: Params, bound: Array, spread: Array
) -> Array:
    """Return how much of each canary is in ``rest``, ``float32[m]``: about 1 if it is.

    Least squares over the clipped gradients of all canaries, regularised by the noise of
    standard deviation ``spread``.
    """

    def one(example: Example) -> Array:
        gradient = jax.grad(loss)(params, example, jax.random.key(0))
        flat = jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(gradient)])
        return flat * jnp.minimum(1.0, bound / jnp.linalg.norm(flat))

    rows = jax.lax.map(one, examples, batch_size=64)
    seen = rows @ jnp.concatenate([jnp.ravel(r) for r in jax.tree.leaves(rest)])
    ridge = jnp.square(spread) * jnp.eye(len(rows))
    return jnp.linalg.solve(rows @ rows.T + ridge, seen)


def _linear_loss(params: Params, example: Example, key: Key) -> Array:
    """The loss whose gradient is the canary, far too long to pass unclipped."""
    del key
    parts = jax.tree.map(lambda p, c: jnp.vdot(p, c), params, example)
    return 1e4 * jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def _mislabelled(experiment: Experiment, count: int) -> dict[str, NDArray]:
    source = experiment.source
    size = len(source)
    records = source[[i * size // count for i in range(count)]]
    if "label" not in records:
        raise ValueError("kind='input' changes labels, and these examples have none")
    return {**records, "label": np.roll(records["label"], 1)}
