"""Diff2BvrLSgd against the algorithm as it is written, and against Diff2."""

import dataclasses
import functools
import math

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.clipping import vmap
from dpjax.privacy.sampling import PeriodicPoisson
from tests.checks import batch_of
from tests.contracts.test_mechanisms import bvr_l_sgd, diff2

N, RATE, SEED = 40, 0.5, 3
ROOT = dpjax.root_key(0)
KEY = jax.random.key(5)
rng = np.random.default_rng(1)
X = rng.normal(size=(N, 5)).astype(np.float32)
Y = rng.uniform(-1, 1, size=N).astype(np.float32)
START = rng.normal(size=5).astype(np.float32)
RUN = jax.jit(vmap, static_argnums=0)


def loss(params, example, key):
    del key
    return jnp.square(jnp.tanh(jnp.dot(params["w"], example["x"])) - example["y"]) / 2


def trained(mechanism, steps):
    """Parameters of every step, outside of the loop."""
    transform = dpjax.private(mechanism, optax.sgd(RATE), noise_key=ROOT)
    params = {"w": jnp.asarray(START)}
    state, seen = transform.init(params), [START]
    update = jax.jit(transform.update)
    for t in range(steps):
        drawn = mechanism.sampling.draw(t, num_examples=N, seed=SEED)
        mask = np.isin(np.arange(N), drawn)
        query = mechanism.query(mechanism.phase(t), params, state.mechanism)
        clipped, _ = RUN(loss, query, batch_of({"x": X, "y": Y}, mask=mask), KEY)
        updates, state = update(query.empty().merge(clipped), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"]))
    return np.stack(seen)


def as_written(mechanism, rounds):
    """Round by round and example by example, in float64; also how many were clipped."""
    length, share = mechanism.sampling.period, mechanism.sampling.rate
    sizes = {"clipped": 0, "all": 0}

    def gradient(w, i):
        out = math.tanh(w @ X[i])
        return (out - Y[i]) * (1 - out**2) * X[i].astype(np.float64)

    def clip(vector, radius):
        size = np.linalg.norm(vector)
        sizes["all"] += 1
        sizes["clipped"] += size > radius
        return vector * min(1.0, radius / max(size, 1e-300))

    x, before, estimate, seen = START.astype(np.float64), None, None, [START]
    for r in range(rounds):
        if r % mechanism.restart_every == 0:
            terms = [clip(gradient(x, i), mechanism.clip_norm) for i in range(N)]
            estimate = sum(terms) / N
        else:
            radius = mechanism.difference_clip_norm * np.linalg.norm(x - before)
            terms = [
                clip(gradient(x, i) - gradient(before, i), radius) for i in range(N)
            ]
            estimate = estimate + sum(terms) / N
        before, last, v = x, x, estimate
        x = x - RATE * v
        seen.append(x)
        for k in range(1, length):
            batch = mechanism.sampling.draw(r * length + k, num_examples=N, seed=SEED)
            radius = mechanism.local_clip_norm * np.linalg.norm(x - last)
            terms = [clip(gradient(x, i) - gradient(last, i), radius) for i in batch]
            v = v + sum(terms) / (share * N)
            last, x = x, x - RATE * v
            seen.append(x)
    return np.stack(seen), sizes["clipped"] / sizes["all"]


@pytest.mark.parametrize(("period", "restart_every"), [(4, 2), (2, 3)])
def test_without_noise_it_is_the_algorithm_as_written(period, restart_every):
    mechanism = bvr_l_sgd(
        noise_multiplier=0.0,
        clip_norm=0.6,
        difference_clip_norm=0.4,
        local_clip_norm=0.4,
        restart_every=restart_every,
        sampling=PeriodicPoisson(period=period, first_rate=1.0, rate=0.3),
        num_examples=N,
    )
    expected, clipped = as_written(mechanism, rounds=5)
    assert 0.1 < clipped < 0.9
    found = trained(mechanism, steps=5 * period)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rounds_of_one_step_are_diff2_noise_included():
    one = PeriodicPoisson(period=1, first_rate=1.0, rate=0.3)
    mechanism = bvr_l_sgd(sampling=one, restart_every=3, num_examples=N)
    facts = vars(mechanism) | {"sampling": dpjax.FullBatch(), "noisy_workers": 1}
    del facts["local_clip_norm"], facts["local_noise_ratio"]
    same = dpjax.Diff2(**facts)
    np.testing.assert_array_equal(trained(mechanism, 7), trained(same, 7))
    assert dpjax.epsilon(mechanism) == pytest.approx(dpjax.epsilon(same), rel=1e-5)


def test_every_release_of_fifty_is_accounted_by_its_noise_and_rate():
    """By hand: rounds of 3, of which every second restarts."""

    def times(count, rate, z):
        gaussian = dp.GaussianDpEvent(z)
        sampled = dp.PoissonSampledDpEvent(rate, gaussian)
        return dp.SelfComposedDpEvent(sampled, count)

    parts = [times(9, 1.0, 20.0), times(8, 1.0, 40.0), times(33, 0.1, 5.0)]
    assert bvr_l_sgd().event() == dp.ComposedDpEvent(parts)
    assert bvr_l_sgd().event(1) == dp.ComposedDpEvent([times(1, 1.0, 20.0)])
    phases = [bvr_l_sgd().phase(t) for t in range(7)]
    assert phases == [
        "restart",
        *["local"] * 2,
        "difference",
        *["local"] * 2,
        "restart",
    ]


def test_without_local_amplification_it_costs_what_diff2_does():
    """Local steps on all examples at z2: 17 + 33 releases, 9 of them restarts."""
    full = PeriodicPoisson(period=3, first_rate=1.0, rate=1.0)
    mechanism = bvr_l_sgd(sampling=full, local_noise_ratio=2.0)
    same = diff2(restart_every=6, steps=54)
    assert dpjax.epsilon(same, steps=50) == pytest.approx(
        dpjax.epsilon(mechanism), rel=1e-4
    )


def test_local_steps_are_clipped_by_their_own_length_and_corrected_from_the_round():
    mechanism = bvr_l_sgd()
    release = jax.jit(functools.partial(mechanism.release, key=ROOT))
    at = [{"w": jnp.full(4, x)} for x in (0.0, 0.5, 0.6)]
    state = mechanism.init(at[0])
    query = mechanism.query("restart", at[0], state)
    first, state = release(query.empty(), state, at[0], step=0)
    jax.tree.map(np.testing.assert_array_equal, state.local, state.round)
    for step, moved in ((1, at[1]), (2, at[2])):
        query = mechanism.query("local", moved, state)
        np.testing.assert_allclose(query.clip_norm, 0.6 * (1.0, 0.2)[step - 1], 1e-5)
        _, state = release(query.empty(), state, moved, step=step)
    np.testing.assert_array_equal(state.round.estimate["w"], first["w"])
    # The next round differs from the first parameters of the last one.
    query = mechanism.query("difference", at[2], state)
    np.testing.assert_allclose(query.clip_norm, 0.8 * 1.2, 1e-5)
    np.testing.assert_array_equal(query.points[1]["w"], at[0]["w"])


def test_facts_replaced_stay_consistent():
    mechanism = bvr_l_sgd()
    for fact, stddev in (("local_clip_norm", 5.0), ("local_noise_ratio", 10.0)):
        doubled = dataclasses.replace(mechanism, **{fact: 2 * getattr(mechanism, fact)})
        assert doubled.noise_stddev("local", 1.0) == stddev
        assert (doubled.event() == mechanism.event()) == (fact == "local_clip_norm")
        assert doubled.noise_stddev("difference", 1.0) == 40.0
