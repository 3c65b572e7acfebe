"""One example moves the sum by at most C, whatever its float32 numbers are.

Compiled as production compiles: what the tests' own settings leave out is what rounds one
use of a value otherwise than another.
"""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, auto, vmap
from dpjax.clipping.arithmetic import kernels
from dpjax.clipping.arithmetic.rounding import row_norms
from dpjax.clipping.engines.by_plan import execute
from dpjax.clipping.planning.costs import saved_bytes
from dpjax.clipping.planning.plan import make_plan
from dpjax.clipping.planning.slots import find_slots
from tests.checks import batch_of, norm, thinned

execution = importlib.import_module("dpjax.clipping.execution.execute")
PRODUCTION = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
KEY = jax.random.key(0)
C = 1.0
K, N, ROWS = 8, 4, 4


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """The tests have eight, and on several the examples of an image do not take turns."""
    monkeypatch.setattr(kernels, "prefers_turns", lambda: True)


def by(method, *, two_passes=False):
    """Return the engine that uses one method wherever it can."""

    def planner(program):
        cost = lambda group, m: 0.0 if m == method else 1.0  # noqa: E731
        return make_plan(
            find_slots(program), cost, probing=cost if two_passes else None
        )

    return lambda *args: execute(*args, planner=planner)


def lean(*args):
    planner = lambda program: make_plan(find_slots(program), saved_bytes)  # noqa: E731
    return execute(*args, planner=planner)


ENGINES = {
    "vmap": vmap,
    "auto": auto,
    "gram": by("gram"),
    "direct": by("direct"),
    "keep": by("keep"),
    "lean": lean,
    "gram, two passes": by("gram", two_passes=True),
    "direct, two passes": by("direct", two_passes=True),
}


def weighted(out, example):
    return jnp.sum(out.astype(jnp.float32) * example["s"])


def dense(params, example, key):
    del key
    return weighted(example["x"] @ params, example)


def dense_bf16(params, example, key):
    del key
    x, w = example["x"].astype(jnp.bfloat16), params.astype(jnp.bfloat16)
    return weighted(x @ w, example)


def less_its_mean(params, example, key):
    return dense(params - jnp.mean(params, axis=0, keepdims=True), example, key)


def scaled(params, example, key):
    del key
    return weighted(example["x"][:, :N] * params[:1], example)


def standardised_output(params, example, key):
    out = example["x"] @ params
    out = out - jnp.mean(out, axis=0, keepdims=True)
    out = out * jax.lax.rsqrt(jnp.mean(out**2, axis=0, keepdims=True) + 1e-5)
    return jnp.sum(jnp.tanh(out) * example["s"])


def convolution(params, example, key):
    del key
    out = jax.lax.conv_general_dilated(
        example["x"][None],
        params.reshape(2, K // 2, N)[:, :, :],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )
    return weighted(out[0], example)


def lookup(params, example, key):
    del key
    rows = jnp.clip(jnp.abs(example["x"][:, 0]), 0, K - 1).astype(jnp.int32)
    return weighted(params[jnp.where(rows > 0, rows, 0)], example)


def tied(params, example, key):
    del key
    hidden = jnp.tanh(example["x"]) @ params
    return jnp.sum(example["s"] * hidden) + jnp.sum(
        (example["s"] @ params.T) * example["x"]
    )


def scanned(params, example, key):
    del key
    first = lambda h, w: (h + example["x"] @ w, None)  # noqa: E731
    stack = jnp.stack([params, 2 * params])
    out, _ = jax.lax.scan(first, jnp.zeros_like(example["s"]), stack)
    return weighted(out, example)


def penalised(params, example, key):
    strength = example.get("e", jnp.mean(example["s"]))
    return dense(params, example, key) + strength * jnp.sum(jnp.square(params))


RULES = {
    loss.__name__: loss
    for loss in (
        dense,
        dense_bf16,
        less_its_mean,
        scaled,
        standardised_output,
        convolution,
        lookup,
        tied,
        scanned,
        penalised,
    )
}
RULES["standardised_output, two points"] = standardised_output
RULES["penalised, two points"] = penalised


@functools.cache
def compiled(rule, engine):
    """Return (examples, which row counts) -> its contribution, compiled as in production."""
    w = jnp.float32(np.random.default_rng(0).normal(size=(K, N)))
    points = (w, w + 1e-3) if rule.endswith("two points") else (w,)
    query = Query(points, clip_norm=C, signs=(1.0, -1.0)[: len(points)])
    run = jax.jit(
        lambda batch: ENGINES[engine](RULES[rule], query, batch, KEY),
        compiler_options=PRODUCTION,
    )

    def contribution(examples, row):
        return run(batch_of(examples, mask=np.arange(ROWS) == row))[0].total

    return contribution


KINDS = ("any", "constant", "one position", "opposite", "nearly opposite", "denormal")


def adversary(kind, t, seed, exponents):
    """Return ROWS examples with values about 10 to the ``exponents`` of x and s."""
    rng = np.random.default_rng(seed)
    x, s = rng.normal(size=(ROWS, t, K)), rng.normal(size=(ROWS, t, N))
    if kind == "constant":
        x = np.broadcast_to(1 + rng.uniform(size=(ROWS, t, 1)), x.shape)
        s = s * np.where(np.arange(t) % 2, -1.0, 1.0)[:, None]
    if kind == "one position":
        x, s = x * np.float64(10.0) ** rng.integers(-30, 30, (ROWS, t, 1)), s
    if kind in ("opposite", "nearly opposite"):
        half = t // 2
        x[:, half : 2 * half], s[:, half : 2 * half] = x[:, :half], -s[:, :half]
    if kind == "nearly opposite":
        x = x * (1 + 1e-6 * rng.normal(size=(ROWS, t, 1)))
    if kind == "denormal":
        x = 1e-40 * x
    with np.errstate(over="ignore"):
        return {
            "x": (x * 10.0 ** exponents[0]).astype(np.float32),
            "s": (s * 10.0 ** exponents[1]).astype(np.float32),
        }


# Each engine and each rule.
CASES = thinned(
    [(engine, rule) for rule in RULES for engine in ENGINES], len(ENGINES) - 1
)


@pytest.mark.parametrize(("engine", "rule"), CASES)
@hypothesis.given(
    kind=st.sampled_from(KINDS),
    t=st.sampled_from([1, 2, 64]),
    seed=st.integers(0, 2**31),
    exponents=st.tuples(st.integers(-38, 38), st.integers(-38, 38)),
)
def test_no_example_contributes_more_than_the_clip_norm(
    engine, rule, kind, t, seed, exponents
):
    contribution = compiled(rule, engine)
    examples = adversary(kind, t, seed, exponents)
    for row in range(ROWS):
        assert norm(contribution(examples, row)) <= C * (1 + 1e-6)


def of_images(standardise, normalise):
    def loss(params, example, key):
        del key
        w = params["w"]
        if standardise:
            w = w - jnp.mean(w, (0, 1, 2), keepdims=True)
            w = w * jax.lax.rsqrt(jnp.mean(w**2, (0, 1, 2), keepdims=True) + 1e-5)
        out = jax.lax.conv_general_dilated(
            example["x"][None],
            w,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
        if normalise:
            out = out - jnp.mean(out, (0, 1), keepdims=True)
            out = out * jax.lax.rsqrt(jnp.var(out, (0, 1), keepdims=True) + 1e-12)
            out = jnp.tanh(out)
        out = jnp.mean(out, (0, 1)) @ params["o"]
        return 0.5 * jnp.sum(jnp.square(out - example["y"]))

    return loss


def images(rng, value, target):
    shade = value or 0.5 + rng.uniform(size=(ROWS, 1, 1, 1))
    return {
        "x": np.broadcast_to(shade, (ROWS, 8, 8, 3)).astype(np.float32),
        "y": (target * rng.normal(size=(ROWS, 4))).astype(np.float32),
    }


def two_constant_rows(rng):
    a, b, width = 1.9751230478286743, 1.9961426258087158, 8192
    x = np.stack([np.full((ROWS, width), a), np.full((ROWS, width), b)], 1)
    s = np.stack([np.ones((ROWS, N)), np.full((ROWS, N), -1.0)], 1)
    scale = 10.0 ** rng.integers(0, 5, (ROWS, 1, 1))
    return {"x": x.astype(np.float32), "s": (scale * s).astype(np.float32)}


def flat(value, target):
    def draw(rng):
        s = target * rng.normal(size=(ROWS, 1, N))
        x = np.full((ROWS, 1, K), value)
        return {"x": x.astype(np.float32), "s": s.astype(np.float32)}

    return draw


WEIGHT = np.float32(np.random.default_rng(7).normal(size=(K, N)))


def against_its_penalty(rng):
    """Draw examples for which the product with WEIGHT and the penalty on it cancel."""
    strength = np.float32(10.0 ** rng.integers(0, 9, ROWS))
    x = np.broadcast_to(np.eye(K, dtype=np.float32), (ROWS, K, K))
    near = 1 + 1e-7 * rng.normal(size=(ROWS, K, N))
    s = -2 * strength[:, None, None] * WEIGHT * near
    return {"x": x, "s": np.float32(s), "e": strength}


def normal(*shape):
    return lambda rng: jnp.float32(rng.normal(size=shape))


def kernels_of_images(rng):
    shapes = {"w": (3, 3, 3, 8), "o": (8, 4)}
    return {k: jnp.float32(rng.normal(size=shape)) for k, shape in shapes.items()}


ATTACKS = {
    # name: (loss, how to draw parameters, examples)
    "standardised kernel, flat images": (
        of_images(standardise=True, normalise=False),
        kernels_of_images,
        lambda rng: images(rng, None, 1e6),
    ),
    "normalised output, white images": (
        of_images(standardise=False, normalise=True),
        kernels_of_images,
        lambda rng: images(rng, 1.0, 30.0),
    ),
    "two constant rows": (dense, normal(8192, N), two_constant_rows),
    "products that underflow": (dense, normal(K, N), flat(8e-20, 4e18)),
    "a mean that cancels": (less_its_mean, normal(K, N), flat(1.7, 1e12)),
    "a penalty that cancels": (penalised, lambda rng: WEIGHT, against_its_penalty),
}


@pytest.mark.parametrize(
    ("name", "engine"),
    thinned([(name, engine) for name in ATTACKS for engine in ENGINES], 3),
)
def test_known_attacks_stay_within_the_bound(name, engine):
    check_attack(name, ENGINES[engine])


def check_attack(name, engine):
    loss, params, examples = ATTACKS[name]
    rng = np.random.default_rng(0)
    params, examples = params(rng), examples(rng)
    query = Query((params,), clip_norm=C)
    run = jax.jit(
        lambda batch: engine(loss, query, batch, KEY), compiler_options=PRODUCTION
    )
    for row in range(ROWS):
        alone = batch_of(examples, mask=np.arange(ROWS) == row)
        assert norm(run(alone)[0].total) <= C * (1 + 1e-6)


MUTANTS = {
    # attack: (engine, what is broken)
    "standardised kernel, flat images": ("vmap", "computed_anew"),
    "normalised output, white images": ("direct, two passes", "never_measured_again"),
    "two constant rows": ("gram", "no_slack"),
    "products that underflow": ("gram", "underflow_forgotten"),
    "a penalty that cancels": ("gram", "no_slack"),
}


def computed_anew(monkeypatch):
    for module in ("engines.vmap", "execution.execute", "arithmetic.kernels"):
        module = importlib.import_module(f"dpjax.clipping.{module}")
        monkeypatch.setattr(
            module, "apart", lambda function, operands: function(operands)
        )


def never_measured_again(monkeypatch):
    for module in (execution, kernels):
        monkeypatch.setattr(module, "capped", lambda weights, norms, allowed: weights)


def no_slack(monkeypatch):
    monkeypatch.setattr(kernels, "of_terms", lambda count, dtype: 0.0)


def underflow_forgotten(monkeypatch):
    monkeypatch.setattr(kernels, "smallest", lambda dtype: 0.0)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_passes_the_bound(name, monkeypatch):
    engine, mutant = MUTANTS[name]
    globals()[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        # A function of its own: the honest program is in jit's cache.
        check_attack(name, lambda *args: ENGINES[engine](*args))


@pytest.mark.parametrize("terms", [1e4, 1e9])
@pytest.mark.parametrize("engine", [e for e in ENGINES if e not in ("vmap", "keep")])
def test_terms_that_cancel_in_one_example_do_not_erase_the_others(engine, terms):
    """Its gradient is zero up to rounding, its terms are larger than the others' sum."""
    rng, rows, t = np.random.default_rng(0), 64, 64
    x, s = rng.normal(size=(rows, t, K)), rng.normal(size=(rows, t, N))
    s[5] = terms
    x[5, 1::2] = -x[5, ::2]
    examples = {"x": np.float32(x), "s": np.float32(s)}
    check_others(dense, np.zeros((K, N), np.float32), examples, engine)


@pytest.mark.parametrize("engine", ["gram", "direct"])
def test_a_penalty_that_cancels_in_one_example_does_not_erase_the_others(engine):
    rng, rows, t = np.random.default_rng(0), 64, K
    x, s = rng.normal(size=(rows, t, K)), rng.normal(size=(rows, t, N))
    e = rng.normal(size=rows)
    x[5], s[5], e[5] = np.eye(K), -2e9 * WEIGHT, 1e9
    examples = {k: np.float32(v) for k, v in {"x": x, "s": s, "e": e}.items()}
    check_others(penalised, WEIGHT, examples, engine)


def check_others(loss, params, examples, engine):
    """The fifth row moves the sum by C at most."""
    rows, query = len(examples["x"]), Query((params,), clip_norm=C)
    run = jax.jit(
        lambda batch: ENGINES[engine](loss, query, batch, KEY),
        compiler_options=PRODUCTION,
    )
    with_it = run(batch_of(examples))[0].total
    without = run(batch_of(examples, mask=np.arange(rows) != 5))[0].total
    assert norm(np.float64(with_it) - np.float64(without)) <= 1.001 * C


@pytest.mark.parametrize("t", [2, 7, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [(2, 2), (33, 8)])
def test_what_is_said_to_be_computed_once_is(width, dtype, t):
    """In the optimised program: norm and sum together do not take the product twice."""
    k, n = width
    args = jnp.ones((1, ROWS, t, k), dtype), jnp.ones((1, ROWS, t, n), dtype)
    assert kernels.computed_once([kernels.Dense((args[0],), args[1])])

    def rows(left, right):
        return kernels.gradients([kernels.Dense((2 * left,), jnp.tanh(right) - 1)])

    def length(*args):
        return row_norms(rows(*args)).squares

    def total(*args):
        return kernels.weighted_rows(rows(*args), jnp.ones(ROWS))

    def both(*args):
        found = rows(*args)
        return row_norms(found).squares, kernels.weighted_rows(found, jnp.ones(ROWS))

    product, apart, together = (
        sum(flops(function, args) for function in functions)
        for functions in ((rows,), (length, total), (both,))
    )
    assert together <= apart - 0.9 * product


def flops(function, args):
    program = jax.jit(function, compiler_options=PRODUCTION).lower(*args).compile()
    return program.cost_analysis()["flops"]


def test_the_product_of_two_vectors_is_not_said_to_be_computed_once():
    for t, k, n in [(1, 8, 4), (7, 1, 4), (7, 8, 1)]:
        left, right = jnp.ones((1, ROWS, t, k)), jnp.ones((1, ROWS, t, n))
        assert not kernels.computed_once([kernels.Dense((left,), right)])
