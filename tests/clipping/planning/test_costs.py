"""What the planner expects of memory is what the compiler says, for every rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, bookkeeping, ghost, plain
from dpjax.clipping.analysis.uses import analyse
from dpjax.clipping.execution.execute import run_plan
from dpjax.clipping.planning.costs import DEVICES
from dpjax.clipping.planning.planner import candidates, estimates
from dpjax.typing import Batch
from tests.checks import batch_of, check_engine_contract, thinned

EXAMPLES = 8
KEY = jax.random.key(0)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def score(out):
    return jnp.sum(jnp.sin(out))


def conv(kernel, image, stride=1, padding="SAME", **options):
    """Return loss, parameters and examples ``[EXAMPLES, *image]`` of one convolution."""
    rank = len(kernel) - 2
    numbers = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}[rank]

    def loss(p, e, key):
        del key
        out = jax.lax.conv_general_dilated(
            e["x"][None], p["w"], (stride,) * rank, padding,
            dimension_numbers=numbers, **options,
        )  # fmt: skip
        return score(out)

    return loss, {"w": floats(*kernel)}, {"x": floats(*image)}


def transposed(kernel, image, stride):
    padding = ((kernel[0] // 2,) * 2,) * 2
    return conv(kernel, image, padding=padding, lhs_dilation=(stride, stride))


def recurrent(p, e, key):
    del key
    step = lambda h, x: (jnp.tanh(h @ p["w"] + x), 0.0)  # noqa: E731
    return score(jax.lax.scan(step, jnp.zeros(32), e["x"])[0])


def tied(p, e, key):
    del key
    return score(jnp.tanh(p["t"][e["i"]]) @ p["t"].T)


def dense(p, e, key):
    del key
    return score(e["x"] @ p["w"] + p["b"][None])


def penalised(p, e, key):
    return dense(p, e, key) + sum(jnp.sum(x**2) for x in p.values())


def adapted(p, e, key):
    del key
    return score(e["x"] @ jax.nn.softplus(p["w"]))


def standardised(p, e, key):
    kernel = p["w"] - jnp.mean(p["w"], axis=(0, 1, 2), keepdims=True)
    return conv((3, 3, 16, 16), (16, 16, 16))[0]({"w": kernel}, e, key)


def embedded(p, e, key):
    del key
    return score(p["t"][e["i"]])


def of_dense(positions, width, out):
    shapes = {"w": floats(width, out), "b": floats(out)}
    return dense, shapes, {"x": floats(positions, width)}


CASES = {
    "one position": of_dense(1, 200, 300),
    "positions": of_dense(100, 64, 128),
    "many positions": of_dense(1500, 16, 24),
    "penalised": (penalised, *of_dense(100, 64, 128)[1:]),
    "table": (embedded, {"t": floats(5000, 32)}, {"i": ids(40)}),
    "small table": (embedded, {"t": floats(16, 8)}, {"i": ids(600)}),
    "tied": (tied, {"t": floats(500, 32)}, {"i": ids(40)}),
    "recurrent": (recurrent, {"w": floats(32, 32)}, {"x": floats(60, 32)}),
    "derived": (adapted, {"w": floats(64, 128)}, {"x": floats(20, 64)}),
    "derived kernel": (
        standardised,
        {"w": floats(3, 3, 16, 16)},
        {"x": floats(16, 16, 16)},
    ),
    "3 x 3": conv((3, 3, 16, 16), (16, 16, 16)),
    "1 x 1": conv((1, 1, 16, 32), (16, 16, 16)),
    "stride": conv((7, 7, 3, 64), (64, 64, 3), 2),
    "wide": conv((5, 5, 64, 64), (16, 16, 64)),
    "groups": conv((3, 3, 4, 16), (16, 16, 16), feature_group_count=4),
    "depthwise": conv((7, 7, 1, 32), (28, 28, 32), feature_group_count=32),
    "dilated": conv((3, 3, 16, 16), (16, 16, 16), rhs_dilation=(3, 3)),
    "transposed": transposed((4, 4, 16, 8), (16, 16, 16), 2),
    "as long as the image": conv((32, 32, 8, 8), (32, 32, 8), padding="VALID"),
    "31 x 31": conv((31, 31, 8, 8), (32, 32, 8)),
    "256": conv((256, 4, 4), (512, 4)),
    "sound": conv((400, 1, 32), (4000, 1), 10, "VALID"),
    "transposed by strides": transposed((16, 16, 16, 8), (8, 8, 16), 8),
}
MANY_OFFSETS = [
    "as long as the image",
    "31 x 31",
    "256",
    "sound",
    "transposed by strides",
]


def batch_like(examples, size=EXAMPLES):
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), examples
    )
    return Batch(rows, jax.ShapeDtypeStruct((size,), bool), ids(size))


def temporaries(run, *shapes):
    """Return the bytes of temporaries of ``run``, compiled for the least memory."""
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    compiled = jax.jit(run).lower(*shapes).compile(options)
    return compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def of_engine(engine, name):
    loss, params, examples = CASES[name]

    def run(params, batch):
        query = Query((params,), clip_norm=np.inf if engine is plain else 1.0)
        return engine(loss, query, batch, KEY)

    return temporaries(run, params, batch_like(examples))


@pytest.mark.parametrize("name", thinned([(name,) for name in CASES], 2))
def test_estimated_memory_is_the_compilers(name):
    loss, params, examples = CASES[name]
    batch = batch_like(examples)
    program = analyse(loss, Query((params,), clip_norm=1.0), batch, KEY)
    outputs = 2 * sum(4 * x.size for x in jax.tree.leaves(params))
    on, seen = DEVICES["cpu"], []
    for plan in candidates(program, on):
        if plan in seen:
            continue
        seen.append(plan)

        def run(params, batch, plan=plan):
            query = Query((params,), clip_norm=1.0)
            return run_plan(program, plan, query, batch, KEY)

        found = temporaries(run, params, batch)
        (choice,) = estimates(program, plan, [EXAMPLES], EXAMPLES, on)
        assert found <= 1.25 * choice.peak, plan
        assert choice.peak <= 4 * found + outputs, plan


@pytest.mark.parametrize("engine", [bookkeeping, ghost])
@pytest.mark.parametrize("name", MANY_OFFSETS)
def test_many_offsets_cost_about_what_gradients_of_examples_do(engine, name):
    _, params, _ = CASES[name]
    rows = EXAMPLES * sum(4 * x.size for x in jax.tree.leaves(params))
    assert of_engine(engine, name) <= 4 * of_engine(plain, name) + 2 * rows


@pytest.mark.parametrize("engine", [bookkeeping, ghost])
def test_a_long_table_has_no_gradient_for_each_example(engine):
    shapes = {"t": floats(1_000_000, 16)}, batch_like({"i": ids(20)}, 512)

    def run(params, batch):
        return engine(embedded, Query((params,), clip_norm=1.0), batch, KEY)

    assert temporaries(run, *shapes) < 3 * 4 * 1_000_000 * 16


@pytest.mark.parametrize(
    "engine", [bookkeeping, pytest.param(ghost, marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    ("kernel", "image", "options"),
    [
        ((6, 5, 2, 3), (6, 6, 2), {"padding": "VALID"}),
        ((5, 2, 2, 4), (7, 8, 4), {"stride": 3, "feature_group_count": 2}),
        ((4, 3, 2, 2), (9, 5, 2), {"padding": "VALID", "rhs_dilation": (2, 2)}),
        ((70, 2, 3), (80, 2), {}),
        ((9, 9, 1, 4), (9, 9, 4), {"feature_group_count": 4}),
    ],
)
def test_kernels_longer_than_outputs_and_of_many_offsets_are_right(
    kernel, image, options, engine
):
    loss, *_ = conv(kernel, image, **options)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=kernel), jnp.float32)}
    examples = {"x": jnp.asarray(rng.normal(size=(4, *image)), jnp.float32)}
    query = Query((params,), clip_norm=0.5, residual=True)
    batch = batch_of(examples, mask=[True, True, False, True])
    check_engine_contract(engine, loss, query, batch, KEY)
