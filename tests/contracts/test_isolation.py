"""No example reaches another: whatever stands in a row, the others contribute as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query
from dpjax.privacy.sensitive import reveal
from tests.checks import assert_close, batch_of, norm, thinned
from tests.contracts.test_zoo import ENGINES, INDEX, KEY, MASK
from tests.contracts.zoo import ZOO
from tests.contracts.zoo.cases import Case, convolve

BAD = 1
"""The row that is spoilt."""
VALUES = (np.nan, np.inf, 1e38)
GROUPED = [name for name in ZOO if "group" in name or "depthwise" in name]


def spoilt(examples, value):
    """Return ``examples`` with ``value`` in all floats of one row."""

    def put(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(leaf).at[BAD].set(value)
        return leaf

    return jax.tree.map(put, examples)


def check_isolation(engine, case):
    """Spoil one row: what all contribute is what it contributes, and what the others do."""
    query = Query((case.params,), clip_norm=0.1, residual=True)
    run = jax.jit(lambda *args: engine(case.loss, *args))

    def ask(examples, mask):
        return run(query, batch_of(examples, mask=mask, index=INDEX), KEY)

    only = np.arange(len(MASK)) == BAD
    others = np.flatnonzero(MASK & ~only)
    clean, expected = ask(case.examples, MASK & ~only)
    scale = norm(clean.total) + norm(clean.residual) + query.clip_norm
    for value in VALUES:
        examples = spoilt(case.examples, value)
        alone, _ = ask(examples, only)
        masked, of_masked = ask(examples, MASK & ~only)
        whole, of_whole = ask(examples, MASK)
        both = jax.tree.map(jnp.add, clean.total, alone.total)
        assert norm(both) < np.inf
        assert_close(masked.total, clean.total, rtol=1e-6, scale=scale)
        assert_close(masked.residual, clean.residual, rtol=1e-6, scale=scale)
        assert_close(whole.total, both, rtol=1e-6, scale=scale)
        for statistics in (of_masked, of_whole):
            for name in ("norms", "losses", "nonfinite"):
                actual, wanted = (reveal(s)[name] for s in (statistics, expected))
                np.testing.assert_allclose(actual[others], wanted[others], rtol=1e-6)


PAIRS = [
    *thinned([("vmap", name) for name in ZOO], 48, always=GROUPED),
    *thinned([("bookkeeping", name) for name in ZOO], 48),
    *thinned([("ghost", name) for name in ZOO], 96),
    *thinned([("auto", name) for name in ZOO], 96),
]


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_a_spoilt_row_moves_nothing_but_itself(engine, name):
    check_isolation(ENGINES[engine], ZOO[name]())


def penalised(p, e, key):
    del key
    out = convolve(e["x"], p["k"], feature_group_count=2)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.square(p["k"]))


def modulated(p, e, key):
    del key
    kernel = p["k"] * (1 + jnp.mean(e["x"]))
    return jnp.sum(jnp.sin(convolve(e["x"], kernel, feature_group_count=2)))


def in_a_branch(p, e, key):
    del key

    def branch(scale, x):
        return jnp.sum(jnp.sin(scale * convolve(x, p["k"], feature_group_count=2)))

    first = e["x"][0, 0, 0] > 0
    return jax.lax.cond(
        first, lambda x: branch(1.0, x), lambda x: branch(2.0, x), e["x"]
    )


def in_a_checkpointed_loop(p, e, key):
    del key

    @jax.checkpoint
    def layer(x, scale):
        return jnp.tanh(scale * convolve(x, p["k"], feature_group_count=2)), None

    x, _ = jax.lax.scan(layer, e["x"], jnp.arange(1.0, 3.0))
    return jnp.sum(x) + jnp.sum(jnp.square(p["k"]))


def with_a_backward_pass_of_its_own(p, e, key):
    del key
    plain = lambda x, k: convolve(x, k, feature_group_count=2)  # noqa: E731
    own = jax.custom_vjp(plain)
    own.defvjp(
        lambda x, k: (plain(x, k), (x, k)), lambda s, g: jax.vjp(plain, *s)[1](g)
    )
    return jnp.sum(jnp.sin(own(e["x"], p["k"])))


@pytest.mark.parametrize("engine", ["vmap", "bookkeeping"])
@pytest.mark.parametrize(
    "loss",
    [
        penalised,
        modulated,
        in_a_branch,
        in_a_checkpointed_loop,
        with_a_backward_pass_of_its_own,
    ],
)
def test_grouped_kernels_without_a_rule_are_kept_apart(engine, loss):
    rng = np.random.default_rng(0)
    params = {"k": jnp.asarray(rng.normal(size=(3, 2, 2, 4)), jnp.float32)}
    examples = {"x": jnp.asarray(rng.normal(size=(4, 5, 6, 4)), jnp.float32)}
    check_isolation(ENGINES[engine], Case(loss, params, examples, {}))


def test_in_float64_ungrouped_kernels_are_kept_apart():
    """There XLA's CPU compiler puts zeros between groups of features instead."""
    with jax.enable_x64(True):
        params = {"k": np.random.default_rng(0).normal(size=(3, 2, 2, 4))}
        examples = {"x": np.random.default_rng(1).normal(size=(4, 5, 6, 2))}

        def loss(p, e, key):
            del key
            return jnp.sum(jnp.sin(convolve(e["x"], p["k"])))

        check_isolation(ENGINES["vmap"], Case(loss, params, examples, {}))


def whose_target_is_spoilt(p, e, key):
    del key
    out = convolve(e["ids"].astype(jnp.float32), p["k"], feature_group_count=2)
    return jnp.sum(jnp.sin(out) * e["y"]) + jnp.sum(jnp.square(p["k"]))


@pytest.mark.parametrize("engine", ["vmap", "bookkeeping"])
def test_a_gradient_of_outputs_that_is_not_finite_is_kept_apart(engine):
    """The image is finite: what is not comes from the other side."""
    rng = np.random.default_rng(0)
    params = {"k": jnp.float32(rng.normal(size=(3, 3, 2, 4)))}
    rows = len(MASK)
    examples = {
        "ids": jnp.asarray(rng.integers(-2, 3, (rows, 4, 5, 4)), jnp.int32),
        "y": jnp.float32(rng.normal(size=(rows, 1, 1, 1))),
    }
    case = Case(whose_target_is_spoilt, params, examples, {})
    check_isolation(ENGINES[engine], case)
    batch = batch_of(spoilt(examples, np.nan), mask=MASK, index=INDEX)
    query = Query((params,), clip_norm=0.1)
    _, statistics = ENGINES[engine](case.loss, query, batch, KEY)
    np.testing.assert_array_equal(
        reveal(statistics)["nonfinite"], MASK & (np.arange(rows) == BAD)
    )
