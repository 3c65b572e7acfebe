"""Diff2 and SpiderBoost: what is particular to recursive gradient differences."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.mechanisms.recursion import optimal_noise_ratio, variance_ratio
from dpjax.privacy.sensitive import ClippedSum
from dpjax.training.verification.reference_noise import grid
from tests.checks import batch_of, norm
from tests.contracts import test_engines as engines
from tests.contracts.test_mechanisms import diff2, spider_boost

KEY = jax.random.key(5)
ROOT = dpjax.root_key(0)


def run(mechanism, loss, examples, params, *, engine, rate, steps):
    """Train on all examples outside of the loop; yield (params, mechanism state)."""
    transform = dpjax.private(mechanism, optax.sgd(rate), noise_key=ROOT)
    state = transform.init(params)
    batch = batch_of(examples)
    step, update = jax.jit(engine, static_argnums=0), jax.jit(transform.update)
    for t in range(steps):
        query = mechanism.query(mechanism.phase(t), params, state.mechanism)
        clipped, _ = step(loss, query, batch, jax.random.fold_in(KEY, t))
        total = query.empty().merge(clipped)
        updates, state = update(total, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state.mechanism


@engines.all_engines
@pytest.mark.parametrize(
    "make", [diff2, pytest.param(spider_boost, marks=pytest.mark.long)]
)
def test_without_noise_and_clipping_it_is_gradient_descent(engine, make):
    """Case 9 of the field notes; on a loss without dropout, telescoping is exact."""
    loss, params, examples = engines.CASES["tied embedding"]
    facts = {"noise_multiplier": 0.0, "clip_norm": 1e6, "difference_clip_norm": 1e4}
    mechanism = make(num_examples=8, **facts)
    if make is spider_boost:
        sampling = dpjax.PeriodicPoisson(period=5, first_rate=1.0, rate=1.0)
        mechanism = dataclasses.replace(mechanism, sampling=sampling)

    def mean(params):
        losses = jax.vmap(loss, in_axes=(None, 0, None))(params, examples, KEY)
        return jnp.mean(losses)

    exact, gradient = params, jax.jit(jax.grad(mean))
    steps = run(mechanism, loss, examples, params, engine=engine, rate=0.5, steps=7)
    for found, _ in steps:
        exact = jax.tree.map(lambda p, g: p - 0.5 * g, exact, gradient(exact))
        np.testing.assert_allclose(found["table"], exact["table"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [diff2, spider_boost])
def test_a_step_of_length_zero_leaves_the_estimate_as_it_is(make):
    mechanism = make()
    params = {"w": jnp.arange(4.0)}
    state = mechanism.init(params)._replace(estimate={"w": jnp.full(4, 7.0)})
    query = mechanism.query("difference", params, state)
    assert query.clip_norm == 0.0

    def loss(params, example, key):
        return jnp.sum(jnp.sin(params["w"] * example["x"]))

    batch = batch_of({"x": jnp.ones((8, 4))})
    for engine in engines.ENGINES.values():
        clipped, _ = engines.run(engine, loss, query, batch)
        out, after = mechanism.release(clipped, state, params, key=ROOT, step=1)
        np.testing.assert_array_equal(out["w"], np.full(4, 7.0))
        np.testing.assert_array_equal(after.prev_params["w"], params["w"])


@engines.all_engines
@pytest.mark.parametrize("case", ["network", "tied embedding"])
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-1, 1e-3, 1e-5, 1e-6, 1e-7]),
    smooth=st.floats(0.01, 10),
)
@hypothesis.example(seed=0, size=1e-6, smooth=0.5)  # Once 21% too long.
@hypothesis.settings(max_examples=6)
def test_a_difference_never_exceeds_its_radius_however_short_the_step(
    engine, case, seed, size, smooth
):
    loss, params, examples = engines.CASES[case]
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda p: p + size * jnp.asarray(rng.normal(size=p.shape), p.dtype), params
    )
    mechanism = diff2(difference_clip_norm=smooth)
    state = mechanism.init(params)
    query = mechanism.query("difference", moved, state)
    total = engines.run(engine, loss, query, batch_of(examples))[0].total
    for i in range(8):
        mask = np.arange(8) != i
        without, _ = engines.run(engine, loss, query, batch_of(examples, mask=mask))
        gap = norm(jax.tree.map(np.subtract, total, without.total))
        # Sums of 8 vectors round by 8 epsilons of the radius at most.
        assert gap <= float(query.l2_bound) * (1 + 1e-6)


def test_the_radius_depends_on_outputs_only_and_not_on_examples():
    """It is a function of parameters and state: no batch is in its signature."""
    mechanism = spider_boost(difference_clip_norm=3.0)
    params, state = {"w": jnp.zeros(4)}, mechanism.init({"w": jnp.zeros(4)})
    for length, radius in ((0.1, 0.3), (1.0, 1.0), (100.0, 1.0)):
        moved = {"w": params["w"].at[0].set(length)}
        found = mechanism.query("difference", moved, state)
        np.testing.assert_allclose(found.clip_norm, radius, rtol=1e-6)
        np.testing.assert_allclose(
            mechanism.noise_stddev("difference", radius), 6.0 * radius
        )


def test_variance_within_a_period_is_the_closed_form():
    """Case 10 of the field notes: R=100, T=10, kappa=.05, n=1000, C1=1, mu=.501552."""
    kappa, size = 0.05, 40_000
    mechanism = diff2(
        clip_norm=1.0,
        difference_clip_norm=2.0,
        restart_every=10,
        noise_multiplier=7.2394,
        noise_ratio=optimal_noise_ratio(kappa=kappa),
        steps=100,
    )
    step = jax.jit(functools.partial(mechanism.release, key=ROOT))
    params = {"w": jnp.zeros(size)}
    state, found = mechanism.init(params), []
    for t in range(10):
        # kappa = C2 |x_t - x_{t-1}| / C1.
        params = {"w": params["w"].at[0].add(kappa / 2.0)}
        query = mechanism.query(mechanism.phase(t), params, state)
        out, state = step(query.empty(), state, params, step=t)
        found.append(float(jnp.var(out["w"])))
    expected = [5.240e-5, 5.611e-5, 7.093e-5, 8.575e-5]
    # Four standard errors of a variance of 40,000 values are 2.8%.
    np.testing.assert_allclose([found[j] for j in (0, 1, 5, 9)], expected, rtol=0.028)
    dp_gd = 100 / 0.501552**2 / 1000**2
    assert np.mean(found) / dp_gd == pytest.approx(0.1738, rel=0.028)


@pytest.mark.parametrize(
    ("kappa", "best", "ratio"),
    # The field notes, section 4.4.
    [
        (0.005, 282, 0.0141),
        (0.01, 140, 0.0281),
        (0.05, 27, 0.1364),
        (0.1, 13, 0.2629),
        (0.2, 6, 0.4857),
        (0.3, 4, 0.6694),
        (0.5, 2, 0.9161),
    ],
)
def test_best_restart_interval_and_its_gain(kappa, best, ratio):
    ratios = {t: variance_ratio(restart_every=t, kappa=kappa) for t in range(1, 1000)}
    assert min(ratios, key=ratios.get) == best
    assert ratios[best] == pytest.approx(ratio, abs=6e-5)
    assert variance_ratio(restart_every=1, kappa=kappa) == 1.0


def test_no_interval_gains_beyond_the_threshold_of_kappa():
    for kappa, gains in (
        (2 - math.sqrt(2) - 1e-3, True),
        (2 - math.sqrt(2) + 1e-3, False),
    ):
        best = min(variance_ratio(restart_every=t, kappa=kappa) for t in range(2, 1000))
        assert (best < 1) == gains


@pytest.mark.parametrize("kappa", [0.02, 0.3])
@pytest.mark.parametrize("period", [2, 10])
def test_the_optimal_ratio_has_the_least_variance_of_all_ratios(kappa, period):
    """Against a search that knows no closed form."""

    def variance(ratio):
        plan = diff2(
            noise_multiplier=1.0, noise_ratio=ratio, restart_every=period, steps=100
        )
        zs = [1.0 if plan.phase(t) == "restart" else ratio for t in range(100)]
        budget = sum(1 / z**2 for z in zs)  # mu^2
        period_variance = [1 + j * (ratio * kappa) ** 2 for j in range(period)]
        return budget * np.mean(period_variance)

    grid = np.geomspace(0.1, 100, 4001)
    best = grid[np.argmin([variance(r) for r in grid])]
    optimum = optimal_noise_ratio(kappa=kappa)
    assert best == pytest.approx(optimum, rel=2e-3)
    dp_gd = 100
    expected = variance_ratio(restart_every=period, kappa=kappa)
    assert variance(optimum) / dp_gd == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kappa", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_kappa_is_refused(kappa):
    for function in (
        optimal_noise_ratio,
        functools.partial(variance_ratio, restart_every=2),
    ):
        with pytest.raises(ValueError, match=f"kappa={kappa} must be positive"):
            function(kappa=kappa)


def test_workers_cost_noise_and_no_epsilon():
    one, many = diff2(), diff2(noisy_workers=9)
    for phase in ("restart", "difference"):
        assert many.noise_stddev(phase, 1.0) == 3 * one.noise_stddev(phase, 1.0)
    assert many.event() == one.event()


@pytest.mark.parametrize("phase", ["restart", "difference"])
def test_a_release_is_the_sum_of_what_the_workers_of_all_shards_send(phase):
    loss, params, examples = engines.CASES["linear"]
    mechanism = diff2(noisy_workers=3, num_examples=8)
    at = {"restart": 5, "difference": 6}[phase]
    state = mechanism.init(jax.tree.map(lambda p: 0.9 * p, params))
    state = state._replace(estimate=jax.tree.map(jnp.cos, params))
    query = mechanism.query(phase, params, state)
    merged, messages = query.empty(), []
    for worker, shard in enumerate(([0, 3, 4, 7], [1], [2, 5, 6])):
        mask = np.isin(np.arange(8), shard)
        clipped, _ = engines.run(
            engines.vmap, loss, query, batch_of(examples, mask=mask)
        )
        messages.append(
            mechanism.message(clipped, state, params, key=ROOT, step=at, worker=worker)
        )
        merged = merged.merge(clipped)
    whole, _ = engines.run(engines.vmap, loss, query, batch_of(examples))
    total = jax.tree.map(lambda *parts: sum(parts) / 8, *messages)
    if phase == "difference":
        total = jax.tree.map(jnp.add, total, state.estimate)
    # What three send is rounded one by one, a release after each of three noises.
    unit = grid(float(mechanism.noise_stddev(phase, query.clip_norm)) / np.sqrt(3)) / 8
    for of_all in (merged, whole):
        found, _ = mechanism.release(of_all, state, params, key=ROOT, step=at)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=3 * unit),
            found,
            total,
        )


def test_each_message_has_the_noise_of_a_whole_release_and_shares_it_with_none():
    mechanism, params = diff2(noisy_workers=9), {"w": jnp.zeros(20_000)}
    state = mechanism.init(params)
    empty = mechanism.query("restart", params, state).empty()
    send = jax.jit(
        functools.partial(mechanism.message, key=ROOT, step=0),
        static_argnames="worker",
    )
    drawn = [send(empty, state, params, worker=k)["w"] for k in (0, 8)]
    for one in drawn:
        # By hand: 20 * .5, whatever the number of workers. Five standard errors.
        assert np.std(one) == pytest.approx(10.0, rel=0.025)
    assert abs(np.corrcoef(drawn)[0, 1]) < 6 / math.sqrt(20_000)
    broken = dataclasses.replace(empty, l2_bound=empty.l2_bound * 1.01)
    assert np.isnan(send(broken, state, params, worker=0)["w"]).all()


@pytest.mark.parametrize("worker", [-1, 9])
def test_a_worker_that_there_is_not_sends_nothing(worker):
    mechanism, params = diff2(noisy_workers=9), {"w": jnp.zeros(3)}
    state = mechanism.init(params)
    empty = mechanism.query("restart", params, state).empty()
    with pytest.raises(ValueError, match=f"worker={worker} must be in"):
        mechanism.message(empty, state, params, key=ROOT, step=0, worker=worker)


@pytest.mark.parametrize("fact", ["clip_norm", "difference_clip_norm"])
def test_a_radius_moves_its_noise_and_no_epsilon(fact):
    mechanism = diff2()
    doubled = dataclasses.replace(mechanism, **{fact: 2 * getattr(mechanism, fact)})
    assert doubled.event() == mechanism.event()
    params = {"w": jnp.ones(4)}
    state = mechanism.init({"w": jnp.zeros(4)})
    for phase, own in (
        ("restart", "clip_norm"),
        ("difference", "difference_clip_norm"),
    ):
        before, after = (m.query(phase, params, state) for m in (mechanism, doubled))
        factor = 2 if fact == own else 1
        np.testing.assert_allclose(after.clip_norm, factor * before.clip_norm)


def test_a_sum_of_no_known_phase_is_refused_and_so_are_missing_params():
    mechanism, params = diff2(), {"w": jnp.zeros(3)}
    state = mechanism.init(params)
    clipped = ClippedSum.zeros(params, l2_bound=0.5)
    with pytest.raises(ValueError, match="phase='gradient' of the sum must be"):
        mechanism.release(clipped, state, params, key=ROOT, step=0)
    asked = mechanism.query("restart", params, state).empty()
    with pytest.raises(ValueError, match="params are missing"):
        mechanism.release(asked, state, None, key=ROOT, step=0)


def test_a_sum_of_another_difference_is_not_released():
    """Clipped for a longer step than was taken: its noise would be too small."""
    mechanism = diff2()
    state = mechanism.init({"w": jnp.zeros(4)})
    near, far = ({"w": jnp.full(4, x)} for x in (0.1, 0.2))
    clipped = mechanism.query("difference", far, state).empty()
    out, _ = mechanism.release(clipped, state, far, key=ROOT, step=1)
    assert np.isfinite(out["w"]).all()
    out, _ = mechanism.release(clipped, state, near, key=ROOT, step=1)
    assert np.isnan(out["w"]).all()
