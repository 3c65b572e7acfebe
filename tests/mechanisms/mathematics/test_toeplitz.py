"""Strategies of correlated noise, against dense matrices and published optima."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from dpjax.mechanisms.mathematics.toeplitz import prefix_errors, strategy_column

all_strategies = pytest.mark.parametrize("strategy", ["mean_error", "square_root"])


def dense(column, steps):
    first = np.concatenate([column, np.zeros(steps)])[:steps]
    return scipy.linalg.toeplitz(first, np.zeros(steps))


def errors_by_matrices(column, steps):
    total = np.tril(np.ones((steps, steps)))
    return np.square(total @ np.linalg.inv(dense(column, steps))).sum(axis=1)


@all_strategies
@pytest.mark.parametrize(("bands", "steps"), [(1, 5), (2, 9), (4, 30), (30, 30)])
def test_prefix_errors_are_those_of_the_matrices(strategy, bands, steps):
    column = strategy_column(strategy, bands=bands, steps=steps)
    found = prefix_errors(column, steps=steps)
    np.testing.assert_allclose(found, errors_by_matrices(column, steps), rtol=1e-9)


def test_independent_noise_adds_up():
    column = strategy_column("mean_error", bands=1, steps=7)
    np.testing.assert_array_equal(column, [1.0])
    np.testing.assert_array_equal(prefix_errors(column, steps=7), np.arange(1, 8))


def test_square_root_squared_is_the_sum():
    column = strategy_column("square_root", bands=40, steps=40)
    root = dense(column / column[0], 40)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((40, 40))), atol=1e-12)
    by_binomials = [math.comb(2 * j, j) / 4**j for j in range(40)]
    np.testing.assert_allclose(column / column[0], by_binomials, rtol=1e-12)


def test_largest_error_of_the_full_square_root_is_a_constant_of_landau():
    """G_m = sum_{j <= m} (binom(2j, j) / 4^j)^2 is in 1 + [0, .0663] + ln(m + 1) / pi.

    (Brutman 1982, "A sharp estimate of the Landau constants".)
    """
    for steps in (64, 500):
        column = strategy_column("square_root", bands=steps, steps=steps)
        largest = math.sqrt(prefix_errors(column, steps=steps).max())
        landau = sum((math.comb(2 * j, j) / 4**j) ** 2 for j in range(steps))
        assert largest == pytest.approx(landau, rel=1e-9)
        assert 0 <= largest - 1 - math.log(steps) / math.pi <= 0.0663


@pytest.mark.parametrize(
    ("steps", "bands", "optimum"),
    # Mean squared errors that the optimiser of jax-privacy 2.0.0 reaches in float64
    # (its toeplitz.optimize_banded_toeplitz, then toeplitz.loss).
    [
        (64, 4, 10.501446861),
        (64, 16, 5.522755555),
        (200, 8, 16.834935449),
        (1000, 8, 69.749929588),
        (1000, 32, 24.115187092),
    ],
)
def test_golden_mean_error(steps, bands, optimum):
    column = strategy_column("mean_error", bands=bands, steps=steps)
    found = prefix_errors(column, steps=steps).mean()
    assert found == pytest.approx(optimum, rel=1e-8)


@pytest.mark.parametrize(("bands", "steps"), [(2, 6), (3, 12), (5, 20)])
def test_no_other_toeplitz_strategy_has_a_smaller_mean_error(bands, steps):
    """A search that knows neither gradients nor bounds, over signed entries."""

    def error(rest):
        column = np.concatenate([[1.0], rest])
        return errors_by_matrices(column, steps).mean() * (column @ column)

    best = strategy_column("mean_error", bands=bands, steps=steps)
    found = scipy.optimize.minimize(
        error,
        np.full(bands - 1, 0.3),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 4000},
    )
    np.testing.assert_allclose(found.x, best[1:] / best[0], atol=1e-4)
    assert prefix_errors(best, steps=steps).mean() <= found.fun * (1 + 1e-9)


@hypothesis.given(
    strategy=st.sampled_from(["mean_error", "square_root"]),
    bands=st.integers(1, 12),
    more=st.integers(0, 400),
)
def test_columns_have_norm_one_fall_and_give_a_stable_recursion(strategy, bands, more):
    column = strategy_column(strategy, bands=bands, steps=bands + more)
    assert column.shape == (bands,)
    assert np.linalg.norm(column) == pytest.approx(1.0, abs=1e-12)
    assert (column > 0).all()
    assert (np.diff(column) <= 0).all()
    poles = np.roots(column)  # of the recursion
    assert (np.abs(poles) < 1).all()
    errors = prefix_errors(column, steps=bands + more)
    assert errors.mean() <= (1 + bands + more) / 2 * (1 + 1e-9)


@functools.cache
def patterns(steps, gap):
    """All sets of steps that are at least ``gap`` apart."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(steps), k) for k in range(steps + 1)
    )
    return [s for s in subsets if all(b - a >= gap for a, b in itertools.pairwise(s))]


def longest(column, steps, pattern):
    """How far an example that takes part in these steps moves C x, over all signs.

    The length is convex in each contribution, so that its maximum over contributions of
    norm at most 1 on one line is at +1 or -1.
    """
    moved = dense(column, steps)[:, list(pattern)]
    signs = np.array(list(itertools.product([-1, 1], repeat=len(pattern))))
    return np.linalg.norm(signs @ moved.T, axis=1).max()


@all_strategies
@pytest.mark.parametrize(("bands", "steps"), [(2, 8), (3, 8), (4, 9)])
def test_turns_a_band_apart_cost_one_gaussian_each_by_brute_force(
    strategy, bands, steps
):
    column = strategy_column(strategy, bands=bands, steps=steps)
    for pattern in patterns(steps, bands):
        assert longest(column, steps, pattern) <= math.sqrt(len(pattern)) + 1e-12
    worst = max(longest(column, steps, p) for p in patterns(steps, bands))
    full = 1 + (steps - bands) // bands  # turns whose column is not cut short
    assert math.sqrt(full) - 1e-12 <= worst <= math.sqrt(math.ceil(steps / bands))


@all_strategies
def test_turns_closer_than_a_band_cost_more(strategy):
    """So the separation that ``BandMf`` insists on is needed."""
    column = strategy_column(strategy, bands=3, steps=8)
    close = [p for p in patterns(8, 2) if p not in patterns(8, 3)]
    assert any(longest(column, 8, p) > math.sqrt(len(p)) + 0.1 for p in close)
