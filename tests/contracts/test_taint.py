"""The data of a step leaves it through the noise, and by no other way."""

import jax
import jax.numpy as jnp
import pytest

from tests.contracts.test_mechanisms import MECHANISMS, PRIVATE
from tests.taint import check_run, check_step, reached, tainted


@pytest.mark.parametrize("name", PRIVATE)
def test_nothing_leaves_a_step_but_what_got_noise(name):
    check_step(PRIVATE[name])


def test_without_privacy_the_sum_reaches_all_that_leaves_a_step():
    """What is looked at: parameters, average, optimizer, fingerprint and norm."""
    found = reached(MECHANISMS["non-private"])
    for part in (
        "[0].params",
        "[0].average",
        "[0].private.optimizer",
        "[0].private.released",
        "[1].fingerprint",
        "[1].update_norm",
    ):
        assert any(path.startswith(part) for path in found), part


def test_what_a_run_writes_does_not_depend_on_the_data(tmp_path):
    check_run(tmp_path)


def test_taint_goes_through_calls_and_loops_and_nowhere_else():
    @jax.jit
    def called(x, y):
        return x + 1, y + 1

    def function(x, y):
        one, two = called(x, y)
        # Each turn hands on what the one before had: x needs two to arrive.
        late = jax.lax.fori_loop(0, 3, lambda i, c: (c[1], c[2], c[2]), (y, y, x))[0]
        cleared = jax.lax.fori_loop(0, 3, lambda i, c: jnp.zeros_like(c), x)
        return {"one": one, "two": two, "late": late, "cleared": cleared, "y": y}

    found = tainted(function, lambda x, y: x, jnp.ones(2), jnp.ones(2))
    assert found == {"['one']", "['late']"}
