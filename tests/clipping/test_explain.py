"""What ``explain`` says is what the analysis does, for every parameter of the zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpjax
from tests.checks import thinned
from tests.contracts.zoo import ZOO


def rows_of(case):
    example = jax.tree.map(lambda x: x[0], case.examples)
    return dpjax.explain(case.loss, case.params, example)


# Gradients that are zero, which shapes do not tell.
OTHERWISE = {
    ("no_tokens_at_all", "w"): "dense",
    ("output_that_nobody_reads", "dead"): "dense",
    ("output_whose_gradient_stops", "dead"): "dense",
    ("embedding_of_no_ids", "table"): "unused",
    ("parameter_in_a_while_loop_without_gradient", "s"): "fallback",
    ("convolution_without_outputs", "k"): "fallback",
    ("weight_times_zero", "w"): "dense",
}


@pytest.mark.parametrize("name", thinned([(name,) for name in ZOO], 4))
def test_every_parameter_has_a_row_that_says_its_rule(name):
    case = ZOO[name]()
    rows = {row.path: row for row in rows_of(case)}
    assert list(rows) == [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(case.params)
    ]
    for path, row in rows.items():
        assert row.rule == OTHERWISE.get((name, path), case.rules[path]), row
        assert (row.method == "none") == (row.rule in ("frozen", "unused"))


def test_explain_prints_why_and_what_it_costs(capsys):
    def loss(params, example, key):
        del key
        hidden = example["x"] @ params["w"] + params["b"]
        return jnp.sum(jnp.linalg.inv(params["odd"] + jnp.diag(hidden)))

    shape = jax.ShapeDtypeStruct
    params = {
        "w": shape((3, 4), jnp.float32),
        "b": shape((4,), jnp.float32),
        "odd": shape((4, 4), jnp.float32),
        "rest": shape((2,), jnp.float32),
    }
    rows = dpjax.explain(loss, params, {"x": np.ones(3, np.float32)})
    assert {row.path: row.rule for row in rows} == {
        "w": "dense",
        "b": "elementwise",
        "odd": "elementwise",
        "rest": "unused",
    }
    dense = next(row for row in rows if row.path == "w")
    assert dense.flops == 2 * (3 + 4) + 2 * 3 * 4
    text = capsys.readouterr().out
    assert "meets data in add" in text
    assert "the loss does not read it" in text
    assert len(text.strip().splitlines()) == 1 + len(params)


def test_explain_tells_of_gradients_that_are_formed_and_dropped():
    def loss(params, example, key):
        del key
        merged = params["base"] + params["a"] @ params["b"]
        return jnp.sum(jnp.square(jnp.tanh(example["x"] @ merged)))

    shapes = {"base": (256, 256), "a": (256, 4), "b": (4, 256)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    for positions, method in ((2, "direct"), (512, "per-example")):
        example = {"x": jax.ShapeDtypeStruct((positions, 256), jnp.float32)}
        rows = dpjax.explain(loss, params, example)
        assert {row.rule for row in rows} == {"derived"}
        assert {row.method for row in rows} == {method}


def test_what_is_larger_than_what_it_makes_with_data_is_no_scale():
    """A sum over all entries makes one number of them; beside a product it is free."""

    def loss(params, example, key):
        del key
        hidden = example["x"] @ params["w"] + params["b"][None]
        hidden *= jnp.cos(params["long"]).sum()
        return jnp.sum(jnp.sin(hidden)) + 0.1 * jnp.sum(jnp.square(params["w"]))

    shapes = {"b": (4,), "long": (50, 4), "w": (3, 4)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    rows = dpjax.explain(loss, params, {"x": np.ones((5, 3), np.float32)})
    assert [row.rule for row in rows] == ["elementwise", "fallback", "dense+number"]
