"""Canaries in real runs of the loop's step: power, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.audit import canaries, verdict
from dpjax.clipping import vmap
from dpjax.training.experiment import build_experiment
from tests.runs import tiny

FULL = {"name": "dpjax.privacy:FullBatch"}


def config(**changes):
    shared = {"mechanism.steps": 4, "mechanism.noise_multiplier": 1.0}
    return tiny(**{**shared, "mechanism.sampling": FULL, **changes})


@functools.cache
def experiment():
    return build_experiment(config())


def audit(kind, count, *, engine=None):
    built = experiment()
    if engine is not None:
        built = dataclasses.replace(built, engine=engine)
    scores = canaries.canary_scores(config(), built, kind=kind, count=count, seed=0)
    claim = verdict.claim_of(built.mechanism)
    return claim, verdict.judge_one_run(*scores, claim, attack=kind, confidence=0.95)


def test_diracs_show_most_of_the_claim_in_one_run():
    """Without subsampling: at least 60 % (issue); the claim is Gaussian, so exact."""
    claim, finding = audit("dirac", 600)
    assert finding.verdict == "consistent"
    assert 0.6 * claim.epsilon < finding.gdp_lower_bound < claim.epsilon
    assert 2 < finding.lower_bound < claim.epsilon


@pytest.mark.parametrize(
    ("kind", "train"),
    [("random", ".*"), ("per_layer", "head/.*"), ("input", "head/.*")],
)
def test_other_canaries_are_found(kind, train):
    built = dataclasses.replace(experiment(), train=(train,))
    found = canaries.canary_scores(config(), built, kind=kind, count=60, seed=0)
    inside, outside = found.scores[found.members], found.scores[~found.members]
    # Of a difference of means of about 30 each.
    error = found.scores.std() * np.sqrt(2 / 30)
    assert inside.mean() - outside.mean() > 2 * error


def clip_times_ten(loss, query, batch, key):
    wide = dataclasses.replace(query, clip_norm=10 * query.clip_norm)
    clipped, statistics = vmap(loss, wide, batch, key)
    return dataclasses.replace(
        clipped, l2_bound=jnp.float32(query.l2_bound)
    ), statistics


def test_an_engine_that_clips_ten_times_too_far_is_flagged():
    quiet = config(**{"mechanism.noise_multiplier": 4.0})
    built = dataclasses.replace(build_experiment(quiet), engine=clip_times_ten)
    scores = canaries.canary_scores(quiet, built, kind="dirac", count=300, seed=0)
    claim = verdict.claim_of(built.mechanism)
    finding = verdict.judge_one_run(*scores, claim, attack="dirac", confidence=0.95)
    assert finding.verdict == "VIOLATED", (claim.epsilon, finding.lower_bound)


def test_gradients_of_canaries_are_what_they_say():
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}
    for kind in ("dirac", "random", "per_layer"):
        made = canaries.make_canaries(experiment(), params, kind=kind, count=4, seed=0)
        gradients = jax.vmap(jax.grad(made.loss), in_axes=(None, 0, None))(
            params, made.examples, jax.random.key(0)
        )
        flat = np.concatenate([np.reshape(g, (4, -1)) for g in gradients.values()], 1)
        used = (np.abs(flat) > 0).sum(axis=1)
        expected = {"dirac": [1] * 4, "random": [10] * 4, "per_layer": [6, 4, 6, 4]}
        assert list(used) == expected[kind]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"kind": "dirak"}, "kind='dirak' is unknown"),
        ({}, {"count": 10**4}, "canaries=10000 exceed the 610 parameters"),
        (
            {
                "mechanism.sampling": {
                    "name": "dpjax.privacy:ShuffledFixed",
                    "batch_size": 64,
                }
            },
            {},
            "drawn by coins of their own",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(changes, options, message):
    given = config(**changes)
    built = build_experiment(given)
    with pytest.raises(ValueError, match=message):
        canaries.canary_scores(
            given, built, **{"kind": "dirac", "count": 10, "seed": 0, **options}
        )


def test_too_few_canaries_are_refused():
    claim = verdict.claim_of(experiment().mechanism)
    with pytest.raises(ValueError, match="canaries=9 are too few to show any"):
        verdict.judge_one_run(
            np.arange(9), np.arange(9) > 4, claim, attack="dirac", confidence=0.99
        )
