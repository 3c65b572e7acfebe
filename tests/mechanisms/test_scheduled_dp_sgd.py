"""Clip norm and noise by public functions of the step, each step accounted with its own."""

import dataclasses
import math

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpjax
from dpjax.privacy.noise import root_key
from dpjax.privacy.sensitive import ClippedSum
from dpjax.training.config import check
from tests.contracts.test_mechanisms import dp_sgd, scheduled
from tests.golden.test_configs import resolved

PLAN = scheduled(
    clip_schedule=optax.linear_schedule(1.0, 0.5, 4),
    noise_schedule=lambda step: 2.0 ** (step // 2),
    noise_multiplier=3.0,
    steps=6,
)
CLIP_NORMS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.5)
MULTIPLIERS = (3.0, 3.0, 6.0, 6.0, 12.0, 12.0)


def test_every_step_is_clipped_and_noised_as_its_schedules_say():
    state = PLAN.init({})
    release = jax.jit(lambda *args, key, step: PLAN.release(*args, key=key, step=step))
    for step in range(6):
        asked = PLAN.query("gradient", {"w": jnp.zeros(4000)}, state)
        assert asked.clip_norm == CLIP_NORMS[step]
        total = ClippedSum.zeros({"w": jnp.zeros(4000)}, l2_bound=asked.clip_norm)
        mean, state = release(total, state, {}, key=root_key(0), step=step)
        spread = np.std(mean["w"]) * PLAN.expected_batch_size
        assert spread == pytest.approx(MULTIPLIERS[step] * CLIP_NORMS[step], rel=0.05)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_every_step_costs_what_its_own_multiplier_costs(steps):
    parts = [
        dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(z))
        for z in MULTIPLIERS[:steps]
    ]
    accountant = dp.rdp.RdpAccountant()
    accountant.compose(dp.ComposedDpEvent(parts))
    expected = accountant.get_epsilon(PLAN.delta)
    found = dpjax.epsilon(PLAN, steps=steps, accountant="rdp")
    assert found == pytest.approx(expected, rel=0.05)
    assert dpjax.epsilon(PLAN, steps=steps) <= found


def test_constant_schedules_are_dp_sgd():
    assert dpjax.epsilon(scheduled()) == pytest.approx(
        dpjax.epsilon(dp_sgd()), rel=1e-6
    )


def test_multipliers_are_rounded_up_and_by_little():
    scales = np.geomspace(0.3, 7, 50)
    plan = dataclasses.replace(PLAN, noise_schedule=lambda t: scales[t], steps=50)
    ratio = np.array(plan.noise_multipliers) / (3 * scales)
    assert (ratio >= 1 - 1e-6).all()
    assert (ratio <= 2 ** (1 / 32) + 1e-6).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_schedule": 1.0}, "clip_schedule=1.0 must be a function of the step"),
        ({"clip_schedule": lambda t: 1.0 - t}, "clip_norm=0.0 must be positive"),
        ({"noise_schedule": lambda t: 1.0 - t}, r"noise_schedule\(1\)=0.0 must be"),
        ({"noise_schedule": lambda t: math.nan}, r"noise_schedule\(0\)=nan must be"),
        (
            {"sampling": dpjax.CyclicPoisson(cycle=3, rate=0.5)},
            "does not treat all steps alike",
        ),
    ],
)
def test_schedules_that_make_no_plan_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        scheduled(**changes)


@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier"])
def test_a_schedule_where_a_number_is_wanted_is_told_of(name):
    with pytest.raises(
        ValueError,
        match=f"{name}=.*: a number is wanted; public schedules: ScheduledDpSgd",
    ):
        dp_sgd(**{name: optax.constant_schedule(1.0)})


class StepNoise(dpjax.DpSgd):
    """A mechanism of one's own that inherits its fields."""


def test_a_mechanism_that_inherits_takes_an_epsilon():
    config = resolved("digits_mlp_dpsgd")
    config["mechanism"]["name"] = f"{__name__}:StepNoise"
    check(config)
    assert config["mechanism"]["epsilon"] == 3.0
