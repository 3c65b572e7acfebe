"""On one CPU examples are taken in turn: the same numbers, whatever the number of devices.

Patches of wide images are not joined, and are not wide in the zoo: the same numbers, too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import bookkeeping
from dpjax.clipping.arithmetic import kernels, layouts
from tests.checks import thinned
from tests.contracts.test_zoo import compare, known
from tests.contracts.zoo import ZOO

NAMES = [name for name in ZOO if name.startswith("conv")] + ["tied_head"]


@pytest.mark.parametrize(
    "name", thinned([(name,) for name in NAMES], 3, always=("conv_2d_same",))
)
def test_examples_in_turn_give_the_same_sums(name, monkeypatch):
    monkeypatch.setattr(kernels, "prefers_turns", lambda: True)
    monkeypatch.setattr(kernels, "FEW_POSITIONS", 1)
    monkeypatch.setattr(kernels, "_LARGE", 1)
    turns = []
    in_turn = kernels.in_turn

    def counted(function, factors):
        turns.append(function)
        return in_turn(function, factors)

    monkeypatch.setattr(kernels, "in_turn", counted)
    case, vectors = known(name)
    # A function of its own: other tests' programs are in jit's cache.
    compare(lambda *args: bookkeeping(*args), case, vectors)
    if name in ("conv_2d_same", "conv_weight_standardised"):
        assert turns


APART = [
    "conv_2d_same",
    "conv_3d",
    "conv_everything_at_once",
    "conv_grouped",
    "conv_odd_dimension_numbers",
]


@pytest.mark.parametrize("name", APART)
def test_patches_apart_give_the_same_sums(name, monkeypatch):
    monkeypatch.setattr(layouts, "_NARROW", 1)
    monkeypatch.setattr(layouts, "FEW_POSITIONS", 0)
    blocks = []
    whole = kernels.Patches.dense

    def dense(patches):
        found = whole.fget(patches)
        blocks.append(len(found.left))
        return found

    monkeypatch.setattr(kernels.Patches, "dense", property(dense))
    case, vectors = known(name)
    compare(lambda *args: bookkeeping(*args), case, vectors)
    assert max(blocks) > 1


def test_a_turn_is_traced_once():
    traced = []

    def total(part):
        traced.append(part.shape)
        return jnp.sum(part, axis=(0, 1))

    factors = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    found = jax.jit(lambda x: kernels.in_turn(total, x))(factors)
    np.testing.assert_allclose(found, factors.sum(axis=0), rtol=1e-6)
    assert traced == [(2, 1, 3)]
