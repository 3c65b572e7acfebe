import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpjax.models.linen import array_model, image_model


def test_group_norm_uses_all_positions_of_its_group():
    model = image_model(nn.GroupNorm(num_groups=2, epsilon=1e-6))
    image = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    params = model.init(jax.random.key(0), {"image": image})
    normal = model.apply(params, {"image": image}, jax.random.key(0))
    halves = np.split(image, 2, axis=-1)
    expected = [(half - half.mean()) / half.std() for half in halves]
    np.testing.assert_allclose(
        normal, np.concatenate(expected, axis=-1), rtol=1e-4, atol=1e-5
    )


def test_params_are_the_bare_dict_and_other_inputs_are_ignored():
    model = image_model(nn.Dense(2))
    example = {"image": np.ones((2, 2, 3), np.float32), "label": np.int32(0)}
    params = model.init(jax.random.key(0), example)
    assert jax.tree.map(np.shape, params) == {"kernel": (3, 2), "bias": (2,)}
    assert model.apply(params, example, jax.random.key(0)).shape == (2, 2, 2)


class _BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


def test_a_module_that_keeps_statistics_of_batches_is_refused_with_the_fix():
    model = image_model(_BatchNormed())
    with pytest.raises(ValueError, match=r"keeps batch_stats .* use GroupNorm"):
        model.init(jax.random.key(0), {"image": np.ones((2, 2, 3), np.float32)})


class Normed(nn.Module):
    deterministic: bool = False
    frozen: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=self.frozen)(x)
        return nn.Dropout(0.5, deterministic=self.deterministic)(x)


KEY, ROW = jax.random.key(0), {"x": np.full(4, 3.0, np.float32)}
STATISTICS = {
    "batch_stats": {"BatchNorm_0": {"mean": jnp.arange(4.0), "var": jnp.full(4, 4.0)}}
}


def test_dropout_is_drawn_from_the_key_and_left_out_in_evaluation():
    """Beside a BatchNorm whose statistics are public constants."""
    evaluation = Normed(deterministic=True)
    model = array_model(
        Normed(), field="x", evaluation=evaluation, constants=STATISTICS
    )
    params = model.init(KEY, ROW)
    assert jax.tree.map(np.shape, params) == {
        "BatchNorm_0": {"scale": (4,), "bias": (4,)}
    }
    apply, evaluate = jax.jit(model.apply), jax.jit(model.evaluating().apply)
    wanted = (3 - np.arange(4.0)) / np.sqrt(4 + 1e-5)
    draws = [apply(params, ROW, jax.random.key(i)) for i in range(20)]
    for draw in draws:
        np.testing.assert_allclose(draw, np.where(draw == 0, 0, 2 * wanted), rtol=1e-5)
    assert len({tuple(draw.tolist()) for draw in draws}) > 3
    for i in range(3):
        found = evaluate(params, ROW, jax.random.key(i))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


WRONG = {
    "dropout in metrics": (
        array_model(Normed(), field="x", constants=STATISTICS),
        "draws randomness .* give as evaluation= the same module with deterministic=True",
    ),
    "statistics of the batch": (
        array_model(
            Normed(deterministic=True, frozen=False), field="x", constants=STATISTICS
        ),
        "changes variables .* use_running_average=True leaves BatchNorm as it is",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_module_that_draws_or_changes_what_it_must_not_is_refused(case):
    model, message = WRONG[case]
    params = model.init(KEY, ROW)
    with pytest.raises(ValueError, match=message):
        jax.jit(model.apply)(params, ROW, KEY)
