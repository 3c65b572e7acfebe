"""One contract body over all samplings."""

import math
import tracemalloc

import dp_accounting as dp
import numpy as np
import pytest

from dpjax.privacy.sampling import (
    CyclicPoisson,
    FullBatch,
    PeriodicPoisson,
    Poisson,
    ShuffledFixed,
    TruncatedPoisson,
    secret_seed,
)
from tests.checks import check_cyclic, check_poisson

SAMPLINGS = {
    "poisson": Poisson(rate=0.1),
    "poisson of rate 1": Poisson(rate=1.0),
    "truncated": TruncatedPoisson(rate=0.1, capacity=25),
    "periodic": PeriodicPoisson(period=4, first_rate=0.3, rate=0.05),
    "cyclic": CyclicPoisson(cycle=3, rate=0.25),
    "cyclic of rate 1": CyclicPoisson(cycle=3, rate=1.0),
    "full": FullBatch(),
    "shuffled": ShuffledFixed(batch_size=16),
}
all_samplings = pytest.mark.parametrize(
    "sampling", SAMPLINGS.values(), ids=list(SAMPLINGS)
)
N = 200


def draw(sampling, step, seed=1):
    return sampling.draw(step, num_examples=N, seed=seed)


@all_samplings
def test_draw_is_a_pure_function_of_seed_and_step(sampling):
    forward = [draw(sampling, step) for step in range(30)]
    backward = [draw(sampling, step) for step in reversed(range(30))][::-1]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(one, other)


@all_samplings
@pytest.mark.parametrize("steps", [1, 12, 13, 30])
def test_no_example_takes_part_more_often_than_is_said(sampling, steps):
    taken = np.zeros(N, int)
    for step in range(steps):
        taken[draw(sampling, step)] += 1
    most = sampling.max_participations(steps=steps, num_examples=N)
    assert taken.max() <= most
    if not sampling.amplified:
        assert taken.max() == most


@pytest.mark.parametrize(
    "sampling",
    [
        Poisson(rate=1e-3),
        TruncatedPoisson(rate=1e-3, capacity=1_000_500),
        PeriodicPoisson(period=4, first_rate=1e-3, rate=1e-5),
    ],
    ids=lambda sampling: type(sampling).__name__,
)
def test_a_million_of_a_billion_examples_are_drawn_in_little_memory(sampling):
    tracemalloc.start()
    drawn = sampling.draw(0, num_examples=10**9, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert abs(len(drawn) - 1e6) < 6e3
    assert len(np.unique(drawn)) == len(drawn)
    # Uniform: no tenth has more or less than its share.
    shares = np.bincount(drawn // 10**8, minlength=10) / len(drawn)
    assert np.abs(shares - 0.1).max() < 6 * math.sqrt(0.09 / 1e6)


@all_samplings
def test_draws_are_distinct_indices_in_range(sampling):
    for step in range(30):
        indices = draw(sampling, step)
        assert indices.dtype == np.int64
        assert len(np.unique(indices)) == len(indices)
        assert ((indices >= 0) & (indices < N)).all()


@pytest.mark.parametrize(
    "name", ["poisson", "periodic", "truncated", "cyclic", "shuffled"]
)
def test_seeds_and_steps_draw_differently(name):
    sampling = SAMPLINGS[name]
    draws = {
        tuple(np.sort(draw(sampling, step, seed)))
        for step in range(10)
        for seed in (1, 2, 2**100, 2**127 + 5)
    }
    assert len(draws) == 40


@all_samplings
def test_expected_batch_size_is_the_mean_size(sampling):
    sizes = [len(draw(sampling, step)) for step in range(600)]
    error = max(np.std(sizes), 1e-9) / math.sqrt(len(sizes))
    expected = sampling.expected_batch_size(N)
    if isinstance(sampling, TruncatedPoisson):
        assert max(sizes) == sampling.capacity
        assert np.mean(sizes) < expected
    else:
        assert abs(np.mean(sizes) - expected) <= 5 * error


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(sampling, marks=pytest.mark.long if i % 3 else [], id=name)
        for i, (name, sampling) in enumerate(SAMPLINGS.items())
    ],
)
def test_every_composed_gaussian_reveals_its_noise_to_the_accountant(sampling):
    loose = sampling.compose(4.0, steps=20, num_examples=N)
    tight = sampling.compose(1.0, steps=20, num_examples=N)

    def epsilon(event):
        accountant = dp.pld.PLDAccountant()
        return accountant.compose(event).get_epsilon(1e-5)

    assert 0 < epsilon(loose) < epsilon(tight)


def test_no_step_of_a_long_run_draws_as_an_earlier_one():
    sampling = Poisson(rate=0.5)
    steps = [3, *(3 + 2**power for power in range(4, 31))]
    drawn = {tuple(sorted(sampling.draw(t, num_examples=64, seed=7))) for t in steps}
    assert len(drawn) == len(steps)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_poisson_draws_what_is_accounted(rate):
    check_poisson(Poisson(rate=rate), num_examples=N)


def test_periodic_poisson_draws_and_accounts_its_parts_in_turn():
    sampling = SAMPLINGS["periodic"]
    for step in range(12):
        part = Poisson(rate=0.05 if step % 4 else 0.3)
        np.testing.assert_array_equal(draw(sampling, step), draw(part, step))
    event = sampling.compose(2.0, steps=9, num_examples=N)
    parts = [(0.3, 3), (0.05, 6)]
    expected = [Poisson(rate=r).compose(2.0, steps=k, num_examples=N) for r, k in parts]
    assert event == dp.ComposedDpEvent(expected)
    one = sampling.compose(2.0, steps=1, num_examples=N)
    assert one == dp.ComposedDpEvent(
        [Poisson(rate=0.3).compose(2.0, steps=1, num_examples=N)]
    )


@pytest.mark.parametrize(("cycle", "rate"), [(3, 0.3), (2, 0.6)])
def test_cyclic_poisson_draws_what_is_accounted(cycle, rate):
    check_cyclic(CyclicPoisson(cycle=cycle, rate=rate), num_examples=N)


def test_cyclic_poisson_of_rate_1_takes_the_parts_in_a_fixed_order():
    sampling = SAMPLINGS["cyclic of rate 1"]
    parts = [set(draw(sampling, step)) for step in range(6)]
    assert parts[:3] == parts[3:]
    assert sorted(i for part in parts[:3] for i in part) == list(range(N))


def test_a_cycle_of_one_is_poisson_sampling():
    cyclic, plain = CyclicPoisson(cycle=1, rate=0.1), Poisson(rate=0.1)
    for step in range(5):
        np.testing.assert_array_equal(draw(cyclic, step), draw(plain, step))
    composed = [s.compose(1.0, steps=7, num_examples=N) for s in (cyclic, plain)]
    assert composed[0] == composed[1]


def test_parts_of_a_cycle_are_even_and_independent_choices():
    """Each example's own: so that adding one moves no other."""
    sampling = CyclicPoisson(cycle=4, rate=1.0)
    seats = np.empty((100, N), int)
    for seed in range(100):
        for part in range(4):
            seats[seed, draw(sampling, part, seed)] = part
    counts = np.bincount(seats.ravel(), minlength=4)
    # Four standard errors of a share of 1/4 in 20,000.
    assert np.abs(counts / seats.size - 0.25).max() < 4 * math.sqrt(3 / 16 / 20_000)
    # Sizes of parts vary as independent choices do: 200 * 1/4 * 3/4.
    sizes = (seats == 0).sum(axis=1)
    assert abs(sizes.var() / 37.5 - 1) < 5 * math.sqrt(2 / 100)


def test_truncated_poisson_draws_what_is_accounted():
    sampling = SAMPLINGS["truncated"]
    event = sampling.compose(1.0, steps=7, num_examples=N)
    assert event == dp.SelfComposedDpEvent(
        dp.TruncatedSubsampledGaussianDpEvent(N + 1, 0.1, 25, 1.0), 7
    )
    sizes = np.array([len(draw(sampling, step)) for step in range(2000)])
    # Binomial(200, 0.1) exceeds 24 with probability 0.1449 (scipy binom.sf(24, 200, .1)).
    assert abs((sizes == 25).mean() - 0.1449) < 5 * math.sqrt(0.145 * 0.855 / 2000)


def test_shuffled_fixed_shows_each_example_at_most_once_an_epoch():
    sampling = SAMPLINGS["shuffled"]
    per_epoch = N // 16
    epochs = [
        np.concatenate([draw(sampling, e * per_epoch + i) for i in range(per_epoch)])
        for e in range(3)
    ]
    for epoch in epochs:
        assert len(np.unique(epoch)) == per_epoch * 16
    assert not np.array_equal(epochs[0], epochs[1])


def test_shuffled_fixed_claims_no_amplification_and_zero_out_adjacency():
    sampling = SAMPLINGS["shuffled"]
    assert sampling.adjacency == "zero_out_one"
    assert not sampling.amplified
    gaussian = dp.GaussianDpEvent(2.0)
    for steps, epochs in ((1, 1), (12, 1), (13, 2), (25, 3)):
        event = sampling.compose(2.0, steps=steps, num_examples=N)
        assert event == dp.SelfComposedDpEvent(gaussian, epochs)


def test_full_batch_is_everyone_every_time():
    np.testing.assert_array_equal(np.sort(draw(FullBatch(), 5)), np.arange(N))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(rate=0.0), "rate=0.0 must be in"),
        (lambda: Poisson(rate=1.5), "rate=1.5 must be in"),
        (
            lambda: PeriodicPoisson(period=4, first_rate=1.5, rate=0.1),
            "first_rate=1.5 must be in",
        ),
        (
            lambda: PeriodicPoisson(period=0, first_rate=0.5, rate=0.1),
            "period=0 must be an integer",
        ),
        (lambda: CyclicPoisson(cycle=0, rate=0.1), "cycle=0 must be an integer"),
        (lambda: CyclicPoisson(cycle=2, rate=1.1), "rate=1.1 must be in"),
        (lambda: Poisson(rate=float("nan")), "rate=nan must be in"),
        (
            lambda: TruncatedPoisson(rate=0.1, capacity=0),
            "capacity=0 must be an integer",
        ),
        (lambda: ShuffledFixed(batch_size=-3), "batch_size=-3 must be an integer"),
        (
            lambda: ShuffledFixed(batch_size=300).expected_batch_size(N),
            "batch_size=300 exceeds num_examples=200",
        ),
        (
            lambda: TruncatedPoisson(rate=0.5, capacity=50).expected_batch_size(N),
            "capacity=50 is below the expected batch size 100.0",
        ),
    ],
)
def test_impossible_samplings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_secret_seeds_are_fresh_and_128_bits_long():
    seeds = [secret_seed(None) for _ in range(50)]
    assert len(set(seeds)) == 50
    assert max(seeds).bit_length() > 120
    assert secret_seed(3) == secret_seed(3) != secret_seed(4)
