"""Every engine agrees with per-example gradients on every loss of the zoo."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, auto, bookkeeping, ghost, vmap
from dpjax.clipping.execution.keys import example_keys
from dpjax.privacy.sensitive import reveal
from dpjax.typing import Batch
from tests.checks import assert_close, batch_of, clip, norm, thinned
from tests.contracts.random_losses import random_loss
from tests.contracts.zoo import ZOO

ENGINES = {
    "vmap": vmap,
    "bookkeeping": bookkeeping,
    "ghost": ghost,
    "auto": auto,
}
KEY = jax.random.key(3)
MASK = np.array([True, True, False, True])
INDEX = np.array([3, 0, 2, 1], np.int32)


# The others are `long`. `ghost` shares analysis and rules with `bookkeeping`, and the planner
# of `auto` mixes what the other two do.
EVERY = {"vmap": 30, "bookkeeping": 10, "ghost": 30, "auto": 30}
ONCE_WRONG = (
    "conv_shared_by_few_and_many_positions",
    "custom_vjp_on_a_weight_in_a_loop",
    "custom_vjp_on_a_weight_in_nested_loops",
    "scan_over_layers_times_a_number_for_each",
    "weights_fused_in_a_scan_and_stacked",
)
PAIRS = [
    pair
    for engine, every in EVERY.items()
    for pair in thinned([(engine, name) for name in ZOO], every, always=ONCE_WRONG)
]


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_engine_equals_per_example_gradients(engine, name):
    case, vectors = known(name)
    compare(ENGINES[engine], case, vectors)


@pytest.mark.parametrize(
    "name", thinned([(name,) for name in ZOO], EVERY["bookkeeping"])
)
def test_rules_of_the_zoo_are_of_its_parameters(name):
    """Zero gradients are where the rules say, and nowhere else."""
    case, vectors = known(name)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(case.params)
    ]
    assert sorted(case.rules) == sorted(paths)
    for path, leaf in zip(paths, jax.tree.leaves(vectors), strict=True):
        if leaf.size:
            still = case.rules[path] in ("frozen", "unused")
            assert leaf[MASK].any() != still, path


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, marks=[] if name == "bookkeeping" else pytest.mark.long)
        for name, engine in ENGINES.items()
    ],
    ids=list(ENGINES),
)
@hypothesis.given(case=random_loss())
@hypothesis.settings(max_examples=8, derandomize=True)
def test_engine_equals_per_example_gradients_of_random_losses(engine, case):
    compare(engine, case, gradients(case))


@functools.cache
def known(name):
    case = ZOO[name]()
    return case, gradients(case)


def gradients(case):
    """Per-example gradients ``[B, ...]`` in the arithmetic of the loss, as float64.

    One by one: ``vmap`` itself might mix examples, and is what the engines are made of.
    """

    @jax.jit
    def run(params, examples, key):
        keys = example_keys(key, Batch(examples, MASK, INDEX))
        one = lambda example: jax.grad(case.loss)(params, *example)  # noqa: E731
        return jax.lax.map(one, (examples, keys))

    leaves = run(case.params, case.examples, KEY)
    return jax.tree.map(lambda g: np.asarray(g, np.float64), leaves)


def compare(engine, case, vectors):
    """Compare what the engine says with the gradients, clipped in float64.

    It is asked twice: flat, and per layer with each leaf a layer of its own, where the clip
    factor of the smallest leaf tells if its norm is wrong.
    """
    rows = [jax.tree.map(lambda g, i=i: g[i], vectors) for i in range(len(MASK))]
    norms = np.array([norm(row) for row in rows]) * MASK
    finite = np.isfinite(norms)
    assert set(np.flatnonzero(~finite)) == set(case.nonfinite)
    kept = np.flatnonzero(MASK & finite)
    rows = [rows[i] for i in kept]
    # Some rows are clipped and some are not.
    clip_norm = float(np.mean(norms[kept])) or 1.0
    for style, (clipped, statistics) in ask(engine, case, clip_norm).items():
        if style == "per_layer":
            rows = [
                {n: {"leaf": leaf} for n, leaf in enumerate(jax.tree.leaves(row))}
                for row in rows
            ]
        parts = [clip(row, clip_norm, style) for row in rows]
        rest = [
            jax.tree.map(np.subtract, row, part)
            for row, part in zip(rows, parts, strict=True)
        ]
        check_sum(clipped.total, parts, like=parts, tolerance=case.tolerance)
        check_sum(clipped.residual, rest, like=rows, tolerance=case.tolerance)
        opened = reveal(statistics)
        np.testing.assert_allclose(
            opened["norms"][finite], norms[finite], case.tolerance, 1e-30
        )
        np.testing.assert_array_equal(opened["nonfinite"], ~finite & MASK)
        np.testing.assert_array_equal(opened["mask"], MASK)


def ask(engine, case, clip_norm):
    leaves, tree = jax.tree.flatten(case.params)
    layers = {n: {"leaf": leaf} for n, leaf in enumerate(leaves)}

    def loss_of_layers(layers, example, key):
        inner = [layers[n]["leaf"] for n in range(len(leaves))]
        return case.loss(jax.tree.unflatten(tree, inner), example, key)

    @jax.jit
    def run(params, layers, batch, key):
        flat = Query((params,), clip_norm=clip_norm, residual=True)
        split = Query((layers,), clip_norm=clip_norm, residual=True, style="per_layer")
        return {
            "flat": engine(case.loss, flat, batch, key),
            "per_layer": engine(loss_of_layers, split, batch, key),
        }

    return run(
        case.params, layers, batch_of(case.examples, mask=MASK, index=INDEX), KEY
    )


def check_sum(actual, vectors, *, like, tolerance):
    """Check that ``actual`` is the sum of ``vectors``, leaf by leaf.

    The tolerance is relative to the leaf's own norms in ``like``; where a leaf's gradient
    cancels, to a hundredth of those of all leaves.
    """
    whole = sum(map(norm, like))
    columns = [jax.tree.leaves(actual)]
    columns += [
        zip(*map(jax.tree.leaves, trees), strict=True) for trees in (vectors, like)
    ]
    for leaf, expected, sizes in zip(*columns, strict=True):
        assert leaf.dtype == jnp.float32
        scale = sum(map(norm, sizes)) + 1e-2 * whole
        assert_close(leaf, sum(expected), rtol=tolerance, scale=scale)
