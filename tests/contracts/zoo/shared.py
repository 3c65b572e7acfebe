"""Several uses of one weight."""

import jax
import jax.numpy as jnp

from tests.contracts.zoo.cases import case, elementwise, score, tied, x


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
