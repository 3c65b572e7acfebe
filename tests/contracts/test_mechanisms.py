"""One contract body over all mechanisms."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax.mechanisms import (
    AdaptiveDpSgd,
    BandMf,
    DiceSgd,
    Diff2,
    Diff2BvrLSgd,
    DpSgd,
    DpZero,
    NonPrivate,
    PrivatizedErrorFeedback,
    ScheduledDpSgd,
    SpiderBoost,
)
from dpjax.mechanisms.mathematics.directions import gaussian_direction
from dpjax.privacy.noise import root_key
from dpjax.privacy.sampling import (
    CyclicPoisson,
    FullBatch,
    PeriodicPoisson,
    Poisson,
    ShuffledFixed,
    TruncatedPoisson,
)
from dpjax.privacy.sensitive import ClippedSum
from tests.checks import RELEASED, check_adds_to_sum, check_noise, thinned

PLAN = {"steps": 50, "num_examples": 1000, "delta": 1e-5}


def dp_sgd(**changes):
    facts = {
        "clip_norm": 0.5,
        "clip_style": "flat",
        "noise_multiplier": 4.0,
        "sampling": Poisson(rate=0.1),
        **PLAN,
    }
    return DpSgd(**(facts | changes))


def diff2(**changes):
    facts = {
        "clip_norm": 0.5,
        "difference_clip_norm": 0.8,
        "restart_every": 5,
        "noise_multiplier": 20.0,
        "noise_ratio": 2.0,
        "noisy_workers": 1,
        "sampling": FullBatch(),
        **PLAN,
    }
    return Diff2(**(facts | changes))


def bvr_l_sgd(**changes):
    facts = {
        "clip_norm": 0.5,
        "difference_clip_norm": 0.8,
        "local_clip_norm": 0.6,
        "restart_every": 2,
        "noise_multiplier": 20.0,
        "noise_ratio": 2.0,
        "local_noise_ratio": 0.25,
        "sampling": PeriodicPoisson(period=3, first_rate=1.0, rate=0.1),
        **PLAN,
    }
    return Diff2BvrLSgd(**(facts | changes))


def spider_boost(**changes):
    facts = {
        "clip_norm": 0.5,
        "difference_clip_norm": 0.8,
        "noise_multiplier": 4.0,
        "noise_ratio": 1.5,
        "sampling": PeriodicPoisson(period=5, first_rate=0.2, rate=0.1),
        **PLAN,
    }
    return SpiderBoost(**(facts | changes))


def dp_zero(**changes):
    facts = {
        "clip_norm": 0.5,
        "smoothing": 1e-3,
        "direction_seed": 7,
        "noise_multiplier": 4.0,
        "sampling": Poisson(rate=0.1),
        **PLAN,
    }
    return DpZero(**(facts | changes))


def dice_sgd(accounting, **changes):
    facts = {
        "clip_norm": 0.5,
        "clip_style": "flat",
        "error_clip_norm": 0.75,
        "error_scale": "sum",
        "outer_norm": 1.5,
        "noise_multiplier": 20.0,
        "sampling": Poisson(rate=0.1),
        "accounting": accounting,
        "accept_unproven_epsilon": accounting == "paper",
        **PLAN,
    }
    return DiceSgd(**(facts | changes))


def band_mf(**changes):
    facts = {
        "clip_norm": 0.5,
        "clip_style": "flat",
        "noise_multiplier": 4.0,
        "bands": 3,
        "strategy": "square_root",
        "sampling": CyclicPoisson(cycle=4, rate=0.4),
        **PLAN,
    }
    return BandMf(**(facts | changes))


def constant(value, step):
    return value


def scheduled(**changes):
    facts = {
        "clip_schedule": functools.partial(constant, 0.5),
        "noise_schedule": functools.partial(constant, 1.0),
        "noise_multiplier": 4.0,
        "sampling": Poisson(rate=0.1),
        **PLAN,
    }
    return ScheduledDpSgd(**(facts | changes))


def adaptive(**changes):
    facts = {
        "initial_clip_norm": 0.5,
        "min_clip_norm": 1e-3,
        "max_clip_norm": 10.0,
        "target_quantile": 0.7,
        "clip_learning_rate": 0.2,
        "count_share": 0.36,
        "noise_multiplier": 4.0,
        "sampling": Poisson(rate=0.1),
        **PLAN,
    }
    return AdaptiveDpSgd(**(facts | changes))


MECHANISMS = {
    "dp_sgd poisson": dp_sgd(),
    "dp_sgd per layer": dp_sgd(clip_style="per_layer"),
    "dp_sgd truncated": dp_sgd(sampling=TruncatedPoisson(rate=0.1, capacity=130)),
    "dp_sgd full batch": dp_sgd(sampling=FullBatch()),
    "dp_sgd shuffled": dp_sgd(sampling=ShuffledFixed(batch_size=100)),
    "dp_sgd cyclic": dp_sgd(sampling=CyclicPoisson(cycle=5, rate=0.5)),
    "scheduled": scheduled(),
    "adaptive": adaptive(),
    "band_mf": band_mf(),
    "band_mf fixed order": band_mf(sampling=CyclicPoisson(cycle=5, rate=1.0)),
    "dice_sgd": dice_sgd("conservative", clip_style="automatic", outer_norm=None),
    "dice_sgd full batch": dice_sgd("conservative", sampling=FullBatch()),
    "dice_sgd outer clip": dice_sgd("outer_clip", error_clip_norm=None),
    "dice_sgd shuffled": dice_sgd(
        "k_participation",
        noise_multiplier=2.0,
        sampling=ShuffledFixed(batch_size=100),
    ),
    "dice_sgd paper": dice_sgd("paper", noise_multiplier=2.0),
    "two channels": PrivatizedErrorFeedback(
        clip_norm=0.5,
        outer_norm=1.5,
        noise_multiplier=4.0,
        residual_share=0.36,
        memory_rate=0.3,
        sampling=Poisson(rate=0.1),
        **PLAN,
    ),
    "dp_zero": dp_zero(),
    "diff2": diff2(),
    "diff2 four workers": diff2(noisy_workers=4),
    "diff2 bvr-l-sgd": bvr_l_sgd(),
    "spider boost": spider_boost(),
    "spider boost capped": spider_boost(difference_clip_norm=50.0),
    "non-private": NonPrivate(sampling=ShuffledFixed(batch_size=100), **PLAN),
}
PRIVATE = {name: m for name, m in MECHANISMS.items() if m.private}
all_mechanisms = pytest.mark.parametrize("name", MECHANISMS)
all_private = pytest.mark.parametrize("name", PRIVATE)


class Kind(NamedTuple):
    """What a release of one phase must be, when the parameters have moved by 1."""

    step: int  # of this phase
    bound: float
    stddev: float
    divisor: float
    every: int = 5  # steps from one of this phase to another


def kinds(name):
    """By hand from the facts above."""
    mechanism = MECHANISMS[name]
    if isinstance(mechanism, DpSgd):
        size = mechanism.expected_batch_size
        return {"gradient": Kind(0, 0.5, 2.0, size)}
    if isinstance(mechanism, DpZero):
        return {"slope": Kind(0, 0.5, 2.0, mechanism.expected_batch_size)}
    return {
        "non-private": {"gradient": Kind(0, math.inf, 0.0, 100.0)},
        "scheduled": {"gradient": Kind(0, 0.5, 4 * 0.5, 100.0)},
        "adaptive": {"gradient": Kind(0, 0.5, 4 * 0.5 / 0.8, 100.0)},
        # The norm of 1, 1/2, 3/8 is 1.179248.
        "band_mf": {"gradient": Kind(0, 0.5, 4 * 0.5 * 1.179248, 100.0)},
        "band_mf fixed order": {"gradient": Kind(0, 0.5, 4 * 0.5 * 1.179248, 200.0)},
        # 2 C2 + C1; G; sqrt(5) C1 + 5 (G - C1) in 5 epochs; sqrt(C1^2 + 2 C2^2).
        "dice_sgd": {"gradient": Kind(0, 0.5, 20 * 2.0, 100.0)},
        "dice_sgd full batch": {"gradient": Kind(0, 0.5, 20 * 2.0, 1000.0)},
        "dice_sgd outer clip": {"gradient": Kind(0, 0.5, 20 * 1.5, 100.0)},
        "dice_sgd shuffled": {"gradient": Kind(0, 0.5, 2 * 6.11803, 100.0)},
        "dice_sgd paper": {"gradient": Kind(0, 0.5, 2 * 1.172604, 100.0)},
        # 4 * .5 / .8 and .3 of 4 * 1 / .6, in the first step.
        "two channels": {"gradient": Kind(0, 0.5, math.hypot(2.5, 2.0), 100.0)},
        "diff2": {
            "restart": Kind(0, 0.5, 10.0, 1000.0),
            "difference": Kind(1, 0.8, 32.0, 1000.0),
        },
        "diff2 four workers": {
            "restart": Kind(0, 0.5, 20.0, 1000.0),
            "difference": Kind(1, 0.8, 64.0, 1000.0),
        },
        # z2 C2 and z3 C3; all examples, but for local steps.
        "diff2 bvr-l-sgd": {
            "restart": Kind(0, 0.5, 10.0, 1000.0, every=6),
            "difference": Kind(3, 0.8, 32.0, 1000.0, every=6),
            "local": Kind(2, 0.6, 3.0, 100.0, every=6),
        },
        "spider boost": {
            "restart": Kind(0, 0.5, 2.0, 200.0),
            "difference": Kind(1, 0.8, 4.8, 100.0),
        },
        "spider boost capped": {
            "restart": Kind(0, 0.5, 2.0, 200.0),
            "difference": Kind(1, 1.0, 6.0, 100.0),
        },
    }[name]


KINDS = [(name, phase) for name in MECHANISMS for phase in kinds(name)]
all_releases = pytest.mark.parametrize(
    ("name", "phase"), [kind for kind in KINDS if kind[0] in PRIVATE]
)


def moved_by_one(mechanism, like):
    """A state, and parameters at distance 1 from the last ones."""
    size = sum(x.size for x in jax.tree.leaves(like))
    zeros = jax.tree.map(jnp.zeros_like, like)
    params = jax.tree.map(lambda x: x + 1 / math.sqrt(size), zeros)
    return mechanism.init(zeros), params


def release(mechanism, clipped, step):
    if isinstance(mechanism, DpZero):
        return slopes_released(mechanism, clipped, step)
    state, params = moved_by_one(mechanism, clipped.total)
    asked = mechanism.query(clipped.phase, params, state)
    if asked.residual:
        clipped = dataclasses.replace(
            clipped,
            residual=jax.tree.map(jnp.zeros_like, clipped.total),
            outer_norm=jnp.float32(asked.outer_norm),
        )
    if asked.count:
        clipped = dataclasses.replace(clipped, count=jnp.float32(0))
    if "count" in getattr(state, "_fields", ()):
        state = state._replace(count=jnp.int32(step))
    mean, _ = _compiled_release(mechanism)(clipped, state, params, root_key(0), step)
    return mean


def slopes_released(mechanism, clipped, step):
    """Each entry of the sum is a sum of slopes, released with a root key of its own."""
    totals, treedef = jax.tree.flatten(clipped.total)
    count = sum(t.size for t in totals)
    words = jax.random.bits(jax.random.key(0), (count, 2, 2), jnp.uint32)
    roots = jax.random.wrap_key_data(words)
    flat = jnp.concatenate([jnp.ravel(t) for t in totals])
    asked = dataclasses.replace(clipped, total=flat)
    found = _compiled_slopes(mechanism)(asked, roots, step)
    parts = np.split(found, np.cumsum([t.size for t in totals])[:-1])
    shaped = [p.reshape(t.shape) for p, t in zip(parts, totals, strict=True)]
    return treedef.unflatten(shaped)


@functools.cache
def _compiled_slopes(mechanism):
    params = {"w": jnp.zeros(3)}

    def one(total, asked, root, step):
        asked = dataclasses.replace(asked, total=total)
        state = mechanism.init(params)._replace(step=step)
        out, _ = mechanism.release(asked, state, params, key=root, step=step)
        u = gaussian_direction(params, seed=7, step=step)["w"]
        return jnp.dot(out["w"], u) / jnp.dot(u, u)

    each = jax.vmap(one, in_axes=(0, None, 0, None))
    return jax.jit(lambda asked, roots, step: each(asked.total, asked, roots, step))


@functools.cache
def _compiled_release(mechanism):
    return jax.jit(
        lambda clipped, state, params, key, step: mechanism.release(
            clipped, state, params, key=key, step=step
        )
    )


def releases(name, phase):
    """``(sum, i) -> `` the release of the i-th step of this phase."""
    mechanism = MECHANISMS[name]

    def run(clipped, i):
        kind = kinds(name)[phase]
        asked = dataclasses.replace(clipped, phase=phase)
        return release(mechanism, asked, kind.step + kind.every * i)

    return run


@all_mechanisms
def test_epsilon_grows_with_steps_and_is_zero_before_the_first(name):
    mechanism = MECHANISMS[name]
    assert dpjax.epsilon(mechanism, steps=0) == 0.0
    curve = [dpjax.epsilon(mechanism, steps=s) for s in (1, 50)]
    assert curve == sorted(curve)
    assert curve[0] > 0
    assert dpjax.epsilon(mechanism) == curve[-1]


@all_mechanisms
def test_steps_beyond_the_plan_have_no_epsilon(name):
    with pytest.raises(ValueError, match="steps=51 is outside the plan"):
        dpjax.epsilon(MECHANISMS[name], steps=51)


@all_private
def test_pld_epsilon_is_at_most_the_rdp_cross_check(name):
    mechanism = MECHANISMS[name]
    rdp = dpjax.epsilon(mechanism, accountant="rdp")
    assert math.isnan(rdp) == (name in ("dp_sgd truncated", "dice_sgd"))
    assert math.isnan(rdp) or dpjax.epsilon(mechanism) <= rdp


@all_releases
def test_noise_has_the_derived_scale_and_never_repeats(name, phase):
    kind = kinds(name)[phase]
    check_noise(
        releases(name, phase),
        stddev=kind.stddev,
        divisor=kind.divisor,
        clip_norm=kind.bound,
    )


@all_releases
def test_release_divides_the_sum_by_the_public_constant(name, phase):
    kind = kinds(name)[phase]
    check_adds_to_sum(releases(name, phase), divisor=kind.divisor, clip_norm=kind.bound)


@pytest.mark.parametrize(("name", "phase"), KINDS)
def test_the_query_asks_for_what_the_release_takes(name, phase):
    mechanism, kind = MECHANISMS[name], kinds(name)[phase]
    assert mechanism.phase(kind.step) == phase
    state, params = moved_by_one(mechanism, {"w": jnp.zeros(3)})
    asked = mechanism.query(phase, params, state)
    assert asked.phase == phase
    np.testing.assert_allclose(asked.clip_norm, kind.bound, rtol=1e-6)
    for point, expected in zip(
        asked.points, (params, {"w": jnp.zeros(3)}), strict=False
    ):
        np.testing.assert_array_equal(point["w"], expected["w"])
    differs = phase in ("difference", "local")
    assert asked.signs == ((1.0, -1.0) if differs else (1.0,))


@pytest.mark.parametrize(
    "name", [n for n, m in PRIVATE.items() if isinstance(m, DpSgd)]
)
@pytest.mark.parametrize("fact", ["clip_norm", "noise_multiplier"])
def test_replacing_a_fact_moves_everything_derived_from_it(name, fact):
    mechanism = MECHANISMS[name]
    doubled = dataclasses.replace(mechanism, **{fact: 2 * getattr(mechanism, fact)})
    assert doubled.noise_stddev == 2 * mechanism.noise_stddev
    cheaper = dpjax.epsilon(doubled) < dpjax.epsilon(mechanism)
    assert cheaper == (fact == "noise_multiplier")
    query = doubled.query("gradient", jnp.zeros(3), ())
    assert query.clip_norm == doubled.clip_norm
    assert query.style == doubled.clip_style


@pytest.mark.parametrize(
    ("name", "phase", "harm"),
    # Nothing bounds what NonPrivate releases: only its seal can break.
    [
        (*kind, harm)
        for kind in KINDS
        for harm in ("seal", "bound", "step")
        if harm == "seal" or kind[0] in PRIVATE
        if harm != "step" or kind[1] not in ("gradient", "slope")
    ],
)
def test_a_sum_that_was_tampered_with_comes_out_as_nan(name, phase, harm):
    mechanism, kind = MECHANISMS[name], kinds(name)[phase]
    clipped = ClippedSum.zeros(RELEASED, l2_bound=kind.bound, phase=phase)
    assert all(
        np.isfinite(x).all() for x in release(mechanism, clipped, kind.step).values()
    )
    changes = {
        "seal": {"seal": clipped.seal * 0.99},
        "bound": {"l2_bound": clipped.l2_bound * 1.01},
        "step": {},
    }[harm]
    step = kind.step + 4 if harm == "step" else kind.step
    broken = dataclasses.replace(clipped, **changes)
    assert all(np.isnan(x).all() for x in release(mechanism, broken, step).values())


@pytest.mark.parametrize(
    ("target", "name"),
    thinned(
        [
            (target, name)
            for target in (0.5, 3.0)
            for name in (
                "dp_sgd poisson",
                "dp_sgd full batch",
                "dice_sgd shuffled",
                "diff2",
            )
        ],
        3,
    ),
)
def test_calibration_meets_the_target_from_below(name, target):
    mechanism = PRIVATE[name]
    found = dpjax.calibrate(
        lambda z: dataclasses.replace(mechanism, noise_multiplier=z), epsilon=target
    )
    assert 0.99 * target < dpjax.epsilon(found) <= target


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dp_sgd(clip_norm=0.0), "clip_norm=0.0 must be positive and finite"),
        (lambda: dp_sgd(clip_norm=-1.0), "clip_norm=-1.0 must be positive"),
        (lambda: dp_sgd(clip_style="layers"), "clip_style='layers' is unknown"),
        (lambda: dp_sgd(noise_multiplier=-0.1), "noise_multiplier=-0.1 must be"),
        (lambda: dp_sgd(noise_multiplier=math.nan), "noise_multiplier=nan must be"),
        (lambda: dp_sgd(steps=0), "steps=0 must be an integer of at least 1"),
        (lambda: dp_sgd(steps=1.5), "steps=1.5 must be an integer"),
        (lambda: dp_sgd(num_examples=0), "num_examples=0 must be an integer"),
        (lambda: dp_sgd(delta=0.0), r"delta=0.0 must be in \(0, 1\)"),
        (lambda: dp_sgd(delta=1.0), r"delta=1.0 must be in \(0, 1\)"),
        (
            lambda: dp_sgd(sampling=ShuffledFixed(batch_size=2000)),
            "batch_size=2000 exceeds num_examples=1000",
        ),
        (lambda: dp_zero(smoothing=0.0), "smoothing=0.0 must be positive and finite"),
        (
            lambda: dp_zero(direction_seed=None),
            "direction_seed=None must be an integer",
        ),
        (lambda: dp_zero(clip_norm=0.0), "clip_norm=0.0 must be positive"),
        (
            lambda: adaptive(initial_clip_norm=20.0),
            "initial_clip_norm=20.0 must be between min_clip_norm=0.001 and "
            "max_clip_norm=10.0",
        ),
        (lambda: adaptive(min_clip_norm=0.0), "clip_norm=0.0 must be positive"),
        (lambda: adaptive(max_clip_norm=math.inf), "clip_norm=inf must be positive"),
        (lambda: adaptive(target_quantile=1.0), r"target_quantile=1.0 must be in \(0"),
        (lambda: adaptive(count_share=0.0), r"count_share=0.0 must be in \(0, 1\)"),
        (
            lambda: adaptive(clip_learning_rate=0.0),
            "clip_learning_rate=0.0 must be positive",
        ),
        (lambda: adaptive(noise_multiplier=-1.0), "noise_multiplier=-1.0 must be"),
        (lambda: band_mf(bands=0), "bands=0 must be an integer of at least 1"),
        (lambda: band_mf(bands=51), "bands=51 exceeds steps=50"),
        (lambda: band_mf(strategy="optimal"), "strategy='optimal' is unknown"),
        (lambda: band_mf(clip_norm=0.0), "clip_norm=0.0 must be positive"),
        (lambda: band_mf(noise_multiplier=-1.0), "noise_multiplier=-1.0 must be"),
        (
            lambda: band_mf(bands=5),
            r"CyclicPoisson\(cycle=4, rate=0.4\) .* twice within bands=5 steps, .* use "
            r"CyclicPoisson\(cycle=5",
        ),
        (
            lambda: band_mf(sampling=ShuffledFixed(batch_size=100)),
            "with rate=1.0 for batches in a fixed order",
        ),
        (lambda: band_mf(sampling=Poisson(rate=0.1)), "which has no analysis"),
        (lambda: band_mf(sampling=FullBatch()), "which has no analysis"),
        (lambda: diff2(clip_norm=0.0), "clip_norm=0.0 must be positive"),
        (
            lambda: diff2(difference_clip_norm=0.0),
            "difference_clip_norm=0.0 must be positive",
        ),
        (lambda: diff2(restart_every=0), "restart_every=0 must be an integer"),
        (lambda: diff2(noise_multiplier=-1.0), "noise_multiplier=-1.0 must be"),
        (lambda: diff2(noise_ratio=0.0), "noise_ratio=0.0 must be positive"),
        (lambda: diff2(noisy_workers=0), "noisy_workers=0 must be an integer"),
        (
            lambda: diff2(noisy_workers=1001),
            "noisy_workers=1001 exceeds num_examples=1000",
        ),
        (lambda: diff2(sampling=Poisson(rate=0.1)), "for Poisson batches use Spider"),
        (
            lambda: bvr_l_sgd(sampling=Poisson(rate=0.1)),
            "must be PeriodicPoisson.*without local steps use Diff2",
        ),
        (
            lambda: bvr_l_sgd(sampling=ShuffledFixed(batch_size=10)),
            "must be PeriodicPoisson.*without local steps use Diff2",
        ),
        (
            lambda: bvr_l_sgd(local_clip_norm=0.0),
            "local_clip_norm=0.0 must be positive",
        ),
        (
            lambda: bvr_l_sgd(local_noise_ratio=math.inf),
            "local_noise_ratio=inf must be positive and finite",
        ),
        (lambda: bvr_l_sgd(restart_every=0), "restart_every=0 must be an integer"),
        (lambda: spider_boost(sampling=FullBatch()), "for full batches use Diff2"),
        (lambda: spider_boost(sampling=Poisson(rate=0.1)), "must be PeriodicPoisson"),
        (lambda: spider_boost(difference_clip_norm=-1.0), "difference_clip_norm=-1.0"),
        (
            lambda: dpjax.calibrate(lambda z: dp_sgd(), epsilon=0.0),
            "epsilon=0.0 must be",
        ),
        (
            lambda: dpjax.calibrate(lambda z: dp_sgd(), epsilon=math.inf),
            "use the NonPrivate mechanism",
        ),
        (
            lambda: dpjax.epsilon(dp_sgd(), accountant="prv"),
            "accountant='prv' is unknown",
        ),
    ],
)
def test_impossible_plans_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_noise_epsilon_is_infinite():
    assert dpjax.epsilon(dp_sgd(noise_multiplier=0.0)) == math.inf


def test_non_private_epsilon_is_infinite_and_its_release_the_exact_mean():
    mechanism = MECHANISMS["non-private"]
    assert dpjax.epsilon(mechanism) == math.inf
    clipped = ClippedSum.zeros({"w": jnp.zeros(4)}, l2_bound=math.inf)
    clipped = dataclasses.replace(clipped, total={"w": jnp.arange(4.0)})
    mean = release(mechanism, clipped, 0)
    np.testing.assert_array_equal(mean["w"], np.arange(4, dtype=np.float32) / 100)
