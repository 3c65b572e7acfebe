"""One contract body over all engines."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import (
    Query,
    Slope,
    auto,
    bookkeeping,
    clipped_grad,
    ghost,
    microbatched,
    plain,
    planned,
    vmap,
)
from dpjax.privacy.sensitive import SEAL, ClippedSum, reveal
from tests.checks import (
    assert_close,
    batch_of,
    check_engine_contract,
    check_sensitivity,
    norm,
    thinned,
)

ENGINES = {
    "vmap": vmap,
    "microbatched(vmap, 4)": microbatched(vmap, size=4),
    "bookkeeping": bookkeeping,
    "microbatched(bookkeeping, 4)": microbatched(bookkeeping, size=4),
    "ghost": ghost,
    "auto": auto,
}
all_engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
all_styles = pytest.mark.parametrize("style", ["flat", "automatic", "per_layer"])
KEY = jax.random.key(3)


def run(engine, loss, query, batch):
    return _compiled(engine)(loss, query, batch, KEY)


@functools.cache
def _compiled(engine):
    return jax.jit(engine, static_argnums=0)


def linear(params, example, key):
    del key
    return jnp.square(jnp.dot(params, example["x"]) - example["y"])


def network(params, example, key):
    """Two layers with dropout: the loss depends on the example's own key."""
    hidden = jnp.tanh(example["x"] @ params["first"]["w"] + params["first"]["b"])
    hidden = hidden * jax.random.bernoulli(key, 0.7, hidden.shape)
    out = hidden @ params["second"]["w"] + params["second"]["b"]
    return jnp.sum(jnp.square(out - example["y"])) + 0.1 * jnp.sum(hidden)


def embedding(params, example, key):
    del key
    rows = params["table"][example["ids"]]
    logits = rows @ params["table"].T  # tied
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


def convolution(params, example, key):
    del key
    out = jax.lax.conv_general_dilated(
        example["x"][None], params["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return jnp.sum(jnp.tanh(out)) * params["scale"]


def unused(params, example, key):
    del key
    return jnp.sum(params["used"] * example["x"])


def make(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "linear": (linear, normal(5), {"x": normal(8, 5), "y": normal(8)}),
        "network": (
            network,
            {
                "first": {"w": normal(5, 7), "b": normal(7)},
                "second": {"w": normal(7, 3), "b": normal(3)},
            },
            {"x": normal(8, 5), "y": normal(8, 3)},
        ),
        "tied embedding": (
            embedding,
            {"table": normal(6, 4)},
            {"ids": jnp.asarray(rng.integers(0, 6, (8, 3)))},
        ),
        "convolution": (
            convolution,
            {"kernel": normal(3, 3, 2, 4), "scale": normal()},
            {"x": normal(8, 6, 6, 2)},
        ),
        "unused parameter": (
            unused,
            {"used": normal(4), "unused": normal(3)},
            {"x": normal(8, 4)},
        ),
    }


CASES = make(0)
MASK = [True, True, False, True, True, True, False, True]


# Styles meet all engines on one loss, and all losses under one engine or another.
STYLED = thinned(
    [
        (engine, style, case)
        for style in ("automatic", "per_layer")
        for case in CASES
        for engine in ENGINES
    ],
    len(ENGINES) + 1,
    always=("network",),
)


@pytest.mark.parametrize(
    ("engine", "style", "case"),
    [*itertools.product(ENGINES, ["flat"], CASES), *STYLED],
)
@pytest.mark.parametrize("clip_norm", [0.3, 1e6])
def test_engine_equals_the_reference(engine, style, case, clip_norm):
    engine = ENGINES[engine]
    loss, params, examples = CASES[case]
    query = Query(
        (params,), clip_norm=clip_norm, style=style, residual=True, count=True
    )
    batch = batch_of(examples, mask=MASK, index=[5, 9, 0, 2, 7, 1, 0, 4])
    check_engine_contract(engine, loss, query, batch, KEY)


@all_engines
@all_styles
def test_gradients_are_clipped_to_the_outer_norm_first(engine, style):
    loss, params, examples = CASES["network"]
    norms = reveal(
        run(vmap, loss, Query((params,), clip_norm=1.0), batch_of(examples))[1]
    )["norms"]
    outer = float(np.median(norms))  # Half of the gradients are longer.
    query = Query(
        (params,),
        clip_norm=outer / 3,
        style=style,
        residual=True,
        count=True,
        outer_norm=outer,
    )
    check_engine_contract(engine, loss, query, batch_of(examples, mask=MASK), KEY)


@all_engines
@pytest.mark.parametrize("clip_norm", [0.2, 0.5])
def test_one_example_moves_the_residual_by_at_most_what_lies_between(engine, clip_norm):
    loss, params, examples = CASES["network"]
    for scale in (1e-3, 1.0, 1e12):
        big = {"x": examples["x"], "y": examples["y"] * scale}
        for i in range(8):
            one = batch_of(big, mask=np.arange(8) == i)
            query = Query(
                (params,),
                clip_norm=clip_norm,
                residual=True,
                count=True,
                outer_norm=0.7,
            )
            clipped, _ = run(engine, loss, query, one)
            assert norm(clipped.residual) <= 0.7 - clip_norm


def test_sums_of_different_outer_norms_do_not_merge():
    zeros = [
        ClippedSum.zeros(jnp.zeros(3), l2_bound=1.0, outer_norm=g) for g in (2.0, 3.0)
    ]
    assert np.isnan(zeros[0].merge(zeros[1]).seal)


def test_sums_of_different_bounds_do_not_merge():
    near, far = (ClippedSum.zeros(jnp.zeros(3), l2_bound=c) for c in (0.5, 1.0))
    assert np.isfinite(near.merge(near).seal)
    assert np.isnan(near.merge(far).seal)
    assert np.isnan(far.merge(near).seal)


@pytest.mark.parametrize(
    ("engine", "case"),
    thinned(itertools.product(ENGINES, CASES), 3, always=("network",)),
)
def test_difference_of_two_points_equals_the_reference(engine, case):
    engine = ENGINES[engine]
    loss, params, examples = CASES[case]
    other = jax.tree.map(lambda p: p + 0.1 * jnp.cos(p), params)
    query = Query(
        (params, other), clip_norm=0.3, signs=(1.0, -1.0), residual=True, count=True
    )
    # Norms of differences at many positions allow for more rounding.
    rtol = 1e-4 if case == "convolution" else 1e-5
    batch = batch_of(examples, mask=MASK)
    check_engine_contract(engine, loss, query, batch, KEY, rtol=rtol)


@all_engines
def test_difference_of_equal_points_with_zero_radius_is_zero(engine):
    loss, params, examples = CASES["network"]
    query = Query(
        (params, params), clip_norm=0.0, signs=(1.0, -1.0), residual=True, count=True
    )
    clipped, _ = run(engine, loss, query, batch_of(examples))
    assert norm(clipped.total) == 0.0


def slope_query(params, *, clip_norm, **options):
    direction = jax.tree.map(lambda p: jnp.cos(3 * p), params)
    slope = Slope(direction, 0.05)
    return Query((params,), clip_norm=clip_norm, slope=slope, **options)


@all_engines
@pytest.mark.parametrize("clip_norm", [0.3, 1e6])
def test_slopes_equal_the_reference(engine, clip_norm):
    """The loss has dropout: both points must drop the same units."""
    loss, params, examples = CASES["network"]
    query = slope_query(params, clip_norm=clip_norm, residual=True)
    batch = batch_of(examples, mask=MASK, index=[5, 9, 0, 2, 7, 1, 0, 4])
    # Float32 losses are rounded before they are subtracted.
    check_engine_contract(engine, loss, query, batch, KEY, rtol=1e-4)


@all_engines
def test_the_slope_of_one_example_counts_within_the_clip_norm_or_not_at_all(engine):
    loss, params, examples = CASES["network"]
    query = slope_query(params, clip_norm=0.1)
    for scale in (1e-3, 1.0, 1e12, np.nan):
        y = examples["y"] * scale
        for i in range(8):
            one = batch_of({"x": examples["x"], "y": y}, mask=np.arange(8) == i)
            clipped, statistics = run(engine, loss, query, one)
            assert norm(clipped.total) <= 0.1
            found = reveal(statistics)["nonfinite"]
            np.testing.assert_array_equal(found, (np.arange(8) == i) & np.isnan(scale))


def test_slopes_are_refused_by_engines_that_would_not_answer_them():
    loss, params, examples = CASES["network"]
    query = slope_query(params, clip_norm=1.0)
    with pytest.raises(ValueError, match="residual, count or slope"):
        plain(loss, query, batch_of(examples), KEY)
    with pytest.raises(ValueError, match="this query is of slopes; use micro"):
        planned(memory_budget=1e9)(loss, query, batch_of(examples), KEY)


@all_engines
def test_bfloat16_parameters_are_summed_in_float32_within_the_bound(engine):
    loss, params, examples = CASES["network"]
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for i in range(8):
        one = batch_of(examples, mask=np.arange(8) == i)
        clipped, _ = run(engine, loss, Query((params,), clip_norm=0.01), one)
        assert {x.dtype for x in jax.tree.leaves(clipped.total)} == {
            jnp.dtype("float32")
        }
        assert norm(clipped.total) <= 0.01


@all_engines
@all_styles
def test_contribution_of_one_example_never_exceeds_the_clip_norm(engine, style):
    loss, params, examples = CASES["network"]
    for scale in (1e-20, 1e-3, 1.0, 1e3, 1e12):
        big = {"x": examples["x"], "y": examples["y"] * scale}
        for i in range(8):
            one = batch_of(big, mask=np.arange(8) == i)
            query = Query(
                (params,), clip_norm=0.1, style=style, residual=True, count=True
            )
            clipped, _ = run(engine, loss, query, one)
            assert norm(clipped.total) <= 0.1
            assert abs(clipped.count) == 0.5


@all_engines
@all_styles
@hypothesis.given(seed=st.integers(0, 2**32 - 1), clip=st.floats(1e-3, 10))
@hypothesis.settings(max_examples=8)
def test_neighbouring_batches_differ_by_at_most_the_bound(engine, style, seed, clip):
    loss, params, examples = make(seed)["network"]
    check_sensitivity(
        engine, loss, params, batch_of(examples), KEY, clip_norm=clip, style=style
    )


@all_engines
@all_styles
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_nonfinite_examples_are_zeroed_counted_and_harmless(engine, style, bad):
    loss, params, examples = CASES["network"]
    broken = {**examples, "y": examples["y"].at[3].set(bad)}
    query = Query((params,), clip_norm=0.5, style=style, residual=True, count=True)
    clipped, statistics = run(engine, loss, query, batch_of(broken))
    without = batch_of(examples, mask=np.arange(8) != 3)
    expected, _ = run(engine, loss, query, without)
    for part in ("total", "residual"):
        wanted = getattr(expected, part)
        assert_close(getattr(clipped, part), wanted, rtol=1e-6, scale=norm(wanted))
    assert clipped.count == expected.count - 0.5  # It is not within.
    np.testing.assert_array_equal(reveal(statistics)["nonfinite"], np.arange(8) == 3)


@all_engines
def test_garbage_in_masked_rows_changes_nothing(engine):
    loss, params, examples = CASES["network"]
    garbage = jax.tree.map(lambda x: x.at[2].set(jnp.nan), examples)
    query = Query((params,), clip_norm=0.5, residual=True, count=True)
    mask = np.arange(8) != 2
    clean = run(engine, loss, query, batch_of(examples, mask=mask))
    dirty = run(engine, loss, query, batch_of(garbage, mask=mask))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@all_engines
def test_batch_of_padding_only_sums_to_zero(engine):
    loss, params, examples = CASES["network"]
    query = Query((params,), clip_norm=0.5, residual=True, count=True)
    clipped, _ = run(engine, loss, query, batch_of(examples, mask=np.zeros(8, bool)))
    assert norm(clipped.total) == 0.0
    assert norm(clipped.residual) == 0.0
    assert clipped.count == 0.0


@all_engines
def test_order_and_slot_of_examples_do_not_matter(engine):
    loss, params, examples = CASES["network"]
    query = Query((params,), clip_norm=0.5, count=True)
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    straight, _ = run(engine, loss, query, batch_of(examples))
    shuffled = jax.tree.map(lambda x: x[order], examples)
    moved, statistics = run(engine, loss, query, batch_of(shuffled, index=order))
    assert_close(moved.total, straight.total, rtol=1e-6, scale=norm(straight.total))
    assert moved.count == straight.count
    _, plain_order = run(engine, loss, query, batch_of(examples))
    np.testing.assert_allclose(
        reveal(statistics)["norms"], reveal(plain_order)["norms"][order], rtol=1e-6
    )


@all_engines
def test_merge_over_a_split_batch_equals_the_whole(engine):
    loss, params, examples = CASES["network"]
    query = Query((params,), clip_norm=0.5, residual=True, count=True)
    whole, _ = run(engine, loss, query, batch_of(examples))
    halves = [
        run(engine, loss, query, batch_of(examples, mask=mask))[0]
        for mask in (np.arange(8) < 3, np.arange(8) >= 3)
    ]
    merged = halves[0].merge(halves[1])
    assert_close(merged.total, whole.total, rtol=1e-6, scale=norm(whole.total))
    assert_close(merged.residual, whole.residual, rtol=1e-6, scale=norm(whole.residual))
    assert merged.count == whole.count
    assert merged.seal == np.float32(SEAL)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, e, k: p * e["x"], "one floating-point scalar for ONE example"),
        (lambda p, e, k: (jnp.sum(p), 1.0), "one floating-point scalar"),
        (lambda p, e, k: jnp.sum(p > 0), "one floating-point scalar"),
    ],
    ids=["vector", "auxiliary", "integer"],
)
@pytest.mark.parametrize("engine", [*ENGINES.values(), plain], ids=[*ENGINES, "plain"])
def test_a_loss_that_is_no_scalar_is_refused(engine, loss, message):
    batch = batch_of({"x": jnp.ones((8, 5))})
    with pytest.raises(TypeError, match=message):
        engine(loss, Query((jnp.ones(5),), clip_norm=1.0), batch, KEY)


def shout(params, example, key):
    del key
    jax.debug.print("{}", example["x"])
    return jnp.sum(params * example["x"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (shout, "has side effects"),
        (
            lambda p, e, k: jnp.sum(p * jax.lax.pmean(e["x"], "batch")),
            "reads a mapped axis .*batch.* ONE example",
        ),
    ],
    ids=["effects", "batch axis"],
)
@pytest.mark.parametrize("engine", [*ENGINES.values(), plain], ids=[*ENGINES, "plain"])
def test_a_loss_that_sees_more_than_its_example_is_refused(engine, loss, message):
    batch = batch_of({"x": jnp.ones((8, 5))})
    with pytest.raises(TypeError, match=message):
        engine(loss, Query((jnp.ones(5),), clip_norm=1.0), batch, KEY)


@all_engines
def test_integer_parameters_are_refused_by_name(engine):
    params = {"layer": {"w": jnp.ones(5), "count": jnp.zeros((), jnp.int32)}}
    with pytest.raises(TypeError, match="layer/count has dtype int32"):
        engine(
            lambda p, e, k: jnp.sum(p["layer"]["w"]),
            Query((params,), clip_norm=1.0),
            batch_of({"x": jnp.ones((8, 5))}),
            KEY,
        )


@all_engines
def test_a_radius_where_squares_underflow_keeps_nothing(engine):
    """Entries of 1e-19 have squares of 0 in float32: their norm would look like 0."""

    def tiny(params, example, key):
        del key
        return 1e-19 * jnp.sum(params * example["x"])

    batch = batch_of({"x": jnp.ones((8, 5))})
    clipped, _ = run(engine, tiny, Query((jnp.ones(5),), clip_norm=1e-21), batch)
    assert norm(clipped.total) == 0.0


def test_plain_engine_is_the_gradient_of_the_summed_loss():
    loss, params, examples = CASES["network"]
    mask = np.array(MASK)
    batch = batch_of(examples, mask=mask)
    gradient, statistics = plain(loss, Query((params,), clip_norm=np.inf), batch, KEY)
    expected, *_ = _unclipped(loss, params, batch)
    assert_close(gradient.total, expected, rtol=1e-5, scale=norm(expected))
    assert float(gradient.l2_bound) == np.inf
    assert np.isnan(reveal(statistics)["norms"][mask]).all()


def test_plain_engine_uses_no_per_example_gradients():
    loss, params, examples = CASES["network"]
    query = Query((params,), clip_norm=np.inf)
    lowered = jax.jit(functools.partial(plain, loss)).lower(
        query, batch_of(examples), KEY
    )
    # A per-example gradient of first/w would be [8, 5, 7].
    assert "8x5x7" not in lowered.as_text()
    reference = jax.jit(functools.partial(vmap, loss))
    assert "8x5x7" in reference.lower(query, batch_of(examples), KEY).as_text()


def test_plain_engine_refuses_what_it_cannot_answer():
    loss, params, examples = CASES["network"]
    for extra in ("residual", "count"):
        query = Query((params,), clip_norm=1.0, **{extra: True})
        with pytest.raises(ValueError, match=f"without residual.* {extra}=True"):
            plain(loss, query, batch_of(examples), KEY)


def test_microbatch_size_must_divide_the_batch():
    loss, params, examples = CASES["linear"]
    engine = microbatched(vmap, size=3)
    with pytest.raises(ValueError, match="microbatch_size=3 does not divide"):
        engine(loss, Query((params,), clip_norm=1.0), batch_of(examples), KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be positive"),
        ({"clip_norm": float("nan")}, "clip_norm=nan must be positive"),
        ({"clip_norm": float("inf")}, "clip_norm=inf must be positive and finite"),
        ({"clip_norm": 1e-15}, "clip_norm=1e-15 is below"),
        ({"clip_norm": 1.0, "outer_norm": 0.5}, "outer_norm=0.5 must be at least"),
        ({"clip_norm": 1.0, "style": "layer"}, "clip_style='layer' is unknown"),
        ({"clip_norm": 1.0, "engine": "vamp"}, "did you mean 'vmap'"),
        ({"clip_norm": 1.0, "microbatch_size": 0}, "microbatch_size=0"),
        (
            {"clip_norm": 1.0, "engine": "ghost", "memory_budget": 1e9},
            "memory_budget=1000000000.0 is for engine='auto'",
        ),
        (
            {"clip_norm": 1.0, "memory_budget": -1},
            "memory_budget=-1 must be a positive",
        ),
    ],
    ids=str,
)
def test_clipped_grad_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_grad(linear, **options)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_clipped_grad_refuses_a_mask_of_weights(dtype):
    loss, params, examples = CASES["linear"]
    batch = batch_of(examples)
    weighted = batch._replace(mask=2 * np.asarray(batch.mask, dtype))
    with pytest.raises(TypeError, match=r"batch.mask has dtype .*32; it must be bool"):
        clipped_grad(loss, clip_norm=1.0)(params, weighted, KEY)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("engine", [bookkeeping, ghost, auto])
def test_ids_of_a_byte_are_looked_up_in_longer_tables(engine, dtype):
    """Against the same ids in 32 bits: the gradient of JAX's own lookup may be wrong."""
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(300, 3)), jnp.float32)}
    ids = rng.integers(0, np.iinfo(dtype).max, size=(8, 9))

    def loss(params, example, key):
        del key
        return jnp.sum(jnp.sin(jnp.take(params["table"], example["ids"], axis=0)))

    query = Query((params,), clip_norm=1.0)
    long, short = (
        run(engine, loss, query, batch_of({"ids": jnp.asarray(ids, kind)}))
        for kind in (jnp.int32, dtype)
    )
    assert_close(short[0].total, long[0].total, rtol=1e-6, scale=1.0)
    np.testing.assert_allclose(reveal(short[1])["norms"], reveal(long[1])["norms"])


NAMES = ["vmap", "bookkeeping", "ghost", "auto"]


@pytest.mark.parametrize("engine", NAMES)
def test_what_is_empty_or_a_plain_number_is_taken(engine):
    loss = lambda p, e, k: p["s"] * jnp.sum(jnp.sin(e["x"] @ p["w"]))  # noqa: E731
    grad = clipped_grad(loss, clip_norm=1.0, engine=engine)
    params = {"w": np.ones((4, 3), np.float32), "s": 1.0}
    run = jax.jit(lambda examples: grad(params, examples, KEY))
    for examples in (0, 2):
        total, _ = run({"x": jnp.ones((examples, 4))})
        assert norm(total.total) <= examples
    assert norm(total.total) > 1.9


@pytest.mark.parametrize("engine", NAMES)
def test_a_convolution_without_outputs_is_taken(engine):
    def loss(params, example, key):
        del key
        form = {"dimension_numbers": ("NWC", "WIO", "NWC")}
        out = jax.lax.conv_general_dilated(
            example["x"][None], params["k"], (1,), "SAME", **form
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(example["x"][0] * params["b"])

    params = {"k": jnp.ones((3, 2, 0)), "b": jnp.ones(2)}
    grad = clipped_grad(loss, clip_norm=1e6, engine=engine)
    total, _ = jax.jit(grad.__call__)(params, {"x": jnp.ones((4, 6, 2))}, KEY)
    np.testing.assert_allclose(total.total["b"], 4.0)


@pytest.mark.parametrize(
    ("batch", "key", "error", "message"),
    [
        ({}, KEY, ValueError, r"shapes \[\]; each must begin with the axis"),
        ({"x": 1.0}, KEY, ValueError, r"shapes \[\(\)\]; each must begin"),
        (
            {"x": np.ones((2, 4))},
            np.zeros(2, np.uint32),
            TypeError,
            r"not by jax.random.P",
        ),
    ],
    ids=["no arrays", "no axis", "old key"],
)
def test_clipped_grad_refuses_what_is_no_batch_or_key(batch, key, error, message):
    with pytest.raises(error, match=message):
        clipped_grad(linear, clip_norm=1.0)({"w": np.ones(4)}, batch, key)


def test_clipped_grad_takes_plain_examples_and_knows_its_sensitivity():
    loss, params, examples = CASES["linear"]
    grad = clipped_grad(loss, clip_norm=0.25)
    assert grad.sensitivity() == 0.25
    total, _ = jax.jit(grad.__call__)(params, examples, KEY)
    expected, *_ = _unclipped(loss, params, batch_of(examples), clip_norm=0.25)
    assert_close(total.total, expected, rtol=1e-5, scale=norm(expected))
    assert isinstance(total, ClippedSum)


def _unclipped(loss, params, batch, clip_norm=1e9):
    from tests.checks import reference

    return reference(loss, Query((params,), clip_norm=clip_norm), batch, KEY)
