"""Each classical way to break DP-SGD makes a check fail: the checks have teeth.

Every mutant is a plausible bug, run through the same check that the honest code passes.
"""

import collections
import dataclasses
import functools
import math
import tempfile
from pathlib import Path
from unittest import mock

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.clipping import Query, Slope, vmap
from dpjax.mechanisms import recursion
from dpjax.privacy import noise
from dpjax.privacy.noise import root_key
from dpjax.privacy.sampling import CyclicPoisson, Poisson
from dpjax.privacy.sensitive import ClippedSum
from tests.checks import (
    FORTY,
    batch_of,
    check_adds_to_sum,
    check_correlated,
    check_cyclic,
    check_engine_contract,
    check_exact_noise,
    check_joint_release,
    check_noise,
    check_poisson,
    check_sensitivity,
)
from tests.taint import check_run, check_step

MECHANISM = dpjax.DpSgd(
    clip_norm=0.5,
    clip_style="flat",
    noise_multiplier=1.2,
    sampling=Poisson(rate=0.1),
    steps=50,
    num_examples=200,
    delta=1e-5,
)
KEY = root_key(0)


def exact_check(run):
    check_exact_noise(
        run,
        key=KEY,
        stddev=MECHANISM.noise_stddev,
        divisor=MECHANISM.expected_batch_size,
        clip_norm=MECHANISM.clip_norm,
    )


def release(mechanism, *, key=KEY, step_of=lambda step: step):
    def run(clipped, step):
        return mechanism.release(clipped, (), None, key=key, step=step_of(step))[0]

    return run


def noise_check(run):
    check_noise(
        run,
        stddev=MECHANISM.noise_stddev,
        divisor=MECHANISM.expected_batch_size,
        clip_norm=MECHANISM.clip_norm,
        steps=20,
    )


def sum_check(run):
    check_adds_to_sum(
        run, divisor=MECHANISM.expected_batch_size, clip_norm=MECHANISM.clip_norm
    )


def sensitivity_check(engine):
    def loss(params, example, key):
        del key
        return jnp.square(jnp.dot(params["w"], example["x"]) - example["y"])

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=5), jnp.float32)}
    examples = {
        "x": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=6), jnp.float32),
    }
    check_sensitivity(
        engine,
        loss,
        params,
        batch_of(examples),
        jax.random.key(0),
        clip_norm=0.5,
        style="flat",
    )


def contract_check(engine):
    def loss(params, example, key):
        del key
        return jnp.square(jnp.dot(params, example["x"]))

    examples = {"x": jnp.arange(24.0).reshape(6, 4) / 24}
    batch = batch_of(examples, mask=[True, False, True, True, False, True])
    query = Query((jnp.ones(4),), clip_norm=0.5)
    check_engine_contract(engine, loss, query, batch, jax.random.key(0))


def difference_check(engine):
    """The contract on a difference, of a loss with dropout."""

    def loss(params, example, key):
        kept = jax.random.bernoulli(key, 0.5, params.shape)
        return jnp.square(jnp.dot(params * kept, example["x"]))

    batch = batch_of({"x": jnp.arange(24.0).reshape(6, 4) / 24})
    points = (jnp.ones(4), jnp.ones(4) * 0.9)
    query = Query(points, signs=(1.0, -1.0), clip_norm=1e3)
    check_engine_contract(engine, loss, query, batch, jax.random.key(0))


DIFF2 = dpjax.Diff2(
    clip_norm=0.5,
    difference_clip_norm=2.0,
    restart_every=10,
    noise_multiplier=1.2,
    noise_ratio=3.0,
    noisy_workers=1,
    sampling=dpjax.FullBatch(),
    steps=50,
    num_examples=200,
    delta=1e-5,
)


LOCAL = dpjax.Diff2BvrLSgd(
    clip_norm=0.5,
    difference_clip_norm=2.0,
    local_clip_norm=1.0,
    restart_every=2,
    noise_multiplier=1.2,
    noise_ratio=3.0,
    local_noise_ratio=0.5,
    sampling=dpjax.PeriodicPoisson(period=3, first_rate=1.0, rate=0.1),
    steps=50,
    num_examples=200,
    delta=1e-5,
)


def difference_release(mechanism):
    """Releases of the step after a restart, whose length is 0.5."""

    def run(clipped, step):
        params = jax.tree.map(jnp.zeros_like, clipped.total)
        moved = {**params, "a": params["a"].at[0, 0].set(0.5)}
        clipped = dataclasses.replace(clipped, phase="difference")
        state = mechanism.init(params)
        at = 10 * step + 1
        return mechanism.release(clipped, state, moved, key=KEY, step=at)[0]

    return run


def difference_noise_check(run):
    # By hand: z2 R = (3 * 1.2) * (2 * 0.5); all 200 examples.
    check_noise(run, stddev=3.6, divisor=200.0, clip_norm=1.0, steps=20)


def radius_check(mechanism):
    """A difference that was clipped further out than asked for is no release.

    One that is so by rounding has the noise of what it was clipped to.
    """
    params = jax.tree.map(jnp.zeros_like, FORTY)
    moved = {**params, "leaf00": params["leaf00"].at[0, 0].set(0.5)}

    def run(clipped, step, *, wider=1.0):
        wide = jnp.float32(clipped.l2_bound * wider)
        clipped = dataclasses.replace(clipped, phase="difference", l2_bound=wide)
        state = mechanism.init(params)
        return mechanism.release(clipped, state, moved, key=KEY, step=step)[0]

    # By hand: z2 R = (3 * 1.2) * (2 * 0.5).
    facts = {"key": KEY, "divisor": 200.0, "clip_norm": 1.0, "steps": (21,)}
    check_exact_noise(run, stddev=3.6, **facts)
    rounded = functools.partial(run, wider=1.0005)
    check_exact_noise(rounded, stddev=3.6 * 1.0005, **facts)
    empty = ClippedSum.zeros(params, l2_bound=1.0)
    for leaf in jax.tree.leaves(run(empty, 21, wider=1.01)):
        assert np.isnan(leaf).all()


def message_check(mechanism):
    """What one of four workers sends is private by itself: by hand, z1 C1."""

    def run(clipped, step):
        state = mechanism.init(clipped.total)
        asked = dataclasses.replace(clipped, phase="restart")
        at = 10 * step
        return mechanism.message(
            asked, state, clipped.total, key=KEY, step=at, worker=step % 4
        )

    check_noise(run, stddev=1.2 * 0.5, divisor=1.0, clip_norm=0.5, steps=20)


def schedule_check(mechanism):
    """What is accounted is the noise and the rate that steps really have."""

    def of_step(step):
        # In units of the sensitivity, which is the radius.
        noise = mechanism.noise_stddev(mechanism.phase(step), 1.0)
        if isinstance(mechanism.sampling, dpjax.FullBatch):
            return float(noise), None
        sampling = mechanism.sampling
        return float(noise), sampling.rate if step % sampling.period else 1.0

    def of_event(event):
        if isinstance(event, dp.PoissonSampledDpEvent):
            return event.event.noise_multiplier, event.sampling_probability
        return event.noise_multiplier, None

    for steps in (1, 2, 10, 11, 50):
        noise = collections.Counter(map(of_step, range(steps)))
        accounted = {
            of_event(part.event): part.count for part in mechanism.event(steps).events
        }
        assert accounted == noise, (steps, accounted, noise)


def slope_check(engine):
    """The contract on slopes, of a loss with dropout."""

    def loss(params, example, key):
        kept = jax.random.bernoulli(key, 0.5, params.shape)
        return jnp.square(jnp.dot(params * kept, example["x"]))

    batch = batch_of({"x": jnp.arange(24.0).reshape(6, 4) / 24})
    slope = Slope(jnp.array([1.0, -2.0, 0.5, 1.0]), 0.1)
    query = Query((jnp.ones(4),), clip_norm=0.5, slope=slope)
    check_engine_contract(engine, loss, query, batch, jax.random.key(0), rtol=1e-4)


ZERO = dpjax.DpZero(
    clip_norm=0.5,
    smoothing=1e-3,
    direction_seed=0,
    noise_multiplier=1.2,
    sampling=Poisson(rate=0.1),
    steps=50,
    num_examples=200,
    delta=1e-5,
)


def direction_check(mechanism):
    """A sum is released along the direction it was taken along, and along no other."""
    params = {"w": jnp.ones(50)}
    for step in range(3):
        state = mechanism.init(params)._replace(step=jnp.int32(step))
        query = mechanism.query("slope", params, state)
        u = query.slope.direction["w"]
        for at in range(3):
            out, _ = mechanism.release(query.empty(), state, params, key=KEY, step=at)
            if at != step:
                assert np.isnan(out["w"]).all()
            else:
                assert abs(jnp.corrcoef(out["w"], u)[0, 1]) > 0.999


def residual_check(engine):
    def loss(params, example, key):
        del key
        return jnp.square(jnp.dot(params, example["x"]))

    batch = batch_of({"x": jnp.arange(24.0).reshape(6, 4) / 24})
    query = Query((jnp.ones(4),), clip_norm=0.5, residual=True, outer_norm=2.0)
    check_engine_contract(engine, loss, query, batch, jax.random.key(0))


DICE = dpjax.DiceSgd(
    clip_norm=0.5,
    clip_style="flat",
    error_clip_norm=1.5,
    error_scale="sum",
    outer_norm=None,
    noise_multiplier=1.2,
    sampling=Poisson(rate=0.1),
    steps=50,
    num_examples=200,
    delta=1e-5,
    accounting="paper",
    accept_unproven_epsilon=True,
)


def feedback_release(mechanism):
    """``(sum, memory, step) -> `` the noisy mean and the next memory."""

    def run(clipped, memory, step):
        state = mechanism.init(clipped.total)._replace(memory=memory)
        mean, state = mechanism.release(clipped, state, None, key=KEY, step=step)
        return mean, state.memory

    return run


def memory_check(run):
    """e' = e + (sum of gradients) - (what went out, noise aside), exactly."""
    total = {"a": jnp.array([0.3, -0.4])}
    zeros = ClippedSum.zeros(total, l2_bound=0.5, residual=True)
    clipped = dataclasses.replace(
        zeros, total=total, residual={"a": jnp.array([0.0, 0.5])}
    )
    for memory, expected in (
        ([6.0, 0.0], [4.5, 0.5]),  # Three quarters are not given back,
        ([2.0, 0.0], [0.5, 0.5]),  # one quarter,
        ([0.0, 1.0], [0.0, 0.5]),  # nothing.
    ):
        _, after = run(clipped, {"a": jnp.array(memory)}, 3)
        np.testing.assert_allclose(after["a"], expected, atol=1e-5)


def feedback_noise_check(mechanism):
    def run(clipped, step):
        residual = jax.tree.map(jnp.zeros_like, clipped.total)
        full = dataclasses.replace(clipped, residual=residual)
        return feedback_release(mechanism)(full, residual, step)[0]

    # By hand: 1.2 sqrt(.5^2 + 2 * 1.5^2), as the paper has it, r = 3.
    check_noise(run, stddev=2.615339, divisor=20.0, clip_norm=0.5, steps=20)


CONSERVATIVE = dataclasses.replace(
    DICE,
    accounting="conservative",
    accept_unproven_epsilon=False,
    noise_multiplier=30.0,
)


def attack_check(mechanism):
    """No attack gets further than what is claimed."""
    assert mechanism.attacked_epsilon() <= dpjax.epsilon(mechanism)


ADAPTIVE = dpjax.AdaptiveDpSgd(
    initial_clip_norm=0.5,
    min_clip_norm=1e-6,
    max_clip_norm=1e6,
    target_quantile=0.5,
    clip_learning_rate=0.2,
    count_share=0.3,
    noise_multiplier=1.2,
    sampling=Poisson(rate=0.1),
    steps=50,
    num_examples=200,
    delta=1e-5,
)


BAND_MF = dpjax.BandMf(
    clip_norm=0.5,
    clip_style="flat",
    noise_multiplier=1.2,
    bands=3,
    strategy="square_root",
    sampling=CyclicPoisson(cycle=3, rate=0.3),
    steps=12,
    num_examples=200,
    delta=1e-5,
)


def correlation_check(mechanism):
    clipped = ClippedSum.zeros({"w": jnp.zeros(8000)}, l2_bound=0.5)
    state, rows = mechanism.init(clipped.total), []
    for step in range(mechanism.steps):
        mean, state = mechanism.release(clipped, state, None, key=KEY, step=step)
        rows.append(np.asarray(mean["w"]))
    check_correlated(np.stack(rows), mechanism)


def clip_norm_check(mechanism):
    """Noise follows the clip norm of the step: by hand, 0.3 is spent on the count."""
    state = mechanism.init(FORTY)._replace(clip_norm=jnp.float32(0.8))

    def run(clipped, step):
        counted = dataclasses.replace(clipped, count=jnp.float32(0))
        return mechanism.release(counted, state, None, key=KEY, step=step)[0]

    check_exact_noise(
        run,
        key=KEY,
        stddev=1.2 * 0.8 / math.sqrt(0.7),
        divisor=20.0,
        clip_norm=0.8,
        steps=(3,),
    )


def run_check(harm):
    with tempfile.TemporaryDirectory() as workdir:
        check_run(Path(workdir), harm=harm)


def finish_check(harm):
    check_step(MECHANISM, harm=harm)


def transform_check(transform_of):
    check_step(MECHANISM, transform_of=transform_of)


def cyclic_check(sampling):
    check_cyclic(sampling, num_examples=200, turns=150)


def sampling_check(sampling):
    check_poisson(sampling, num_examples=MECHANISM.num_examples)


def no_noise():
    return release(dataclasses.replace(MECHANISM, noise_multiplier=0.0))


def noise_divided_twice():
    silent = dataclasses.replace(
        MECHANISM,
        noise_multiplier=MECHANISM.noise_multiplier / MECHANISM.expected_batch_size,
    )
    return release(silent)


def noise_for_another_clip_norm():
    honest = release(MECHANISM)

    def run(clipped, step):
        tighter = dataclasses.replace(MECHANISM, noise_multiplier=1.2 / 10)
        return jax.tree.map(
            lambda a, b: 0 * a + b,
            honest(clipped, step),
            release(tighter)(clipped, step),
        )

    return run


def same_key_every_step():
    return release(MECHANISM, step_of=lambda step: 0)


def key_reused_after_resume():
    return release(MECHANISM, step_of=lambda step: step % 10)


def same_noise_in_all_leaves():
    def run(clipped, step):
        out = release(MECHANISM)(clipped, step)
        return {"a": out["b"].reshape(40, 25), "b": out["b"]}

    return run


def with_deviates(changed):
    """Releases whose deviates are ``changed(honest, key, index, shape)``."""
    honest = noise._deviates

    def deviates(key, index, shape):
        return changed(honest, key, index, shape)

    def run(clipped, step):
        with mock.patch.object(noise, "_deviates", deviates):
            return release(MECHANISM)(clipped, step)

    return run


def less_noise_after_the_third_leaf():
    return with_deviates(
        lambda honest, key, index, shape: (
            honest(key, index, shape) * (1.0 if index < 3 else 0.9)
        )
    )


def leaves_eight_apart_alike():
    return with_deviates(
        lambda honest, key, index, shape: honest(key, index % 8, shape)
    )


def half_a_root_key():
    return with_deviates(lambda honest, key, index, shape: honest(KEY[0], index, shape))


def step_wraps():
    return release(MECHANISM, step_of=lambda step: step % 2**16)


def released_sum_leaks():
    def run(clipped, step):
        out = release(MECHANISM)(clipped, step)
        part = 1e-4 / MECHANISM.expected_batch_size
        return jax.tree.map(lambda x, s: x + part * s, out, clipped.total)

    return run


def not_rounded():
    def add(tree, **where):
        return jax.tree.map(jnp.add, tree, noise.noise_like(tree, **where))

    def run(clipped, step):
        with mock.patch.object(noise, "add_noise", add):
            return release(MECHANISM)(clipped, step)

    return run


def rounded_before_the_noise():
    """Then one example moves each coordinate by up to a whole unit."""

    def run(clipped, step):
        unit = noise.grid(MECHANISM.noise_stddev)
        total = jax.tree.map(lambda x: jnp.round(x / unit) * unit, clipped.total)
        coarse = dataclasses.replace(clipped, total=total)
        return release(MECHANISM)(coarse, step)

    return run


def average_fed_with_the_sum(finish):
    def leaking(state, sums):
        after, released = finish(state, sums)
        total = sums.merged().total
        average = jax.tree.map(lambda a, s: a + 1e-3 * s, after.average, total)
        return after._replace(average=average), released

    return leaking


def norm_fed_with_the_sum(finish):
    def leaking(state, sums):
        after, released = finish(state, sums)
        norm = released.update_norm + 1e-4 * optax.tree.norm(sums.merged().total)
        return after, released._replace(update_norm=norm)

    return leaking


def update_leaks_the_sum(mechanism, optimizer, *, noise_key):
    honest = dpjax.private(mechanism, optimizer, noise_key=noise_key)

    def update(clipped, state, params=None, **extra):
        updates, after = honest.update(clipped, state, params, **extra)
        total = clipped.total
        return jax.tree.map(lambda u, s: u - 1e-4 * s, updates, total), after

    return honest._replace(update=update)


def evaluated_on_the_training_data(experiment):
    return dataclasses.replace(experiment, held_out=experiment.source)


class RadiusNotGuarded(dpjax.Diff2):
    def release(self, *args, **where):
        with mock.patch.object(recursion, "_ROUNDING", math.inf):
            return super().release(*args, **where)


class NoiseOfTheRadiusAlone(dpjax.Diff2):
    """Not of the radius that the sum was clipped to, which another program rounded."""

    def release(self, clipped, state, params, **where):
        radius = jnp.float32(self.radius(clipped.phase, params, state))
        wide = clipped.l2_bound > 1.001 * radius
        asked = dataclasses.replace(
            clipped, l2_bound=jnp.where(wide, clipped.l2_bound, radius)
        )
        return super().release(asked, state, params, **where)


class NoiseOfTheFirstClipNorm(dpjax.AdaptiveDpSgd):
    def noise_stddev(self, clip_norm):
        del clip_norm
        return super().noise_stddev(self.initial_clip_norm)


def opposite_noise_at_odd_steps():
    def run(clipped, step):
        out = release(MECHANISM)(clipped, step - step % 2)
        return jax.tree.map(lambda x: x * (-1) ** step, out)

    return run


def opposite_noise_in_leaves():
    def run(clipped, step):
        out = release(MECHANISM)(clipped, step)
        return {"a": -out["b"].reshape(40, 25), "b": out["b"]}

    return run


def uniform_noise():
    def run(clipped, step):
        out = release(MECHANISM)(clipped, step)
        scale = MECHANISM.noise_stddev / MECHANISM.expected_batch_size
        width = scale * np.sqrt(12)
        cdf = jax.scipy.stats.norm.cdf
        return jax.tree.map(lambda x: width * (cdf(x / scale) - 0.5), out)

    return run


def mean_instead_of_sum():
    def run(clipped, step):
        mean = jax.tree.map(lambda x: x / 20, clipped.total)
        return release(MECHANISM)(dataclasses.replace(clipped, total=mean), step)

    return run


def divided_by_another_batch_size():
    def run(clipped, step):
        realised = MECHANISM.expected_batch_size * 1.3
        scale = MECHANISM.expected_batch_size / realised
        return jax.tree.map(lambda x: x * scale, release(MECHANISM)(clipped, step))

    return run


def clip_times_ten(loss, query, batch, key):
    return vmap(
        loss, dataclasses.replace(query, clip_norm=10 * query.clip_norm), batch, key
    )


def clips_the_batch_not_the_example(loss, query, batch, key):
    def mean(params, examples, key):
        return jnp.mean(jax.vmap(loss, in_axes=(None, 0, None))(params, examples, key))

    count = jnp.maximum(batch.mask.sum(), 1)
    gradient = jax.grad(mean)(query.points[0], batch.examples, key)
    clipped, statistics = vmap(loss, query, batch, key)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    scale = count * jnp.minimum(1.0, query.clip_norm / norm)
    total = jax.tree.map(lambda g: g * scale * count, gradient)
    return dataclasses.replace(clipped, total=total), statistics


def counts_examples_twice(loss, query, batch, key):
    clipped, statistics = vmap(loss, query, batch, key)
    doubled = jax.tree.map(lambda x: 2 * x, clipped.total)
    return dataclasses.replace(clipped, total=doubled), statistics


def forgets_the_mask(loss, query, batch, key):
    everyone = batch._replace(mask=jnp.ones_like(jnp.asarray(batch.mask)))
    return vmap(loss, query, everyone, key)


def per_layer_norm_for_a_flat_bound(loss, query, batch, key):
    """One leaf is clipped, a second one slips through with a bound of its own."""
    clipped, statistics = vmap(loss, query, batch, key)
    return dataclasses.replace(
        clipped, total=jax.tree.map(lambda x: x * jnp.sqrt(2.0), clipped.total)
    ), statistics


def other_dropout_at_the_second_point(loss, query, batch, key):
    parts = [
        vmap(loss, Query((point,), clip_norm=1e6), batch, jax.random.fold_in(key, k))
        for k, point in enumerate(query.points)
    ]
    honest, statistics = vmap(loss, query, batch, key)
    (one, _), (two, _) = parts
    total = jax.tree.map(jnp.subtract, one.total, two.total)
    return dataclasses.replace(honest, total=total), statistics


def other_dropout_behind(loss, query, batch, key):
    """Differences of losses whose two halves drop other units."""
    (point,), (direction, span) = query.points, query.slope
    ahead, behind = (
        jax.vmap(loss, (None, 0, 0))(
            point + s * direction,
            batch.examples,
            jax.random.split(jax.random.fold_in(key, s > 0), len(batch.mask)),
        )
        for s in (span, -span)
    )
    honest, statistics = vmap(loss, query, batch, key)
    slopes = jnp.clip((ahead - behind) / (2 * span), -0.5, 0.5)
    return dataclasses.replace(honest, total=slopes.sum()), statistics


def slope_of_the_batch_clipped(loss, query, batch, key):
    free = dataclasses.replace(query, clip_norm=jnp.float32(jnp.inf))
    honest, statistics = vmap(loss, query, batch, key)
    total = jnp.clip(vmap(loss, free, batch, key)[0].total, -0.5, 0.5)
    return dataclasses.replace(honest, total=total), statistics


def slope_over_one_span(loss, query, batch, key):
    """Divided by lambda where 2 lambda is due."""
    direction, span = query.slope
    wider = dataclasses.replace(query, slope=Slope(2 * direction, span / 2))
    return vmap(loss, wider, batch, key)


class DirectionOfTheStep(dpjax.DpZero):
    """Drawn from the step of the release, whichever the sum was taken along."""

    def release(self, clipped, state, params, *, key, step):
        other = state._replace(step=jnp.asarray(step))
        return super().release(clipped, other, params, key=key, step=step)


class FreshDirection(dpjax.DpZero):
    def release(self, clipped, state, params, *, key, step):
        other = dataclasses.replace(self, direction_seed=self.direction_seed + 1)
        honest = dpjax.DpZero(**vars(other))
        return honest.release(clipped, state, params, key=key, step=step)


def residual_not_scaled(loss, query, batch, key):
    """As the authors' code: the mean of gradients less the sum of clipped ones."""
    clipped, statistics = vmap(loss, query, batch, key)
    residual = jax.tree.map(
        lambda t, r: (t + r) / batch.mask.shape[0] - t, clipped.total, clipped.residual
    )
    return dataclasses.replace(clipped, residual=residual), statistics


def outer_norm_forgotten(loss, query, batch, key):
    free, _ = vmap(loss, dataclasses.replace(query, outer_norm=jnp.inf), batch, key)
    clipped, statistics = vmap(loss, query, batch, key)
    return dataclasses.replace(clipped, residual=free.residual), statistics


def noise_in_the_memory():
    honest = feedback_release(DICE)

    def run(clipped, memory, step):
        mean, after = honest(clipped, memory, step)
        silent = dataclasses.replace(DICE, noise_multiplier=0.0)
        exact, _ = feedback_release(silent)(clipped, memory, step)
        noise = jax.tree.map(lambda a, b: (a - b) * 20, mean, exact)
        return mean, jax.tree.map(jnp.subtract, after, noise)

    return run


def memory_of_the_authors():
    honest = feedback_release(DICE)

    def run(clipped, memory, step):
        mean, _ = honest(clipped, memory, step)
        kept = jnp.minimum(1.0, 1.5 / jnp.linalg.norm(memory["a"]))
        kept = jnp.minimum(kept, 1 - kept)
        return mean, {"a": kept * memory["a"] + clipped.residual["a"]}

    return run


class NoiseOfTheAuthors(dpjax.DiceSgd):
    @property
    def noise_stddev(self):
        ratio = self.error_clip_norm / self.clip_norm
        return self.noise_multiplier * self.clip_norm * np.sqrt(1 + 2 * ratio)


class AmplifiedMemory(dpjax.DiceSgd):
    """The error as if it were of the examples drawn in the step alone."""

    def event(self, steps=None):
        steps = self.steps if steps is None else steps
        return self.sampling.compose(
            self.noise_multiplier, steps=steps, num_examples=self.num_examples
        )


class NoiseOfTheLastStep(dpjax.Diff2):
    """Scaled with the length of another step than the one that clips."""

    def noise_stddev(self, phase, radius):
        del radius
        return super().noise_stddev(phase, 0.5 * self.difference_clip_norm * 0.5)


class NoiseOfTheRestart(dpjax.Diff2):
    def noise_stddev(self, phase, radius):
        del phase, radius
        return super().noise_stddev("restart", self.clip_norm)


class NoiseMultiplierOfTheRestart(dpjax.Diff2):
    def noise_stddev(self, phase, radius):
        del phase
        return super().noise_stddev("restart", radius)


class NoiseSharedAmongWorkers(dpjax.Diff2):
    """Enough for the total, if nobody sees the parts."""

    def message(self, clipped, state, params, *, key, step, worker):
        less = self.noise_multiplier / np.sqrt(self.noisy_workers)
        honest = dpjax.Diff2(**vars(self) | {"noise_multiplier": less})
        return honest.message(clipped, state, params, key=key, step=step, worker=worker)


class AllRestarts(dpjax.Diff2):
    def event(self, steps=None):
        return dpjax.Diff2(**vars(self) | {"restart_every": 1}).event(steps)


class NoRestarts(dpjax.Diff2):
    def event(self, steps=None):
        return dpjax.Diff2(**vars(self) | {"restart_every": 10**6}).event(steps)


class LocalStepsForFree(dpjax.Diff2BvrLSgd):
    def event(self, steps=None):
        parts = super().event(steps).events
        rates = (part.event.sampling_probability for part in parts)
        return dp.ComposedDpEvent(
            [part for part, rate in zip(parts, rates, strict=True) if rate == 1.0]
        )


class LocalStepsAmplifiedTwice(dpjax.Diff2BvrLSgd):
    """Accounted as of a tenth of the examples of the round, which takes all."""

    def event(self, steps=None):
        halved = dataclasses.replace(self.sampling, rate=self.sampling.rate / 10)
        return dpjax.Diff2BvrLSgd(**vars(self) | {"sampling": halved}).event(steps)


class RestartsCountedInSteps(dpjax.Diff2BvrLSgd):
    def event(self, steps=None):
        longer = self.restart_every * self.sampling.period
        return dpjax.Diff2BvrLSgd(**vars(self) | {"restart_every": longer}).event(steps)


def adaptive_as(mutant, **changes):
    return mutant(**vars(ADAPTIVE) | changes)


def banded_as(mutant):
    return mutant(**vars(BAND_MF))


def diff2_as(mutant):
    return mutant(**vars(DIFF2))


class NoiseOfTheMultiplier(dpjax.BandMf):
    """As if no noise were taken back: its first step has too little."""

    def release(self, clipped, state, params, *, key, step):
        plain = dpjax.DpSgd(
            clip_norm=self.clip_norm,
            clip_style=self.clip_style,
            noise_multiplier=self.noise_multiplier,
            sampling=self.sampling,
            steps=self.steps,
            num_examples=self.num_examples,
            delta=self.delta,
        )
        return plain.release(clipped, (), params, key=key, step=step)[0], state


class NoisesForgotten(dpjax.BandMf):
    """After each resume, say."""

    def release(self, clipped, state, params, *, key, step):
        fresh = self.init(clipped.total)._replace(count=state.count)
        return super().release(clipped, fresh, params, key=key, step=step)


class NoisesOutOfOrder(dpjax.BandMf):
    def release(self, clipped, state, params, *, key, step):
        recent = jax.tree.map(lambda x: x[::-1], state.recent)
        mixed = state._replace(recent=recent)
        return super().release(clipped, mixed, params, key=key, step=step)


class ColumnNotNormalised(dpjax.BandMf):
    @property
    def noise_stddev(self):
        return super().noise_stddev / 1.179248  # the norm of 1, 1/2, 3/8


class PartsAnewInEachCycle(CyclicPoisson):
    def draw(self, step, *, num_examples, seed):
        turn = step // self.cycle
        return super().draw(step, num_examples=num_examples, seed=seed + turn)


class PlainPoisson(CyclicPoisson):
    def draw(self, step, *, num_examples, seed):
        honest = Poisson(rate=self.rate / self.cycle)
        return honest.draw(step, num_examples=num_examples, seed=seed)


class CyclesEndedAccounted(CyclicPoisson):
    def compose(self, noise_multiplier, *, steps, num_examples):
        turns = max(1, steps // self.cycle)
        return Poisson(rate=self.rate).compose(
            noise_multiplier, steps=turns, num_examples=num_examples
        )


class RateOfAllExamplesAccounted(CyclicPoisson):
    def compose(self, noise_multiplier, *, steps, num_examples):
        sampled = dataclasses.replace(self, rate=self.rate / self.cycle)
        return CyclicPoisson.compose(
            sampled, noise_multiplier, steps=steps, num_examples=num_examples
        )


class NoisyBySumAlone(dpjax.AdaptiveDpSgd):
    """As if the count cost nothing."""

    def noise_stddev(self, clip_norm):
        return self.noise_multiplier * clip_norm


class CountWithoutNoise(dpjax.AdaptiveDpSgd):
    @property
    def count_stddev(self):
        return 0.0


class HalfAlsoIfZeroedOut(dpjax.AdaptiveDpSgd):
    @property
    def count_sensitivity(self):
        return 0.5


class NoiseOfTheCountOnTheMean(dpjax.AdaptiveDpSgd):
    @property
    def count_stddev(self):
        return super().count_stddev / self.expected_batch_size


def counts_one_and_zero(loss, query, batch, key):
    """Not centred: one example moves it by 1."""
    clipped, statistics = vmap(loss, query, batch, key)
    count = clipped.count + 0.5 * jnp.asarray(batch.mask).sum()
    return dataclasses.replace(clipped, count=count), statistics


def counts_padding(loss, query, batch, key):
    clipped, statistics = vmap(loss, query, batch, key)
    padding = (~jnp.asarray(batch.mask)).sum()
    return dataclasses.replace(clipped, count=clipped.count + 0.5 * padding), statistics


class TwiceTheRate(Poisson):
    def draw(self, step, *, num_examples, seed):
        honest = Poisson(rate=2 * self.rate)
        return honest.draw(step, num_examples=num_examples, seed=seed)


class FixedSize(Poisson):
    def draw(self, step, *, num_examples, seed):
        rng = np.random.default_rng([seed, step])
        return rng.choice(num_examples, int(self.rate * num_examples), replace=False)


class ShuffledEpochs(Poisson):
    def draw(self, step, *, num_examples, seed):
        honest = dpjax.ShuffledFixed(batch_size=int(self.rate * num_examples))
        return honest.draw(step, num_examples=num_examples, seed=seed)


class SameBatchTwice(Poisson):
    def draw(self, step, *, num_examples, seed):
        honest = Poisson(rate=self.rate)
        return honest.draw(step // 2, num_examples=num_examples, seed=seed)


class UnaccountedTruncation(Poisson):
    def draw(self, step, *, num_examples, seed):
        honest = Poisson(rate=self.rate)
        return honest.draw(step, num_examples=num_examples, seed=seed)[:20]


class ContiguousBlock(Poisson):
    def draw(self, step, *, num_examples, seed):
        rng = np.random.default_rng([seed, step])
        size = rng.binomial(num_examples, self.rate)
        return (rng.integers(num_examples) + np.arange(size)) % num_examples


class SameBatchAgainLater(Poisson):
    def draw(self, step, *, num_examples, seed):
        honest = Poisson(rate=self.rate)
        return honest.draw(step % 100, num_examples=num_examples, seed=seed)


class SomeExamplesMoreOften(Poisson):
    def draw(self, step, *, num_examples, seed):
        honest = Poisson(rate=self.rate)
        drawn = honest.draw(step, num_examples=num_examples, seed=seed)
        return np.unique(np.where(drawn < 20, 0, drawn))


MUTANTS = {
    "no noise": (noise_check, no_noise()),
    "noise divided by the batch twice": (noise_check, noise_divided_twice()),
    "noise for another clip norm": (noise_check, noise_for_another_clip_norm()),
    "same key every step": (noise_check, same_key_every_step()),
    "key reused after resume": (noise_check, key_reused_after_resume()),
    "same noise in all leaves": (noise_check, same_noise_in_all_leaves()),
    "opposite noise at odd steps": (noise_check, opposite_noise_at_odd_steps()),
    "opposite noise in leaves": (noise_check, opposite_noise_in_leaves()),
    "uniform noise": (noise_check, uniform_noise()),
    "less noise after the third leaf": (exact_check, less_noise_after_the_third_leaf()),
    "leaves eight apart alike": (exact_check, leaves_eight_apart_alike()),
    "one half of the root key": (exact_check, half_a_root_key()),
    "step wraps at 2**16": (exact_check, step_wraps()),
    "a ten-thousandth of the sum in the release": (exact_check, released_sum_leaks()),
    "not rounded": (exact_check, not_rounded()),
    "rounded before the noise": (exact_check, rounded_before_the_noise()),
    "a ten-thousandth of the sum in the update": (
        transform_check,
        update_leaks_the_sum,
    ),
    "a thousandth of the sum in the average": (finish_check, average_fed_with_the_sum),
    "the sum in the norm that is logged": (finish_check, norm_fed_with_the_sum),
    "evaluated on the training data": (run_check, evaluated_on_the_training_data),
    "radius not guarded": (radius_check, diff2_as(RadiusNotGuarded)),
    "noise of the radius alone": (radius_check, diff2_as(NoiseOfTheRadiusAlone)),
    "noise of the first clip norm": (
        clip_norm_check,
        adaptive_as(NoiseOfTheFirstClipNorm),
    ),
    "mean instead of sum": (sum_check, mean_instead_of_sum()),
    "divided by another batch size": (sum_check, divided_by_another_batch_size()),
    "clip x10": (sensitivity_check, clip_times_ten),
    "clips the batch": (sensitivity_check, clips_the_batch_not_the_example),
    "counts examples twice": (sensitivity_check, counts_examples_twice),
    "forgets the mask": (contract_check, forgets_the_mask),
    "bound exceeded by sqrt(2)": (sensitivity_check, per_layer_norm_for_a_flat_bound),
    "other dropout at the second point": (
        difference_check,
        other_dropout_at_the_second_point,
    ),
    "noise of the last step": (
        difference_noise_check,
        difference_release(diff2_as(NoiseOfTheLastStep)),
    ),
    "noise of the restart": (
        difference_noise_check,
        difference_release(diff2_as(NoiseOfTheRestart)),
    ),
    "noise multiplier of the restart": (
        difference_noise_check,
        difference_release(diff2_as(NoiseMultiplierOfTheRestart)),
    ),
    "noise multiplier of the restart, accounted": (
        schedule_check,
        diff2_as(NoiseMultiplierOfTheRestart),
    ),
    "noise shared among workers": (
        message_check,
        NoiseSharedAmongWorkers(**vars(DIFF2) | {"noisy_workers": 4}),
    ),
    "all steps accounted as restarts": (schedule_check, diff2_as(AllRestarts)),
    "local steps for free": (schedule_check, LocalStepsForFree(**vars(LOCAL))),
    "local steps amplified twice": (
        schedule_check,
        LocalStepsAmplifiedTwice(**vars(LOCAL)),
    ),
    "restarts counted in steps": (
        schedule_check,
        RestartsCountedInSteps(**vars(LOCAL)),
    ),
    "no restarts accounted": (schedule_check, diff2_as(NoRestarts)),
    "other dropout behind": (slope_check, other_dropout_behind),
    "slope of the batch clipped": (slope_check, slope_of_the_batch_clipped),
    "slope over one span": (slope_check, slope_over_one_span),
    "direction of the step": (direction_check, DirectionOfTheStep(**vars(ZERO))),
    "fresh direction": (direction_check, FreshDirection(**vars(ZERO))),
    "residual not scaled": (residual_check, residual_not_scaled),
    "outer norm forgotten": (residual_check, outer_norm_forgotten),
    "noise in the memory": (memory_check, noise_in_the_memory()),
    "memory of the authors": (memory_check, memory_of_the_authors()),
    "noise of the authors": (feedback_noise_check, NoiseOfTheAuthors(**vars(DICE))),
    "amplified memory": (
        attack_check,
        AmplifiedMemory(**vars(CONSERVATIVE) | {"noise_multiplier": 1.2}),
    ),
    "noise of the paper": (attack_check, DICE),
    "noise not correlated": (correlation_check, banded_as(NoiseOfTheMultiplier)),
    "noises forgotten": (correlation_check, banded_as(NoisesForgotten)),
    "noises out of order": (correlation_check, banded_as(NoisesOutOfOrder)),
    "column not normalised": (correlation_check, banded_as(ColumnNotNormalised)),
    "parts anew in each cycle": (cyclic_check, PartsAnewInEachCycle(cycle=3, rate=0.3)),
    "poisson for cyclic": (cyclic_check, PlainPoisson(cycle=3, rate=0.3)),
    "cycles ended accounted": (cyclic_check, CyclesEndedAccounted(cycle=3, rate=0.3)),
    "rate of all examples accounted": (
        cyclic_check,
        RateOfAllExamplesAccounted(cycle=3, rate=0.3),
    ),
    "count costs nothing": (check_joint_release, adaptive_as(NoisyBySumAlone)),
    "count without noise": (check_joint_release, adaptive_as(CountWithoutNoise)),
    "noise of the count on the mean": (
        check_joint_release,
        adaptive_as(NoiseOfTheCountOnTheMean),
    ),
    "half also if zeroed out": (
        check_joint_release,
        adaptive_as(HalfAlsoIfZeroedOut, sampling=dpjax.ShuffledFixed(batch_size=20)),
    ),
    "count not centred": (sensitivity_check, counts_one_and_zero),
    "count of padding": (sensitivity_check, counts_padding),
    "rate x2": (sampling_check, TwiceTheRate(rate=0.1)),
    "fixed size": (sampling_check, FixedSize(rate=0.1)),
    "shuffled epochs": (sampling_check, ShuffledEpochs(rate=0.1)),
    "same batch twice": (sampling_check, SameBatchTwice(rate=0.1)),
    "unaccounted truncation": (sampling_check, UnaccountedTruncation(rate=0.1)),
    "contiguous block": (sampling_check, ContiguousBlock(rate=0.1)),
    "same batch again later": (sampling_check, SameBatchAgainLater(rate=0.1)),
    "some examples more often": (sampling_check, SomeExamplesMoreOften(rate=0.1)),
}


# One of each check at least; the others are long.
FIRST = {check: name for name, (check, _) in reversed(MUTANTS.items())}.values()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FIRST else pytest.mark.long)
        for name in MUTANTS
    ],
)
def test_mutant_is_caught(name):
    check, mutant = MUTANTS[name]
    with pytest.raises(AssertionError):
        check(mutant)


@pytest.mark.parametrize(
    ("check", "honest"),
    [
        (noise_check, release(MECHANISM)),
        (exact_check, release(MECHANISM)),
        (finish_check, lambda finish: finish),
        (transform_check, dpjax.private),
        (run_check, lambda experiment: experiment),
        (radius_check, DIFF2),
        (clip_norm_check, ADAPTIVE),
        (sum_check, release(MECHANISM)),
        (sensitivity_check, vmap),
        (contract_check, vmap),
        (difference_check, vmap),
        (difference_noise_check, difference_release(DIFF2)),
        (message_check, dataclasses.replace(DIFF2, noisy_workers=4)),
        (schedule_check, DIFF2),
        (schedule_check, LOCAL),
        (slope_check, vmap),
        (direction_check, ZERO),
        (residual_check, vmap),
        (memory_check, feedback_release(DICE)),
        (feedback_noise_check, DICE),
        (attack_check, CONSERVATIVE),
        (check_joint_release, ADAPTIVE),
        (correlation_check, BAND_MF),
        (cyclic_check, BAND_MF.sampling),
        (sampling_check, Poisson(rate=0.1)),
    ],
)
def test_the_honest_code_passes_the_same_checks(check, honest):
    check(honest)
