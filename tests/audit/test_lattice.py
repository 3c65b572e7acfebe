"""The last bits of a release tell nothing, and the attack on them sees it if they do."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.audit.lattice import lattice_scores
from dpjax.mechanisms.mathematics import correlated
from dpjax.privacy import noise
from dpjax.privacy.sampling import CyclicPoisson, FullBatch, PeriodicPoisson, Poisson
from tests.contracts import test_mechanisms as plans

# Rates at which 1024 examples make batches of a power of two.
SIXTEENTH = {"num_examples": 1024, "sampling": Poisson(rate=1 / 16)}
MECHANISMS = {
    "dp_sgd": plans.dp_sgd(noise_multiplier=1.0, **SIXTEENTH),
    "adaptive": plans.adaptive(**SIXTEENTH),
    "dice_sgd": plans.dice_sgd("conservative", **SIXTEENTH),
    "band_mf": plans.band_mf(
        num_examples=1024, sampling=CyclicPoisson(cycle=4, rate=1 / 4)
    ),
    "diff2": plans.diff2(num_examples=1024, sampling=FullBatch()),
    "spider_boost": plans.spider_boost(
        num_examples=1024,
        sampling=PeriodicPoisson(period=5, first_rate=1 / 16, rate=1 / 16),
    ),
}
COORDINATES = 20
VALUE = 0.5 / np.sqrt(COORDINATES)
"""The whole clip norm, shared out."""


def add_as_before(tree, *, key, step, stddev, stream=0):
    """Noise of ``jax.random.normal``, added in floats and not rounded."""
    leaves, treedef = jax.tree.flatten(tree)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    keys = fold_in(fold_in(key, step), stream)

    def noisy(index, leaf):
        first, second = (
            jax.random.normal(jax.random.fold_in(key, index), leaf.shape)
            for key in keys
        )
        return leaf + stddev * ((first + second) * np.float32(np.sqrt(0.5)))

    return treedef.unflatten([noisy(i, leaf) for i, leaf in enumerate(leaves)])


def add_without_rounding(tree, **where):
    return jax.tree.map(jnp.add, tree, noise.noise_like(tree, **where))


def scores(mechanism, *, add=noise.add_noise):
    with (
        mock.patch.object(noise, "add_noise", add),
        mock.patch.object(correlated, "add_noise", add),
    ):
        return lattice_scores(
            mechanism, value=VALUE, coordinates=COORDINATES, trials=4000, seed=5
        )


def nats(found):
    """Per coordinate."""
    return found.inside.mean() / COORDINATES


def rightly_told(found):
    """Which part of members and others, in equal numbers, is told apart."""
    return np.mean(found.inside > 0) / 2 + np.mean(found.outside < 0) / 2


@pytest.mark.parametrize("name", MECHANISMS)
def test_last_bits_of_releases_tell_nothing(name):
    """Within a thousandth of a nat, which is what these many runs can tell."""
    found = scores(MECHANISMS[name])
    assert abs(nats(found)) < 1e-3
    assert abs(rightly_told(found) - 0.5) < 0.04


@pytest.mark.parametrize("add", [add_as_before, add_without_rounding])
def test_last_bits_of_releases_that_are_not_rounded_tell_members(add):
    """From 20 coordinates of one step; the sizes of the numbers are not looked at."""
    found = scores(MECHANISMS["dp_sgd"], add=add)
    assert nats(found) > 0.1
    assert rightly_told(found) > 0.9


def test_plans_whose_bits_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match=r"expected_batch_size=100\.0 must be a power"):
        scores(plans.dp_sgd())
    with pytest.raises(ValueError, match="mechanism=DpZero releases one slope"):
        scores(plans.dp_zero(**SIXTEENTH))
