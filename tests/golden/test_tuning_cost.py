"""What a search costs, against dp_accounting called by hand and a closed form."""

import dataclasses
import math

import dp_accounting as dp
import pytest
import scipy.optimize
import scipy.stats
from dp_accounting import dp_event

import dpjax
from dpjax.mechanisms.dice_sgd import DiceSgd
from dpjax.privacy.accounting import tuning_cost

DELTA = 1e-5


def full_batch(noise_multiplier, *, steps=4, delta=DELTA):
    return dpjax.DpSgd(
        clip_norm=1.0,
        clip_style="flat",
        noise_multiplier=noise_multiplier,
        sampling=dpjax.FullBatch(),
        steps=steps,
        num_examples=1000,
        delta=delta,
    )


def gaussian_epsilon(mu):
    """The exact epsilon of a Gaussian mechanism (Balle and Wang 2018, theorem 8)."""

    def gap(epsilon):
        tail = scipy.stats.norm.cdf(-epsilon / mu - mu / 2)
        head = scipy.stats.norm.cdf(-epsilon / mu + mu / 2)
        return head - math.exp(epsilon) * tail - DELTA

    return scipy.optimize.brentq(gap, 0, 50)


def test_all_runs_compose_to_one_gaussian():
    plans = [full_batch(20.0)] * 5 + [full_batch(40.0, steps=8)] * 3
    cost = tuning_cost(plans)
    mu = math.sqrt(5 * 4 / 20**2 + 3 * 8 / 40**2)
    assert cost.composed == pytest.approx(gaussian_epsilon(mu), rel=2e-3)
    assert cost.composed >= gaussian_epsilon(mu)
    assert cost.dearest == pytest.approx(gaussian_epsilon(2 / 20), rel=2e-3)
    assert (cost.runs, cost.analysed) == (8, 8)


def test_runs_of_different_adjacency_have_no_common_epsilon():
    plain = full_batch(20.0)
    shuffled = dataclasses.replace(plain, sampling=dpjax.ShuffledFixed(batch_size=250))
    assert tuning_cost([shuffled]).composed > 0
    with pytest.raises(ValueError, match=r"\['add_or_remove_one', 'zero_out_one'\]"):
        tuning_cost([plain, shuffled])


def by_hand(event):
    orders = [*(1 + x / 10 for x in range(6, 100)), *range(11, 64), 128, 256, 512, 1024]
    accountant = dp.rdp.RdpAccountant(orders)
    return accountant.compose(event).get_epsilon(DELTA)


@pytest.mark.parametrize(("name", "shape"), [("geometric", 1.0), ("Poisson", math.inf)])
def test_the_best_of_a_random_number_is_what_dp_accounting_says(name, shape):
    plans = [full_batch(20.0)] * 40
    event = dp_event.RepeatAndSelectDpEvent(plans[0].event(), 40, shape)
    selected = tuning_cost(plans).selected[name]
    assert selected == pytest.approx(by_hand(event), rel=1e-12)
    # Far below all 40 runs, well above one.
    assert 2 * dpjax.epsilon(plans[0]) < selected
    two = [*plans, full_batch(30.0)]
    other = dp_event.RepeatAndSelectDpEvent(two[-1].event(), 1, shape)
    both = by_hand(dp.ComposedDpEvent([event, other]))
    assert tuning_cost(two).selected[name] == pytest.approx(both, rel=1e-12)


def test_golden_search():
    """40 runs at epsilon 0.73 each; computed here, with dp_accounting 0.6.0."""
    cost = tuning_cost([full_batch(10.0)] * 40)
    found = (cost.dearest, cost.composed, *cost.selected.values())
    assert found == pytest.approx((0.7255, 5.7595, 2.0054, 4.2351), abs=5e-4)


def test_what_rdp_cannot_analyse_is_left_out_and_counted():
    dice = DiceSgd(
        clip_norm=1.0,
        clip_style="flat",
        error_clip_norm=1.0,
        error_scale="sum",
        outer_norm=None,
        noise_multiplier=300.0,
        sampling=dpjax.Poisson(rate=0.1),
        steps=2,
        num_examples=1000,
        delta=DELTA,
    )
    plain = full_batch(20.0)
    cost = tuning_cost([plain, dice, dice])
    assert (cost.runs, cost.analysed, cost.claimed) == (3, 1, 0)
    assert cost.selected == tuning_cost([plain]).selected
    assert cost.composed > tuning_cost([plain]).composed
    assert tuning_cost([dice]).selected == {}


def test_claims_are_counted():
    claim = DiceSgd(
        clip_norm=1.0,
        clip_style="flat",
        error_clip_norm=1.0,
        error_scale="sum",
        outer_norm=2.0,
        noise_multiplier=20.0,
        sampling=dpjax.FullBatch(),
        steps=2,
        num_examples=1000,
        delta=DELTA,
        accounting="paper",
        accept_unproven_epsilon=True,
    )
    assert tuning_cost([full_batch(20.0), claim, claim]).claimed == 2


def test_without_noise_nothing_is_guaranteed():
    cost = tuning_cost([full_batch(20.0), full_batch(0.0)])
    assert math.isinf(cost.composed)
    assert math.isinf(cost.dearest)


def test_delta_must_be_one():
    with pytest.raises(ValueError, match=r"delta=\[1e-06, 1e-05\] must be the same"):
        tuning_cost([full_batch(20.0), full_batch(20.0, delta=1e-6)])
    with pytest.raises(ValueError, match=r"mechanisms=\[\] must be those of one run"):
        tuning_cost([])
