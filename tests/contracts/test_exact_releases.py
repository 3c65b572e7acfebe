"""Every release is the sum plus the noise of its key, exactly, rounded to its grid.

Each mechanism, 40 leaves, at the last step there can be: an independent reference, drawn
from the same key, says what comes out. What is by hand is in ``kinds`` or next to it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.mechanisms.mathematics.directions import gaussian_direction
from dpjax.privacy.noise import root_key
from dpjax.privacy.sensitive import ClippedSum
from dpjax.training.verification.reference_noise import grid, normals
from tests.checks import FORTY, check_rounded, filled, flat, reference_sum
from tests.contracts.test_mechanisms import (
    KINDS,
    MECHANISMS,
    PRIVATE,
    adaptive,
    kinds,
    moved_by_one,
)

ROOT = root_key(3)
LAST = 2**31 - 1
PLAIN = [
    (name, phase)
    for name, phase in KINDS
    if name in PRIVATE
    and name not in ("adaptive", "two channels", "dp_zero")
    and "band_mf" not in name
]


def last_step(kind):
    return kind.step + (LAST - kind.step) // kind.every * kind.every


def sum_of(mechanism, phase, *, scale, params, state):
    """A sum like ``params``, as the query of this phase asks for it, and its total."""
    total = filled(params, scale)
    empty = mechanism.query(phase, params, state).empty()
    return dataclasses.replace(empty, total=total), total


@pytest.mark.parametrize(("name", "phase"), PLAIN)
def test_release_is_the_sum_and_the_noise_of_its_key(name, phase):
    mechanism, kind = MECHANISMS[name], kinds(name)[phase]
    step = last_step(kind)
    # Workers share the variance, and round one after the other.
    workers = getattr(mechanism, "noisy_workers", 1)
    # Their loop is compiled.
    tree = FORTY if workers == 1 else {"a": jnp.zeros(7), "b": jnp.ones((2, 3))}
    state, params = moved_by_one(mechanism, tree)
    clipped, total = sum_of(
        mechanism, phase, scale=kind.stddev, params=params, state=state
    )
    # The parameters moved by 1 but for rounding.
    np.testing.assert_allclose(clipped.l2_bound, kind.bound, rtol=1e-6)
    each = kind.stddev / math.sqrt(workers) * float(clipped.l2_bound) / kind.bound
    parts = [(each, stream) for stream in range(workers)]
    mean, _ = mechanism.release(clipped, state, params, key=ROOT, step=jnp.int32(step))
    expected = reference_sum(total, key=ROOT, step=step, parts=parts)
    check_rounded(flat(mean) * kind.divisor, expected, unit=grid(each), times=workers)


@pytest.mark.parametrize("worker", [0, 3])
def test_message_of_a_worker_is_its_sum_and_its_own_noise(worker):
    mechanism, kind = MECHANISMS["diff2 four workers"], kinds("diff2")["restart"]
    state, params = moved_by_one(mechanism, FORTY)
    clipped, total = sum_of(
        mechanism, "restart", scale=kind.stddev, params=params, state=state
    )
    sent = mechanism.message(clipped, state, params, key=ROOT, step=5, worker=worker)
    expected = reference_sum(total, key=ROOT, step=5, parts=[(kind.stddev, worker)])
    check_rounded(flat(sent), expected, unit=grid(kind.stddev))


@pytest.mark.parametrize("clip_norm", [0.5, 0.8, 3.0])
def test_adaptive_noise_follows_the_clip_norm_of_the_step(clip_norm):
    """Of the sum and of the count, by hand: 4 C / 0.8, and 4 / 2 / 0.6."""
    mechanism = adaptive(max_clip_norm=1e6, min_clip_norm=1e-6)
    state = mechanism.init(FORTY)._replace(clip_norm=jnp.float32(clip_norm))
    stddev = 4 * np.float32(clip_norm) / 0.8
    clipped, total = sum_of(
        mechanism, "gradient", scale=stddev, params=FORTY, state=state
    )
    clipped = dataclasses.replace(clipped, count=jnp.float32(7.5))
    mean, after = mechanism.release(clipped, state, None, key=ROOT, step=LAST)
    expected = reference_sum(total, key=ROOT, step=LAST, parts=[(stddev, 0)])
    check_rounded(flat(mean) * 100, expected, unit=grid(stddev))

    count = 7.5 + 4 / 2 / 0.6 * normals(
        jax.random.key_data(ROOT), step=LAST, stream=1, index=0, shape=()
    )
    moved = math.log(float(after.clip_norm) / np.float32(clip_norm)) / -0.2
    found = np.array([100 * (moved - 0.5 + 0.7)])
    check_rounded(found, np.array([count]), unit=grid(4 / 2 / 0.6), slack=0.1)


def test_both_channels_have_noise_of_their_own():
    """Of the residual by hand: 4 (G - C) / 0.6, all of it in the memory; 4 C / 0.8."""
    mechanism = MECHANISMS["two channels"]
    state = mechanism.init(FORTY)
    clipped, total = sum_of(mechanism, "gradient", scale=2.5, params=FORTY, state=state)
    residual = jax.tree.map(lambda x: -x, total)
    clipped = dataclasses.replace(clipped, residual=residual)
    mean, after = mechanism.release(clipped, state, None, key=ROOT, step=LAST)
    second = flat(after.value) / 0.3
    stddev = 4 * 1.0 / 0.6
    expected = reference_sum(residual, key=ROOT, step=LAST, parts=[(stddev, 1)])
    check_rounded(second, expected, unit=grid(stddev))
    first = flat(mean) * 100 - flat(after.value)
    expected = reference_sum(total, key=ROOT, step=LAST, parts=[(2.5, 0)])
    check_rounded(first, expected, unit=grid(2.5))


def test_one_slope_has_one_noise():
    mechanism = MECHANISMS["dp_zero"]
    state = mechanism.init(FORTY)._replace(step=jnp.int32(LAST))
    empty = ClippedSum.zeros(jnp.zeros(()), l2_bound=0.5, phase="slope")
    clipped = dataclasses.replace(empty, total=jnp.float32(3.3))
    mean, _ = mechanism.release(clipped, state, FORTY, key=ROOT, step=LAST)
    u = flat(gaussian_direction(FORTY, seed=7, step=LAST))
    slope = np.array([flat(mean) @ u / (u @ u)]) * 100
    np.testing.assert_allclose(flat(mean) * 100, slope * u, rtol=1e-5)
    expected = reference_sum(jnp.float32(3.3), key=ROOT, step=LAST, parts=[(2.0, 0)])
    check_rounded(slope, expected, unit=grid(2.0))


def test_banded_noise_takes_back_what_the_state_holds():
    """By hand: ``y_t = z_t / c_0 - y_{t-1} / 2 - 3 y_{t-2} / 8``, c_0 = 1 / 1.179248."""
    mechanism, step = MECHANISMS["band_mf"], LAST - 1
    zeros = mechanism.init(FORTY)
    recent = jax.tree.map(
        lambda x: 3 * jnp.cos(jnp.arange(x.size * 1.0).reshape(x.shape)), zeros.recent
    )
    state = zeros._replace(count=jnp.int32(step), recent=recent)
    stddev = 2.0 * math.sqrt(1 + 1 / 4 + 9 / 64)
    clipped, total = sum_of(
        mechanism, "gradient", scale=stddev, params=FORTY, state=state
    )
    mean, after = mechanism.release(clipped, state, None, key=ROOT, step=step)
    # The noise of step s is in row s mod 2.
    carried = jax.tree.map(
        lambda x: -x[(step - 1) % 2] / 2 - 3 * x[step % 2] / 8, recent
    )
    drawn = [(stddev, 0)]
    released = jax.tree.map(jnp.add, total, carried)
    expected = reference_sum(released, key=ROOT, step=step, parts=drawn)
    check_rounded(flat(mean) * 100, expected, unit=grid(stddev))
    # What is kept is not rounded, and does not know of the sum.
    kept = jax.tree.map(lambda x: x[step % 2], after.recent)
    expected = reference_sum(carried, key=ROOT, step=step, parts=drawn)
    np.testing.assert_allclose(flat(kept), expected, atol=5e-6)
    old = jax.tree.map(lambda x: x[(step - 1) % 2], after.recent)
    np.testing.assert_array_equal(
        flat(old), flat(jax.tree.map(lambda x: x[(step - 1) % 2], recent))
    )


def test_every_private_mechanism_is_covered():
    apart = {"adaptive", "two channels", "dp_zero", "band_mf", "band_mf fixed order"}
    assert {name for name, _ in PLAIN} | apart == set(PRIVATE)
