"""On one CPU examples are taken in turn: the same numbers, whatever the number of devices."""

import pytest

from dpjax.clipping import bookkeeping, kernels
from tests.contracts.test_zoo import compare, known
from tests.contracts.zoo import ZOO

NAMES = [name for name in ZOO if name.startswith("conv")] + ["tied_head"]


@pytest.mark.parametrize("name", NAMES)
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
