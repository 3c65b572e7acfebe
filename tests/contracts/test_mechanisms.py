"""One contract body over all mechanisms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax.mechanisms import DpSgd, NonPrivate
from dpjax.noise import root_key
from dpjax.sampling import FullBatch, Poisson, ShuffledFixed, TruncatedPoisson
from dpjax.sensitive import ClippedSum
from tests.checks import check_adds_to_sum, check_noise

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


MECHANISMS = {
    "dp_sgd poisson": dp_sgd(),
    "dp_sgd per layer": dp_sgd(clip_style="per_layer"),
    "dp_sgd truncated": dp_sgd(sampling=TruncatedPoisson(rate=0.1, capacity=130)),
    "dp_sgd full batch": dp_sgd(sampling=FullBatch()),
    "dp_sgd shuffled": dp_sgd(sampling=ShuffledFixed(batch_size=100)),
    "non-private": NonPrivate(sampling=ShuffledFixed(batch_size=100), **PLAN),
}
PRIVATE = {name: m for name, m in MECHANISMS.items() if m.private}
all_mechanisms = pytest.mark.parametrize("name", MECHANISMS)
all_private = pytest.mark.parametrize("name", PRIVATE)


def release(mechanism, clipped, step):
    mean, _ = jax.jit(mechanism.release)(
        clipped, mechanism.init(clipped.total), None, key=root_key(0), step=step
    )
    return mean


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
    assert math.isnan(rdp) == isinstance(mechanism.sampling, TruncatedPoisson)
    assert math.isnan(rdp) or dpjax.epsilon(mechanism) <= rdp


@all_private
def test_noise_has_the_derived_scale_and_never_repeats(name):
    mechanism = MECHANISMS[name]
    check_noise(
        lambda clipped, step: release(mechanism, clipped, step),
        stddev=mechanism.noise_stddev,
        divisor=mechanism.expected_batch_size,
        clip_norm=mechanism.clip_norm,
    )


@all_private
def test_release_divides_the_sum_by_the_public_constant(name):
    mechanism = MECHANISMS[name]
    check_adds_to_sum(
        lambda clipped, step: release(mechanism, clipped, step),
        divisor=mechanism.expected_batch_size,
        clip_norm=mechanism.clip_norm,
    )


@all_private
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
    ("name", "harm"),
    # Nothing bounds what NonPrivate releases: only its seal can break.
    [*((name, "seal") for name in MECHANISMS), *((name, "bound") for name in PRIVATE)],
)
def test_a_sum_that_was_tampered_with_comes_out_as_nan(name, harm):
    mechanism = MECHANISMS[name]
    bound = mechanism.clip_norm if mechanism.private else math.inf
    clipped = ClippedSum.zeros({"w": jnp.zeros(3)}, l2_bound=bound)
    assert np.isfinite(release(mechanism, clipped, 0)["w"]).all()
    if harm == "seal":
        broken = dataclasses.replace(clipped, seal=clipped.seal * 0.99)
    else:
        broken = dataclasses.replace(clipped, l2_bound=clipped.l2_bound * 1.01)
    assert np.isnan(release(mechanism, broken, 0)["w"]).all()


@pytest.mark.parametrize("name", ["dp_sgd poisson", "dp_sgd full batch"])
@pytest.mark.parametrize("target", [0.5, 3.0])
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
