"""Norms from factors: what rounding may hide is bounded, and low precision hides nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, bookkeeping, ghost, vmap
from dpjax.clipping.arithmetic import kernels
from dpjax.clipping.arithmetic.kernels import (
    Dense,
    Lookup,
    differenced,
    direct_norms,
    gradients,
    gram_norms,
    oriented,
    weighted_sum,
)
from tests.checks import batch_of, norm, thinned


def dense(rng, *, t, k=5, n=3, b=4, h=2, scale=1.0):
    left = rng.normal(size=(h, b, t, k)) * scale
    right = rng.normal(size=(h, b, t, n)) * scale
    return Dense((jnp.float32(left),), jnp.float32(right))


def lookup(rng, *, t, size=5, n=3, b=4, h=2):
    rows = rng.integers(0, size, (h, b, t))
    return Lookup(jnp.asarray(rows), jnp.float32(rng.normal(size=(h, b, t, n))), size)


def in_full(part):
    """Per-example gradients ``[B, H, K, N]`` in float64."""
    right = np.asarray(part.right, np.float64)
    if isinstance(part, Lookup):
        lefts = [np.eye(part.size)[np.asarray(part.rows)]]
    else:
        lefts = [np.asarray(left, np.float64) for left in part.left]
    return np.concatenate(
        [np.einsum("hbtk,hbtn->bhkn", left, right) for left in lefts], axis=2
    )


PARTS = {
    "dense": [dense],
    "lookup": [lookup],
    "both": [lookup, dense],
}


@pytest.mark.parametrize("makers", PARTS.values(), ids=list(PARTS))
@pytest.mark.parametrize(("t", "h"), [(1, 2), (4, 2), (4, 1)])
def test_norms_and_sums_are_those_of_the_gradients(makers, t, h):
    rng = np.random.default_rng(t)
    parts = [make(rng, t=t + i, h=h) for i, make in enumerate(makers)]
    expected = sum(map(in_full, parts))
    squares = np.sum(expected**2, axis=(1, 2, 3))
    np.testing.assert_allclose(gradients(parts), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gram_norms(parts).squares, squares, rtol=1e-5)
    np.testing.assert_allclose(direct_norms(parts).squares, squares, rtol=1e-5)
    weights = np.array([0.5, 0.0, 1.0, -2.0], np.float32)
    total = np.einsum("b,bhkn->hkn", weights, expected)
    np.testing.assert_allclose(
        weighted_sum(parts, weights), total, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("make", [dense, lookup])
def test_rows_of_weight_zero_count_for_nothing_even_if_not_finite(make):
    rng = np.random.default_rng(0)
    part = make(rng, t=3)
    broken = part.right.at[:, 1].set(jnp.nan)
    bad = type(part)(**{**vars(part), "right": broken})
    if isinstance(part, Dense):
        bad = Dense((part.left[0].at[:, 1].set(jnp.inf),), broken)
    weights = np.array([0.5, 0.0, 1.0, 0.3], np.float32)
    np.testing.assert_array_equal(
        weighted_sum([bad], weights), weighted_sum([part], weights)
    )


@pytest.mark.parametrize("cancellation", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("t", [2, 16, 128])
def test_slack_covers_what_rounding_hides(t, cancellation):
    """Terms that nearly cancel: the Gram sum loses digits, the bound knows how many."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        left = np.repeat(rng.normal(size=(1, 8, 1, 64)), t, axis=2)
        left = left * (1 + cancellation * rng.normal(size=left.shape))
        signs = np.where(np.arange(t) % 2, -1.0, 1.0)[:, None]
        right = signs * np.repeat(rng.normal(size=(1, 8, 1, 32)), t, axis=2)
        right = right * (1 + cancellation * rng.normal(size=right.shape))
        part = Dense((jnp.float32(left),), jnp.float32(right))
        truth = np.sum(in_full(part) ** 2, axis=(1, 2, 3))
        found = gram_norms([part])
        upper = np.asarray(found.squares, np.float64) + np.asarray(found.slack)
        assert (truth <= upper * (1 + 1e-6)).all()


def test_slack_is_small_where_nothing_cancels():
    rng = np.random.default_rng(0)
    found = gram_norms([dense(rng, t=128, k=256, n=256)])
    assert (found.slack < 1e-2 * found.squares).all()
    one = gram_norms([dense(rng, t=1, k=256, n=256)])
    assert (one.slack < 1e-4 * one.squares).all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.bool_])
@pytest.mark.parametrize("swapped", [False, True])
def test_difference_of_whole_numbers_does_not_wrap_around(dtype, swapped):
    """Data may be bytes or bits, and are the right factors of a transposed weight."""
    rng = np.random.default_rng(0)
    pair = []
    for _ in range(2):
        part = dense(rng, t=3)
        data = rng.integers(0, 250, part.left[0].shape) - 125
        part = Dense((jnp.asarray(data).astype(dtype),), part.right)
        pair.append(oriented(part, swapped=swapped))
    np.testing.assert_allclose(
        gradients([differenced(*pair)]), sum(map(in_full, pair)), rtol=1e-5, atol=1e-3
    )


def test_rows_without_any_width_have_a_gradient():
    part = lookup(np.random.default_rng(0), t=3, n=0)
    assert gradients([part]).shape == (4, 2, 5, 0)
    assert weighted_sum([part], jnp.ones(4)).shape == (2, 5, 0)


def test_difference_of_close_points_keeps_its_digits():
    rng = np.random.default_rng(1)
    one = dense(rng, t=1, k=64, n=64)
    for step in (1e-2, 1e-4):
        left = one.left[0] * (1 + step * jnp.sign(one.left[0]))
        other = Dense((left,), -one.right * (1 + step))
        exact = np.sum((in_full(one) + in_full(other)) ** 2, axis=(1, 2, 3))
        found = gram_norms([differenced(one, other)])
        np.testing.assert_allclose(found.squares, exact, rtol=1e-2 * 1e-2 / step)


def low_precision(dtype):
    """Two layers on six tokens, computed in ``dtype`` from float32 parameters."""

    def loss(params, example, key):
        del key
        w = jax.tree.map(lambda p: p.astype(dtype), params)
        hidden = jnp.tanh(example["x"].astype(dtype) @ w["first"])
        out = hidden @ w["second"]
        return jnp.sum(jnp.square(out.astype(jnp.float32) - example["y"]))

    return loss


@pytest.mark.parametrize(
    ("dtype", "terms"),
    [
        (jnp.bfloat16, False),
        (jnp.bfloat16, True),
        (jnp.float16, True),
        (jnp.float32, True),
    ],
)
@pytest.mark.parametrize(
    "engine", [vmap, bookkeeping, ghost], ids=["vmap", "bookkeeping", "ghost"]
)
def test_no_contribution_exceeds_the_clip_norm_in_low_precision(
    engine, dtype, terms, monkeypatch
):
    """Weights cast to bfloat16 would let contributions exceed the bound by 0.2%."""
    monkeypatch.setattr(kernels, "prefers_bfloat16", lambda: terms)
    rng = np.random.default_rng(2)
    params = {
        "first": jnp.float32(rng.normal(size=(24, 40)) / 5),
        "second": jnp.float32(rng.normal(size=(40, 9)) / 6),
    }
    x, y = rng.normal(size=(12, 6, 24)), rng.normal(size=(12, 6, 9))
    examples = {"x": jnp.float32(x), "y": jnp.float32(y)}
    # Terms of bfloat16 are paid for by clipping further in.
    least = 0.98 if terms and dtype == jnp.bfloat16 else 0.99
    loss = low_precision(dtype)
    run = jax.jit(lambda *args: engine(*args), static_argnums=0)
    for clip_norm in (0.7, 1.3):
        query = Query((params,), clip_norm=clip_norm)
        for i in range(12):
            one = batch_of(examples, mask=np.arange(12) == i)
            clipped, _ = run(loss, query, one, jax.random.key(0))
            assert least * clip_norm < norm(clipped.total) <= clip_norm


def low(rng, *, t):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense(rng, t=t))


def coherent(rng, *, t):
    """Entries that round far, at positions whose products cancel."""
    left = rng.choice([-1.0, 1.0], size=(1, 4, t, 8))
    right = rng.choice([1.0, -1.0078125], size=(1, 4, t, 8))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), Dense((left,), right))


def reached(part, *, terms):
    """Norms of the sum of one example, over its weight: the largest of some weights."""
    found = []
    for i in range(part.right.shape[1]):
        norms = []
        for weight in (1.01, 0.337, 2.9e-3):
            weights = weight * (jnp.arange(part.right.shape[1]) == i)
            total = weighted_sum([part], weights, terms=terms)
            norms.append(np.linalg.norm(np.asarray(total, np.float64)) / weight)
        found.append(max(norms))
    return np.array(found)


@pytest.mark.parametrize(
    ("norms", "kind", "t", "make"),
    thinned(
        [
            (norms, kind, t, make)
            for norms, kind in ((gram_norms, "gram"), (direct_norms, "direct"))
            for t in (6, 40, 1)
            for make in (coherent, low)
        ],
        5,
    ),
)
def test_norms_allow_for_terms_of_bfloat16(monkeypatch, norms, kind, t, make):
    monkeypatch.setattr(kernels, "prefers_bfloat16", lambda: True)
    part = make(np.random.default_rng(t), t=t)
    found = norms([part])
    longest = np.sqrt(found.squares + found.slack)
    assert (reached(part, terms=kernels.TERMS[kind]) <= longest * (1 + 1e-6)).all()
    if kind == "direct":
        np.testing.assert_array_less(found.slack, 1e-3 * found.squares)


def test_one_term_of_bfloat16_would_exceed_norms_that_do_not_allow_for_it(monkeypatch):
    part = coherent(np.random.default_rng(6), t=6)
    unaware = gram_norms([part])
    longest = np.sqrt(unaware.squares + unaware.slack)
    assert (reached(part, terms=1) <= longest * (1 + 1e-6)).all()  # It is float32 here.
    monkeypatch.setattr(kernels, "prefers_bfloat16", lambda: True)
    assert (reached(part, terms=1) > longest * (1 + 1e-4)).any()


def test_terms_of_bfloat16_are_so_many_products(monkeypatch):
    monkeypatch.setattr(kernels, "prefers_bfloat16", lambda: True)
    part = low(np.random.default_rng(0), t=6)
    weights = jnp.ones(part.right.shape[1])

    def products(terms):
        run = jax.make_jaxpr(lambda w: weighted_sum([part], w, terms=terms))
        return str(run(weights)).count("dot_general")

    assert [products(terms) for terms in (1, 2, 3)] == [1, 2, 3]


def test_rows_are_summed_alike_on_accelerators(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    weights = jnp.asarray([1.0, 0.5, 0.0, 2.0, 0.0])
    rows[2] = np.nan
    known = np.where(np.isnan(rows), 0, rows)
    expected = np.einsum("b,bij->ij", weights, known)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        np.testing.assert_allclose(
            kernels.weighted_rows(jnp.asarray(rows), weights), expected, rtol=1e-6
        )


def test_rows_together_are_summed_as_each_alone():
    rng = np.random.default_rng(0)
    weights = jnp.asarray([1.0, 0.5, 0.0, 2.0])
    shapes = [(3, 2), (), (5,), (kernels._SMALL,), (2, 1)]
    parts = [rng.normal(size=(4, *shape)).astype(np.float32) for shape in shapes]
    parts[-1] = parts[-1].astype(np.float16)
    parts[0][2] = parts[1][2] = np.nan
    expected = [kernels.weighted_rows(jnp.asarray(rows), weights) for rows in parts]
    run = jax.make_jaxpr(lambda w: kernels.weighted_together(parts, w))
    found = kernels.weighted_together([jnp.asarray(rows) for rows in parts], weights)
    for one, alone in zip(found, expected, strict=True):
        assert one.dtype == alone.dtype
        np.testing.assert_allclose(one, alone, rtol=1e-6)
    # The three small ones at once, the large one and the one of another dtype alone.
    assert str(run(weights)).count("dot_general") == 3


def test_the_reference_sums_in_full_precision():
    """The default of some accelerators would let a gradient exceed its bound."""

    def loss(params, example, key):
        del key
        return jnp.sum(params * example["x"])

    batch = batch_of({"x": jnp.ones((4, 3))})
    query = Query((jnp.ones(3),), clip_norm=1.0)
    program = jax.make_jaxpr(lambda query: vmap(loss, query, batch, jax.random.key(0)))
    products = [
        part for part in str(program(query)).split(" = ") if "dot_general[" in part[:40]
    ]
    assert products
    assert all("HIGHEST" in part for part in products)
