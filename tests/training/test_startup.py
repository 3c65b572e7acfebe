"""What does not fit is told in one line before anything is written, also by a dry run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

import dpjax
from dpjax.models import losses, peft
from dpjax.models.inputs import resized, standardized
from dpjax.models.linen import array_model
from dpjax.training.config import ConfigError
from dpjax.training.experiment import build_experiment
from dpjax.training.opening import plan
from dpjax.training.startup import check_parts
from dpjax.training.train import train
from dpjax.typing import Model
from tests.containers import dropping
from tests.runs import tiny


def of(name, **keys):
    return {"name": f"tests.containers:{name}", **keys}


PRIVATE = "which has no noise and is private: take an optimizer of gradients alone"
WRONG = {
    "an optimizer of the loss": (
        {"optimizer": of("plateau", learning_rate=0.5)},
        PRIVATE,
    ),
    "a line search": ({"optimizer": {"name": "optax:lbfgs"}}, PRIVATE),
    "curvature of the loss": (
        {"optimizer": {"name": "optax.contrib:sophia", "learning_rate": 0.1}},
        PRIVATE,
    ),
    "parameters of a kind of their own": (
        {
            "optimizer": {
                "name": "optax:lookahead",
                "fast_optimizer": {"name": "optax:sgd", "learning_rate": 0.1},
                "sync_period": 2,
                "slow_step_size": 0.5,
            }
        },
        "config.optimizer: it does not take the parameters and their released gradient",
    ),
    "no optimizer": (
        {"optimizer": of("rate", learning_rate=0.5)},
        "config.optimizer: optimizer=0.5 must be an optax transform",
    ),
    "a state that grows": (
        {"optimizer": of("growing", learning_rate=0.5)},
        "config.optimizer: a step changes the shapes or dtypes of its state",
    ),
    "other parameters to evaluate": (
        {"optimizer": of("summed", learning_rate=0.5)},
        "config.optimizer: a step changes the shapes or dtypes of its evaluation_params",
    ),
    "held-out images of another size": (
        {"evaluation.source": of("held_out", size=9, label=True)},
        "config.evaluation.metric does not fit config.evaluation.source or the model: ",
    ),
    "held-out data without labels": (
        {"evaluation.source": of("held_out", size=8, label=False)},
        "or the model: KeyError: 'label'; an example has ['image', 'target']",
    ),
    "augmentation of what is not there": (
        {"augment.transform": of("cropped")},
        "config.augment.transform does not fit the data or the model: KeyError: 'picture'",
    ),
    "dropout in evaluation": (
        {"model": of("dropping", num_classes=10, evaluated=False)},
        "config.model: its outputs depend on the random key (dropout?), in evaluation, too",
    ),
    "no Model": (
        {"model": of("pair", num_classes=10)},
        "tests.containers:pair returned a tuple; it must return dpjax.Model(init, apply)",
    ),
    "no parameters": (
        {"model": of("empty", num_classes=10)},
        "config.model: init returns no parameters",
    ),
    "two parameters of one name": (
        {"model": of("colliding", num_classes=10)},
        "two parameters are named 'head/kernel': rename one of them",
    ),
    "an integer that is trained": (
        {"model": of("counting", num_classes=10, dtype="int32")},
        "config.model: the parameter 'seen' is of dtype int32, and only real numbers",
    ),
    "a complex number that is trained": (
        {"model": of("counting", num_classes=10, dtype="complex64")},
        "config.model: the parameter 'seen' is of dtype complex64, and only real numbers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_told_by_shapes_alone(case):
    changes, message = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        check_parts(build_experiment(tiny(**changes)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def with_mechanism(kind):
    """Return an experiment whose mechanism is of this class, with the facts of DpSgd."""
    experiment = build_experiment(tiny())
    plan = experiment.mechanism
    facts = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return dataclasses.replace(experiment, mechanism=kind(**facts))


def test_an_error_of_an_own_mechanism_is_not_called_one_of_the_optimizer():
    class Broken(dpjax.DpSgd):
        def init(self, params):
            return params["weights"]

        def event(self, steps=None):
            return super().event(steps)

    with pytest.raises(
        ConfigError, match=r"config\.mechanism does not fit .*'weights'"
    ):
        check_parts(with_mechanism(Broken))


def test_a_mechanism_with_a_release_of_its_own_is_not_accounted_as_its_parent():
    class Half(dpjax.DpSgd):
        noise_stddev = 0.5

    class Heir(Half):
        pass

    class Told(Half):
        def event(self, steps=None):
            return super().event(steps)

    for kind in (Half, Heir):
        with pytest.raises(
            ConfigError, match="Half overrides noise_stddev and inherits event"
        ):
            check_parts(with_mechanism(kind))
    check_parts(with_mechanism(Told))


@pytest.mark.parametrize("self_check", [False, True])
def test_a_run_and_its_dry_run_refuse_before_anything_is_written(tmp_path, self_check):
    changes, _ = WRONG["an optimizer of the loss"]
    config = tiny(**changes, **{"run.self_check": self_check})
    for start in (plan, lambda config: train(config, tmp_path / "run")):
        with pytest.raises(ConfigError, match=PRIVATE):
            start(config)
    assert not (tmp_path / "run").exists()


def test_integers_may_be_frozen():
    model = of("counting", num_classes=10, dtype="int32")
    config = tiny(model=model, **{"parameters.train": ("w",)})
    trained, frozen = check_parts(build_experiment(config))
    assert trained["seen"] is None
    assert frozen["w"] is None


def test_scores_and_attacks_see_the_model_without_dropout():
    model = of("dropping", num_classes=10, evaluated=True)
    experiment = build_experiment(tiny(model=model))
    check_parts(experiment)
    examples = experiment.held_out[list(range(100))]
    params = {"w": np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)}
    logits = examples["image"].reshape(100, 64) @ params["w"]
    right = logits.argmax(axis=1) == examples["label"]
    over = functools.partial(jax.vmap, in_axes=(None, 0))
    np.testing.assert_array_equal(over(experiment.metric)(params, examples), right)
    over_examples = jax.vmap(experiment.evaluation_loss, (None, 0, None))
    found = over_examples(params, examples, jax.random.key(1))
    wanted = (
        scipy.special.logsumexp(logits, axis=1) - logits[range(100), examples["label"]]
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    dropped = jax.vmap(experiment.loss, (None, 0, None))
    assert np.abs(dropped(params, examples, jax.random.key(1)) - wanted).max() > 1


def test_a_metric_of_the_users_sees_the_model_without_dropout():
    model = of("dropping", num_classes=10, evaluated=True)
    metric = {"evaluation.metric": of("largest_score")}
    experiment = build_experiment(tiny(model=model, **metric))
    examples = experiment.held_out[list(range(10))]
    params = {"w": np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)}
    wanted = (examples["image"].reshape(10, 64) @ params["w"]).max(axis=1)
    found = jax.vmap(experiment.metric, in_axes=(None, 0))(params, examples)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


OUTPUTS = {
    losses.accuracy: jnp.arange(3.0),
    losses.error_rate: jnp.arange(3.0),
    losses.squared_error: jnp.float32(2.0),
    losses.token_nats: jnp.zeros((4, 5)),
    functools.partial(losses.hidden_token_nats, mask_token=0, rate=0.5): jnp.zeros(
        (4, 5)
    ),
}


@pytest.mark.parametrize("metric", OUTPUTS)
def test_every_metric_takes_what_is_evaluated(metric):
    outputs = OUTPUTS[metric]
    model = Model(
        lambda key, example: {},
        lambda params, example, key: outputs * jnp.nan,
        evaluate=lambda params, example, key: outputs,
    )
    example = {"label": 2, "y": 1.0, "tokens": jnp.arange(1, 5)}
    plain = metric(model.evaluating())({}, example)
    assert metric(model)({}, example) == plain
    assert metric(model._replace(evaluate=None))({}, example) != plain


WRAPPED = {
    "standardized": lambda model: standardized(model, mean=(0.0,), std=(2.0,)),
    "resized": lambda model: resized(model, size=8),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_models_around_models_are_evaluated_without_dropout(name):
    inner = dropping(num_classes=10, evaluated=True)
    model = WRAPPED[name](inner)
    image = np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)
    params = inner.init(jax.random.key(0), {"image": image})
    found = model.evaluating().apply(params, {"image": image}, jax.random.key(0))
    scale = 0.5 if name == "standardized" else 1.0
    wanted = scale * image.ravel() @ params["w"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    drawn = model.apply(params, {"image": image}, jax.random.key(0))
    assert np.abs(drawn - wanted).max() > 1


class Dropped(nn.Module):
    deterministic: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=self.deterministic)(nn.Dense(4)(x))


def test_adapters_and_prompts_are_evaluated_without_dropout():
    """And are part of what is evaluated."""
    example = {"x": np.ones(3, np.float32)}
    inner = array_model(Dropped(), field="x", evaluation=Dropped(deterministic=True))
    model = peft.lora(inner, rank=1, scale=1.0, targets=("Dense_0",)).evaluating()
    params = model.init(jax.random.key(0), example)
    layer = params["Dense_0"]
    layer["lora_b"] = jnp.ones((1, 4))
    found = model.apply(params, example, jax.random.key(0))
    wanted = jnp.sum(layer["kernel"], axis=0) + jnp.sum(layer["lora_a"])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

    def lengths(params, example, key):
        tokens = example["tokens"]
        return jnp.full((len(tokens), 1), len(tokens))

    inner = Model(lambda key, example: {}, lambda *args: None, evaluate=lengths)
    model = peft.prompt(inner, length=2, position=1).evaluating()
    found = model.apply({}, {"tokens": jnp.arange(1, 5)}, jax.random.key(0))
    np.testing.assert_array_equal(found, np.full((4, 1), 6))
