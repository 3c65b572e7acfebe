"""Every optimizer that optax ships trains and resumes bitwise, or is refused in one line."""

import inspect
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import dpjax
from dpjax.parallel.sharding import make_layout
from dpjax.privacy.noise import root_key
from dpjax.training.checkpoint import Checkpoints
from dpjax.training.config import ConfigError
from dpjax.training.startup import check_optimizer
from dpjax.training.state import TrainState
from dpjax.training.step import make_train_step
from dpjax.transforms import private
from tests.checks import thinned

PARAMS = {
    "w": np.arange(6, dtype=np.float32).reshape(3, 2),
    "b": np.ones(2, np.float32),
}
MECHANISM = dpjax.DpSgd(
    clip_norm=1.0, clip_style="flat", noise_multiplier=1.0,
    sampling=dpjax.Poisson(rate=0.5), steps=4, num_examples=8, delta=1e-5,
)  # fmt: skip
CONFIG = {
    "run": {"log_sensitive": False},
    "evaluation": {"ema_decay": 0.5},
    "compute": {"physical_batch_size": 8},
}


def by_layer(params):
    return {"w": "one", "b": "other"}


def sometimes(step):
    return step % 2 == 0


ARGUMENTS = {
    "learning_rate": 0.1,
    "decay": 0.9,
    "max_delta": 1.0,
    "max_norm": 1.0,
    "threshold": 1.0,
    "clipping": 0.1,
    "eta": 0.01,
    "gamma": 0.5,
    "step_size": -0.1,
    "step_size_fn": lambda step: -0.1 / (1 + step),
    "mask": {"w": True, "b": False},
    "freeze_mask": {"w": True, "b": False},
    "inner": optax.adam(0.1),
    "tx": optax.adam(0.1),
    "optimizer": optax.sgd(0.1),
    "adv_optimizer": optax.sgd(0.05),
    "base_optimizer": optax.sgd(0.1),
    "fast_optimizer": optax.sgd(0.1),
    "sync_period": 2,
    "slow_step_size": 0.5,
    "max_consecutive_errors": 2,
    "max_backtracking_steps": 3,
    "max_linesearch_steps": 3,
    "should_transform_fn": sometimes,
    "transforms": {"one": optax.adam(0.1), "other": optax.contrib.schedule_free_sgd()},
    "param_labels": by_layer,
    "measure": optax.tree.norm,
    "measure_name": "norm",
    "l2_norm_clip": 1.0,
    "noise_multiplier": 1.0,
    "seed": 0,
    "key": 0,
}
WHOLE = {
    "optax:chain": lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)),
    "optax:named_chain": lambda: optax.named_chain(("sgd", optax.sgd(0.1))),
    "optax:stateless": lambda: optax.stateless(lambda u, p: optax.tree.scale(-0.1, u)),
    "optax:stateless_with_tree_map": lambda: optax.stateless_with_tree_map(
        lambda u, p: -0.1 * u
    ),
    "optax:inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "optax:inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(
        optax.sgd
    )(0.1),
}


def made():
    """Return every optimizer of optax, by its name in a config."""
    found = {name: make() for name, make in WHOLE.items()}
    for module in (optax, optax.contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_"):
                continue
            needed = [
                p.name
                for p in inspect.signature(make).parameters.values()
                if p.default is p.empty
            ]
            if (
                not set(needed) <= ARGUMENTS.keys()
                or f"{module.__name__}:{name}" in found
            ):
                continue
            one = make(**{key: ARGUMENTS[key] for key in needed})
            if isinstance(one, optax.GradientTransformation):
                found[f"{module.__name__}:{name}"] = one
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # optax tells of what it will change
    OPTIMIZERS = made()
REFUSED = {
    "optax:lbfgs": "needs more than released gradients",
    "optax:lookahead": "AttributeError: 'dict' object has no attribute 'fast'",
    "optax:measure_with_ema": "changes the shapes or dtypes of its updates",
    "optax:polyak_sgd": "needs more than released gradients",
    "optax:scale_by_backtracking_linesearch": "needs more than released gradients",
    "optax:scale_by_polyak": "needs more than released gradients",
    "optax:scale_by_zoom_linesearch": "needs more than released gradients",
    "optax.contrib:differentially_private_aggregate": "to have a batch dimension",
    "optax.contrib:dpsgd": "to have a batch dimension in the 0th axis",
    "optax.contrib:hutchinson_estimator_diag_hessian": "needs more than released",
    "optax.contrib:momo": "needs more than released gradients",
    "optax.contrib:momo_adam": "needs more than released gradients",
    "optax.contrib:reduce_on_plateau": "needs more than released gradients",
    "optax.contrib:scale_by_muon": "ValueError: pytree structure error",
    "optax.contrib:sophia": "needs more than released gradients",
}
TRAINED = sorted(OPTIMIZERS.keys() - REFUSED.keys())
ALIASED = ("prodigy", "dog", "dowg", "cocob", "mechanize", "sam", "schedule_free_sgd")


@pytest.fixture(autouse=True)
def as_optax_expects():
    with jax.numpy_rank_promotion("allow"):
        yield


def experiment(optimizer):
    layout = make_layout(data=1, fsdp=1, model=1, rules=((".*", None),))
    return SimpleNamespace(
        mechanism=MECHANISM, layout=layout, engine=None, loss=None, optimizer=optimizer
    )


def test_each_is_accepted_or_refused_by_shapes_in_one_line():
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    refused = {}
    for name, optimizer in OPTIMIZERS.items():
        try:
            check_optimizer(experiment(optimizer), shapes)
        except ConfigError as error:
            refused[name] = str(error)
    assert refused.keys() == REFUSED.keys()
    for name, message in refused.items():
        assert REFUSED[name] in message
        assert message.startswith("config.optimizer: ")
        assert "\n" not in message


def test_none_is_left_out():
    annotated = {
        f"{module.__name__}:{name}"
        for module in (optax, optax.contrib)
        for name, make in inspect.getmembers(module, inspect.isfunction)
        if "GradientTransformation" in str(inspect.signature(make).return_annotation)
        and not name.startswith("_")
    }
    assert annotated <= OPTIMIZERS.keys()
    assert {f"optax.contrib:{name}" for name in ALIASED} <= OPTIMIZERS.keys()


@pytest.mark.parametrize(
    ("module", "name"),
    thinned([name.split(":") for name in TRAINED], 12, always=ALIASED),
)
def test_each_trains_and_resumes_bitwise(module, name, tmp_path):
    one = experiment(OPTIMIZERS[f"{module}:{name}"])

    def transform():
        # A state is donated, and its key with it.
        return private(MECHANISM, one.optimizer, noise_key=root_key(0))

    step = make_train_step(CONFIG, one, transform())

    def begun():
        params = jax.tree.map(jnp.array, PARAMS)
        average, seed = jax.tree.map(jnp.array, PARAMS), jnp.zeros(4, jnp.uint32)
        keys = jax.random.key(1), jax.random.key(2)
        return TrainState(params, transform().init(params), average, *keys, seed)

    def after(state, steps):
        for _ in range(steps):
            state, released = step.finish(state, step.begin("gradient", state))
            assert np.isfinite(released.update_norm)
        return state

    whole = after(begun(), 4)
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(2, after(begun(), 2), metadata={}, wait=True)
        _, state = saved.restore(begun())
    resumed = after(state, 2)
    assert step.finish._cache_size() == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (whole.params, whole.average),
        (resumed.params, resumed.average),
    )
