"""Membership inference on trained models: by the loss, and LiRA with shadow models.

LiRA: Carlini et al. 2022 (arXiv 2112.03570), online, with Gaussian fits of the logit-scaled
confidence. Every shadow model is also a target for all the others.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from numpy.typing import NDArray

from dpjax.clipping import vmap
from dpjax.models.partition import merge, partition, with_frozen
from dpjax.optimizers import owning
from dpjax.privacy.noise import root_key
from dpjax.privacy.sampling import FullBatch, Poisson
from dpjax.training.experiment import Experiment
from dpjax.typing import Batch, Params


class Attacked(NamedTuple):
    """How well members are told from others.

    Attributes:
        auc: Area under the ROC curve; 0.5 is chance.
        tpr_at_1_percent: TPR at an FPR of 0.01.
        tpr_at_01_percent: TPR at an FPR of 0.001.
    """

    auc: float
    tpr_at_1_percent: float
    tpr_at_01_percent: float


def shadow_models(
    experiment: Experiment, members: Bool[np.ndarray, "S N"], *, seed: int
) -> Params:
    """Train S models in one vectorised program, each on the examples it is given.

    Each step takes per-example gradients of all N examples, of which those drawn count;
    mechanism and optimizer are the configured ones. Coins are drawn on the device, so this
    is a simulation of the sampling.

    Args:
        experiment: With ``Poisson`` or ``FullBatch`` sampling, and few examples.
        members: ``bool[S, N]``, who is in which training set.
        seed: Of initialisation, coins and noise.

    Returns:
        Parameters with a leading axis ``[S]``.
    """
    mechanism, source = experiment.mechanism, experiment.source
    if not isinstance(mechanism.sampling, Poisson | FullBatch):
        raise ValueError(f"sampling={mechanism.sampling} must be Poisson or FullBatch")
    size = len(source)
    if members.ndim != 2 or members.shape[1] != size:
        raise ValueError(
            f"members of shape {members.shape} must be one row of {size} for each model"
        )
    rate = mechanism.expected_batch_size / size
    examples = jax.tree.map(jnp.asarray, source[list(range(size))])
    blank = jax.tree.map(lambda column: jnp.zeros_like(column[0]), examples)
    index = jnp.arange(size, dtype=jnp.int32)
    optimizer = owning(experiment.optimizer)
    roots = jnp.stack([root_key(seed + 1 + i) for i in range(len(members))])

    def train(member: Bool[Array, "N"], key: Any, root: Any, examples: Any) -> Params:
        start = experiment.model.init(jax.random.fold_in(key, 0), blank)
        params, frozen = partition(start, experiment.train)
        loss = with_frozen(experiment.loss, frozen)
        carry = (params, mechanism.init(params), optimizer.init(params))
        phase = mechanism.phase(0)

        def step(carry: Any, t: Array) -> tuple[Any, None]:
            params, state, inner = carry
            own = jax.random.fold_in(key, t + 1)
            mask = member & jax.random.bernoulli(own, rate, (size,))
            query = mechanism.query(phase, params, state)
            batch = Batch(examples, mask, index)
            clipped, _ = vmap(loss, query, batch, own)
            mean, state = mechanism.release(clipped, state, params, key=root, step=t)
            updates, inner = optimizer.update(mean, inner, params)
            return (optax.apply_updates(params, updates), state, inner), None

        (params, _, _), _ = jax.lax.scan(step, carry, jnp.arange(mechanism.steps))
        return merge(params, frozen)

    keys = jax.random.split(jax.random.key(seed), len(members))
    # Arguments, not constants: a program may be kept in a cache, and nobody's data with it.
    run = jax.jit(jax.vmap(train, in_axes=(0, 0, 0, None)))
    return run(jnp.asarray(members), keys, roots, examples)


def losses_of(experiment: Experiment, params: Params) -> Float[np.ndarray, "S N"]:
    """Return the loss of each model, as it is evaluated, on each training example."""
    source = experiment.source
    examples = jax.tree.map(jnp.asarray, source[list(range(len(source)))])

    @jax.jit
    def all_losses(params: Params, examples: Any) -> Array:
        def one(params: Params, example: Any) -> Array:
            return experiment.evaluation_loss(params, example, jax.random.key(0))

        over_examples = jax.vmap(one, in_axes=(None, 0))
        return jax.vmap(over_examples, in_axes=(0, None))(params, examples)

    return np.asarray(all_losses(params, examples), np.float64)


def loss_scores(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores of the threshold attack (Yeom et al. 2018): low loss, member."""
    return -losses


def lira_scores(
    losses: NDArray[np.float64], members: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return LiRA's log likelihood ratios, ``[S, N]``, from models other than the target.

    Args:
        losses: ``float[S, N]``, cross entropies.
        members: ``bool[S, N]``.

    Raises:
        ValueError: Fewer than 4 models, or an example that is in (or out of) fewer than 2.
    """
    shown = len(members)
    inside = members.sum(axis=0)
    if shown < 4 or inside.min() < 2 or (shown - inside).min() < 2:
        raise ValueError(
            f"shadow models={shown}: each example must be in at least 2, and out of 2"
        )
    # log(p / (1 - p)) with p = exp(-loss).
    clipped = np.clip(losses, 1e-9, 50)
    logits = -np.log(np.expm1(clipped))
    ratios = np.zeros_like(logits)
    for sign, chosen in ((1, members), (-1, ~members)):
        # Means over all models but the target itself.
        count = chosen.sum(axis=0) - chosen
        mean = ((logits * chosen).sum(axis=0) - logits * chosen) / count
        centred = (logits - (logits * chosen).sum(axis=0) / chosen.sum(axis=0)) * chosen
        # With few models one variance for all examples is the better fit.
        variance = np.square(centred).sum() / max(chosen.sum() - chosen.shape[1], 1)
        ratios += sign * -np.square(logits - mean) / (2 * variance + 1e-12)
    return ratios


def attacked(scores: NDArray[np.float64], members: NDArray[np.bool_]) -> Attacked:
    """Return how well ``scores`` tell members, pooled over models and examples."""
    inside, outside = scores[members], np.sort(scores[~members])
    below = np.searchsorted(outside, inside, side="left")
    ties = np.searchsorted(outside, inside, side="right") - below
    auc = float(np.mean(below + ties / 2) / len(outside))

    def tpr(fpr: float) -> float:
        # The threshold that at most this part of the others exceeds.
        threshold = outside[-1 - int(fpr * len(outside))]
        return float(np.mean(inside > threshold))

    return Attacked(auc, tpr(0.01), tpr(0.001))


def exposure(canary_loss: float, candidate_losses: NDArray[np.float64]) -> float:
    """Return the exposure of a canary in a language model, in bits.

    ``log2 |R| - log2 rank``, where the rank of the canary's loss is among the losses of
    itself and of ``R - 1`` other candidates of the same format (Carlini et al. 2019, arXiv
    1802.08232, Definition 2). About 1.4 on average if it was not memorised.

    Args:
        canary_loss: Of the sequence that was in the training data.
        candidate_losses: ``float[R - 1]``, of sequences that could have been.
    """
    candidates = np.asarray(candidate_losses, np.float64)
    rank = 1 + np.sum(candidates < canary_loss) + np.sum(candidates == canary_loss) / 2
    return float(np.log2(len(candidates) + 1) - np.log2(rank))
