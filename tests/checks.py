"""Checks that hold for every honest implementation.

They are called by the contract tests on what ships, and by ``test_mutants`` on what must
be caught. Slow and obvious on purpose.
"""

import dataclasses
import functools
import math

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import dpjax
from dpjax.clipping import Query, vmap
from dpjax.clipping.execution.keys import example_keys
from dpjax.mechanisms.mathematics.toeplitz import strategy_column
from dpjax.privacy.sensitive import SEAL, ClippedSum, reveal
from dpjax.training.verification import reference_noise
from dpjax.typing import Batch


def thinned(cases, every, *, always=()):
    """Return ``cases`` (tuples) for ``parametrize``; all but one in ``every`` are long.

    Those that end in one of ``always`` are not.
    """
    return [
        pytest.param(
            *case,
            marks=[pytest.mark.long] if i % every and case[-1] not in always else [],
        )
        for i, case in enumerate(cases)
    ]


def batch_of(examples, *, mask=None, index=None):
    size = jax.tree.leaves(examples)[0].shape[0]
    mask = np.ones(size, bool) if mask is None else np.asarray(mask)
    index = np.arange(size, dtype=np.int32) if index is None else np.asarray(index)
    return Batch(examples, mask, index)


def reference(loss, query, batch, key):
    """The contract, one by one in float64 numpy: (total, residual, count, norms)."""
    keys = example_keys(key, batch)
    zeros = jax.tree.map(lambda p: np.zeros(p.shape), query.empty().total)
    total, residual, count, norms = zeros, zeros, 0.0, []
    for i in range(len(batch.mask)):
        if not batch.mask[i]:
            norms.append(0.0)
            continue
        example = jax.tree.map(lambda x, i=i: x[i], batch.examples)
        vector = (_gradient if query.slope is None else _slope)(
            loss, query, example, keys[i]
        )
        norms.append(norm(vector))
        count += 0.5 if norms[-1] <= query.clip_norm else -0.5
        if not math.isfinite(norms[-1]):
            continue
        vector = clip(vector, float(query.outer_norm), "flat")
        clipped = clip(vector, float(query.clip_norm), query.style)
        total = jax.tree.map(np.add, total, clipped)
        residual = jax.tree.map(lambda r, v, c: r + v - c, residual, vector, clipped)
    return total, residual, count, np.array(norms)


def _gradient(loss, query, example, key):
    vector = jax.tree.map(lambda p: np.zeros(p.shape), query.points[0])
    for sign, point in zip(query.signs, query.points, strict=True):
        gradient = _compiled_gradient(loss)(point, example, key)
        vector = jax.tree.map(
            lambda v, g, s=sign: v + s * np.asarray(g, np.float64), vector, gradient
        )
    return vector


@functools.cache
def _compiled_gradient(loss):
    return jax.jit(jax.grad(loss))


def _slope(loss, query, example, key):
    (point,), (direction, span) = query.points, query.slope
    ahead, behind = (
        np.float64(
            loss(
                jax.tree.map(lambda p, u, s=s: p + s * u, point, direction),
                example,
                key,
            )
        )
        for s in (span, -span)
    )
    return (ahead - behind) / (2 * span)


def clip(vector, clip_norm, style):
    if style == "automatic":
        factor = clip_norm / (norm(vector) + 0.01)
        return jax.tree.map(lambda v: factor * v, vector)
    if style == "flat":
        factor = min(1.0, clip_norm / max(norm(vector), 1e-300))
        return jax.tree.map(lambda v: factor * v, vector)
    paths = jax.tree_util.tree_leaves_with_path(vector)
    layers = {path[:-1] for path, _ in paths}
    bound = clip_norm / math.sqrt(len(layers))
    factors = {
        layer: min(
            1.0,
            bound / max(norm([leaf for p, leaf in paths if p[:-1] == layer]), 1e-300),
        )
        for layer in layers
    }
    return jax.tree_util.tree_map_with_path(lambda p, v: factors[p[:-1]] * v, vector)


def norm(tree):
    squares = [
        np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)
    ]
    return math.sqrt(sum(squares))


def check_engine_contract(engine, loss, query, batch, key, *, rtol=1e-5):
    """``engine`` returns the sum, residual, count and norms of the reference."""
    total, residual, count, norms = reference(loss, query, batch, key)
    clipped, statistics = jax.jit(engine, static_argnums=0)(loss, query, batch, key)
    assert_close(clipped.total, total, rtol=rtol, scale=norm(total) + query.clip_norm)
    if query.residual:
        scale = norm(residual) + norm(total) + query.clip_norm
        assert_close(clipped.residual, residual, rtol=rtol, scale=scale)
    else:
        assert clipped.residual is None
    assert clipped.count == (count if query.count else None)
    finite = np.isfinite(norms)
    opened = reveal(statistics)
    np.testing.assert_allclose(opened["norms"][finite], norms[finite], rtol, 1e-6)
    np.testing.assert_array_equal(opened["nonfinite"], ~finite)
    np.testing.assert_array_equal(opened["mask"], batch.mask)
    assert clipped.seal == np.float32(SEAL)
    np.testing.assert_allclose(clipped.l2_bound, query.clip_norm, rtol=1e-7)


def assert_close(actual, expected, *, rtol, scale):
    difference = jax.tree.map(
        lambda a, e: np.asarray(a, np.float64) - np.asarray(e, np.float64),
        actual,
        expected,
    )
    assert norm(difference) <= rtol * scale, (norm(difference), scale)


def check_sensitivity(engine, loss, params, batch, key, *, clip_norm, style):
    """Removing any one example moves the sum by at most ``clip_norm``, the count by 1/2."""
    query = Query(
        (params,), clip_norm=clip_norm, style=style, residual=True, count=True
    )
    run = jax.jit(engine, static_argnums=0)
    whole, _ = run(loss, query, batch, key)
    # Float32 sums over B examples of norm at most C round by about B * C * 2**-24.
    slack = 1e-6 * clip_norm * len(batch.mask)
    for i in np.flatnonzero(batch.mask):
        mask = np.array(batch.mask)
        mask[i] = False
        without, _ = run(loss, query, batch._replace(mask=mask), key)
        moved = norm(jax.tree.map(np.subtract, whole.total, without.total))
        assert moved <= clip_norm + slack, (i, moved)
        assert abs(whole.count - without.count) == 0.5, i


RELEASED = {"a": np.zeros((40, 25), np.float32), "b": np.zeros(1000, np.float32)}
"""One shape for what is released, so that a mechanism is compiled once."""


def check_noise(release, *, stddev, divisor, clip_norm, steps=40):
    """``release(sum, step)`` of an empty sum is N(0, (stddev/divisor)^2), fresh each time."""
    empty = ClippedSum.zeros(RELEASED, l2_bound=clip_norm)
    draws = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(release(empty, step))])
        for step in range(steps)
    ]
    values = np.concatenate(draws) * divisor / stddev
    rows = np.stack(draws).astype(np.float64) * divisor / stddev
    count = len(values)
    # Five standard errors of the mean and of the variance.
    assert abs(values.mean()) < 5 / math.sqrt(count), "mean"
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / count), "variance"
    # Single values repeat, as they are rounded; four in a row do not, but by reuse.
    assert repeated(values) < 0.02, "noise repeats"
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-6, "shape"
    # No step, and no leaf, is correlated with any other (of either sign).
    size = rows.shape[1]
    steps_apart = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(steps_apart).max() < 6 / math.sqrt(size), "steps correlate"
    leaves = np.corrcoef(rows[:, :1000].ravel(), rows[:, 1000:].ravel())[0, 1]
    assert abs(leaves) < 6 / math.sqrt(count / 2), "leaves correlate"


def repeated(values):
    """Which part of the runs of four values in a row has been there before."""
    runs = np.lib.stride_tricks.sliding_window_view(values, 4)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)


def check_rounded(values, expected, *, unit, times=1, slack=0.02):
    """``values`` are ``expected``, known to ``slack`` units, rounded to ``unit``.

    Args:
        values, expected: ``float64[n]``.
        unit: Of which values are multiples; the last place of the release.
        times: How often something was rounded on the way.
        slack: What float32 makes of logarithms, divisors and so on, in units.
    """
    cells, exact = values / unit, expected / unit
    assert np.isfinite(cells).all(), "not finite"
    assert np.abs(cells - np.round(cells)).max() <= slack, "not rounded"
    assert np.abs(cells - exact).max() <= times / 2 + slack, "not the noise of this key"
    if times == 1 and slack < 0.1:
        # The nearest multiple, but where the difference is too close to call.
        assert np.mean(np.round(cells) != np.round(exact)) <= 0.01, "not the nearest"


FORTY = {f"leaf{i:02}": jnp.zeros((7,) if i % 2 else (2, 3)) + i for i in range(40)}
"""More leaves than digits of any base that keys might be told apart by."""
FAR_STEPS = (0, 3, 2**16 + 3, 2**31 - 1)


def reference_sum(total, *, key, step, parts):
    """``total`` plus the noise of each of ``parts``, pairs of a stddev and a stream.

    Returns:
        ``float64[n]``, leaf after leaf.
    """
    root = np.asarray(jax.random.key_data(key))
    noisy = []
    for index, leaf in enumerate(jax.tree.leaves(total)):
        expected = np.asarray(leaf, np.float64)
        for stddev, stream in parts:
            drawn = reference_noise.normals(
                root, step=step, stream=stream, index=index, shape=leaf.shape
            )
            expected = expected + stddev * drawn
        noisy.append(np.ravel(expected))
    return np.concatenate(noisy)


def flat(tree):
    """``float64[n]``, leaf after leaf."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(
        np.float64
    )


def filled(tree, scale):
    """A sum like ``tree`` whose entries are about ``scale``."""
    return jax.tree.map(
        lambda x: jnp.asarray(scale * np.cos(x + np.arange(x.size).reshape(x.shape))),
        tree,
    )


def check_exact_noise(release, *, key, stddev, divisor, clip_norm, steps=FAR_STEPS):
    """``release(sum, step)`` is that of a key's noise, on each coordinate of 40 leaves."""
    # Long enough that a ten-thousandth of it, added once more, shows.
    total = filled(FORTY, 5 * stddev)
    clipped = dataclasses.replace(
        ClippedSum.zeros(total, l2_bound=clip_norm), total=total
    )
    for step in steps:
        found = flat(release(clipped, step)) * divisor
        expected = reference_sum(total, key=key, step=step, parts=[(stddev, 0)])
        check_rounded(found, expected, unit=reference_noise.grid(stddev))


def check_adds_to_sum(release, *, divisor, clip_norm):
    """Noise aside, release divides the SUM by the public divisor."""
    empty = ClippedSum.zeros(RELEASED, l2_bound=clip_norm)
    total = {**RELEASED, "a": RELEASED["a"] + 1000.0 * clip_norm}
    mean = np.mean(release(dataclasses.replace(empty, total=total), 0)["a"])
    np.testing.assert_allclose(mean * divisor, 1000.0 * clip_norm, rtol=0.01)


def check_poisson(sampling, *, num_examples, steps=400):
    """Draws are independent coins of exactly the rate that is accounted."""
    event = sampling.compose(1.0, steps=steps, num_examples=num_examples)
    assert isinstance(event, dp.SelfComposedDpEvent)
    assert event.count == steps
    assert isinstance(event.event, dp.PoissonSampledDpEvent)
    rate = event.event.sampling_probability
    seen = np.zeros((steps, num_examples), bool)
    for step in range(steps):
        draw = sampling.draw(step, num_examples=num_examples, seed=7)
        assert len(np.unique(draw)) == len(draw), "an example twice in one batch"
        seen[step, draw] = True
    _check_coins(seen, rate=rate)


def _check_coins(seen, *, rate):
    """``seen``, bool[steps, examples], are independent coins of this rate."""
    count = seen.size
    error = math.sqrt(rate * (1 - rate) / count)
    assert abs(seen.mean() - rate) < 5 * error, (seen.mean(), rate)
    # Sizes vary as coins do: a fixed size, or a wrong one, has another variance.
    variance = seen.shape[1] * rate * (1 - rate)
    sizes = seen.sum(axis=1)
    assert abs(sizes.var() / variance - 1) < 5 * math.sqrt(2 / len(seen)), sizes.var()
    # Each example, each pair of examples and each pair of steps are independent coins.
    per_example = seen.mean(axis=0)
    assert np.abs(per_example - rate).max() < 6 * math.sqrt(
        rate * (1 - rate) / len(seen)
    )
    both = rate**2
    for coins in (seen, seen.T):
        trials = coins.shape[0]
        together = (coins.T.astype(float) @ coins)[np.triu_indices(coins.shape[1], 1)]
        error = math.sqrt(trials * both * (1 - both))
        # Skewed when few are expected: 8 errors, and 10 counts, of room.
        assert np.abs(together - trials * both).max() < 8 * error + 10


def check_cyclic(sampling, *, num_examples, turns=300):
    """An example is drawn at turns of its own only, by coins of the accounted rate."""
    cycle = sampling.cycle
    seen = np.zeros((turns, cycle, num_examples), bool)
    for step in range(turns * cycle):
        draw = sampling.draw(step, num_examples=num_examples, seed=7)
        assert len(np.unique(draw)) == len(draw), "an example twice in one batch"
        seen[step // cycle, step % cycle, draw] = True
    drawn = seen.any(axis=0)
    assert (drawn.sum(axis=0) == 1).all(), "an example at two turns of a cycle"
    for part in range(cycle):
        _check_coins(seen[:, part, drawn[part]], rate=sampling.rate)
    for steps in (1, cycle, cycle + 1, 5 * cycle):
        event = sampling.compose(1.0, steps=steps, num_examples=num_examples)
        gaussian = dp.PoissonSampledDpEvent(sampling.rate, dp.GaussianDpEvent(1.0))
        most = max(len(range(part, steps, cycle)) for part in range(cycle))
        assert event == dp.SelfComposedDpEvent(gaussian, most), steps


def check_correlated(released, mechanism):
    """``C y / sigma`` is white and standard normal for the C whose columns have norm 1.

    Args:
        released: ``[steps, coordinates]``, releases of sums of nothing.
        mechanism: A ``BandMf``.
    """
    steps, size = released.shape
    column = strategy_column(
        mechanism.strategy, bands=mechanism.bands, steps=mechanism.steps
    )
    np.testing.assert_allclose(np.linalg.norm(column), 1.0, rtol=1e-12)
    first = np.concatenate([column, np.zeros(steps)])[:steps]
    strategy = scipy.linalg.toeplitz(first, np.zeros(steps))
    # By hand, from primary facts: what a Gaussian of this multiplier needs.
    unit = mechanism.noise_multiplier * mechanism.clip_norm
    noise = released.astype(np.float64) * mechanism.expected_batch_size
    white = strategy @ noise / unit
    covariance = white @ white.T / size
    # Six standard errors of a variance and of a covariance.
    assert np.abs(np.diag(covariance) - 1).max() < 6 * math.sqrt(2 / size), "variance"
    apart = covariance[np.triu_indices(steps, 1)]
    assert np.abs(apart).max() < 6 / math.sqrt(size), "steps correlate"
    assert scipy.stats.kstest(white.ravel(), "norm").pvalue > 1e-6, "shape"


def check_joint_release(mechanism, *, steps=20_000):
    """Sum and count, with the noise they really carry, cost one Gaussian of z.

    Args:
        mechanism: An ``AdaptiveDpSgd``, the noise of whose count moves its clip norm.
        steps: Releases that are looked at.
    """
    bound = mechanism.initial_clip_norm
    empty = ClippedSum.zeros({"w": jnp.zeros(4)}, l2_bound=bound, count=True)
    state = mechanism.init(empty.total)

    def release(step):
        mean, after = mechanism.release(
            empty, state, None, key=dpjax.root_key(3), step=step
        )
        return mean["w"], after.clip_norm

    means, clip_norms = jax.jit(jax.vmap(release))(jnp.arange(steps))
    size = mechanism.expected_batch_size
    # By hand: log C' - log C = -rate (1/2 + b/m - target).
    moved = -np.log(np.asarray(clip_norms, np.float64) / bound)
    moved = moved / mechanism.clip_learning_rate - 0.5 + mechanism.target_quantile
    sums, counts = np.asarray(means, np.float64) * size, moved * size
    for noise in (sums, counts):
        assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(noise.size), "mean"
    for column in sums.T:
        correlation = np.corrcoef(column, counts)[0, 1]
        assert abs(correlation) < 5 / math.sqrt(steps), "sum and count correlate"
    with np.errstate(divide="ignore"):
        spent = (bound / sums.std()) ** 2
        spent += (_count_sensitivity(mechanism) / counts.std()) ** 2
    claimed = 1 / mechanism.noise_multiplier**2
    # Four standard errors of the two variances.
    assert abs(spent / claimed - 1) < 4 * 2 / math.sqrt(steps), (spent, claimed)


def _count_sensitivity(mechanism):
    """How far one example moves the count: by brute force, over short and long ones."""
    query = mechanism.query("gradient", jnp.zeros(2), mechanism.init(jnp.zeros(2)))

    @jax.jit
    def count(lengths, mask):
        batch = batch_of({"x": jnp.stack([lengths, 0 * lengths], axis=1)})
        batch, key = batch._replace(mask=mask), jax.random.key(0)
        return vmap(lambda p, e, k: p @ e["x"], query, batch, key)[0].count

    bound = mechanism.initial_clip_norm
    others = [0.1 * bound, 3 * bound, 0.5 * bound]
    moved = []
    for length in (0.0, 0.5 * bound, 2 * bound):
        present = count(jnp.array([*others, length]), jnp.ones(4, bool))
        zeroed = mechanism.sampling.adjacency == "zero_out_one"
        absent = count(jnp.array([*others, 0.0]), jnp.array([True] * 3 + [zeroed]))
        moved.append(abs(float(present) - float(absent)))
    return max(moved)
