"""Membership inference, exposure and inversion on small models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.audit import inversion, membership
from dpjax.data.arrays import ArraySource
from dpjax.privacy.noise import add_noise, root_key
from dpjax.training.experiment import build_experiment
from tests.runs import tiny


@functools.cache
def experiment():
    """Random labels on few digits: what is learnt of them is memory."""
    built = build_experiment(tiny(**{"model.features": (32,)}))
    rng = np.random.default_rng(0)
    records = built.source[list(range(48))]
    labels = rng.integers(10, size=48).astype(records["label"].dtype)
    mechanism = dpjax.DpSgd(
        clip_norm=1.0,
        clip_style="flat",
        noise_multiplier=1e-3,
        sampling=dpjax.FullBatch(),
        steps=40,
        num_examples=48,
        delta=1e-5,
    )
    return dataclasses.replace(
        built,
        source=ArraySource({**records, "label": labels}),
        mechanism=mechanism,
        optimizer=optax.sgd(5.0),
    )


MEMBERS = np.random.default_rng(1).permuted(
    np.tile(np.arange(8)[:, None] < 4, (1, 48)), axis=0
)


def shadow_losses():
    built = experiment()
    models = membership.shadow_models(built, MEMBERS, seed=0)
    return membership.losses_of(built, models)


def test_shadow_models_keep_what_is_frozen():
    built = dataclasses.replace(experiment(), train=("head/.*",))
    mechanism = dataclasses.replace(built.mechanism, steps=1)
    built = dataclasses.replace(built, mechanism=mechanism)
    models = membership.shadow_models(built, MEMBERS[:1], seed=0)
    key = jax.random.fold_in(jax.random.split(jax.random.key(0), 1)[0], 0)
    start = built.model.init(key, jax.tree.map(lambda x: x[0], built.source[[0]]))
    for layer in start:
        for before, after in zip(
            *map(jax.tree.leaves, (start[layer], models[layer])), strict=True
        ):
            assert np.allclose(before, after[0], atol=1e-6) == (layer != "head")


def test_no_example_becomes_a_constant_of_a_program(monkeypatch):
    """Compiled programs are kept in a cache that anybody may read."""
    constants, jit = [], jax.jit

    def spied(function):
        def run(*args):
            constants.extend(jax.make_jaxpr(function)(*args).consts)
            return jit(function)(*args)

        return run

    built = experiment()
    mechanism = dataclasses.replace(built.mechanism, steps=1)
    built = dataclasses.replace(built, mechanism=mechanism)
    images = built.source[[0, 1]]["image"]
    key, params = (
        jax.random.key(0),
        built.model.init(jax.random.key(0), {"image": images[0]}),
    )
    monkeypatch.setattr(jax, "jit", spied)
    models = membership.shadow_models(built, MEMBERS[:1], seed=0)
    membership.losses_of(built, models)
    inversion.invert_by_descent(
        built.loss,
        params,
        jax.tree.map(jnp.ones_like, params),
        built.source[[0, 1]],
        inputs="image",
        steps=1,
        learning_rate=0.1,
        key=key,
    )
    assert constants
    assert max(np.size(constant) for constant in constants) <= images[0].size


def test_members_are_told_where_noise_is_little_and_strangers_are_not():
    losses = shadow_losses()
    for scores, lowest in (
        (membership.loss_scores(losses), 0.75),
        (membership.lira_scores(losses, MEMBERS), 0.8),
    ):
        assert membership.attacked(scores, MEMBERS).auc > lowest
    # Models do not know who was in the others.
    rolled = np.roll(MEMBERS, 1, axis=0)
    strangers = membership.lira_scores(np.roll(losses, 3, axis=1), rolled)
    assert abs(membership.attacked(strangers, rolled).auc - 0.5) < 0.15


def test_rates_are_those_of_the_definition():
    scores = np.array([[3.0, 2.0, 1.0, 0.0]])
    members = np.array([[True, False, True, False]])
    found = membership.attacked(scores, members)
    assert found.auc == 0.75
    assert found.tpr_at_1_percent == 0.5
    assert membership.attacked(np.zeros((1, 4)), members).auc == 0.5


def test_exposure_counts_bits_of_rank():
    candidates = np.arange(1.0, 1024.0)
    assert membership.exposure(0.5, candidates) == 10
    assert membership.exposure(2000.0, candidates) == 0
    rng = np.random.default_rng(0)
    forgotten = [membership.exposure(x, rng.random(1023)) for x in rng.random(2000)]
    # Of a rank uniform in 1..R: 1/ln 2 bits.
    assert np.mean(forgotten) == pytest.approx(1.4427, abs=0.1)


def test_wrong_input_is_refused():
    built = experiment()
    with pytest.raises(ValueError, match="must be one row of 48"):
        membership.shadow_models(built, MEMBERS[:, :5], seed=0)
    with pytest.raises(ValueError, match="shadow models=2"):
        membership.lira_scores(np.zeros((2, 48)), MEMBERS[:2])
    shuffled = dataclasses.replace(
        built.mechanism, sampling=dpjax.ShuffledFixed(batch_size=8)
    )
    with pytest.raises(ValueError, match="must be Poisson or FullBatch"):
        membership.shadow_models(
            dataclasses.replace(built, mechanism=shuffled), MEMBERS, seed=0
        )


@functools.cache
def release(count):
    """One release of the code that ships, on ``count`` digits: params, release, images."""
    built = experiment()
    rows = jax.tree.map(jnp.asarray, built.source[list(range(count))])
    params = jax.jit(built.model.init)(
        jax.random.key(0), jax.tree.map(lambda column: column[0], rows)
    )
    mechanism = dataclasses.replace(built.mechanism, noise_multiplier=0.0)
    clipped_grad = dpjax.clipped_grad(built.loss, clip_norm=1.0, engine="vmap")
    clipped, _ = jax.jit(clipped_grad)(params, rows, jax.random.key(0))
    mean, _ = mechanism.release(clipped, (), params, key=root_key(0), step=0)
    return built, params, mean, rows


def test_a_linear_layer_gives_one_image_away_and_noise_hides_it():
    _, _, exact, rows = release(1)
    for noise, lowest, highest in ((0.0, 0.999, 1.0), (1.0, -1.0, 0.6)):
        noisy = add_noise(exact, key=root_key(0), step=0, stddev=noise / 48)
        kernel, bias = first_layer(noisy)
        guesses = inversion.invert_linear(kernel, bias)
        found = inversion.best_correlation(guesses[:1], rows["image"])
        assert lowest <= found <= highest + 1e-9, (noise, found)


def first_layer(tree):
    for layer in tree.values():
        if layer["kernel"].shape[0] == 64:
            return np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    raise AssertionError


def test_descent_finds_an_image_too():
    built, params, mean, rows = release(1)
    guess = inversion.invert_by_descent(
        built.loss,
        params,
        mean,
        rows,
        inputs="image",
        steps=300,
        learning_rate=0.05,
        key=jax.random.key(3),
    )
    assert inversion.best_correlation(guess, rows["image"]) > 0.9
