"""The count of FLOPs: the compiler's own where there is no loop, and loops as they run."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import flops


def compiled(function, *shapes):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*structs).compile()


def convolution(x, kernel, *, kwargs):
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


CONVOLUTIONS = {
    "padded": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 3), "padding": ((1, 0), (2, 1))},
    "dilated": {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 3)},
    "transposed": {
        "window_strides": (1, 1),
        "padding": ((1, 1), (1, 2)),
        "lhs_dilation": (2, 2),
    },
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_counts_as_the_compiler_counts_it(name):
    run = functools.partial(convolution, kwargs=CONVOLUTIONS[name])
    program = compiled(run, (2, 9, 8, 3), (3, 3, 3, 5))
    assert flops.count(program.as_text()) == program.cost_analysis()["flops"]


def test_a_convolution_in_groups_counts_the_channels_of_one_group():
    kwargs = CONVOLUTIONS["padded"] | {"feature_group_count": 2}
    run = functools.partial(convolution, kwargs=kwargs)
    program = compiled(run, (2, 9, 8, 4), (3, 3, 2, 6))
    # Rows and columns that three offsets meet: 3 * 9 - 2 and 3 * 8 - 2.
    assert flops.count(program.as_text()) == 2 * 2 * 6 * 2 * 25 * 22


def test_a_batched_product_counts_as_the_compiler_counts_it():
    program = compiled(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 5, 6), (4, 6, 7)
    )
    assert flops.count(program.as_text()) == 2 * 4 * 5 * 6 * 7
    assert program.cost_analysis()["flops"] == 2 * 4 * 5 * 6 * 7


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x)

    def outer(x, w):
        return jax.lax.scan(lambda y, _: (inner(y, w), None), x, length=5)[0] @ w

    program = compiled(outer, (8, 8), (8, 8))
    # Each turn of a loop adds one to its counter.
    assert flops.count(program.as_text()) == (3 * 5 + 1) * 2 * 8**3 + 3 * 5 + 5


def test_of_two_branches_the_dearer_counts():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ (w + x))

    program = compiled(either, (8, 8), (8, 8))
    assert flops.count(program.as_text()) == 2 * 2 * 8**3 + 8**2


def test_a_loop_of_unknown_length_has_no_count():
    def run(x, w):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 9.0, lambda y: y @ w, x)

    assert flops.count(compiled(run, (8, 8), (8, 8)).as_text()) is None


def test_calls_of_a_library_have_no_count():
    text = compiled(jnp.matmul, (8, 8), (8, 8)).as_text()
    assert math.isclose(flops.count(text), 2 * 8**3)
    library = text.replace(" dot(", " custom-call(").replace(
        "lhs_contracting_dims", 'custom_call_target="gemm", lhs_contracting_dims'
    )
    assert flops.count(library) is None


def test_a_convolution_in_groups_of_its_batch_has_no_count():
    run = functools.partial(convolution, kwargs=CONVOLUTIONS["padded"])
    text = compiled(run, (2, 9, 8, 3), (3, 3, 3, 5)).as_text()
    grouped = text.replace("dim_labels=", "batch_group_count=2, dim_labels=")
    assert flops.count(text) is not None
    assert flops.count(grouped) is None
