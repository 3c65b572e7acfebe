"""Weights that are computed from parameters: sums hold where the way back cancels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, auto, bookkeeping, ghost
from dpjax.clipping.analysis.uses import analyse
from dpjax.clipping.arithmetic import kernels
from dpjax.clipping.engines.by_plan import execute
from dpjax.clipping.planning.costs import saved_bytes
from dpjax.clipping.planning.plan import make_plan
from dpjax.clipping.planning.slots import find_slots
from tests.checks import (
    batch_of,
    check_engine_contract,
    check_sensitivity,
    norm,
    thinned,
)

KEY = jax.random.key(0)
SIZE = 64


def planner(program):
    return make_plan(find_slots(program), saved_bytes)


def lean(loss, query, batch, key):
    """Drop gradients wherever that saves room."""
    return execute(loss, query, batch, key, planner=planner)


def standardised(w, dtype):
    w = w.astype(dtype)
    w = w - w.mean((0, 1, 2), keepdims=True)
    return w / jnp.sqrt(jnp.mean(w**2, (0, 1, 2), keepdims=True) + 1e-6)


def of_images(dtype):
    def loss(params, example, key):
        del key
        w = standardised(params["w"], dtype)
        out = jax.lax.conv_general_dilated(
            example["x"][None].astype(dtype),
            w,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum(jnp.square(out.astype(jnp.float32) / 10 - 1))

    return loss


def of_tokens(derive):
    def loss(params, example, key):
        del key
        w = derive(params["w"])
        out = jnp.tanh(example["x"].astype(w.dtype) @ w)
        return jnp.sum(out).astype(jnp.float32)

    return loss


def centred(w):
    return w - w.mean(0, keepdims=True)


def low(w):
    return w.astype(jnp.bfloat16)


FLAT = (1, 1e-4)
CASES = {
    # Of nearly flat images a standardised convolution sees next to nothing.
    "images": (of_images(jnp.float32), (3, 3, 3, 8), (5, 5, 3), FLAT, True),
    "images, bf16": (of_images(jnp.bfloat16), (3, 3, 3, 8), (5, 5, 3), (1, 0.1), False),
    "centred": (of_tokens(centred), (32, 16), (2, 32), FLAT, True),
    "centred in bf16": (
        of_tokens(lambda w: centred(low(w))),
        (32, 16),
        (2, 32),
        FLAT,
        False,
    ),
    "scaled in bf16": (
        of_tokens(lambda w: 0.7 * low(w)),
        (64, 48),
        (2, 64),
        (1, 0.05),
        False,
    ),
    "scaled, then cast": (
        of_tokens(lambda w: low(0.7 * w)),
        (64, 48),
        (2, 64),
        (1, 0.05),
        False,
    ),
    "lower triangle in bf16": (
        of_tokens(lambda w: jnp.tril(low(w))),
        (64, 48),
        (2, 64),
        (1, 0.05),
        False,
    ),
}


def drawn(name):
    loss, shape, data, (mean, spread), drops = CASES[name]
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=shape) / 10, jnp.float32)}
    x = mean + spread * rng.normal(size=(SIZE, *data))
    return loss, params, batch_of({"x": jnp.asarray(x, jnp.float32)}), drops


ENGINES = {"lean": lean, "bookkeeping": bookkeeping, "ghost": ghost, "auto": auto}


@pytest.mark.parametrize(
    ("engine", "name"),
    thinned([(engine, name) for engine in ENGINES for name in CASES], 3),
)
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(engine, name):
    """Rounding is of one example, not of the sum over the batch before it cancels."""
    loss, params, batch, _ = drawn(name)
    few = batch._replace(mask=np.arange(SIZE) < 60)
    check_sensitivity(
        ENGINES[engine], loss, params, few, KEY, clip_norm=1e-3, style="flat"
    )


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_rounded_alike_is_formed_twice(name):
    loss, params, batch, drops = drawn(name)
    program = analyse(loss, Query((params,), clip_norm=1.0), batch, KEY)
    assert bool(planner(program).dropped) == drops


@pytest.mark.parametrize("style", ["flat", "per_layer"])
@pytest.mark.parametrize("turns", [True, False])
def test_gradients_that_are_formed_twice_add_up(style, turns, monkeypatch):
    monkeypatch.setattr(kernels, "prefers_turns", lambda: turns)
    images, params, _, _ = drawn("images")
    x = np.random.default_rng(1).normal(size=(6, 5, 5, 3))
    x[2] = np.nan  # of no account
    batch = batch_of({"x": jnp.asarray(x, jnp.float32)}, mask=np.arange(6) != 2)

    def loss(params, example, key):
        shared = params["both"]["s"][:, None, None]
        first = images({"w": params["one"]["w"] * shared}, example, key)
        second = images({"w": params["two"]["w"] + shared}, example, key)
        return first + 2 * second

    params = {
        "one": params,
        "two": {"w": jnp.flip(params["w"], 0)},
        "both": {"s": jnp.linspace(0.5, 2, 24).reshape(3, 8)},
    }
    query = Query((params,), clip_norm=0.5, style=style, residual=True)
    check_engine_contract(lambda *args: lean(*args), loss, query, batch, KEY)


@pytest.mark.parametrize("engine", [bookkeeping, ghost, auto])
def test_a_tied_table_in_bfloat16_is_rounded_alike_for_norm_and_sum(engine):
    def loss(params, example, key):
        del key
        table = low(params["table"])
        hidden = jnp.tanh(table[example["ids"]])
        return jax.nn.logsumexp((hidden @ table.T).astype(jnp.float32))

    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(30, 8)) / 2, jnp.float32)}
    batch = batch_of({"ids": jnp.asarray(rng.integers(0, 30, (16, 6)))})
    run = jax.jit(lambda *args: engine(*args), static_argnums=0)
    for i in range(16):
        one = batch._replace(mask=np.arange(16) == i)
        clipped, _ = run(loss, Query((params,), clip_norm=1e-2), one, KEY)
        assert norm(clipped.total) <= 1e-2
