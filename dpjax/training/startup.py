"""What shapes alone tell about a run, before anything is computed or written."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from dpjax.checks import check_accounted
from dpjax.models.partition import flatten, partition
from dpjax.optimizers import evaluation_params, owning
from dpjax.parallel.gathering import check_divisible
from dpjax.training import config as configs
from dpjax.training.experiment import Experiment
from dpjax.typing import Example, Key, Model, Params, Source


def check_parts(experiment: Experiment) -> tuple[Params, Params]:
    """Check, by shapes alone, what would else fail after steps have been released.

    Returns:
        The shapes of the parameters: those that are trained, and the frozen ones.

    Raises:
        ConfigError: Loss or metric does not fit the model and the data, that for training
            or that for evaluation; the model is evaluated with dropout; the optimizer needs
            more than released gradients; the mechanism releases what it does not account; the
            parameters have no names to be exported by,
            cannot be split as the mesh asks, or no part of them can be trained as asked; the
            loss cannot be divided among devices.
    """
    try:
        check_accounted(experiment.mechanism)
    except ValueError as error:
        raise configs.ConfigError(f"config.mechanism: {error}") from error
    blank, key = blank_example(experiment.source), jax.random.key(0)
    with configs.of_the_user("model", blank):
        params = jax.eval_shape(experiment.model.init, key, blank)
        if not flatten(params):
            raise configs.ConfigError("config.model: init returns no parameters")
    with configs.of_the_user("loss", blank):
        loss = jax.eval_shape(experiment.loss, params, blank, key)
    held_out = blank_example(experiment.held_out)
    source = "config.evaluation.source"
    with configs.of_the_user("evaluation.metric", held_out, data=source):
        score = jax.eval_shape(experiment.metric, params, held_out)
    if _evaluated_at_random(experiment.model, params, blank):
        raise configs.ConfigError(
            "config.model: its outputs depend on the random key (dropout?), in evaluation, "
            "too: give the Model as evaluate= the same function without randomness"
        )
    for name, out in (("loss", loss), ("evaluation.metric", score)):
        if getattr(out, "shape", None) != ():
            raise configs.ConfigError(
                f"config.{name}: {out} must be one scalar for ONE example"
            )
    try:
        experiment.layout.check_params(params)
    except ValueError as error:
        raise configs.ConfigError(f"config.mesh.rules: {error}") from error
    if experiment.layout.split:
        traced = jax.make_jaxpr(experiment.loss)(params, blank, key)
        try:
            check_divisible(traced.jaxpr)
        except ValueError as error:
            raise configs.ConfigError(f"config.mesh: {error}") from error
    try:
        trained, frozen = jax.eval_shape(lambda key: starts(experiment, key), key)
    except ValueError as error:
        raise configs.ConfigError(f"config.parameters.train: {error}") from error
    _check_real(trained)
    check_optimizer(experiment, trained)
    return trained, frozen


def starts(experiment: Experiment, key: Key) -> tuple[Params, Params]:
    """Return the starting parameters: those that are trained, and the frozen ones."""
    params = experiment.model.init(key, blank_example(experiment.source))
    return partition(params, experiment.train)


def blank_example(source: Source) -> Example:
    """Return an example of zeros, of the shapes and dtypes of those of ``source``."""
    # Initialisation sees shapes only: one that reads values would release an example.
    return jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), source[[0]])


def _evaluated_at_random(model: Model, params: Params, blank: Example) -> bool:
    """Return whether metrics of the model would be those of one dropout mask."""
    apply, key = model.evaluating().apply, jax.random.key(0)
    try:
        traced = jax.make_jaxpr(apply)(params, blank, key)
    except Exception:  # noqa: BLE001 (the loss has passed: it makes other inputs of these)
        return False
    wanted = [True] * len(traced.jaxpr.outvars)
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, wanted)
    return used[-1]


def _check_real(trained: Params) -> None:
    for name, leaf in flatten(trained).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise configs.ConfigError(
                f"config.model: the parameter {name!r} is of dtype {leaf.dtype}, and only "
                "real numbers are trained: freeze it in config.parameters.train, or keep a "
                "complex one as its real and its imaginary part"
            )


def check_optimizer(experiment: Experiment, trained: Params) -> None:
    """Check that released gradients are all the optimizer needs, for any number of steps.

    Args:
        experiment: Of which mechanism and optimizer are looked at.
        trained: Shapes of the parameters that are trained.

    Raises:
        ConfigError: It needs more, or changes the shapes of parameters or of its state.
    """
    try:
        optimizer = owning(experiment.optimizer)
    except ValueError as error:
        raise configs.ConfigError(f"config.optimizer: {error}") from error
    with configs.of_the_user("mechanism", {}):
        gradient = _released(experiment, trained)
    try:
        state = jax.eval_shape(optimizer.init, trained)
        updates, after = jax.eval_shape(optimizer.update, gradient, state, trained)
        evaluated = jax.eval_shape(evaluation_params, after, trained)
    except Exception as error:
        raise configs.ConfigError(
            f"config.optimizer: {_why(error)}{configs.told(error)}"
        ) from error
    alike = {
        "updates": _shapes(updates) == _shapes(trained),
        "evaluation_params": _typed(evaluated) == _typed(trained),
        "state": _typed(after) == _typed(state),
    }
    if changed := [name for name, same in alike.items() if not same]:
        raise configs.ConfigError(
            f"config.optimizer: a step changes the shapes or dtypes of its {changed[0]}; it "
            "must map the gradient of the mean loss to updates of the parameters"
        )


def _released(experiment: Experiment, trained: Params) -> Params:
    """Return the shapes of what the mechanism releases."""
    mechanism = experiment.mechanism

    def release(params: Params, key: Key) -> Params:
        state = mechanism.init(params)
        asked = mechanism.query(mechanism.phase(0), params, state)
        step = jnp.zeros((), jnp.int32)
        return mechanism.release(asked.empty(), state, params, key=key, step=step)[0]

    return jax.eval_shape(release, trained, jax.random.split(jax.random.key(0)))


def _why(error: Exception) -> str:
    if not re.search("required keyword-only|must be provided", str(error)):
        return "it does not take the parameters and their released gradient: "
    return (
        "it needs more than released gradients, such as the loss of training examples, "
        "which has no noise and is private: take an optimizer of gradients alone; "
    )


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def _typed(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
