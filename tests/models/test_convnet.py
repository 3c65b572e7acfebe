import jax
import jax.numpy as jnp

from dpjax.models.convnet import groupnorm_cnn, tanh_cnn


def count_params(model, shape):
    example = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    params = jax.eval_shape(model.init, jax.random.key(0), example)
    return sum(x.size for x in jax.tree.leaves(params))


def test_tanh_cnn_has_the_published_number_of_parameters():
    # Papernot et al. (2020) on MNIST.
    assert count_params(tanh_cnn(num_classes=10), (28, 28, 1)) == 26_010


def test_groupnorm_cnn_parameters():
    convs = sum(
        9 * d * p + p for d, p in [(3, 32), (32, 32), (32, 64), (64, 64)]
    )  # kernel and bias
    norms = 2 * (32 + 32 + 64 + 64)
    head = 64 * 10 + 10
    counted = count_params(groupnorm_cnn(num_classes=10), (32, 32, 3))
    assert counted == convs + norms + head
