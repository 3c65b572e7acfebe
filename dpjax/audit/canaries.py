"""Canaries in one real run: through the configured engine and the loop's own step.

A canary takes part or not by a fair coin, and the auditor guesses the coins from the
releases: what is left of them once the known sum over the real examples is taken away is
compared with each canary's gradient.
"""

import dataclasses
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
from dpjax.entropy import entropy
from dpjax.experiment import Experiment
from dpjax.noise import root_key
from dpjax.sampling import FullBatch, Poisson, secret_seed
from dpjax.train import TrainState, init_state, make_train_step
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
        config: As for ``dpjax.train.train``.
        experiment: Built from it.
        kind: See ``make_canaries``.
        count: m.
        seed: Of the coins and of ``make_canaries``. Noise and batches are secret.

    Raises:
        ValueError: The sampling does not draw canaries as independent coins.
    """
    mechanism = experiment.mechanism
    if not isinstance(mechanism.sampling, Poisson | FullBatch):
        raise ValueError(
            f"sampling={mechanism.sampling}: canaries are drawn by coins of their own, "
            "as Poisson and FullBatch do"
        )
    plain = dataclasses.replace(experiment, optimizer=optax.sgd(1 / mechanism.steps))
    transform = private(mechanism, plain.optimizer, noise_key=root_key())
    state = init_state(config, plain, transform)
    canaries = make_canaries(plain, state.params, kind=kind, count=count, seed=seed)
    members = np.asarray(jax.random.bernoulli(jax.random.key(seed + 1), shape=(count,)))
    hidden = dataclasses.replace(plain, loss=canaries.loss)
    step_real = make_train_step(config, plain, transform)
    step_canary = make_train_step(config, hidden, transform)
    scores, own_seed = np.zeros(count), secret_seed()
    for batch in _real_batches(config, plain):
        phase, before = step_real.phase(batch.step), state.params
        sums = step_real.begin(phase, state)
        for chunk in batch.chunks:
            sums, _ = step_real.accumulate(phase, state, sums, step_real.place(chunk))
        known = jax.tree.map(jnp.copy, sums.merged().total)
        drawn = mechanism.sampling.draw(batch.step, num_examples=count, seed=own_seed)
        taken = members & np.isin(np.arange(count), drawn)
        for chunk in _chunks(canaries, taken, config["compute"]["physical_batch_size"]):
            sums, _ = step_canary.accumulate(
                phase, state, sums, step_canary.place(chunk)
            )
        # The step gives its old state away.
        before = jax.tree.map(jnp.copy, before)
        state, _ = step_real.finish(state, sums)
        scores += _shown(canaries, before, state, known, mechanism)
    return CanaryScores(scores, members)


def _real_batches(config: Mapping[str, Any], experiment: Experiment) -> Any:
    rows = config["compute"]["physical_batch_size"]
    return batches(
        experiment.source,
        experiment.mechanism,
        seed=int.from_bytes(entropy("sampling", seed=None), "big"),
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


def _shown(
    canaries: Canaries, before: Params, state: TrainState, known: Params, mechanism: Any
) -> NDArray[np.float64]:
    """Return the inner product of each canary's unit gradient with what is unexplained."""
    scale = mechanism.expected_batch_size * mechanism.steps
    rest = jax.tree.map(
        lambda x, y, k: (x - y) * scale - k, before, state.params, known
    )
    return np.asarray(_alignments(canaries.loss, before, canaries.examples, rest))


@jax.jit(static_argnums=0)
def _alignments(loss: Loss, params: Params, examples: Any, rest: Params) -> Array:
    def one(example: Example) -> Array:
        gradient = jax.grad(loss)(params, example, jax.random.key(0))
        parts = jax.tree.map(lambda g, r: jnp.vdot(g, r), gradient, rest)
        return sum(jax.tree.leaves(parts)) / (optax.tree.norm(gradient) + 1e-12)

    return jax.lax.map(one, examples, batch_size=64)


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
