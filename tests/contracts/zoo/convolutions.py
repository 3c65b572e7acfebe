"""Convolutions of all forms."""

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import (
    case,
    conv,
    convolve,
    dense,
    derived,
    elementwise,
    entropy,
    fallback,
    ids,
    score,
    tied,
    x,
)


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


# What norms allow for rounding clips a little more: by 2.6e-5 here.
@case({"k": conv(2, 2, 2, 3), "v": conv(4, 2, 3, 2)}, {"x": x(5, 5, 2)}, tolerance=1e-4)
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
