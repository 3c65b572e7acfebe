"""What does not fit is told in one line before anything is written, also by a dry run."""

import pytest

from dpjax.config import ConfigError
from dpjax.experiment import build_experiment
from dpjax.startup import check_parts
from dpjax.train import plan, train
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
    experiment = build_experiment(tiny(**changes))
    with pytest.raises(ConfigError) as caught:
        check_parts(experiment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
