"""Numbers that are computed from parameters: penalties cost no per-example gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from dpjax.clipping import Query, auto, bookkeeping, ghost, plain
from dpjax.clipping.engines.by_plan import execute
from dpjax.clipping.planning.plan import make_plan
from dpjax.clipping.planning.slots import find_slots
from tests.checks import batch_of, check_engine_contract

KEY = jax.random.key(0)


def planned(method, loss, query, batch, key):
    def planner(program):
        return make_plan(find_slots(program), lambda group, m: float(m != method))

    return execute(loss, query, batch, key, planner=planner)


def penalised(params, example, key):
    """One weight is tied, one is shifted and penalised twice, one is derived."""
    del key
    hidden = jnp.tanh(example["x"] @ params["w"])
    out = (hidden @ params["w"].T) @ params["v"] + params["b"][None]
    out += example["x"] @ jnp.sinh(params["d"])
    squares = {name: jnp.sum(jnp.square(leaf)) for name, leaf in params.items()}
    norm = jnp.sqrt(squares["w"] + squares["v"])
    all_of_them = sum(squares.values())
    return jnp.sum(jnp.sin(out)) * norm + example["s"] * squares["v"] + all_of_them


def drawn():
    rng, rows = np.random.default_rng(0), 4
    shapes = {"w": (3, 4), "v": (3, 2), "b": (2,), "d": (3, 2)}
    params = {k: jnp.float32(rng.normal(size=shape)) for k, shape in shapes.items()}
    examples = {"x": rng.normal(size=(rows, 5, 3)), "s": rng.normal(size=rows)}
    return params, batch_of(jax.tree.map(jnp.float32, examples))


def test_a_penalty_is_a_rule_of_its_own():
    params, batch = drawn()
    one = jax.tree.map(lambda leaf: leaf[0], batch.examples)
    rules = {row.path: row.rule for row in dpjax.explain(penalised, params, one)}
    assert rules == {
        "w": "tied+number",
        "v": "dense+number",
        "b": "elementwise",
        "d": "derived",
    }


@pytest.mark.parametrize("points", [1, 2])
@pytest.mark.parametrize("method", ["gram", "direct", "keep"])
def test_every_method_adds_what_numbers_add(method, points):
    params, batch = drawn()
    other = jax.tree.map(lambda p: p + 0.1 * jnp.cos(p), params)
    query = Query(
        (params, other)[:points],
        clip_norm=0.3,
        signs=(1.0, -1.0)[:points],
        style="per_layer",
        residual=True,
    )
    engine = functools.partial(planned, method)
    # Norms allow for rounding, those of differences by Gram matrices for most of it.
    rtol = 1e-3 if (method, points) == ("gram", 2) else 1e-4
    check_engine_contract(engine, penalised, query, batch, KEY, rtol=rtol)


@pytest.mark.parametrize("engine", [bookkeeping, ghost, auto])
def test_a_penalty_needs_no_gradient_of_an_example(engine):
    """What is in memory is far from one gradient for each example."""
    rows, width = 64, 128

    def loss(params, example, key):
        del key
        out = jnp.sum(jnp.sin(example["x"] @ params))
        return out + 0.1 * jnp.sum(jnp.square(params))

    shape = jax.ShapeDtypeStruct
    batch = batch_of({"x": np.zeros((rows, 2, width), np.float32)})

    def bytes_of(engine, clip_norm):
        def run(params, batch):
            return engine(loss, Query((params,), clip_norm=clip_norm), batch, KEY)

        params = shape((width, width), jnp.float32)
        compiled = jax.jit(run).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    spent = bytes_of(engine, 1.0) - bytes_of(plain, jnp.inf)
    assert spent < 0.2 * (4 * rows * width**2)


@jax.custom_vjp
def clipped_on_its_way_back(number):
    return number


clipped_on_its_way_back.defvjp(
    lambda number: (number, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),)
)


@pytest.mark.parametrize("engine", [bookkeeping, auto])
def test_a_number_whose_gradient_is_not_in_proportion_has_no_such_rule(engine):
    def loss(params, example, key):
        del key
        penalty = clipped_on_its_way_back(jnp.sum(jnp.square(params["v"])))
        out = jnp.sum(jnp.sin(example["x"] @ params["v"]))
        return out + example["s"] * penalty

    params, batch = drawn()
    params = {"v": params["v"]}
    one = jax.tree.map(lambda leaf: leaf[0], batch.examples)
    assert [row.rule for row in dpjax.explain(loss, params, one)] == ["fallback"]
    query = Query((params,), clip_norm=1e6)
    check_engine_contract(engine, loss, query, batch, KEY)
