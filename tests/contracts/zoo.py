"""Losses that exercise every rule of the fast engines, and losses that try to break them.

``ZOO[name]()`` builds a ``Case``. Each says, parameter by parameter, how its per-example
norm can be computed:

- ``dense``, ``conv``, ``embedding``: it meets data in one use (or in several uses of slices
  that do not overlap), through views only: in a dot_general, as the kernel of a convolution,
  as a table whose whole rows are picked. A weight shared by the steps of a scan is one use.
- ``tied``: several such uses of the same entries, so that cross terms count.
- ``elementwise``: biases, scales, tokens, and whatever else meets data entry by entry and is
  no larger than what comes out: per-example gradients are cheap.
- ``derived``: what meets data is a function of parameters that is no view.
- ``fallback``: no rule; per-example gradients are formed though they may be large.
- ``dense+elementwise``: parts of it one way and parts the other way.
- ``frozen``, ``unused``: the gradient is zero; with or without a trace in the jaxpr.

Most cases are written as ``@case({name: rule and shape}, {name: data})`` above the loss. The
sizes of dimensions differ where they can, so that a mix-up fails; in cases named ``all_equal``
they are all the same (the batch's too), so that a mix-up is not saved by a shape error.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

B = 4
BF16 = 2e-2  # tolerance where arithmetic is in bfloat16


class Case(NamedTuple):
    """A loss of one example, and what to expect of it.

    Attributes:
        loss: ``(params, example, key) -> scalar``.
        params: Pytree of floating arrays.
        examples: Pytree ``[B, ...]``.
        rules: Path of each parameter (``keystr``, "/" between) to its rule.
        tolerance: Relative, of sums and norms.
        dtype: Of the arithmetic.
        nonfinite: Rows whose gradient is not finite.
    """

    loss: Callable[[Any, Any, Any], Any]
    params: Any
    examples: Any
    rules: dict[str, str]
    tolerance: float = 1e-5
    dtype: str = "float32"
    nonfinite: tuple[int, ...] = ()


ZOO: dict[str, Callable[[], Case]] = {}


class P(NamedTuple):
    """A parameter to draw: normal, of this rule, shape, scale, shift and dtype."""

    rule: str
    shape: tuple[int, ...]
    scale: float = 0.5
    shift: float = 0.0
    dtype: Any = jnp.float32


def _kind(rule):
    return lambda *shape, **options: P(rule, shape, **options)


dense, conv, embedding, tied = map(_kind, ["dense", "conv", "embedding", "tied"])
elementwise, derived, fallback = map(_kind, ["elementwise", "derived", "fallback"])
dense_and_elementwise = _kind("dense+elementwise")
frozen, unused = map(_kind, ["frozen", "unused"])


class X(NamedTuple):
    """Data to draw: normal, or whole numbers from ``low`` below ``high``."""

    shape: tuple[int, ...]
    low: int | None = None
    high: int | None = None
    dtype: Any = None
    scale: float = 1.0


def x(*shape, **options):
    return X(shape, **options)


def ids(high, *shape, low=0):
    return X(shape, low, high, jnp.int32)


def bits(*shape):
    return X(shape, 0, 2, jnp.bool_)


def register(build):
    """Put ``build(rng) -> Case`` in the zoo under its name."""
    name = build.__name__
    assert name not in ZOO, name
    ZOO[name] = lambda: build(np.random.default_rng(zlib.crc32(name.encode())))
    return build


def case(params, data, **options):
    """Put the decorated loss in the zoo, with these parameters and data."""

    def decorate(loss):
        def build(rng):
            return Case(
                loss,
                draw_params(rng, params),
                draw_data(rng, data),
                {
                    jax.tree_util.keystr(path, simple=True, separator="/"): p.rule
                    for path, p in jax.tree_util.tree_leaves_with_path(
                        params, is_leaf=_is_spec
                    )
                },
                **options,
            )

        build.__name__ = loss.__name__
        register(build)
        return loss

    return decorate


def _is_spec(leaf):
    return isinstance(leaf, P | X)


def draw_params(rng, spec):
    def draw(p):
        value = p.shift + p.scale * rng.normal(size=p.shape)
        return jnp.asarray(value, p.dtype)

    return jax.tree.map(draw, spec, is_leaf=_is_spec)


def draw_data(rng, spec):
    def draw(d):
        shape = (B, *d.shape)
        if d.high is None:
            return jnp.asarray(d.scale * rng.normal(size=shape), d.dtype or jnp.float32)
        return jnp.asarray(rng.integers(d.low, d.high, shape), d.dtype)

    return jax.tree.map(draw, spec, is_leaf=_is_spec)


def score(out):
    """Some smooth function of all outputs; in at least float32 whatever their dtype."""
    out = jnp.ravel(out)
    out = out.astype(jnp.float64 if out.dtype == jnp.float64 else jnp.float32)
    return jnp.sum(jnp.sin(out + 0.3)) + 0.1 * jnp.sum(jnp.square(out))


def entropy(logits, labels):
    """Summed cross entropy of ``labels[T]`` under ``logits[T, V]``."""
    log = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.take_along_axis(log, labels[:, None], axis=-1))


def linen(module, data, rules, *, call=None, shapes=None, **options):
    """Build a case of a linen module; the rule is found by the parameter's last name."""

    def apply(variables, e, key):
        if call is not None:
            return call(module, variables, e, key)
        return score(module.apply(variables, e["x"]))

    def loss(p, e, key):
        return apply({"params": p}, e, key)

    def build(rng):
        examples = draw_data(rng, data)
        one = jax.tree.map(lambda a: a[0], examples)

        def init(key):
            if shapes is not None:
                return shapes(module, key, one)
            return module.init(key, one["x"])

        abstract = jax.eval_shape(init, jax.random.key(0))["params"]
        params = jax.tree.map(
            lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), abstract
        )
        return Case(loss, params, examples, rules_by_name(params, rules), **options)

    return build


def rules_by_name(params, rules):
    """Rule of the longest end of each path that ``rules`` has."""

    def rule(path):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        ends = [end for end in rules if ("/" + name).endswith("/" + end)]
        return name, rules[max(ends, key=len)]

    return dict(rule(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


# --- Dense layers: dot_general in every orientation ---------------------------------------


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


# --- Views of a weight --------------------------------------------------------------------


@case({"w": dense(12)}, {"x": x(5, 3)})
def weight_reshaped_from_flat(p, e, key):
    return score(e["x"] @ p["w"].reshape(3, 4))


@case({"w": dense(2, 2, 3)}, {"x": x(5, 6)})
def weight_reshaped_across_axes(p, e, key):
    """[2, 2, 3] to [6, 2]: no axis of the leaf survives."""
    return score(e["x"] @ p["w"].reshape(6, 2))


@case({"w": dense(4, 3)}, {"x": x(5, 3)})
def weight_transposed(p, e, key):
    return score(e["x"] @ p["w"].T)


@case({"w": derived(2, 3, 4)}, {"x": x(5, 8)})
def weight_transposed_then_reshaped(p, e, key):
    return score(e["x"] @ jnp.transpose(p["w"], (2, 0, 1)).reshape(8, 3))


@case({"w": dense(4, 4)}, {"x": x(4, 4)})
def weight_reshaped_in_another_order_all_equal(p, e, key):
    """One primitive transposes and reshapes."""
    return score(e["x"] @ jax.lax.reshape(p["w"], (4, 4), dimensions=(1, 0)))


@case({"w": dense(1, 3, 1, 4)}, {"x": x(5, 3)})
def weight_squeezed(p, e, key):
    return score(e["x"] @ jnp.squeeze(p["w"]))


@case({"w": dense(4)}, {"x": x(5, 4)})
def weight_expanded(p, e, key):
    return score(e["x"] @ p["w"][:, None])


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_cast_to_bfloat16(p, e, key):
    return score(e["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16))


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_cast_there_and_back(p, e, key):
    return score(e["x"] @ p["w"].astype(jnp.bfloat16).astype(jnp.float32))


@case({"w": derived(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_with_reduced_precision(p, e, key):
    return score(e["x"] @ jax.lax.reduce_precision(p["w"], 8, 7))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_cast_to_complex(p, e, key):
    data = e["x"].astype(jnp.complex64) * (1 + 2j)
    return score(jnp.imag(data @ p["w"].astype(jnp.complex64)))


@case({"re": derived(3, 4), "im": derived(3, 4)}, {"x": x(5, 3)})
def weight_of_real_and_imaginary_part(p, e, key):
    out = e["x"].astype(jnp.complex64) @ jax.lax.complex(p["re"], p["im"])
    return score(jnp.abs(out + 1) ** 2)


@case({"re": derived(3, 4), "im": derived(3, 4)}, {"x": x(5, 3)})
def real_data_times_a_complex_weight(p, e, key):
    out = e["x"] @ (p["re"] + 1j * p["im"])
    return score(jnp.abs(out)) + score(jnp.imag(out))


@case({"w": dense(3, 12)}, {"x": x(5, 3)})
def fused_qkv_sliced_by_columns(p, e, key):
    q, k, v = (e["x"] @ p["w"][:, i : i + 4] for i in (0, 4, 8))
    return score(jax.nn.softmax(q @ k.T) @ v)


@case({"w": dense(3, 12)}, {"x": x(5, 3)})
def fused_qkv_split_after_the_dot(p, e, key):
    q, k, v = jnp.split(e["x"] @ p["w"], 3, axis=1)
    return score(jax.nn.softmax(q @ k.T) @ v)


@case({"w": dense(3, 6)}, {"x": x(5, 3)})
def a_slice_of_which_the_rest_is_unused(p, e, key):
    return score(e["x"] @ p["w"][:, 1:5])


@case({"w": tied(3, 6)}, {"x": x(5, 3)})
def slices_that_overlap(p, e, key):
    return score(e["x"] @ p["w"][:, :4]) + score(jnp.cos(e["x"]) @ p["w"][:, 2:])


@case({"w": tied(5, 5)}, {"x": x(6, 3)})
def slices_that_overlap_in_a_corner(p, e, key):
    return score(e["x"] @ p["w"][:3, :3]) + score(jnp.cos(e["x"]) @ p["w"][2:, 2:])


@case({"w": tied(4, 6)}, {"x": x(5, 4), "y": x(5, 3)})
def slices_that_overlap_in_other_shapes(p, e, key):
    other = p["w"].ravel()[5:17].reshape(3, 4)
    return score(e["x"] @ p["w"]) + score(e["y"] @ other)


@case({"w": dense(3, 3, 3)}, {"x": x(5, 3)})
def stack_indexed_layer_by_layer(p, e, key):
    hidden = e["x"]
    for i in range(3):
        hidden = jnp.tanh(hidden @ p["w"][i])
    return score(hidden)


@case({"w": tied(3, 3, 3)}, {"x": x(5, 3)})
def stack_indexed_with_a_layer_repeated(p, e, key):
    hidden = e["x"]
    for i in (0, 1, -1, 1):
        hidden = jnp.tanh(hidden @ p["w"][i])
    return score(hidden)


@case({"w": dense(6, 4)}, {"x": x(5, 3)})
def weight_sliced_with_a_stride(p, e, key):
    return score(e["x"] @ p["w"][::2])


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def weight_reversed(p, e, key):
    return score(e["x"] @ p["w"][::-1])


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_rolled(p, e, key):
    return score(e["x"] @ jnp.roll(p["w"], 1, axis=0))


@case({"w": derived(2, 4)}, {"x": x(5, 3)})
def weight_padded(p, e, key):
    return score(e["x"] @ jnp.pad(p["w"], ((1, 0), (0, 2))))


@case({"w": derived(3, 4)}, {"x": x(5, 2, 3)})
def weight_broadcast_over_heads(p, e, key):
    heads = jnp.broadcast_to(p["w"][None], (2, 3, 4))
    return score(jnp.einsum("thk,hkn->thn", e["x"], heads))


@case({"w": derived(2, 3, 4)}, {"x": x(5, 4, 3)})
def weight_repeated_over_groups_of_heads(p, e, key):
    heads = jnp.repeat(p["w"], 2, axis=0)
    return score(jnp.einsum("thk,hkn->thn", e["x"], heads))


@case({"w": derived(3, 2)}, {"x": x(5, 6)})
def weight_tiled(p, e, key):
    return score(e["x"] @ jnp.tile(p["w"], (2, 3)))


@case({"a": dense(3, 2), "b": dense(3, 5)}, {"x": x(5, 3)})
def weights_concatenated(p, e, key):
    return score(e["x"] @ jnp.concatenate([p["a"], p["b"]], axis=1))


@case({"a": derived(3, 4), "b": derived(3, 4)}, {"x": x(5, 2, 3)})
def weights_stacked(p, e, key):
    heads = jnp.stack([p["a"], p["b"]])
    return score(jnp.einsum("thk,hkn->thn", e["x"], heads))


@case({"w": derived(3, 4), "v": derived(4, 2)}, {"x": x(5, 3)})
def optimization_barrier_around_a_weight(p, e, key):
    w, v = jax.lax.optimization_barrier((p["w"], p["v"]))
    return score(jnp.tanh(e["x"] @ w) @ v)


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_sum_over_its_free_axis(p, e, key):
    """jnp.einsum sums the weight before it meets data."""
    return score(jnp.einsum("tk,kn->t", e["x"], p["w"]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_gathered_by_constant_rows(p, e, key):
    return score(e["x"] @ p["w"][np.array([2, 0, 2])])


@case({"w": dense(2, 3, 4)}, {"x": x(5, 3)})
def transposed_output_reshaped_into_heads(p, e, key):
    q = jnp.einsum("tk,hkn->htn", e["x"], p["w"])
    return score(jnp.einsum("htn,hsn->hts", q, q))


# --- Several uses of one weight -----------------------------------------------------------


@case({"w": tied(3, 3)}, {"x": x(5, 3)})
def same_dense_twice(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) @ p["w"])


@case({"w": tied(3, 4)}, {"x": x(5, 3)})
def same_dense_twice_on_the_same_data(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) * jnp.cos(e["x"] @ p["w"]))


# Gram norms of terms that cancel to a tenth come with slack, and clip that much harder.
@case({"w": tied(3, 4)}, {"x": x(3)}, tolerance=5e-5)
def two_uses_that_cancel(p, e, key):
    """Each use alone has a large gradient; the example's own is small."""
    return jnp.sum(e["x"] @ p["w"]) - 0.9 * jnp.sum(e["x"] @ p["w"])


@case({"w": tied(3, 4)}, {"x": x(5, 3)})
def weight_and_its_transpose(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) @ p["w"].T)


@case({"w": tied(4, 4)}, {"x": x(4, 4)})
def weight_and_its_transpose_all_equal(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) @ p["w"].T + e["x"] @ p["w"].T)


@case({"w": tied(3, 4)}, {"x": x(5, 3), "y": x(2, 3), "z": x(3)})
def same_weight_at_three_lengths(p, e, key):
    return score(e["x"] @ p["w"]) + score(e["y"] @ p["w"]) + score(e["z"] @ p["w"])


@case({"w": tied(3, 4)}, {"x": x(5, 3), "y": x(2, 2), "z": x(5, 12)})
def same_weight_in_other_shapes(p, e, key):
    one = e["x"] @ p["w"]
    two = e["y"] @ p["w"].reshape(2, 6)
    three = e["z"] @ p["w"].ravel()
    return score(one) + score(two) + score(three)


@case({"w": tied(2, 3, 4)}, {"x": x(5, 3), "y": x(5, 2, 3), "z": x(2, 4)})
def same_weight_with_and_without_batch_axes(p, e, key):
    one = jnp.einsum("tk,hkn->thn", e["x"], p["w"])
    two = jnp.einsum("thk,hkn->thn", e["y"], p["w"])
    three = jnp.einsum("hn,hkn->k", e["z"], p["w"])
    return score(one) + score(two) + score(three)


@case({"w": elementwise(3, 3)}, {"x": x(5, 3)})
def weight_in_a_dot_and_elementwise(p, e, key):
    return score(e["x"] @ p["w"] + jnp.sum(e["x"][0][:, None] * p["w"]))


@case({"w": elementwise(4, 3)}, {"x": x(5, 3)})
def diagonal_also_scales(p, e, key):
    return score(e["x"] @ p["w"].T) + score(e["x"] * jnp.diag(p["w"])[None])


@case({"w": tied(3)}, {"x": x(3), "y": x(4)})
def vector_in_a_dot_and_an_outer_product(p, e, key):
    outer = jax.lax.dot_general(e["y"], p["w"], (((), ()), ((), ())))
    return score(e["x"] @ p["w"]) + score(outer)


@case({"w": tied(3, 3)}, {"x": x(3)})
def gradient_of_a_network_inside_the_loss(p, e, key):
    """A force: the input gradient of an energy, so w is met forwards and backwards."""

    def energy(v):
        return jnp.sum(jnp.tanh(v @ p["w"]))

    return score(jax.grad(energy)(e["x"]))


@case({"w": elementwise(3, 4), "v": elementwise(4)}, {"x": x(3)})
def laplacian_inside_the_loss(p, e, key):
    def field(v):
        return jnp.tanh(v @ p["w"]) @ p["v"]

    return jnp.square(jnp.trace(jax.hessian(field)(e["x"])) - 1)


@case({"w": tied(3, 4)}, {"x": x(3), "y": x(3)})
def directional_derivative_inside_the_loss(p, e, key):
    out, tangent = jax.jvp(lambda v: jnp.sin(v @ p["w"]), (e["x"],), (e["y"],))
    return score(out * tangent)


@case({"w": elementwise(3, 4), "b": elementwise(4)}, {"x": x(5, 3), "y": x(5, 3)})
def one_step_of_learning_inside_the_loss(p, e, key):
    """Meta-learning: the weights that meet data are of the parameters and of data."""

    def inner(q):
        return score(e["x"] @ q["w"] + q["b"][None])

    q = jax.tree.map(lambda v, g: v - 0.1 * g, p, jax.grad(inner)(p))
    return score(e["y"] @ q["w"] + q["b"][None])


# --- Bilinear forms -----------------------------------------------------------------------


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


# --- Elementwise parameters, norms --------------------------------------------------------


@case({"s": elementwise(3), "b": elementwise(3)}, {"x": x(5, 3)})
def scale_and_bias(p, e, key):
    return score(e["x"] * p["s"][None] + p["b"][None])


@case({"s": elementwise(), "t": elementwise(), "c": elementwise()}, {"x": x(5, 3)})
def scalars(p, e, key):
    return score(e["x"] * p["s"] + jnp.tanh(p["t"]) * p["c"])


@case({"w": dense(3, 4), "t": elementwise()}, {"x": x(5, 3), "y": ids(4, 5)})
def temperature_and_cross_entropy(p, e, key):
    return entropy(e["x"] @ p["w"] / jnp.exp(p["t"]), e["y"])


@case({"w": dense(3, 4), "table": elementwise(6, 4)}, {"x": x(5, 3)})
def positional_table(p, e, key):
    return score(e["x"] @ p["w"] + p["table"][:5])


@case({"cls": elementwise(3), "w": dense(3, 4)}, {"x": x(5, 3)})
def class_token(p, e, key):
    tokens = jnp.concatenate([p["cls"][None], e["x"]])
    attention = jax.nn.softmax(tokens @ tokens.T)
    return score((attention @ tokens)[0] @ p["w"])


@case({"a": elementwise(3)}, {"x": x(5, 3)})
def prelu(p, e, key):
    return score(jnp.where(e["x"] > 0, e["x"], p["a"][None] * e["x"]))


@case({"w": dense(2, 6), "b": elementwise(6)}, {"x": x(5, 3), "c": x(2)})
def film(p, e, key):
    scale, shift = jnp.split(e["c"] @ p["w"] + p["b"], 2)
    return score(e["x"] * (1 + scale)[None] + shift[None])


@case({"s": elementwise(6), "b": elementwise(6), "w": dense(6, 2)}, {"x": x(5, 6)})
def layer_norm(p, e, key):
    mean = jnp.mean(e["x"], axis=-1, keepdims=True)
    variance = jnp.var(e["x"], axis=-1, keepdims=True)
    normal = (e["x"] - mean) * jax.lax.rsqrt(variance + 1e-3)
    return score((normal * p["s"][None] + p["b"][None]) @ p["w"])


@case({"s": elementwise(6), "w": dense(6, 2)}, {"x": x(5, 6)})
def rms_norm(p, e, key):
    power = jnp.mean(jnp.square(e["x"]), axis=-1, keepdims=True)
    return score(e["x"] * jax.lax.rsqrt(power + 1e-3) * p["s"][None] @ p["w"])


@case({"s": derived(5, shift=0.5), "w": dense(3, 2)}, {"x": x(5, 3)})
def weight_of_each_token(p, e, key):
    return score(jax.nn.softmax(p["s"]) @ (e["x"] @ p["w"]))


@case({"p": elementwise(3, shift=2.0, scale=0.1)}, {"x": x(5, 3)})
def power_of_data(p, e, key):
    return score((jnp.abs(e["x"]) + 0.5) ** p["p"][None])


@case({"c": elementwise(4)}, {"x": x(5)})
def polynomial(p, e, key):
    return score(jnp.polyval(p["c"], e["x"]))


@case({"bias": elementwise(9, 2), "w": dense(3, 2, 4)}, {"x": x(5, 3)})
def relative_position_bias(p, e, key):
    q = jnp.einsum("tk,khn->htn", e["x"], p["w"])
    distance = np.arange(5)[:, None] - np.arange(5)[None] + 4
    logits = jnp.einsum("htn,hsn->hts", q, q) + jnp.transpose(
        p["bias"][distance], (2, 0, 1)
    )
    return score(jax.nn.softmax(logits))


@case({"w": elementwise(3, 4)}, {"x": x(5, 3)})
def maximum_with_a_parameter(p, e, key):
    return score(jnp.maximum(e["x"][:, :, None], p["w"][None]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def maximum_over_a_parameter(p, e, key):
    return score(e["x"] @ jnp.max(p["w"], axis=1))


@case({"a": elementwise(3, 4), "b": elementwise(3, 4)}, {"m": bits(3, 4), "x": x(3)})
def where_data_picks_between_parameters(p, e, key):
    return score(e["x"] @ jnp.where(e["m"], p["a"], p["b"]))


@case({"w": dense(3, 4), "gate": frozen(4)}, {"x": x(5, 3)})
def parameter_that_only_decides(p, e, key):
    return score(jnp.where(p["gate"][None] > 0, e["x"] @ p["w"], 0.0))


@case({"w": elementwise(3, 4)}, {"x": x(3)})
def dropout_of_weights(p, e, key):
    keep = jax.random.bernoulli(key, 0.7, (3, 4))
    return score(e["x"] @ jnp.where(keep, p["w"], 0.0))


@case({"w": elementwise(3, 4)}, {"x": x(3)})
def noise_on_weights(p, e, key):
    return score(e["x"] @ (p["w"] + 0.1 * jax.random.normal(key, (3, 4))))


@case({"w": elementwise(4, 3)}, {"ids": ids(4, 6), "x": x(6, 3)})
def parameter_that_data_scatters_into(p, e, key):
    return score(p["w"].at[e["ids"]].add(jnp.sin(e["x"])) ** 2)


@case({"w": fallback(6, 3)}, {"ids": ids(4, 6)})
def parameter_scattered_by_data(p, e, key):
    return score(jnp.zeros((4, 3)).at[e["ids"]].add(p["w"]) ** 2)


@case({"w": elementwise(3, 3)}, {"x": x(5, 3)})
def sort_of_parameter_plus_data(p, e, key):
    return score(jnp.sort(e["x"][:3] + p["w"], axis=0) * jnp.arange(9.0).reshape(3, 3))


@case({"y": elementwise(5)}, {"x": x(6)})
def interpolation_of_a_table(p, e, key):
    return score(jnp.interp(e["x"], jnp.linspace(-2.0, 2.0, 5), p["y"]))


# --- Derived weights ----------------------------------------------------------------------


@case({"w": derived(3, 4), "g": derived(4)}, {"x": x(5, 3)})
def weight_norm(p, e, key):
    size = jnp.sqrt(jnp.sum(jnp.square(p["w"]), axis=0, keepdims=True))
    return score(e["x"] @ (p["w"] / size * p["g"][None]))


@case({"w": derived(6, 4)}, {"x": x(5, 6)})
def standardised_dense(p, e, key):
    centred = p["w"] - jnp.mean(p["w"], axis=0, keepdims=True)
    return score(
        e["x"] @ (centred * jax.lax.rsqrt(jnp.var(p["w"], axis=0, keepdims=True)))
    )


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def spectral_norm_with_a_frozen_vector(p, e, key):
    u = jax.lax.stop_gradient(jnp.sin(p["w"]) @ jnp.ones(4))
    return score(e["x"] @ (p["w"] / jnp.sqrt(jnp.sum(jnp.square(u @ p["w"])) + 1)))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_through_softplus(p, e, key):
    return score(e["x"] @ jax.nn.softplus(p["w"]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_clipped(p, e, key):
    return score(e["x"] @ jnp.clip(p["w"], -0.4, 0.4))


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def weight_scaled_by_a_constant(p, e, key):
    return score(e["x"] @ (p["w"] / np.sqrt(3)))


@case({"w": derived(5, 5)}, {"x": x(5, 3)})
def weight_causally_masked(p, e, key):
    return score(jnp.tril(p["w"]) @ e["x"])


@case({"w": derived(3, 3)}, {"x": x(5, 3)})
def weight_made_symmetric(p, e, key):
    return score(e["x"] @ (p["w"] + p["w"].T))


@case({"a": derived(3, 4), "b": derived(3, 4)}, {"x": x(5, 3)})
def product_of_parameters(p, e, key):
    return score(e["x"] @ (p["a"] * p["b"]))


@case({"a": derived(3), "b": derived(4)}, {"x": x(5, 3)})
def outer_product_of_parameters(p, e, key):
    return score(e["x"] @ jnp.outer(p["a"], p["b"]))


@case({"a": derived(3, 2), "b": derived(2, 4)}, {"x": x(5, 3)})
def low_rank_weight_multiplied_first(p, e, key):
    return score(e["x"] @ (p["a"] @ p["b"]))


@case({"a": dense(3, 2), "b": dense(2, 4)}, {"x": x(5, 3)})
def lora_not_merged(p, e, key):
    return score(e["x"] @ BASE + 0.5 * (e["x"] @ p["a"] @ p["b"]))


@case({"a": derived(3, 2), "b": derived(2, 4)}, {"x": x(5, 3)})
def lora_merged(p, e, key):
    return score(e["x"] @ (BASE + 0.5 * (p["a"] @ p["b"])))


@case({"base": frozen(3, 4), "a": derived(3, 2), "b": derived(2, 4)}, {"x": x(5, 3)})
def lora_merged_into_a_frozen_parameter(p, e, key):
    base = jax.lax.stop_gradient(p["base"])
    return score(e["x"] @ (base + 0.5 * (p["a"] @ p["b"])))


BASE = np.cos(np.arange(12.0)).reshape(3, 4).astype(np.float32)


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def straight_through_sign(p, e, key):
    w = p["w"]
    return score(e["x"] @ (w + jax.lax.stop_gradient(jnp.sign(w) - w)))


@case({"w": frozen(3, 4), "v": dense(3, 4)}, {"x": x(5, 3)})
def weight_rounded_to_integers(p, e, key):
    rounded = (10 * p["w"]).astype(jnp.int8).astype(jnp.float32)
    return score(e["x"] @ rounded * (e["x"] @ p["v"]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def weight_pruned_by_its_own_size(p, e, key):
    return score(e["x"] @ (p["w"] * (jnp.abs(p["w"]) > 0.3)))


@case({"a": derived(3, 4), "b": tied(3, 4)}, {"x": x(5, 3)})
def derived_and_plain_use_of_two_weights(p, e, key):
    return score(jnp.tanh(e["x"] @ (p["a"] + 0.0)) + e["x"] @ p["b"]) + score(
        e["x"][:2] @ p["b"]
    )


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def derived_and_plain_use_of_one_weight(p, e, key):
    return score(e["x"] @ p["w"]) + score(e["x"] @ jnp.tanh(p["w"]))


@case({"h": dense(2, 12), "b": elementwise(12)}, {"x": x(5, 3), "z": x(2)})
def weight_made_from_data(p, e, key):
    w = (e["z"] @ p["h"] + p["b"]).reshape(3, 4)
    return score(e["x"] @ w)


@case({"kernel": fallback(6)}, {"x": x(6)})
def long_convolution_by_fourier_transform(p, e, key):
    product = jnp.fft.rfft(e["x"]) * jnp.fft.rfft(p["kernel"])
    return score(jnp.fft.irfft(product, 6))


@case({"w": dense(6, 4), "v": dense(3, 2)}, {"x": x(6)})
def fourier_transform_of_activations(p, e, key):
    spectrum = jnp.fft.rfft(jnp.tanh(e["x"] @ p["w"]))
    return score(jnp.abs(spectrum + 3) @ p["v"])


@case({"w": fallback(3, 3)}, {"x": x(3)})
def solve_with_a_parameter(p, e, key):
    return score(jnp.linalg.solve(p["w"] + 4 * jnp.eye(3), e["x"]))


@case({"w": derived(3, 3)}, {"x": x(5, 3)})
def inverse_of_a_parameter(p, e, key):
    return score(e["x"] @ jnp.linalg.inv(p["w"] + 4 * jnp.eye(3)))


@case({"w": fallback(3, 3)}, {"x": x(3)})
def triangular_solve_and_determinant(p, e, key):
    factor = jnp.tril(p["w"]) + 3 * jnp.eye(3)
    white = jax.scipy.linalg.solve_triangular(factor, e["x"], lower=True)
    return jnp.sum(jnp.square(white)) + jnp.sum(jnp.log(jnp.diag(factor)))


@case({"w": derived(3, 3)}, {"x": x(3)})
def cholesky_of_a_parameter(p, e, key):
    factor = jnp.linalg.cholesky(p["w"] @ p["w"].T + jnp.eye(3))
    return score(factor @ e["x"])


# --- Parameters outside the data path -----------------------------------------------------


@case({"w": fallback(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def l2_regulariser(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) @ p["v"]) + jnp.sum(jnp.square(p["w"]))


@case({"w": fallback(3, 4)}, {"x": x(3)})
def loss_of_parameters_only(p, e, key):
    return score(p["w"])


@case({"c": fallback()}, {"x": x(3)})
def loss_that_is_the_parameter(p, e, key):
    return p["c"]


@case({"w": unused(3)}, {"x": x(3)})
def loss_that_is_a_number(p, e, key):
    return 1.0 + jnp.zeros(())


@case({"w": unused(3)}, {"x": x()})
def loss_that_is_the_example(p, e, key):
    return e["x"]


@case({"w": dense(3, 4), "spare": unused(2), "more": unused()}, {"x": x(3), "y": x(2)})
def parameters_and_data_not_used(p, e, key):
    return score(e["x"] @ p["w"])


@case({"w": frozen(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def frozen_first_layer(p, e, key):
    return score(jnp.tanh(e["x"] @ jax.lax.stop_gradient(p["w"])) @ p["v"])


@case({"w": frozen(3, 3), "v": dense(3, 2)}, {"x": x(3)})
def frozen_parameter_in_a_while_loop(p, e, key):
    w = jax.lax.stop_gradient(p["w"])

    def body(state):
        step, vector = state
        return step + 1, jnp.tanh(vector @ w)

    start = (0, jax.lax.stop_gradient(e["x"]))
    _, vector = jax.lax.while_loop(lambda s: s[0] < 3, body, start)
    return score(vector @ p["v"])


@case({"w": dense(3, 2)}, {"x": x(3), "n": ids(5)})
def while_loop_on_data(p, e, key):
    def body(state):
        step, vector = state
        return step + 1, vector * 0.5 + 1

    _, vector = jax.lax.while_loop(lambda s: s[0] < e["n"], body, (0, e["x"]))
    return score(vector @ p["w"])


@case({"w": dense(3, 2)}, {"x": x(3), "n": ids(5)})
def fori_loop_of_a_length_from_data(p, e, key):
    vector = jax.lax.fori_loop(0, e["n"], lambda i, v: jnp.sin(v + i), e["x"])
    return score(vector @ p["w"])


# --- Convolutions -------------------------------------------------------------------------


def convolve(
    data,
    kernel,
    stride=1,
    padding="SAME",
    *,
    numbers=("NHWC", "HWIO", "NHWC"),
    batched=False,
    **options,
):
    """Convolve one example, or a batch of views."""
    rank = kernel.ndim - 2
    strides = (stride,) * rank if isinstance(stride, int) else stride
    if rank == 1 and len(numbers[0]) == 4:
        numbers = ("NWC", "WIO", "NWC")
    out = jax.lax.conv_general_dilated(
        data if batched else data[None], kernel, strides, padding,
        dimension_numbers=numbers, **options,
    )  # fmt: skip
    return out if batched else out[0]


@case({"k": conv(3, 2, 4)}, {"x": x(6, 2)})
def conv_1d(p, e, key):
    return score(convolve(e["x"], p["k"]))


@case({"k": conv(3, 2, 2, 4), "b": elementwise(4)}, {"x": x(5, 6, 2)})
def conv_2d_same(p, e, key):
    return score(convolve(e["x"], p["k"]) + p["b"][None, None])


@case({"k": conv(3, 2, 2, 4)}, {"x": x(5, 6, 2)})
def conv_2d_valid(p, e, key):
    return score(convolve(e["x"], p["k"], padding="VALID"))


@case({"k": conv(2, 2, 2, 2, 3)}, {"x": x(3, 4, 2, 2)})
def conv_3d(p, e, key):
    out = convolve(e["x"], p["k"], numbers=("NDHWC", "DHWIO", "NDHWC"))
    return score(out)


@case({"k": conv(4, 4, 4, 4)}, {"x": x(4, 4, 4)})
def conv_2d_all_equal(p, e, key):
    return score(convolve(e["x"], p["k"]) * jnp.arange(64.0).reshape(4, 4, 4) / 30)


@case({"k": conv(3, 3, 2, 4)}, {"x": x(6, 5, 2)})
def conv_strided(p, e, key):
    return score(convolve(e["x"], p["k"], (2, 3)))


@case({"k": conv(2, 2, 2, 3)}, {"x": x(6, 6, 2)})
def conv_stride_above_the_kernel(p, e, key):
    return score(convolve(e["x"], p["k"], 4, "VALID"))


@case({"k": conv(3, 2, 2, 4)}, {"x": x(6, 6, 2)})
def conv_rhs_dilated(p, e, key):
    return score(convolve(e["x"], p["k"], rhs_dilation=(2, 3)))


@case({"k": conv(2, 3, 2, 4)}, {"x": x(3, 2, 2)})
def conv_lhs_dilated(p, e, key):
    return score(
        convolve(e["x"], p["k"], padding=[(1, 2), (0, 2)], lhs_dilation=(2, 3))
    )


@case({"k": conv(3, 3, 2, 3)}, {"x": x(4, 4, 2)})
def conv_everything_at_once(p, e, key):
    out = convolve(
        e["x"], p["k"], (2, 1), [(3, 2), (1, 4)], lhs_dilation=(2, 1), rhs_dilation=(1, 2)
    )  # fmt: skip
    return score(out)


@case({"k": conv(2, 3, 2, 3)}, {"x": x(6, 6, 2)})
def conv_negative_padding(p, e, key):
    return score(convolve(e["x"], p["k"], padding=[(-1, 2), (1, -2)]))


@case({"k": conv(2, 2, 2, 3)}, {"x": x(3, 3, 2)})
def conv_lhs_dilated_with_negative_padding(p, e, key):
    out = convolve(e["x"], p["k"], padding=[(-1, 1), (-2, -1)], lhs_dilation=(2, 3))
    return score(out)


@case({"k": conv(3, 3, 2, 6)}, {"x": x(4, 5, 4)})
def conv_grouped(p, e, key):
    return score(convolve(e["x"], p["k"], feature_group_count=2))


@case({"k": conv(3, 3, 1, 4)}, {"x": x(4, 5, 4)})
def conv_depthwise(p, e, key):
    return score(convolve(e["x"], p["k"], feature_group_count=4))


@case({"k": conv(3, 1, 6)}, {"x": x(6, 3)})
def conv_depthwise_causal_with_a_multiplier(p, e, key):
    out = convolve(e["x"], p["k"], padding=[(2, 0)], feature_group_count=3)
    return score(out)


@case({"k": conv(2, 2, 2, 3), "v": conv(4, 2, 3, 2)}, {"x": x(5, 5, 2)})
def conv_even_kernels(p, e, key):
    return score(convolve(jnp.tanh(convolve(e["x"], p["k"])), p["v"], 2))


@case({"k": conv(1, 1, 2, 4), "v": conv(1, 1, 4, 3)}, {"x": x(4, 3, 2)})
def conv_one_by_one(p, e, key):
    return score(convolve(jnp.tanh(convolve(e["x"], p["k"])), p["v"], 2))


@case({"k": conv(5, 5, 2, 3)}, {"x": x(2, 3, 2)})
def conv_kernel_above_the_image(p, e, key):
    return score(convolve(e["x"], p["k"]))


@case({"k": conv(4, 2, 3)}, {"x": x(4, 2)})
def conv_to_a_single_position(p, e, key):
    return score(convolve(e["x"], p["k"], padding="VALID"))


@case({"k": conv(4, 2, 3, 2)}, {"x": x(2, 4, 5)})
def conv_nchw(p, e, key):
    out = convolve(e["x"], p["k"], numbers=("NCHW", "OIHW", "NCHW"))
    return score(out)


@case({"k": conv(3, 4, 2, 2)}, {"x": x(5, 4, 2)})
def conv_odd_dimension_numbers(p, e, key):
    """The batch last, height and width swapped, output channels before the kernel's."""
    out = jax.lax.conv_general_dilated(
        e["x"][..., None], p["k"], (1, 2), [(1, 0), (0, 1)],
        dimension_numbers=("WHCN", "HOIW", "CWNH"),
    )  # fmt: skip
    return score(out)


@case({"k": conv(3, 2, 2, 4)}, {"x": x(5, 6, 2)})
def conv_of_augmented_views(p, e, key):
    views = jnp.stack([e["x"], e["x"][::-1], jnp.roll(e["x"], 1, axis=1)])
    return score(jnp.mean(jnp.tanh(convolve(views, p["k"], batched=True)), axis=0))


@case({"k": conv(3, 3, 2, 4), "w": dense(4, 2)}, {"x": x(4, 4, 2)})
def vmap_over_views_inside_the_loss(p, e, key):
    def one(view, key):
        noisy = view + 0.1 * jax.random.normal(key, view.shape)
        return score(jnp.mean(jnp.tanh(convolve(noisy, p["k"])), axis=(0, 1)) @ p["w"])

    views = jnp.stack([e["x"], e["x"][::-1], jnp.swapaxes(e["x"], 0, 1)])
    return jnp.mean(jax.vmap(one)(views, jax.random.split(key, 3)))


@case({"k": tied(3, 3, 2, 2)}, {"x": x(4, 5, 2)})
def conv_twice(p, e, key):
    return score(convolve(jnp.tanh(convolve(e["x"], p["k"])), p["k"], 2))


# Norms allow for rounding in a width of 576, times the positions.
@case({"k": tied(3, 3, 64, 2)}, {"x": x(7, 6, 64), "y": x(4, 3, 64)}, tolerance=1e-4)
def conv_shared_by_few_and_many_positions(p, e, key):
    """A head of several resolutions."""
    return score(convolve(e["x"], p["k"])) + score(convolve(e["y"], p["k"]))


@case({"k": tied(3, 2, 4)}, {"x": x(6, 2)})
def conv_and_its_transpose(p, e, key):
    down = jnp.tanh(convolve(e["x"], p["k"], 2))
    up = convolve(down, jnp.swapaxes(p["k"], 1, 2), padding=[(2, 1)], lhs_dilation=(2,))
    return score(up)


@case({"k": tied(3, 2, 4)}, {"x": x(6, 2), "y": x(5, 6)})
def conv_kernel_also_used_as_a_matrix(p, e, key):
    return score(convolve(e["x"], p["k"])) + score(e["y"] @ p["k"].reshape(6, 4))


@case({"k": conv(4, 18)}, {"x": x(4, 4, 2)})
def conv_kernel_reshaped_and_transposed(p, e, key):
    return score(convolve(e["x"], p["k"].reshape(4, 3, 3, 2).transpose(1, 2, 3, 0)))


@case({"k": derived(3, 3, 2, 4), "g": derived(4)}, {"x": x(4, 5, 2)})
def conv_weight_standardised(p, e, key):
    k, axes = p["k"], (0, 1, 2)
    centred = k - jnp.mean(k, axis=axes, keepdims=True)
    scale = jax.lax.rsqrt(jnp.var(k, axis=axes, keepdims=True) * 18 + 1e-4)
    return score(convolve(e["x"], centred * scale * p["g"][None, None, None]))


@case({"k": conv(3, 2, 4)}, {"x": x(6, 2)}, tolerance=BF16, dtype="bfloat16")
def conv_in_bfloat16(p, e, key):
    return score(convolve(e["x"].astype(jnp.bfloat16), p["k"].astype(jnp.bfloat16)))


@case({"image": fallback(5, 5, 2)}, {"k": x(3, 3, 2, 3)})
def conv_with_the_parameter_as_the_image(p, e, key):
    return score(convolve(p["image"], e["k"]))


@case({"k": fallback(3, 1, 4)}, {"x": x(2, 6, 1)})
def conv_with_batch_groups(p, e, key):
    out = convolve(e["x"], p["k"], batched=True, batch_group_count=2)
    return score(out)


@case({"k": conv(3)}, {"x": x(6)})
def convolve_of_numpy(p, e, key):
    return score(jnp.convolve(e["x"], p["k"], mode="same"))


@case({"k": conv(3, 3, 2, 3)}, {"x": x(4, 4, 2)})
def conv_transpose_of_lax_with_flipped_kernel(p, e, key):
    kernel = jnp.swapaxes(p["k"], 2, 3)
    out = jax.lax.conv_transpose(
        e["x"][None], kernel, (2, 2), "SAME", transpose_kernel=True
    )  # fmt: skip
    return score(out)


@case({"k": dense(2, 2, 18, 3)}, {"x": x(4, 4, 2)})
def conv_with_a_kernel_for_each_place(p, e, key):
    out = jax.lax.conv_general_dilated_local(
        e["x"][None], p["k"], (1, 1), "VALID", (3, 3),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return score(out)


@case(
    {
        "k": conv(3, 3, 1, 3),
        "s": elementwise(3),
        "v": conv(3, 3, 3, 4),
        "w": dense(4, 3),
    },
    {"x": x(6, 6, 1), "y": ids(3, 1)},
)
def small_convnet_with_pooling(p, e, key):
    hidden = jnp.tanh(convolve(e["x"], p["k"])) * p["s"][None, None]
    hidden = jax.lax.reduce_window(
        hidden, -jnp.inf, jax.lax.max, (2, 2, 1), (2, 2, 1), "VALID"
    )
    hidden = jnp.mean(jax.nn.relu(convolve(hidden, p["v"])), axis=(0, 1))
    return entropy((hidden @ p["w"])[None], e["y"])


# --- Embeddings ---------------------------------------------------------------------------


@case({"table": embedding(7, 3)}, {"ids": ids(7, 5)})
def embedding_lookup(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": embedding(4, 4)}, {"ids": ids(4, 4), "x": x(4, 4)})
def embedding_lookup_all_equal(p, e, key):
    return score(p["table"][e["ids"]] * e["x"])


@case({"table": embedding(2, 3)}, {"ids": ids(2, 6), "x": x(6, 3)})
def embedding_ids_repeat(p, e, key):
    return score(p["table"][e["ids"]] * e["x"])


@case({"table": embedding(7, 3)}, {"ids": ids(7)})
def embedding_of_one_scalar_id(p, e, key):
    return score(jnp.take(p["table"], e["ids"], axis=0))


@case({"table": embedding(7, 3)}, {"ids": ids(7, 2, 3)})
def embedding_of_a_grid_of_ids(p, e, key):
    return score(jnp.sum(p["table"][e["ids"]], axis=0))


@case({"table": frozen(7, 3), "w": dense(3, 2)}, {"ids": ids(7, 0), "x": x(3)})
def embedding_of_no_ids(p, e, key):
    return score(jnp.sum(p["table"][e["ids"]], axis=0) + e["x"] @ p["w"] @ ONES[:2, :3])


@case({"table": embedding(7, 2, 3)}, {"ids": ids(7, 5)})
def embedding_of_matrices(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": embedding(7)}, {"ids": ids(7, 5)})
def embedding_of_scalars(p, e, key):
    return score(p["table"][e["ids"]] ** 2)


@case({"table": embedding(7, 3)}, {"ids": ids(12, 6, low=-5)})
def embedding_clips_ids_out_of_range(p, e, key):
    return score(jnp.take(p["table"], e["ids"], axis=0, mode="clip"))


@case({"table": embedding(7, 3)}, {"ids": ids(12, 6, low=-12)})
def embedding_fills_ids_out_of_range(p, e, key):
    rows = jnp.take(p["table"], e["ids"], axis=0, mode="fill", fill_value=0.5)
    return score(rows)


@case({"table": embedding(7, 3)}, {"ids": ids(7, 6, low=-7)})
def embedding_negative_ids(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": embedding(7, 3)}, {"ids": ids(7, 6)})
def embedding_promises_ids_in_range(p, e, key):
    return score(p["table"].at[e["ids"]].get(mode="promise_in_bounds"))


@case({"table": embedding(7, 3)}, {"ids": x(5, low=0, high=7, dtype=jnp.uint8)})
def embedding_of_byte_ids(p, e, key):
    return score(p["table"][e["ids"]])


@case({"table": dense(7, 3)}, {"ids": ids(9, 5)})
def embedding_by_one_hot(p, e, key):
    return score(jax.nn.one_hot(e["ids"], 7) @ p["table"])


@case({"table": embedding(3, 7)}, {"ids": ids(7, 5)})
def embedding_of_a_transposed_table(p, e, key):
    return score(p["table"].T[e["ids"]])


@case({"table": embedding(3, 7)}, {"ids": ids(7, 5)})
def embedding_of_columns(p, e, key):
    return score(jnp.take(p["table"], e["ids"], axis=1))


@case({"table": embedding(14, 3)}, {"ids": ids(7, 5)})
def embedding_of_a_reshaped_table(p, e, key):
    return score(p["table"].reshape(7, 6)[e["ids"]])


@case({"table": embedding(9, 4)}, {"ids": ids(5, 6)})
def embedding_of_a_slice_of_the_table(p, e, key):
    return score(p["table"][2:7, 1:][e["ids"]])


@case({"table": tied(9, 3)}, {"a": ids(6, 5), "b": ids(6, 4)})
def embedding_of_slices_that_overlap(p, e, key):
    return score(p["table"][:6][e["a"]]) + score(p["table"][3:][e["b"]])


@case({"table": embedding(4, 5, 3)}, {"i": ids(4, 6), "j": ids(5, 6)})
def embedding_by_pairs_of_ids(p, e, key):
    return score(p["table"][e["i"], e["j"]])


@case({"table": fallback(7, 4)}, {"ids": ids(7, 5)})
def embedding_of_half_rows(p, e, key):
    return score(p["table"][e["ids"], 1:3])


@case({"table": embedding(5, 4)}, {"ids": ids(4, 5, 1)})
def take_along_axis_of_a_parameter(p, e, key):
    return score(jnp.take_along_axis(p["table"], e["ids"], axis=1))


@case({"table": embedding(7, 3)}, {"i": ids(7)})
def row_by_traced_index(p, e, key):
    return score(p["table"][e["i"]])


@case({"table": fallback(7, 3)}, {"i": ids(7)})
def several_rows_by_dynamic_slice(p, e, key):
    return score(jax.lax.dynamic_slice(p["table"], (e["i"], 0), (3, 3)))


@case({"table": embedding(3, 7)}, {"i": ids(7)})
def column_by_traced_index(p, e, key):
    return score(p["table"][:, e["i"]])


@case({"table": embedding(2, 5, 3)}, {"ids": ids(5, 2, 4)})
def vmap_of_lookups_in_a_stack_of_tables(p, e, key):
    return score(jax.vmap(lambda t, i: t[i])(p["table"], e["ids"]))


@case({"table": tied(7, 3)}, {"a": ids(7, 5), "b": ids(7, 4)})
def embedding_used_twice(p, e, key):
    one, two = p["table"][e["a"]], p["table"][e["b"]]
    return score(jax.nn.softmax(one @ two.T) @ two)


@case({"table": tied(7, 3)}, {"ids": ids(7, 5)})
def tied_head(p, e, key):
    hidden = jnp.tanh(p["table"][e["ids"]])
    return entropy(hidden @ p["table"].T, e["ids"])


@case({"table": tied(4, 4)}, {"ids": ids(4, 4)})
def tied_head_all_equal(p, e, key):
    hidden = jnp.tanh(p["table"][e["ids"]])
    return entropy(hidden @ p["table"].T, e["ids"])


@case({"table": tied(7, 4)}, {"ids": ids(7, 5)}, tolerance=BF16, dtype="bfloat16")
def tied_head_scaled_and_cast(p, e, key):
    table = p["table"].astype(jnp.bfloat16)
    hidden = jnp.tanh(2 * table[e["ids"]])
    logits = (hidden @ table.T).astype(jnp.float32) / 2
    return entropy(logits, e["ids"])


@case({"table": tied(7, 3), "w": dense(3, 3)}, {"ids": ids(10, 6, low=-9)})
def tied_head_with_ids_out_of_range(p, e, key):
    rows = jnp.take(p["table"], e["ids"], axis=0, mode="fill", fill_value=0.0)
    return score(jnp.tanh(rows @ p["w"]) @ p["table"].T)


@case({"table": tied(7, 3)}, {"ids": ids(7, 5), "i": ids(7)})
def embedding_head_and_one_hot_of_one_table(p, e, key):
    hidden = p["table"][e["ids"]] + (jax.nn.one_hot(e["i"], 7) @ p["table"])[None]
    return score(hidden @ p["table"].T + p["table"][e["i"]][0])


@case({"table": fallback(7, 3)}, {"ids": ids(7, 5)})
def embedding_with_a_penalty_on_the_table(p, e, key):
    return score(p["table"][e["ids"]]) + 0.1 * jnp.sum(jnp.square(p["table"]))


@case({"table": derived(7, 3)}, {"ids": ids(7, 5)})
def embedding_of_a_normalised_table(p, e, key):
    size = jnp.sqrt(jnp.sum(jnp.square(p["table"]), axis=1, keepdims=True))
    return score((p["table"] / size)[e["ids"]])


@case({"table": embedding(7, 3), "w": dense(3, 2)}, {"ids": ids(7, 5), "m": bits(5)})
def padding_tokens_are_masked(p, e, key):
    logits = p["table"][e["ids"]] @ p["w"]
    losses = jnp.sum(jnp.sin(logits), axis=-1)
    return jnp.sum(jnp.where(e["m"], losses, 0)) / (1 + jnp.sum(e["m"]))


@case({"w": dense(3, 4)}, {"x": x(5, 3), "y": ids(4, 5), "weight": x(5)})
def tokens_are_weighted(p, e, key):
    log = jax.nn.log_softmax(e["x"] @ p["w"])
    picked = jnp.take_along_axis(log, e["y"][:, None], axis=-1)[:, 0]
    return -jnp.sum(picked * e["weight"])


# --- Calls: jit, custom derivatives, cond, vmap -------------------------------------------


@jax.jit
def _layer(w, data):
    return jnp.tanh(data @ w)


@case({"w": tied(3, 3)}, {"x": x(5, 3)})
def jitted_layer_twice_with_one_weight(p, e, key):
    return score(_layer(p["w"], _layer(p["w"], e["x"])))


@case({"w": dense(3, 3), "v": dense(3, 3)}, {"x": x(5, 3)})
def jitted_layer_twice_with_two_weights(p, e, key):
    """One jaxpr object, the same variables, two calls."""
    return score(_layer(p["w"], _layer(p["v"], e["x"])))


@case({"w": tied(3, 3)}, {"x": x(3, 3)})
def jitted_layer_with_its_arguments_swapped(p, e, key):
    """One jaxpr: first w is the weight and x the data, then the other way round."""
    return score(_layer(p["w"], e["x"]) + 0.1 * (_layer(e["x"], p["w"])))


@case({"w": dense(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def jit_that_hands_parameters_through(p, e, key):
    @jax.jit
    def prepare(p, data):
        return p["w"], jnp.sin(data), p["v"].T, p["w"]

    w, data, v, _ = prepare(p, e["x"])
    return score(jnp.tanh(data @ w) @ v.T)


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def jit_in_jit_in_jit(p, e, key):
    inner = jax.jit(lambda w: w.T)
    middle = jax.jit(lambda w, data: (data @ inner(w).T, w))
    out, _ = jax.jit(lambda data: middle(p["w"], data))(e["x"])
    return score(out)


@jax.custom_vjp
def _reversed_dense(w, data):
    return data @ w


_reversed_dense.defvjp(
    lambda w, data: (data @ w, (w, data)),
    lambda saved, g: (-2 * jnp.sin(saved[1].T @ g), g @ saved[0].T),
)


@case({"w": fallback(3, 4), "v": dense(2, 3)}, {"x": x(5, 2)})
def custom_vjp_that_is_not_the_derivative(p, e, key):
    return score(_reversed_dense(p["w"], e["x"] @ p["v"]))


@jax.custom_vjp
def _clip_backward(value):
    return value


_clip_backward.defvjp(
    lambda value: (value, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),)
)


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def custom_vjp_on_activations(p, e, key):
    return score(_clip_backward(e["x"] @ p["w"]))


@case({"w": derived(3, 4)}, {"x": x(5, 3)})
def custom_vjp_on_the_weight(p, e, key):
    """Looks like a view, and is none: the gradient changes on the way back."""
    return score(e["x"] @ _clip_backward(p["w"]))


@case({"w": fallback(4, 4)}, {"x": x(5, 4)})
def custom_vjp_on_a_weight_in_a_loop(p, e, key):
    """Its backward pass clips what each iteration sends back, not their sum."""
    carry = jnp.zeros(4)
    for w in (p["w"], jnp.sin(p["w"])):
        step = functools.partial(_clipped_recurrence, w)
        carry, _ = jax.lax.scan(step, carry, e["x"])
    return score(carry)


@case({"w": fallback(2, 4, 4), "v": derived(2, 4, 4)}, {"x": x(5, 4)})
def custom_vjp_on_a_weight_in_nested_loops(p, e, key):
    """Each iteration of the outer loop has a weight of its own, that of the inner none."""

    def outer(carry, layer):
        w, v = layer
        carry = jnp.tanh(carry @ _clip_backward(v))
        return jax.lax.scan(functools.partial(_clipped_recurrence, w), carry, e["x"])

    carry, _ = jax.lax.scan(outer, jnp.ones(4), (p["w"], p["v"]))
    return score(carry)


def _clipped_recurrence(w, carry, data):
    return jnp.tanh(carry @ _clip_backward(w) + data), None


@case({"w": derived(4, 4)}, {"x": x(5, 4)})
def custom_vjp_on_a_weight_before_a_loop(p, e, key):
    w = _clip_backward(p["w"])
    return score(
        jax.lax.scan(lambda c, d: (jnp.tanh(c @ w + d), None), jnp.ones(4), e["x"])[0]
    )


@case({"w": dense(3, 4), "s": fallback(4)}, {"x": x(5, 3)})
def custom_vjp_that_closes_over_data(p, e, key):
    @jax.custom_vjp
    def gate(value, data):
        return value * jnp.sum(data)

    gate.defvjp(
        lambda value, data: (gate(value, data), data),
        lambda data, g: (g * jnp.cos(jnp.sum(data)), jnp.zeros_like(data)),
    )
    return score(gate(e["x"] @ p["w"], e["x"]) + gate(p["s"], e["x"])[None])


@jax.custom_jvp
def _odd_tanh(value):
    return jnp.tanh(value)


_odd_tanh.defjvp(lambda v, t: (jnp.tanh(v[0]), jnp.cos(v[0]) * t[0]))


@case({"w": dense(3, 4), "v": derived(4, 2)}, {"x": x(5, 3)})
def custom_jvp_on_activations_and_weights(p, e, key):
    return score(_odd_tanh(e["x"] @ p["w"]) @ _odd_tanh(p["v"]))


@case({"w": fallback(3, 4)}, {"x": x(5, 3)})
def custom_jvp_with_a_dense_layer_inside(p, e, key):
    @jax.custom_jvp
    def layer(w, data):
        return data @ w

    @layer.defjvp
    def _(primals, tangents):
        (w, data), (dw, ddata) = primals, tangents
        return data @ w, 3 * (data @ dw) + ddata @ w

    return score(layer(p["w"], e["x"]))


@case({"w": dense(3, 4), "v": dense(4, 2), "b": elementwise(4)}, {"x": x(5, 3)})
def activations_with_custom_derivatives(p, e, key):
    hidden = jax.nn.gelu(e["x"] @ p["w"] + p["b"][None])
    return jax.nn.logsumexp(jax.nn.relu(hidden) @ p["v"]) + score(jax.nn.silu(hidden))


@case({"w": fallback(3, 4), "v": fallback(3, 4)}, {"x": x(5, 3)})
def cond_on_data_with_parameters_in_the_branches(p, e, key):
    out = jax.lax.cond(
        e["x"][0, 0] > 0,
        lambda: jnp.tanh(e["x"] @ p["w"]),
        lambda: jnp.sin(e["x"] @ p["v"]),
    )
    return score(out)


@case({"w": fallback(3, 4), "v": fallback(3, 4)}, {"x": x(5, 3)})
def cond_on_data_picks_a_weight(p, e, key):
    w = jax.lax.cond(e["x"][0, 0] > 0, lambda: p["w"], lambda: p["v"])
    return score(e["x"] @ w)


@case({"w": fallback(3, 3), "u": dense(3, 2)}, {"x": x(5, 3)})
def cond_on_the_key_drops_a_layer(p, e, key):
    hidden = jax.lax.cond(
        jax.random.bernoulli(key),
        lambda h: h + jnp.tanh(h @ p["w"]),
        lambda h: h,
        e["x"],
    )
    return score(hidden @ p["u"])


@case({"w": fallback(3, 4), "b": fallback(4)}, {"x": x(5, 3), "i": ids(3)})
def switch_with_parameters_in_the_branches(p, e, key):
    branches = [
        lambda: e["x"] @ p["w"],
        lambda: e["x"] @ jnp.sin(p["w"]) + p["b"][None],
        lambda: jnp.ones((5, 4)),
    ]
    return score(jax.lax.switch(e["i"], branches))


@case({"w": dense(3, 4), "v": dense(4, 2)}, {"x": x(5, 3), "i": ids(2)})
def cond_on_activations_only(p, e, key):
    hidden = jax.lax.cond(e["i"] > 0, jnp.tanh, jnp.sin, e["x"] @ p["w"])
    return score(hidden @ p["v"])


@case({"w": dense(3, 4), "b": elementwise(4)}, {"x": x(5, 3)})
def vmap_over_tokens(p, e, key):
    return score(jax.vmap(lambda token: jnp.tanh(token @ p["w"] + p["b"]))(e["x"]))


@case({"w": dense(2, 3, 4), "b": elementwise(2, 4)}, {"x": x(5, 3)})
def vmap_over_an_ensemble(p, e, key):
    def member(p):
        return jnp.tanh(e["x"] @ p["w"] + p["b"][None])

    return score(jnp.mean(jax.vmap(member)(p), axis=0))


@case({"w": dense(5, 3, 4)}, {"x": x(5, 3)})
def vmap_with_a_weight_for_each_token(p, e, key):
    return score(jax.vmap(jnp.dot)(e["x"], p["w"]))


@case({"w": dense(3, 4, 2)}, {"x": x(2, 5, 3)})
def vmap_over_odd_axes(p, e, key):
    out = jax.vmap(jnp.dot, in_axes=(0, 2), out_axes=1)(e["x"], p["w"])
    return score(out * jnp.arange(40.0).reshape(5, 2, 4) / 10)


@case({"k": conv(2, 3, 2, 3)}, {"x": x(6, 2)})
def vmap_over_kernels(p, e, key):
    return score(jax.vmap(lambda k: convolve(e["x"], k))(p["k"]))


@case({"k": conv(2, 3, 2, 3)}, {"x": x(2, 6, 2)})
def vmap_over_kernels_and_images(p, e, key):
    return score(jax.vmap(convolve)(e["x"], p["k"]))


@case({"w": dense(3, 3)}, {"x": x(4, 5, 3)})
def vmap_of_a_scan(p, e, key):
    def run(tokens):
        return jax.lax.scan(
            lambda h, t: (jnp.tanh(h @ p["w"] + t), None), jnp.zeros(3), tokens
        )[0]

    return score(jax.vmap(run)(e["x"]))


@case({"w": elementwise(3, 3)}, {"x": x(5, 3)})
def vmap_of_a_cond(p, e, key):
    def one(token):
        return jax.lax.cond(token[0] > 0, lambda t: t @ p["w"], jnp.sin, token)

    return score(jax.vmap(one)(e["x"]))


# --- Remat and scan -----------------------------------------------------------------------


@case({"w": dense(3, 4), "v": dense(4, 2), "b": elementwise(4)}, {"x": x(5, 3)})
def remat(p, e, key):
    @jax.checkpoint
    def block(p, data):
        return jnp.tanh(data @ p["w"] + p["b"][None])

    return score(block(p, e["x"]) @ p["v"])


@case({"w": tied(3, 3)}, {"x": x(5, 3)})
def remat_twice_with_one_weight(p, e, key):
    block = jax.checkpoint(lambda w, data: jnp.tanh(data @ w))
    return score(block(p["w"], block(p["w"], e["x"])))


@case({"w": dense(3, 4), "v": dense(4, 2)}, {"x": x(5, 3)})
def remat_with_a_policy_of_names(p, e, key):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    @functools.partial(jax.checkpoint, policy=policy)
    def block(p, data):
        hidden = checkpoint_name(data @ p["w"], "hidden")
        return jnp.tanh(hidden) @ p["v"]

    return score(block(p, e["x"]))


def _stack(p, data, *, wrap=lambda f: f, **options):
    def body(hidden, layer):
        return jnp.tanh(hidden @ layer["w"] + layer["b"][None]), None

    return jax.lax.scan(wrap(body), data, p, **options)[0]


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def scan_over_layers(p, e, key):
    return score(_stack(p, e["x"]))


@case({"w": dense(4, 4, 4), "b": elementwise(4, 4)}, {"x": x(4, 4)})
def scan_over_layers_all_equal(p, e, key):
    return score(_stack(p, e["x"], reverse=True))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(4)})
def scan_over_layers_of_a_vector(p, e, key):
    return score(_stack(p, e["x"][None]))


@case({"w": dense(4, 3, 3), "b": elementwise(4, 3)}, {"x": x(5, 3)})
def scan_unrolled_and_reversed(p, e, key):
    return score(_stack(p, e["x"], reverse=True, unroll=2))


@case({"w": dense(1, 3, 3), "b": elementwise(1, 3)}, {"x": x(5, 3)})
def scan_of_length_one(p, e, key):
    return score(_stack(p, e["x"]))


@case({"w": dense(0, 3, 3), "b": elementwise(0, 3)}, {"x": x(5, 3)})
def scan_of_length_zero(p, e, key):
    return score(_stack(p, e["x"]))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def scan_with_remat_body(p, e, key):
    return score(_stack(p, e["x"], wrap=jax.checkpoint))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def scan_with_remat_body_that_saves_dots(p, e, key):
    wrap = functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_saveable,
        prevent_cse=False,
    )
    return score(_stack(p, e["x"], wrap=wrap))


@case({"w": dense(3, 4, 4), "b": elementwise(3, 4)}, {"x": x(5, 4)})
def remat_of_a_scan_with_remat_body(p, e, key):
    block = jax.checkpoint(lambda p, data: _stack(p, data, wrap=jax.checkpoint))
    return score(block(p, e["x"]))


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_over_layers_with_one_used_outside(p, e, key):
    hidden = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], p["w"])[0]
    return score(hidden @ p["w"][1])


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_over_layers_twice(p, e, key):
    def run(hidden):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, p["w"])[0]

    return score(run(run(e["x"])))


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_over_layers_forwards_and_backwards(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w), None

    hidden = jax.lax.scan(body, e["x"], p["w"])[0]
    return score(jax.lax.scan(body, hidden, p["w"], reverse=True)[0])


@case({"w": tied(3, 4, 4)}, {"x": x(5, 4)})
def scan_whose_body_uses_a_layer_twice(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w) @ w.T, None

    return score(jax.lax.scan(body, e["x"], p["w"])[0])


@case({"w": dense(4, 3, 4)}, {"x": x(5, 4)})
def scan_over_a_transposed_stack(p, e, key):
    stack = jnp.moveaxis(p["w"], 1, 0)
    return score(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], stack)[0])


@case({"w": dense(12, 4)}, {"x": x(5, 4)})
def scan_over_a_reshaped_matrix(p, e, key):
    stack = p["w"].reshape(3, 4, 4)
    return score(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], stack)[0])


@case({"w": tied(4, 3, 3)}, {"x": x(5, 3)})
def scan_over_slices_that_overlap(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w), None

    hidden = jax.lax.scan(body, e["x"], p["w"][:3])[0]
    return score(jax.lax.scan(body, hidden, p["w"][1:])[0])


@case({"a": derived(3, 3), "b": derived(3, 3)}, {"x": x(5, 3)})
def scan_over_weights_stacked_in_the_loss(p, e, key):
    stack = jnp.stack([p["a"], p["b"], p["a"]])
    return score(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], stack)[0])


@case({"w": dense(3, 3, 3), "c": dense(3, 3), "s": elementwise(3)}, {"x": x(5, 3)})
def scan_with_layers_and_a_shared_weight(p, e, key):
    def body(h, w):
        return jnp.tanh(h @ w + jnp.sin(h) @ p["c"]) * p["s"][None], h

    hidden, outputs = jax.lax.scan(body, e["x"], p["w"])
    return score(hidden) + score(outputs)


@case({"w": dense(3, 3), "u": dense(2, 3), "b": elementwise(3)}, {"x": x(5, 2)})
def scan_over_time(p, e, key):
    def step(h, token):
        h = jnp.tanh(token @ p["u"] + h @ p["w"] + p["b"])
        return h, h

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[1])


@case({"w": tied(3, 3)}, {"x": x(5, 3)})
def weight_shared_inside_and_outside_a_scan(p, e, key):
    def step(h, token):
        return jnp.tanh(token + h @ p["w"]), None

    hidden = jax.lax.scan(step, jnp.zeros(3), e["x"])[0]
    return score(hidden @ p["w"]) + score(e["x"] @ p["w"].T)


@case({"w": dense(5, 2, 3)}, {"x": x(5, 2)})
def scan_over_time_with_a_weight_for_each_step(p, e, key):
    def step(h, both):
        token, w = both
        return jnp.tanh(h + token @ w), None

    return score(jax.lax.scan(step, jnp.zeros(3), (e["x"], p["w"]))[0])


@case({"w": dense(3, 3)}, {"x": x(5, 3)})
def scan_with_the_parameter_in_the_carry(p, e, key):
    def step(carry, token):
        h, w = carry
        return (jnp.tanh(token + h @ w), w), None

    (hidden, _), _ = jax.lax.scan(step, (jnp.zeros(3), p["w"]), e["x"])
    return score(hidden)


@case({"w": elementwise(3, 3), "v": elementwise(3, 3)}, {"x": x(4, 3)})
def scan_whose_carry_swaps_two_parameters(p, e, key):
    def step(carry, token):
        h, w, v = carry
        return (jnp.tanh(token + h @ w), v, w), None

    carry = (jnp.zeros(3), p["w"], p["v"])
    return score(jax.lax.scan(step, carry, e["x"])[0][0])


@case({"w": elementwise(3, 3)}, {"x": x(4, 3)})
def scan_whose_carry_transposes_the_parameter(p, e, key):
    def step(carry, token):
        h, w = carry
        return (jnp.tanh(token + h @ w), w.T), None

    return score(jax.lax.scan(step, (jnp.zeros(3), p["w"]), e["x"])[0][0])


@case({"w": elementwise(3, 3)}, {"x": x(5, 3)})
def scan_that_changes_the_weight_by_data(p, e, key):
    """Fast weights: the carry starts as the parameter and becomes data."""

    def step(w, token):
        out = jnp.tanh(token @ w)
        return w + 0.1 * jnp.outer(token, out), out

    w, outputs = jax.lax.scan(step, p["w"], e["x"])
    return score(outputs) + score(w)


@case({"w": derived(3, 3)}, {"x": x(5, 3)})
def scan_over_parameters_alone(p, e, key):
    """A power of the weight, before it meets data."""
    power = jax.lax.scan(lambda m, _: (m @ p["w"], None), jnp.eye(3), length=3)[0]
    return score(e["x"] @ power)


@case({"w": embedding(3, 4, 4)}, {"x": x(5, 4)})
def fori_loop_indexes_the_stack(p, e, key):
    return score(jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), e["x"]))


@case({"w": dense(3, 3)}, {"x": x(5, 3)})
def fori_loop_with_static_bounds(p, e, key):
    return score(jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"] + i), e["x"]))


@case({"w": dense(2, 3, 3), "u": dense(2, 3, 3)}, {"x": x(5, 3)})
def scan_in_scan_recurrent_layers(p, e, key):
    """Each layer of the outer scan is shared by the steps of the inner one."""

    def layer(tokens, q):
        def step(h, token):
            h = jnp.tanh(token @ q["u"] + h @ q["w"])
            return h, h

        return jax.lax.scan(step, jnp.zeros(3), tokens)[1], None

    return score(jax.lax.scan(layer, e["x"], p)[0])


@case({"w": dense(2, 3, 3), "c": dense(3, 3)}, {"x": x(4, 3)})
def scan_in_scan_layers_inside_time(p, e, key):
    """The inner scan runs over layers, again at each step of the outer one."""

    def step(h, token):
        inner = jax.lax.scan(lambda v, w: (jnp.tanh(v @ w), v), h + token, p["w"])
        return inner[0] @ p["c"], inner[1]

    hidden, outputs = jax.lax.scan(step, jnp.zeros(3), e["x"])
    return score(hidden) + score(outputs)


@case({"w": dense(2, 3, 3, 3)}, {"x": x(5, 3)})
def scan_in_scan_over_a_grid_of_layers(p, e, key):
    def outer(h, stack):
        return jax.lax.scan(lambda v, w: (jnp.tanh(v @ w), None), h, stack)

    return score(jax.lax.scan(outer, e["x"], p["w"])[0])


@case({"k": conv(2, 3, 2, 2), "b": elementwise(2, 2)}, {"x": x(6, 2)})
def scan_over_convolutions(p, e, key):
    def body(h, layer):
        return jnp.tanh(convolve(h, layer["k"]) + layer["b"][None]), None

    return score(jax.lax.scan(body, e["x"], p)[0])


@case({"table": embedding(3, 5, 4)}, {"ids": ids(5, 6)})
def scan_over_tables(p, e, key):
    def body(h, table):
        return jnp.sin(h + table[e["ids"]]), None

    return score(jax.lax.scan(body, jnp.zeros((6, 4)), p["table"])[0])


@case({"table": tied(7, 3), "w": dense(3, 3)}, {"ids": ids(7, 5)})
def scan_that_feeds_tokens_and_predicts_the_next(p, e, key):
    """Lookup and head of one table, both inside the loop over time."""

    def step(carry, token):
        h, loss = carry
        log = jax.nn.log_softmax(h @ p["table"].T)
        return (jnp.tanh(p["table"][token] + h @ p["w"]), loss - log[token]), None

    return jax.lax.scan(step, (jnp.zeros(3), 0.0), e["ids"])[0][1]


@case({"table": tied(7, 3)}, {"ids": ids(7, 6)})
def chunked_head_with_remat(p, e, key):
    hidden = jnp.tanh(p["table"][e["ids"]])

    @jax.checkpoint
    def chunk(loss, both):
        rows, labels = both
        return loss + entropy(rows @ p["table"].T, labels), None

    chunks = (hidden.reshape(3, 2, 3), e["ids"].reshape(3, 2))
    return jax.lax.scan(chunk, 0.0, chunks)[0]


@case({"q": dense(2, 3, 4), "kv": dense(2, 2, 4)}, {"x": x(5, 3), "memory": x(6, 2)})
def scan_of_cross_attention_to_one_memory(p, e, key):
    """What the weights of every layer meet is the same: a constant of the loop."""

    def body(h, layer):
        keys = e["memory"] @ layer["kv"]
        logits = (h @ layer["q"]) @ keys.T
        return h + jax.nn.softmax(logits) @ keys[:, :3], None

    return score(jax.lax.scan(body, e["x"], p)[0])


@case({"w": fallback(3, 3)}, {"x": x(5, 3)})
def scan_with_a_cond_in_its_body(p, e, key):
    def step(h, token):
        out = jax.lax.cond(token[0] > 0, lambda: jnp.tanh(h @ p["w"]), lambda: h)
        return out + token, None

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[0])


@case({"w": dense(3, 4)}, {"x": x(5, 3)})
def map_over_tokens(p, e, key):
    return score(jax.lax.map(lambda token: jnp.tanh(token @ p["w"]), e["x"]))


@case({"a": elementwise(3)}, {"x": x(6, 3)})
def associative_scan(p, e, key):
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"])[None], (6, 3))

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return score(jax.lax.associative_scan(combine, (decay, e["x"]))[1])


def _gru_step(p, h, token):
    gates = jax.nn.sigmoid(token @ p["u"] + h @ p["w"] + p["b"])
    z, r = jnp.split(gates, 2)
    new = jnp.tanh(token @ p["v"] + (r * h) @ p["q"])
    return (1 - z) * h + z * new


@case(
    {
        "u": dense(2, 6),
        "w": dense(3, 6),
        "b": elementwise(6),
        "v": dense(2, 3),
        "q": dense(3, 3),
    },
    {"x": x(5, 2)},
)
def gru(p, e, key):
    def step(h, token):
        return _gru_step(p, h, token), None

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[0])


@case(
    {"w": [dense(5, 3), dense(5, 3), dense(5, 3), dense(5, 3)], "b": elementwise(12)},
    {"x": x(4, 2)},
)  # fmt: skip
def lstm_with_concatenated_kernels(p, e, key):
    kernel = jnp.concatenate(p["w"], axis=1)

    def step(carry, token):
        h, c = carry
        gates = jnp.concatenate([token, h]) @ kernel + p["b"]
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    start = (jnp.zeros(3), jnp.zeros(3))
    return score(jax.lax.scan(step, start, e["x"])[0][0])


@case({"w": dense(3, 12), "u": dense(2, 12)}, {"x": x(4, 2)})
def lstm_with_kernels_sliced_in_the_loop(p, e, key):
    def step(carry, token):
        h, c = carry
        i, f, g, o = (
            token @ p["u"][:, n : n + 3] + h @ p["w"][:, n : n + 3]
            for n in (0, 3, 6, 9)
        )
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    start = (jnp.zeros(3), jnp.zeros(3))
    return score(jax.lax.scan(step, start, e["x"])[0][0])


# --- Mixtures, attention, whole models ----------------------------------------------------


@case({"router": dense(3, 4), "w": dense(4, 3, 2)}, {"x": x(5, 3)})
def mixture_over_all_experts(p, e, key):
    gates = jax.nn.softmax(e["x"] @ p["router"])
    return score(jnp.einsum("te,tk,ekn->tn", gates, e["x"], p["w"]))


@case({"router": dense(3, 4), "w": embedding(4, 3, 2)}, {"x": x(5, 3)})
def mixture_gathers_the_weights_of_the_best_expert(p, e, key):
    logits = e["x"] @ p["router"]
    best = jnp.argmax(logits, axis=-1)
    gate = jnp.max(jax.nn.softmax(logits), axis=-1)
    out = jnp.einsum("tk,tkn->tn", e["x"], p["w"][best])
    return score(out * gate[:, None])


@case({"router": dense(3, 4), "w": dense(4, 3, 2)}, {"x": x(5, 3)})
def mixture_dispatches_tokens_to_the_best_expert(p, e, key):
    gates = jax.nn.softmax(e["x"] @ p["router"])
    sent = jax.nn.one_hot(jnp.argmax(gates, axis=-1), 4)
    inputs = jnp.einsum("te,tk->etk", sent, e["x"])
    outputs = jnp.einsum("etk,ekn->etn", inputs, p["w"])
    return score(jnp.einsum("etn,te->tn", outputs, sent * gates))


@case(
    {"latents": dense(2, 4), "w": dense(3, 4), "o": dense(3, 2)},
    {"x": x(5, 3)},
)
def attention_with_learned_queries(p, e, key):
    logits = p["latents"] @ (e["x"] @ p["w"]).T
    return score(jax.nn.softmax(logits) @ e["x"] @ p["o"])


@case({"keys": dense(6, 3), "values": dense(6, 2)}, {"x": x(5, 3)})
def attention_to_a_learned_memory(p, e, key):
    return score(jax.nn.softmax(e["x"] @ p["keys"].T) @ p["values"])


@case({"memory": tied(6, 3)}, {"x": x(5, 3)})
def hopfield_memory_is_keys_and_values(p, e, key):
    return score(jax.nn.softmax(e["x"] @ p["memory"].T) @ p["memory"])


@case({"prototypes": elementwise(6, 3)}, {"x": x(5, 3)})
def distances_to_prototypes(p, e, key):
    difference = e["x"][:, None, :] - p["prototypes"][None]
    return jnp.sum(jax.nn.logsumexp(-jnp.sum(jnp.square(difference), -1), axis=-1))


@case({"prototypes": elementwise(6, 3)}, {"x": x(5, 3)})
def distances_to_prototypes_expanded(p, e, key):
    """The square of the prototypes is a bias made from the weight."""
    cross = e["x"] @ p["prototypes"].T
    squares = jnp.sum(jnp.square(p["prototypes"]), axis=-1)
    return jnp.sum(jax.nn.logsumexp(2 * cross - squares[None], axis=-1))


@case(
    {
        "table": tied(7, 4),
        "position": elementwise(5, 4),
        "layers": {
            "norm": elementwise(2, 4, shift=1.0),
            "qkv": dense(2, 4, 3, 2, 2),
            "out": dense(2, 2, 2, 4),
            "up": dense(2, 4, 6),
            "down": dense(2, 6, 4),
        },
    },
    {"ids": ids(7, 6)},
)
def language_model_tied_scanned_and_remat(p, e, key):
    inputs, labels = e["ids"][:-1], e["ids"][1:]
    hidden = p["table"][inputs] * 2 + p["position"]
    causal = np.tril(np.ones((5, 5), bool))

    @jax.checkpoint
    def block(h, q):
        power = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
        normal = h * jax.lax.rsqrt(power + 1e-3) * q["norm"][None]
        queries, keys, values = jnp.einsum("td,dahn->ahtn", normal, q["qkv"])
        logits = jnp.einsum("htn,hsn->hts", queries, keys)
        attention = jax.nn.softmax(jnp.where(causal[None], logits, -1e9))
        h = h + jnp.einsum("hts,hsn,hnd->td", attention, values, q["out"])
        return h + jax.nn.gelu(h @ q["up"]) @ q["down"], None

    hidden = jax.lax.scan(block, hidden, p["layers"])[0]
    return entropy(hidden @ p["table"].T, labels)


@case(
    {
        "layers": {"w": dense(3, 4, 4), "b": elementwise(3, 4)},
        "head": dense(4, 2),
    },
    {"x": x(5, 4)},
    tolerance=BF16,
    dtype="bfloat16",
)
def mixed_precision_scan(p, e, key):
    low = jax.tree.map(lambda v: v.astype(jnp.bfloat16), p)
    hidden = _stack(low["layers"], e["x"].astype(jnp.bfloat16), wrap=jax.checkpoint)
    return score(hidden @ low["head"])


@case(
    {"w": dense(3, 4, dtype=jnp.bfloat16), "b": elementwise(4, dtype=jnp.bfloat16)},
    {"x": x(5, 3)},
    tolerance=BF16,
    dtype="bfloat16",
)
def parameters_in_bfloat16(p, e, key):
    return score(e["x"].astype(jnp.bfloat16) @ p["w"] + p["b"][None])


@case(
    {"w": dense(3, 4, dtype=jnp.bfloat16), "v": dense(4, 2), "table": tied(7, 3)},
    {"x": x(5, 3), "ids": ids(7, 5)},
    tolerance=BF16,
    dtype="bfloat16",
)
def parameters_of_two_dtypes(p, e, key):
    hidden = jnp.tanh((e["x"] + p["table"][e["ids"]]) @ p["w"])
    head = p["table"].astype(jnp.bfloat16).T
    return score(hidden @ p["v"]) + score(e["x"].astype(jnp.bfloat16) @ head)


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def loss_in_bfloat16(p, e, key):
    return score(e["x"] @ p["w"]).astype(jnp.bfloat16)


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def loss_summed_in_bfloat16(p, e, key):
    out = e["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    return jnp.sum(jnp.sin(out))


@case({"w": dense(3, 4), "b": elementwise(4)}, {"x": x(5, 3)}, tolerance=3e-3,
      dtype="float16")  # fmt: skip
def arithmetic_in_float16(p, e, key):
    low = jax.tree.map(lambda v: v.astype(jnp.float16), p)
    return score(e["x"].astype(jnp.float16) @ low["w"] + low["b"][None])


# --- Pytrees ------------------------------------------------------------------------------


class Pair(NamedTuple):
    w: Any
    b: Any


@case(
    {
        "layers": [Pair(dense(3, 4), elementwise(4)), Pair(dense(4, 4), elementwise(4))],
        "rest": (dense(4, 2), {"deep": [elementwise(2)], "none": None, "empty": {}}),
    },
    (x(5, 3), [x(5)], {"none": None}),
)  # fmt: skip
def nested_pytrees(p, e, key):
    hidden, (weights,), _ = e
    for w, b in p["layers"]:
        hidden = jnp.tanh(hidden @ w + b[None])
    head, rest = p["rest"]
    return score((hidden @ head + rest["deep"][0][None]) * weights[:, None])


@case([dense(3, 4), dense(4, 2)], x(5, 3))
def parameters_in_a_list_and_a_bare_example(p, e, key):
    return score(jnp.tanh(e @ p[0]) @ p[1])


@case({"w": dense(3, 4), "again": dense(3, 4)}, {"x": x(5, 3)})
def two_parameters_of_the_same_values(p, e, key):
    return score(jnp.tanh(e["x"] @ p["w"]) + e["x"] @ p["again"])


@register
def one_array_under_two_names(rng):
    """The same object twice in the pytree is two parameters."""

    def loss(p, e, key):
        return score(jnp.tanh(e["x"] @ p["a"]) + e["x"] @ p["b"])

    w = draw_params(rng, dense(3, 4))
    rules = {"a": "dense", "b": "dense"}
    return Case(loss, {"a": w, "b": w}, draw_data(rng, {"x": x(5, 3)}), rules)


@register
def numpy_parameters_and_examples(rng):
    def loss(p, e, key):
        return score(e["x"] @ p["w"] + p["b"])

    params = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.float32(0.5)}
    examples = {"x": rng.normal(size=(B, 3)).astype(np.float32)}
    return Case(loss, params, examples, {"w": "dense", "b": "elementwise"})


@register
def random_keys_among_the_data(rng):
    def loss(p, e, key):
        keep = jax.random.bernoulli(e["key"], 0.5, (5, 4))
        return score(jnp.where(keep, e["x"] @ p["w"], 0.0))

    examples = draw_data(rng, {"x": x(5, 3)})
    examples["key"] = jax.random.split(jax.random.key(1), B)
    return Case(loss, draw_params(rng, {"w": dense(3, 4)}), examples, {"w": "dense"})


@register
def a_pytree_class_holds_the_parameters(rng):
    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=[]
    )
    class Layer:  # fmt: skip
        def __init__(self, w):
            self.w = w

    def loss(p, e, key):
        return score(e["x"] @ p.w)

    w = draw_params(rng, dense(3, 4))
    return Case(loss, Layer(w), draw_data(rng, {"x": x(5, 3)}), {"w": "dense"})


# --- flax ---------------------------------------------------------------------------------

NORMS = {"kernel": "dense", "bias": "elementwise", "scale": "elementwise"}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, data):
        hidden = nn.gelu(nn.LayerNorm()(nn.Dense(4)(data)))
        return nn.Dense(2, use_bias=False)(nn.RMSNorm()(hidden))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, data):
        hidden = nn.Conv(4, (3, 3), strides=2)(data)
        hidden = jnp.tanh(nn.GroupNorm(2)(hidden))
        hidden = nn.ConvTranspose(3, (2, 2), strides=(2, 2))(hidden)
        hidden = nn.Conv(3, (3, 3), feature_group_count=3)(hidden)
        return nn.Dense(2)(nn.avg_pool(hidden, (2, 2)).ravel())


class Attention(nn.Module):
    cross: bool = False

    @nn.compact
    def __call__(self, data, memory=None, *, deterministic=True):
        attention = nn.MultiHeadDotProductAttention(
            2, qkv_features=4, dropout_rate=0.3, deterministic=deterministic
        )
        return attention(data, memory) if self.cross else attention(data)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, data, _):
        return jnp.tanh(nn.Dense(3)(nn.LayerNorm()(data))), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, data):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scanned = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return scanned()(data, None)[0]


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        shared = nn.Dense(4)
        return embed.attend(jnp.tanh(shared(shared(embed(tokens)))))


class General(nn.Module):
    @nn.compact
    def __call__(self, data):
        hidden = nn.DenseGeneral((2, 3), axis=-1)(data)
        hidden = nn.Einsum((2, 3, 4), "thk,hkn->thn")(jnp.tanh(hidden))
        return nn.DenseGeneral(3, axis=(-2, -1))(hidden)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, data):
        return nn.WeightNorm(nn.Dense(4))(data)


def _with_dropout(module, variables, e, key):
    out = module.apply(
        variables, e["x"], deterministic=False, rngs={"dropout": key}
    )  # fmt: skip
    return score(out)


def _with_memory(module, variables, e, key):
    return score(module.apply(variables, e["x"], e["memory"]))


def named(name, build):
    build.__name__ = name
    register(build)


named("linen_mlp", linen(Mlp(), {"x": x(5, 3)}, NORMS))
named("linen_general_and_einsum", linen(General(), {"x": x(5, 3)}, NORMS))
named(
    "linen_convnet",
    linen(
        ConvNet(), {"x": x(6, 6, 2)}, {**NORMS, "kernel": "conv", "Dense_0/kernel": "dense"}
    ),
)  # fmt: skip
named(
    "linen_attention_with_dropout",
    linen(Attention(), {"x": x(5, 3)}, NORMS, call=_with_dropout),
)
named(
    "linen_cross_attention",
    linen(
        Attention(cross=True),
        {"x": x(5, 3), "memory": x(4, 2)},
        NORMS,
        call=_with_memory,
        shapes=lambda module, key, e: module.init(key, e["x"], e["memory"]),
    ),
)
named("linen_scan", linen(Stack(), {"x": x(5, 3)}, NORMS))
named("linen_scan_and_remat", linen(Stack(remat=True), {"x": x(5, 3)}, NORMS))
named(
    "linen_tied_embedding_and_shared_dense",
    linen(Tied(), {"x": ids(7, 5)}, {**NORMS, "kernel": "tied", "embedding": "tied"}),
)
named(
    "linen_weight_norm",
    linen(Normalised(), {"x": x(5, 3)}, {**NORMS, "kernel": "derived", "scale": "derived"}),
)  # fmt: skip
named(
    "linen_optimized_lstm",
    linen(
        nn.RNN(nn.OptimizedLSTMCell(3)), {"x": x(4, 2)}, NORMS
    ),
)  # fmt: skip
named("linen_gru", linen(nn.RNN(nn.GRUCell(3)), {"x": x(4, 2)}, NORMS))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + jnp.tanh(layer(self.norm(hidden)))
        return self.embed.attend(hidden)


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return nnx.Linear(3, 3, rngs=rngs)

        self.layers = create(rngs.split(2))
        self.attention = nnx.MultiHeadAttention(
            2, 3, qkv_features=4, decode=False, rngs=rngs
        )

    def __call__(self, data):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(hidden, layer):
            return jnp.tanh(layer(hidden))

        return self.attention(run(data, self.layers))


def nnx_case(name, model, data, rules):
    """Build a case of an nnx module, its parameters as a pure dict."""

    def build(rng):
        graph, state, rest = nnx.split(
            nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param, ...
        )

        def loss(p, e, key):
            filled = jax.tree.map(lambda leaf: leaf, state)
            nnx.replace_by_pure_dict(filled, p)
            return score(nnx.merge(graph, filled, rest)(e["x"]))

        params = jax.tree.map(
            lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), jnp.float32),
            nnx.to_pure_dict(state),
        )
        return Case(loss, params, draw_data(rng, data), rules_by_name(params, rules))

    named(name, build)


nnx_case(
    "nnx_tied_transformer_blocks", NnxModel, {"x": ids(7, 5)}, {**NORMS, "embedding": "tied"}
)  # fmt: skip
nnx_case("nnx_scan_remat_and_attention", NnxScanned, {"x": x(5, 3)}, NORMS)


# --- Where what is data and what a parameter changes on the way ----------------------------


@case({"w": elementwise(3)}, {"h": x(3), "x": x(5, 3)})
def carry_turns_from_data_into_a_parameter(p, e, key):
    carry, ys = jax.lax.scan(lambda c, x: (p["w"], score(c * x)), e["h"], e["x"])
    return jnp.sum(ys) + score(carry * e["h"])


@case({"w": dense(3, 3), "h0": elementwise(3)}, {"h": x(3), "x": x(4, 6, 3)})
def recurrent_state_is_reset_to_a_learned_one(p, e, key):
    def segment(h, xs):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), h, xs)
        return p["h0"], h

    return score(jax.lax.scan(segment, e["h"], e["x"])[1])


@case({"w": elementwise(4, 3, 3)}, {"x": x(3), "w0": x(3, 3)})
def each_layer_hands_its_weights_to_the_next(p, e, key):
    def body(carry, w):
        h, before = carry
        return (jnp.tanh(h @ before + h @ w), w), None

    (h, last), _ = jax.lax.scan(body, (e["x"], e["w0"]), p["w"])
    return score(h @ last)


@case({"w": elementwise(3, 3)}, {"x": x(2, 4, 3), "w0": x(3, 3)})
def weight_handed_on_by_the_inner_of_two_loops(p, e, key):
    def outer(w, xs):
        def inner(w, x):
            return jnp.tanh(p["w"]), x @ w

        return jax.lax.scan(inner, w, xs)

    last, ys = jax.lax.scan(outer, e["w0"], e["x"], reverse=True)
    return score(ys) + score(last @ e["x"][0, 0])


@case({"w": elementwise(3, 3), "v": dense(3, 3)}, {"x": x(4, 3), "w0": x(3, 3)})
def carries_that_change_places(p, e, key):
    def body(carry, x):
        first, second, third = carry
        return (second, third, p["w"]), jnp.tanh(x @ first) @ p["v"]

    start = (e["w0"], 2 * e["w0"], jnp.zeros((3, 3)))
    return score(jax.lax.scan(body, start, e["x"])[1])


@case({"w": fallback(3, 3), "v": fallback(3, 3)}, {"x": x(5, 3), "w0": x(3, 3)})
def branches_that_return_data_or_parameters(p, e, key):
    w, v = jax.lax.cond(
        e["x"][0, 0] > 0, lambda: (e["w0"], p["v"]), lambda: (p["w"], e["w0"])
    )
    return score(e["x"] @ w) + score(e["x"] @ v)


@case({"w": dense(3, 3), "s": frozen(3)}, {"x": x(5, 3), "n": ids(4)})
def parameter_in_a_while_loop_without_gradient(p, e, key):
    def body(state):
        i, s = state
        return i + 1, s * p["s"] + e["x"][0]

    _, s = jax.lax.while_loop(lambda state: state[0] < e["n"], body, (0, p["s"]))
    return score(e["x"] @ p["w"] + jax.lax.stop_gradient(s)[None])


@case({"m": tied(5, 5)}, {"i": ids(5, 4), "j": ids(5, 3)})
def rows_and_columns_of_one_table(p, e, key):
    return score(p["m"][e["i"]]) + score(p["m"].T[e["j"]])


@case({"m": tied(5, 5)}, {"i": ids(5, 4), "j": ids(5, 3), "x": x(2, 5)})
def rows_columns_and_a_product_of_one_table(p, e, key):
    looked = score(p["m"][e["i"]]) + score(p["m"].T[e["j"]])
    return looked + score(e["x"] @ p["m"])


@case({"w": dense(3, 4), "s": elementwise(4)}, {"x": x(5, 3)})
def product_of_integers_made_of_a_parameter(p, e, key):
    q = jnp.round(p["w"] * 20).astype(jnp.int32)
    x = jnp.round(e["x"] * 20).astype(jnp.int32)
    rounded = (x @ q).astype(jnp.float32) / 400
    return score(rounded * p["s"][None]) + score(e["x"] @ p["w"])


@case({"m": derived(5, 4), "w": dense(4, 3)}, {"ids": ids(5, 6), "x": x(6, 4)})
def lookup_in_a_thresholded_parameter(p, e, key):
    hard = (p["m"] > 0)[e["ids"]]
    soft = jax.nn.sigmoid(p["m"])[e["ids"]]
    return score(jnp.where(hard, e["x"], 0.1 * e["x"]) @ p["w"]) + score(e["x"] * soft)


@case({"w": dense(4, 3), "b": frozen(4)}, {"x": x(5, 4)})
def parameter_that_data_are_compared_with(p, e, key):
    return score(jnp.where(e["x"] > p["b"][None], e["x"], 0) @ p["w"])


@case({"k": frozen(9, 2, 3), "w": dense(2, 3)}, {"x": x(6, 2)})
def convolution_without_outputs(p, e, key):
    form = {"dimension_numbers": ("NWC", "WIO", "NWC")}
    out = jax.lax.conv_general_dilated(e["x"][None], p["k"], (1,), "VALID", **form)
    return score(out) + score(e["x"] @ p["w"])


@case({"w": elementwise(3, 4)}, {"x": x(5, 3)})
def weight_times_a_function_of_data(p, e, key):
    return score(e["x"] @ (p["w"] * jnp.exp(e["x"][0, :, None])))


# --- Rows picked in all ways ---------------------------------------------------------------


@case({"table": embedding(7, 3)}, {"ids": ids(7, 5)})
def vmap_of_a_scalar_lookup(p, e, key):
    return score(jax.vmap(lambda i: p["table"][i])(e["ids"]))


@case({"table": tied(7, 3)}, {"ids": ids(7, 5), "i": ids(7)})
def scalar_lookups_and_head_of_one_table(p, e, key):
    hidden = jax.vmap(lambda i: p["table"][i])(e["ids"]) + p["table"][e["i"]][None]
    return score(jnp.tanh(hidden) @ p["table"].T)


@case({"table": embedding(7, 3)}, {"i": ids(30, low=-15)})
def row_by_an_index_out_of_bounds(p, e, key):
    return score(jax.lax.dynamic_index_in_dim(p["table"], e["i"], axis=0))


@case({"table": embedding(4, 5, 3)}, {"i": ids(4), "j": ids(9, low=-9)})
def row_by_two_traced_indices(p, e, key):
    return score(p["table"][e["i"], e["j"]])


@case({"table": embedding(4, 2, 5)}, {"i": ids(4, 6), "j": ids(5, 6)})
def rows_across_the_middle_of_a_table(p, e, key):
    return score(p["table"][e["i"], :, e["j"]])


@case({"table": tied(4, 5, 3)}, {"i": ids(9, 6, low=-9), "j": ids(9, 6, low=-9)})
def embedding_by_pairs_of_ids_out_of_bounds(p, e, key):
    found = p["table"].at[e["i"], e["j"]].get(mode="fill", fill_value=0.5)
    return score(found) + score(p["table"].at[e["j"], e["i"]].get(mode="clip"))


@case({"table": embedding(3, 3, 3)}, {"i": ids(3, 3), "j": ids(3, 3)})
def embedding_by_pairs_of_ids_all_equal(p, e, key):
    return score(p["table"][e["i"], :, e["j"]] * jnp.arange(9.0).reshape(3, 3))


@case({"table": embedding(5, 4, 3)}, {"ids": ids(4, 6, 5)})
def lookups_per_head_with_heads_last(p, e, key):
    rows = jax.vmap(lambda t, i: t[i], in_axes=(0, 1), out_axes=1)
    return score(rows(p["table"], e["ids"]) * jnp.arange(90.0).reshape(6, 5, 3))


@case({"tables": embedding(2, 7, 3), "w": dense(3, 3)}, {"ids": ids(7, 2)})
def scan_over_scalar_lookups(p, e, key):
    def step(h, xs):
        table, i = xs
        return jnp.tanh(h @ p["w"] + table[i]), None

    return score(jax.lax.scan(step, jnp.ones(3), (p["tables"], e["ids"]))[0])


@case({"table": tied(7)}, {"ids": ids(7, 5), "i": ids(7)})
def numbers_by_id_and_by_traced_index(p, e, key):
    return score(p["table"][e["ids"]] * p["table"][e["i"]])


# --- Weights times a number ----------------------------------------------------------------


@case({"w": tied(3, 4), "v": dense(4, 3)}, {"x": x(5, 3)})
def weights_times_numbers(p, e, key):
    up = e["x"] @ (p["w"] * (1 / jnp.sqrt(3.0)))
    return score(jnp.tanh(up) @ -p["v"] @ (2 * p["w"] / -7))


@case({"table": tied(7, 4), "k": conv(3, 4, 2)}, {"ids": ids(7, 6)})
def tables_and_kernels_times_numbers(p, e, key):
    out = convolve((p["table"] * 2.0)[e["ids"]], 0.3 * p["k"])
    return score(out) + score(jnp.ones((2, 4)) * e["ids"][0] @ (-0.5 * p["table"]).T)


@case({"w": dense(2, 3, 3), "b": elementwise(2, 3)}, {"x": x(5, 3)})
def scan_over_layers_times_a_number(p, e, key):
    def step(h, layer):
        w, b = layer
        return jnp.tanh(h @ (w / 3) + b[None]), None

    return score(jax.lax.scan(step, e["x"], (p["w"] * 2, p["b"]))[0])


@case({"w": dense(3, 4)}, {"x": x(5, 3)}, tolerance=BF16, dtype="bfloat16")
def weight_times_a_number_in_bfloat16(p, e, key):
    x = e["x"].astype(jnp.bfloat16)
    return score(jnp.tanh(x @ (p["w"] / 3).astype(jnp.bfloat16) * 3))


@case({"w": frozen(3, 4), "v": dense(3, 4)}, {"x": x(5, 3)})
def weight_times_zero(p, e, key):
    return score(e["x"] @ (0 * p["w"]) + e["x"] @ p["v"])


# --- Parts of one parameter ----------------------------------------------------------------


@case({"w": dense_and_elementwise(4, 4)}, {"x": x(5, 3)})
def weight_and_bias_in_one_matrix(p, e, key):
    return score(e["x"] @ p["w"][:-1] + p["w"][-1:])


@case({"flat": dense_and_elementwise(34)}, {"x": x(5, 3)})
def network_of_a_flat_vector(p, e, key):
    flat = p["flat"]
    hidden = jnp.tanh(e["x"] @ flat[:12].reshape(3, 4) + flat[12:16][None])
    return score(hidden @ flat[16:32].reshape(4, 4)[:, :2] * flat[32] + flat[33])


@case({"w": dense_and_elementwise(2, 4, 3)}, {"x": x(5, 3)})
def scan_over_layers_with_their_biases(p, e, key):
    def step(h, w):
        return jnp.tanh(h @ w[:3] + w[3:]), None

    return score(jax.lax.scan(step, e["x"], p["w"])[0])


@case({"w": elementwise(4, 3), "v": dense(3, 3)}, {"x": x(5, 3)})
def scan_over_time_with_a_bias_of_a_part(p, e, key):
    def step(h, x):
        return jnp.tanh(h @ p["v"] + x @ p["w"][:3] + p["w"][3]), None

    return score(jax.lax.scan(step, jnp.zeros(3), e["x"])[0])


@case({"w": tied(4, 3)}, {"x": x(5, 3)})
def parts_that_overlap_a_weight(p, e, key):
    return score(e["x"] @ p["w"][:3] + p["w"][2:3]) + score(e["x"] * p["w"][3:])


@case({"w": elementwise(4, 3)}, {"x": x(5, 3)})
def parts_and_the_whole_of_a_weight(p, e, key):
    both = e["x"] @ p["w"][:3] + p["w"][3:]
    return score(both) + score(jnp.sum(e["x"]) * jnp.sin(p["w"]))


@case({"c": tied(2, 3), "w": dense(3, 3)}, {"x": x(5, 3)})
def scales_and_shifts_of_one_parameter(p, e, key):
    def normed(h, c):
        h = h - jnp.mean(h, -1, keepdims=True)
        return h * c[:1] + c[1:]

    return score(normed(jnp.tanh(normed(e["x"], p["c"]) @ p["w"]), 0.5 * p["c"]))


# --- Weights put together from several -----------------------------------------------------


@case({"q": dense(3, 4), "k": dense(3, 4), "v": dense(3, 2)}, {"x": x(5, 3)})
def fused_queries_keys_and_values(p, e, key):
    fused = jnp.concatenate([p["q"], p["k"] / 2, p["v"]], axis=1)
    q, k, v = jnp.split(e["x"] @ fused, [4, 8], axis=-1)
    return score(jax.nn.softmax(q @ k.T) @ v)


@case({"a": dense(2, 3, 4), "b": dense(2, 3, 2)}, {"x": x(5, 3)})
def scan_over_layers_with_fused_weights(p, e, key):
    def step(h, layer):
        out = h @ jnp.concatenate(layer, axis=1)
        return jnp.tanh(out[:, :3] + out[:, 3:]), None

    return score(jax.lax.scan(step, e["x"], (p["a"], p["b"]))[0])


@case({"a": derived(4, 3), "b": derived(2, 3)}, {"x": x(5, 3)})
def fused_weights_transposed(p, e, key):
    return score(e["x"] @ jnp.concatenate([p["a"], p["b"]]).T)


@case({"a": dense(4, 3), "b": dense(2, 3)}, {"x": x(5, 3)})
def fused_weights_on_the_left(p, e, key):
    return score(jnp.concatenate([p["a"], p["b"]]) @ e["x"].T)


@case({"a": dense(2, 3, 4), "b": dense(2, 3, 5)}, {"x": x(5, 2, 3)})
def fused_weights_per_head(p, e, key):
    fused = jnp.concatenate([p["a"], p["b"]], axis=2)
    return score(
        jnp.einsum("thk,hkn->tnh", e["x"], fused) * jnp.arange(18.0).reshape(1, 9, 2)
    )


@case({"a": tied(3, 4), "b": dense(3, 2)}, {"x": x(5, 3)})
def fused_weights_with_one_twice(p, e, key):
    out = e["x"] @ jnp.concatenate([p["a"], p["b"], p["a"]], axis=1)
    return score(out) + score(jnp.tanh(out[:, :4]) @ p["a"].T)


@case({"a": fallback(3, 4), "b": fallback(3, 2)}, {"x": x(5, 3)})
def fused_weights_one_of_which_has_no_rule(p, e, key):
    out = e["x"] @ jnp.concatenate([p["a"], p["b"]], axis=1)
    return score(out) + jnp.sum(jnp.square(p["a"]))


@case(
    {"a": dense(3, 4), "b": dense(3, 2)},
    {"x": x(5, 3)},
    tolerance=BF16,
    dtype="bfloat16",
)
def fused_weights_in_bfloat16(p, e, key):
    fused = jnp.concatenate([p["a"], p["b"]], axis=1).astype(jnp.bfloat16)
    return score(jnp.tanh(e["x"].astype(jnp.bfloat16) @ fused))


@case({"a": derived(3, 4), "b": derived(2, 4)}, {"x": x(5, 3), "y": x(5, 2)})
def fused_weights_of_two_inputs(p, e, key):
    return score(
        jnp.concatenate([e["x"], e["y"]], 1) @ jnp.concatenate([p["a"], p["b"]])
    )
