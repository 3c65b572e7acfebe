"""Views of a weight: reshaped, transposed, cast, sliced, joined."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import case, dense, derived, score, tied, x


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
