"""Dense layers: dot_general in every orientation, and bilinear forms."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import (
    Case,
    bits,
    case,
    dense,
    draw_data,
    draw_params,
    elementwise,
    frozen,
    ids,
    register,
    score,
    tied,
    unused,
    x,
)


@case({"w": dense(3, 4), "b": elementwise(4)}, {"x": x(3)})
def dense_on_a_vector(p, e, key):
    return score(e["x"] @ p["w"] + p["b"])


@case({"w": dense(3, 4), "b": elementwise(4)}, {"x": x(5, 3)})
def dense_on_tokens(p, e, key):
    return score(e["x"] @ p["w"] + p["b"][None])


@case({"w": dense(4, 4), "v": dense(4, 4)}, {"x": x(4, 4)})
def dense_all_equal(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) @ p["v"].T)


@case({"w": dense(3, 4)}, {"x": x(2, 5, 3)})
def dense_on_a_grid_of_tokens(p, e, key):
    return score(e["x"] @ p["w"])


@case(dense(5), {"x": x(5), "y": x()})
def linear_regression_of_a_bare_array(p, e, key):
    return jnp.square(p @ e["x"] - e["y"])


@case({"w": dense(4, 3)}, {"x": x(3)})
def weight_on_the_left(p, e, key):
    return score(p["w"] @ e["x"])


@case({"w": dense(4, 3)}, {"x": x(5, 3)})
def weight_on_the_left_of_tokens(p, e, key):
    return score(p["w"] @ e["x"].T)


@case({"w": dense(4, 3)}, {"x": x(5, 3)})
def einsum_weight_first(p, e, key):
    return score(jnp.einsum("nk,tk->tn", p["w"], e["x"]))


@case({"w": dense(4, 4)}, {"x": x(4, 4)})
def einsum_weight_first_output_transposed_all_equal(p, e, key):
    out = jnp.einsum("nk,tk->nt", p["w"], e["x"])
    return score(out * jnp.arange(16.0).reshape(4, 4))


@case({"w": dense(2, 3, 4)}, {"x": x(5, 2, 3)})
def einsum_over_several_axes(p, e, key):
    return score(jnp.einsum("tij,ijn->tn", e["x"], p["w"]))


@case({"w": dense(3, 4, 2)}, {"x": x(5, 2, 3)})
def einsum_over_several_axes_permuted(p, e, key):
    return score(jnp.einsum("tij,jni->nt", e["x"], p["w"]))


@case({"w": dense(2, 3, 4)}, {"x": x(5, 2, 3)})
def einsum_per_head(p, e, key):
    return score(jnp.einsum("thk,hkn->thn", e["x"], p["w"]))


@case({"w": dense(4, 4, 4)}, {"x": x(4, 4, 4)})
def einsum_per_head_permuted_all_equal(p, e, key):
    out = jnp.einsum("kth,nhk->nth", e["x"], p["w"])
    return score(out * jnp.arange(64.0).reshape(4, 4, 4) / 10)


@case({"w": dense(2, 3, 3, 4)}, {"x": x(5, 2, 3, 3)})
def einsum_two_batch_axes(p, e, key):
    return score(jnp.einsum("tghk,ghkn->gtnh", e["x"], p["w"]))


@case({"w": dense(2, 3)}, {"x": x(5, 2, 3)})
def einsum_batch_and_no_free_axis(p, e, key):
    return score(jnp.einsum("thk,hk->th", e["x"], p["w"]))


@case({"w": dense(3, 4)}, {"x": x(2)})
def dot_without_contraction(p, e, key):
    out = jax.lax.dot_general(e["x"], p["w"], (((), ()), ((), ())))
    return score(out)


@case({"w": dense(3, 4)}, {"x": x(3, 4)})
def dot_over_all_axes_to_a_scalar(p, e, key):
    return score(jnp.tensordot(e["x"], p["w"], axes=2))


@case({"w": dense(3, 2, 4)}, {"x": x(5, 3)})
def dense_general_two_outputs(p, e, key):
    return score(jnp.tensordot(e["x"], p["w"], axes=1))


@case({"w": dense(1, 1), "v": dense(1, 3), "u": dense(3, 1)}, {"x": x(1, 1)})
def axes_of_size_one(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"] @ p["v"]) @ p["u"])


@case({"w": frozen(3, 4), "v": dense(3, 4)}, {"x": x(0, 3), "y": x(3)})
def no_tokens_at_all(p, e, key):
    return score(e["x"] @ p["w"]) + score(e["y"] @ p["v"])


@case({"w": dense(3, 4), "none": unused(0, 3)}, {"x": x(3)})
def zero_size_parameter_not_used(p, e, key):
    return score(e["x"] @ p["w"])


@case({"w": dense(3, 4), "none": dense(0, 4)}, {"x": x(3), "none": x(0)})
def zero_size_parameter_used(p, e, key):
    return score(e["x"] @ p["w"] + e["none"] @ p["none"])


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def dot_with_precision_and_preferred_type(p, e, key):
    out = jax.lax.dot_general(
        e["x"], p["w"], (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return score(out)


@case({"w": dense(3, 4), "v": dense(3, 2)}, {"x": ids(5, 6, 3), "m": bits(6, 3)})
def dense_on_integers_and_booleans(p, e, key):
    return score(e["x"] @ p["w"]) + score(e["m"] @ p["v"])


ONES = np.ones((3, 4), np.float32)


@case({"w": dense(3, 4)}, {"x": x(6, 3, low=0, high=256, dtype=jnp.uint8)})
def dense_on_bytes(p, e, key):
    return score((e["x"] / 255 - 0.5) @ p["w"])


@case({"w": dense(3, 4)}, {"y": x()})
def dense_on_noise_of_the_key(p, e, key):
    """The key is of the example, too."""
    return score(jax.random.normal(key, (5, 3)) @ p["w"]) * e["y"]


@case({"w": dense(3, 4)}, {"x": x(3)})
def dense_on_noise_of_a_key_made_from_data(p, e, key):
    seed = jnp.sum(jnp.abs(e["x"]) * 100).astype(jnp.int32)
    return score(jax.random.normal(jax.random.key(seed), (5, 3)) @ p["w"])


@case({"w": elementwise(3, 4)}, {"y": x()})
def dense_on_a_constant_then_times_data(p, e, key):
    return score((ONES.T @ p["w"]) * e["y"])


@case({"w": dense(3, 4), "v": dense(4, 2)}, {"x": x(5, 3), "m": bits(5)})
def one_row_without_any_gradient(p, e, key):
    out = jnp.tanh(e["x"] @ p["w"]) @ p["v"]
    return score(jnp.where(e["m"][:, None], out, 0.0)) * (e["x"][0, 0] > 0)


@case({"w": dense(3, 4), "dead": unused(3, 4)}, {"x": x(3)})
def output_that_nobody_reads(p, e, key):
    _ = jnp.tanh(e["x"] @ p["dead"])
    return score(e["x"] @ p["w"])


@case({"w": dense(3, 4), "dead": frozen(3, 4)}, {"x": x(3)})
def output_whose_gradient_stops(p, e, key):
    gate = jax.lax.stop_gradient(jnp.tanh(e["x"] @ p["dead"]))
    return score(gate * (e["x"] @ p["w"]))


@case({"w": tied(3, 3)}, {"x": x(3)})
def one_use_with_gradient_and_one_without(p, e, key):
    gate = jax.lax.stop_gradient(e["x"] @ p["w"])
    return score(gate * (e["x"] @ p["w"]))


@case({"w": dense(3, 4)}, {"x": x(6, 3, scale=1e-15), "y": x(4)})
def tiny_activations_with_huge_cotangents(p, e, key):
    return score((e["x"] @ p["w"]) * 1e15 + e["y"][None])


@case({"w": dense(3, 4)}, {"x": x(3), "r": x(6, 3, scale=1e-2), "y": x(6, 4)})
def tokens_that_nearly_cancel(p, e, key):
    """The norm is far below the sum over pairs of tokens: a Gram sum cancels."""
    tokens = e["x"][None] + e["r"]
    weights = e["y"] - jnp.mean(e["y"], axis=0, keepdims=True)
    return jnp.sum((tokens @ p["w"]) * weights)


@register
def example_that_is_not_finite(rng):
    def loss(p, e, key):
        return score(jnp.tanh(e["x"] @ p["w"]) @ p["v"] + p["b"][None])

    params = draw_params(rng, {"w": dense(3, 4), "v": dense(4, 2), "b": elementwise(2)})
    examples = draw_data(rng, {"x": x(5, 3)})
    examples["x"] = examples["x"].at[1, 2, 0].set(jnp.nan)
    rules = {"w": "dense", "v": "dense", "b": "elementwise"}
    return Case(loss, params, examples, rules, nonfinite=(1,))


@register
def example_whose_backward_pass_is_not_finite(rng):
    """The loss is 0 and finite; the gradient of the square root is not."""

    def loss(p, e, key):
        return jnp.sqrt(jnp.sum(jnp.square(e["x"] @ p["w"])))

    params = draw_params(rng, {"w": dense(3, 4)})
    examples = draw_data(rng, {"x": x(3)})
    examples["x"] = examples["x"].at[0].set(0.0)
    return Case(loss, params, examples, {"w": "dense"}, nonfinite=(0,))


# --- Bilinear forms ------------------------------------------------------------------------


@case({"w": dense(3, 4)}, {"x": x(3), "y": x(4)})
def bilinear(p, e, key):
    return jnp.sin(e["x"] @ p["w"] @ e["y"])


@case({"w": dense(3, 3)}, {"x": x(3)})
def quadratic_form(p, e, key):
    return jnp.sin(e["x"] @ p["w"] @ e["x"])


@case({"w": dense(3, 2, 4)}, {"x": x(5, 3), "y": x(5, 4)})
def einsum_of_three_with_the_weight_in_the_middle(p, e, key):
    return score(jnp.einsum("tk,khn,tn->th", e["x"], p["w"], e["y"]))


@case({"w": dense(2, 3, 4)}, {"x": x(3), "y": x(4)})
def bilinear_layer(p, e, key):
    return score(jnp.einsum("i,hij,j->h", e["x"], p["w"], e["y"]))


@case({"u": dense(3, 2), "v": dense(2, 4)}, {"x": x(5, 3), "y": x(5, 4)})
def bilinear_of_low_rank(p, e, key):
    return score(jnp.einsum("ti,tj->ij", e["x"] @ p["u"], e["y"] @ p["v"].T))
