import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.data.augment import flip_and_crop
from dpjax.models.losses import (
    accuracy,
    augmented,
    causal_lm,
    classification,
    error_rate,
    hidden_token_nats,
    masked_lm,
    regression,
    squared_error,
    token_nats,
)
from dpjax.models.mlp import mlp
from dpjax.typing import Model

KEY = jax.random.key(3)
EXAMPLE = {
    "image": np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32),
    "label": np.int32(2),
}
NETWORK = mlp(features=(), num_classes=4, activation="tanh")
PARAMS = {
    "head": {
        "kernel": np.random.default_rng(1).normal(size=(24, 4)).astype(np.float32),
        "bias": np.zeros(4, np.float32),
    }
}
# Its outputs are its parameters, so that a loss of it can be computed by hand.
TABLE = Model(lambda key, example: jnp.zeros(3), lambda params, example, key: params)


def noisy_loss(params, example, key):
    """A loss with randomness of its own, as of a model with dropout."""
    scale = jax.random.uniform(key)
    return scale * classification(NETWORK)(params, example, key)


def assert_trees_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        actual,
        expected,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classification_is_the_cross_entropy_to_the_smoothed_label(smoothing):
    logits = np.array([1.0, -2.0, 0.5], np.float32)
    loss = classification(TABLE, label_smoothing=smoothing)(logits, EXAMPLE, KEY)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    target = np.array([0.0, 0.0, 1.0]) * (1 - smoothing) + smoothing / 3
    np.testing.assert_allclose(loss, -(target * np.log(probabilities)).sum(), rtol=1e-6)
    assert loss.shape == ()


def test_classification_computes_in_float32():
    logits = jnp.array([1.0, -2.0, 0.5], jnp.bfloat16)
    loss = classification(TABLE)(logits, EXAMPLE, KEY)
    assert loss.dtype == jnp.float32
    expected = classification(TABLE)(logits.astype(jnp.float32), EXAMPLE, KEY)
    np.testing.assert_array_equal(loss, expected)


def test_label_without_a_class_gives_nan():
    loss = classification(TABLE)(jnp.zeros(3), EXAMPLE | {"label": np.int32(3)}, KEY)
    assert np.isnan(loss)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_raises(smoothing):
    with pytest.raises(ValueError, match=rf"label_smoothing={smoothing} must be in"):
        classification(TABLE, label_smoothing=smoothing)


def test_augmented_gradient_is_the_mean_of_the_view_gradients():
    augment = flip_and_crop(padding=1)
    loss = augmented(noisy_loss, augment=augment, views=3)
    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS, EXAMPLE, KEY)
    view_gradient = jax.jit(jax.value_and_grad(noisy_loss))
    values, gradients = [], []
    for view_key in jax.random.split(KEY, 3):
        augment_key, loss_key = jax.random.split(view_key)
        view = augment(augment_key, EXAMPLE)
        v, g = view_gradient(PARAMS, view, loss_key)
        values.append(v)
        gradients.append(g)
    assert len({float(v) for v in values}) == 3
    assert_trees_close(value, np.mean(values))
    assert_trees_close(gradient, jax.tree.map(lambda *g: sum(g) / 3, *gradients))


def test_one_view_without_augmentation_is_the_plain_loss():
    plain = classification(NETWORK)
    loss = augmented(plain, augment=lambda key, example: example, views=1)
    gradient = jax.jit(jax.grad(loss))(PARAMS, EXAMPLE, KEY)
    assert_trees_close(gradient, jax.jit(jax.grad(plain))(PARAMS, EXAMPLE, KEY))


def test_views_below_one_raise():
    with pytest.raises(ValueError, match="views=0 must be an integer of at least 1"):
        augmented(noisy_loss, augment=flip_and_crop(padding=1), views=0)


def test_accuracy_is_one_where_the_top_class_is_the_label():
    correct = jax.vmap(accuracy(TABLE), (0, None))
    outputs = np.array([[0, 1, 2], [3, 1, 2], [-3, -2, -1]], np.float32)
    np.testing.assert_array_equal(correct(outputs, EXAMPLE), [1.0, 0.0, 1.0])
    assert correct(outputs, EXAMPLE).dtype == jnp.float32


# --- Losses of tokens ---------------------------------------------------------------------

TOKENS = np.array([3, 1, 4, 1, 2], np.int32)
LOGITS = np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
NATS = -np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("extra", "weights"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"mask": np.array([1, 1, 1, 0, 0], bool)}, [1, 1, 1, 0, 0]),
        ({"weights": np.array([9, 0, 0.5, 2, 0], np.float32)}, [9, 0, 0.5, 2, 0]),
        (
            {"weights": np.array([0, 0, 0, 1, 1], bool), "mask": np.ones(5, bool)},
            [0, 0, 0, 1, 1],
        ),
    ],
)
def test_causal_lm_averages_over_the_weights_of_the_tokens_after_the_first(
    extra, weights
):
    example = {"tokens": TOKENS, **extra}
    loss = causal_lm(TABLE)(LOGITS, example, KEY)
    nats = [NATS[t - 1, TOKENS[t]] for t in range(1, 5)]
    np.testing.assert_allclose(loss, np.average(nats, weights=weights[1:]), rtol=1e-6)
    np.testing.assert_array_equal(token_nats(TABLE)(LOGITS, example), loss)


def test_weights_scale_out_of_the_loss_of_an_example():
    """The loss is normalised inside the example: longer ones do not weigh more."""
    weights = np.array([1, 2, 0, 4, 1], np.float32)
    few, many = (
        causal_lm(TABLE)(LOGITS, {"tokens": TOKENS, "weights": w}, KEY)
        for w in (weights, 7 * weights)
    )
    np.testing.assert_allclose(few, many, rtol=1e-6)


@pytest.mark.parametrize(
    "loss", [causal_lm(TABLE), masked_lm(TABLE, mask_token=5, rate=0.5)]
)
def test_an_example_without_weights_has_loss_and_gradient_zero(loss):
    example = {"tokens": TOKENS, "weights": np.zeros(5, np.float32)}
    value, gradient = jax.value_and_grad(loss)(LOGITS, example, KEY)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(LOGITS))


def test_masked_lm_hides_tokens_that_count_and_scores_those_alone():
    seen = []

    def apply(params, example, key):
        seen.append(np.asarray(example["tokens"]))
        return params

    model = Model(lambda key, example: LOGITS, apply)
    mask = np.array([1, 1, 1, 1, 0], bool)
    counts = np.zeros(5)
    for i in range(200):
        loss = masked_lm(model, mask_token=5, rate=0.3)(
            LOGITS, {"tokens": TOKENS, "mask": mask}, jax.random.key(i)
        )
        hidden = seen[-1] != TOKENS
        assert set(seen[-1][hidden]) <= {5}
        nats = NATS[np.arange(5), TOKENS][hidden]
        np.testing.assert_allclose(loss, nats.mean() if len(nats) else 0.0, rtol=1e-5)
        counts += hidden
    assert counts[4] == 0
    # Five standard errors of a coin of 0.3.
    assert np.abs(counts[:4] / 200 - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 200)


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_a_rate_of_hiding_out_of_range_raises(rate):
    with pytest.raises(ValueError, match=r"rate=.* must be in \(0, 1\]"):
        masked_lm(TABLE, mask_token=5, rate=rate)


def test_regression_is_the_squared_error_and_its_metric():
    model = Model(lambda key, example: jnp.zeros(()), lambda p, example, key: p * 2)
    example = {"y": np.float32(1.0)}
    loss = regression(model)(jnp.float32(2.0), example, KEY)
    assert loss == squared_error(model)(jnp.float32(2.0), example) == 9.0
    half = regression(model)(jnp.bfloat16(2.0), example, KEY)
    assert half.dtype == jnp.float32


def test_error_rate_is_the_rest_of_accuracy():
    for logits in ([0.0, 0.0, 1.0], [0.0, 1.0, 0.0]):
        params = np.array(logits, np.float32)
        total = error_rate(TABLE)(params, EXAMPLE) + accuracy(TABLE)(params, EXAMPLE)
        assert total == 1.0


def test_hidden_token_nats_are_the_loss_at_one_fixed_draw():
    options = {"mask_token": 5, "rate": 0.5}
    example = {"tokens": TOKENS}
    nats = hidden_token_nats(TABLE, **options)(LOGITS, example)
    again = masked_lm(TABLE, **options)(LOGITS, example, jax.random.key(0))
    np.testing.assert_array_equal(nats, again)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (jnp.ones(3), r"an array of shape \(3,\)"),
        (jnp.int32(1), "a scalar of dtype int32"),
        ((jnp.float32(1), {}), "a tuple"),
    ],
    ids=["vector", "integer", "with auxiliary values"],
)
def test_a_loss_that_is_no_scalar_is_named(value, found):
    loss = augmented(lambda *_: value, augment=lambda key, example: example, views=1)
    with pytest.raises(TypeError, match=f"loss returned {found}; it must return one"):
        loss({}, EXAMPLE, KEY)


@pytest.mark.parametrize("build", [classification, accuracy, error_rate])
def test_labels_of_another_shape_are_refused(build):
    example = EXAMPLE | {"label": np.zeros(1, np.int32)}
    arguments = (PARAMS, example, KEY) if build is classification else (PARAMS, example)
    with pytest.raises(
        ValueError, match=r"'label' .* \(1,\), .* as label\[:, 0\] is for"
    ):
        build(NETWORK)(*arguments)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (jnp.zeros(()), np.zeros(1), r"'y' of an example has shape \(1,\)"),
        (jnp.zeros(1), np.zeros(()), r"output has shape \(1,\)"),
        (jnp.zeros(1), np.zeros(1), r"output has shape \(1,\)"),
    ],
)
def test_a_regression_of_other_shapes_is_refused(output, target, message):
    for arguments in ((regression, KEY), (squared_error,)):
        build, *key = arguments
        with pytest.raises(ValueError, match=message):
            build(TABLE)(output, {"y": target}, *key)
