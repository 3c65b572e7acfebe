"""The objects that a checked config names, ready for the loop."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

from dpjax.checks import check_rows
from dpjax.clipping import Engine, plain, resolve_engine
from dpjax.data.batches import check_records, fingerprint, overlap
from dpjax.data.inspection import Inspection, inspect
from dpjax.mechanisms import DpZero, Mechanism, NonPrivate
from dpjax.models.losses import augmented
from dpjax.parallel.sharding import Layout, make_layout
from dpjax.training import config as configs
from dpjax.typing import Example, Key, Loss, Model, Params, Source

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything one run is made of.

    Attributes:
        mechanism: The plan, its noise calibrated.
        layout: The devices, and what is where.
        engine: How clipped sums are computed.
        model: Pure functions on one example.
        train: Patterns of the parameters that are trained; see ``dpjax.models.partition``.
        loss: Of one example, augmentation included.
        evaluation_loss: Of one example as it is evaluated: no augmentation, no dropout.
        metric: ``(params, example) -> float32[]``, averaged for evaluation.
        optimizer: Acts on released gradients.
        source: Training data.
        held_out: Evaluation data.
        data_fingerprint: Of the training data; a resume on other data is refused.
        inspection: What a look at the training data counted; as private as they are.
    """

    mechanism: Mechanism
    layout: Layout
    engine: Engine
    model: Model
    train: tuple[str, ...]
    loss: Loss
    evaluation_loss: Loss
    metric: Callable[[Params, Example], Array]
    optimizer: optax.GradientTransformation
    source: Source
    held_out: Source
    data_fingerprint: str
    inspection: Inspection


def build_experiment(config: Mapping[str, Any]) -> Experiment:
    """Build what ``config`` names, and check the data against it.

    Raises:
        ConfigError: The config is wrong, or does not fit the data.
    """
    configs.check(config)
    _check_start(config)
    layout = _layout(config)
    source = configs.build(config["data"]["source"])
    held_out = configs.build(config["evaluation"]["source"])
    _check_data(source, held_out)
    _check_held_out(config, source, held_out)
    mechanism = configs.build_mechanism(config["mechanism"], num_examples=len(source))
    if mechanism.private and mechanism.delta >= 1 / len(source):
        _log.warning(
            "delta=%g is not below 1/num_examples=%.1e: releasing one example outright "
            "would be allowed; lower config.mechanism.delta",
            mechanism.delta,
            1 / len(source),
        )
    model = _model(config["model"])
    inspection = _inspected(config, "data", source, model)
    _inspected(config, "evaluation", held_out, model)
    return Experiment(
        mechanism=mechanism,
        layout=layout,
        engine=_engine(config["compute"], mechanism, layout),
        model=model,
        train=tuple(config["parameters"]["train"]),
        loss=layout.gathering(
            augmented(
                configs.build(config["loss"], model),
                augment=_told_of(configs.build(config["augment"]["transform"])),
                views=config["augment"]["views"],
            )
        ),
        evaluation_loss=configs.build(config["loss"], model.evaluating()),
        metric=configs.build(config["evaluation"]["metric"], model.evaluating()),
        optimizer=configs.build(config["optimizer"]),
        source=source,
        held_out=held_out,
        data_fingerprint=fingerprint(source),
        inspection=inspection,
    )


def learning_rate(spec: Mapping[str, Any]) -> Callable[[int], Any] | None:
    """Return the learning rate of each step (from 0) that the spec of an optimizer gives.

    Returns:
        ``step -> scalar``; None if the spec has no key ``learning_rate``.
    """
    given = spec.get("learning_rate")
    if isinstance(given, Mapping):
        return configs.build(given)
    return None if given is None else lambda step: given


def _model(spec: Mapping[str, Any]) -> Model:
    model = configs.build(spec)
    if not isinstance(model, Model):
        raise configs.ConfigError(
            f"config.model: {spec['name']} returned a {type(model).__name__}; it must return "
            "dpjax.Model(init, apply)"
        )
    return model


def _told_of(augment: Callable[[Key, Example], Example]) -> Any:
    """Let an error of the augmentation say that it is one, and not one of the loss."""

    def checked(key: Key, example: Example) -> Example:
        with configs.of_the_user("augment.transform", example):
            return augment(key, example)

    return checked


def _check_start(config: Mapping[str, Any]) -> None:
    """Refuse to call parameters public whose own card says that they are not."""
    if config["parameters"]["provenance"] != "public":
        return
    model = configs.flatten({"model": config["model"]})
    for key, value in model.items():
        if value != f"{configs.WEIGHTS}exported":
            continue
        spec = key.removesuffix("name")
        folder, fresh = model[f"{spec}path"], model[f"{spec}fresh"]
        if _tells_of_private_data(Path(folder), fresh):
            raise configs.ConfigError(
                f"config.parameters.provenance='public' with the export {folder!r}, whose "
                "privacy card tells of private data: say 'private'"
            )


def _tells_of_private_data(export: Path, fresh: Sequence[str]) -> bool:
    """Return whether private data had a part in what an export gives but for ``fresh``."""
    files = [export / name for name in ("privacy_card.json", "parameters.json")]
    if not all(file.is_file() for file in files):
        return False
    card, names = (json.loads(file.read_text()) for file in files)
    if any(flag.startswith(configs.PRIVATE_START) for flag in card["flags"]):
        return True
    kept = [n for n in names["trained"] if not any(re.fullmatch(p, n) for p in fresh)]
    # Noise is added to private data, and to no others (see ``dpjax.training.config``).
    mechanism = card["mechanism"]
    silent = mechanism["name"] == NonPrivate.__name__
    return bool(kept) and not (silent or mechanism.get("noise_multiplier") == 0)


def _layout(config: Mapping[str, Any]) -> Layout:
    compute = config["compute"]
    try:
        layout = make_layout(**config["mesh"])
        check_rows(
            compute["physical_batch_size"],
            devices=layout.row_parts,
            microbatch_size=compute["microbatch_size"],
        )
    except ValueError as error:
        raise configs.ConfigError(f"config.mesh: {error}") from error
    return layout


def _check_held_out(
    config: Mapping[str, Any], source: Source, held_out: Source
) -> None:
    if config["evaluation"]["provenance"] == config["data"]["provenance"]:
        return
    shared = overlap(source, held_out)
    if shared > 0.05:
        raise configs.ConfigError(
            "more than 5% of config.evaluation.source is in config.data.source: it is not "
            "held out; change the split, or give both the same provenance"
        )


def _engine(compute: Mapping[str, Any], mechanism: Mechanism, layout: Layout) -> Engine:
    # Without privacy the fair baseline is one ordinary gradient, whatever the engine.
    size = compute["microbatch_size"]
    if size is not None:  # Of each device; an engine sees the rows of a replica.
        size *= layout.row_parts // layout.replicas
    if not mechanism.private:
        return resolve_engine(plain, microbatch_size=size)
    if isinstance(mechanism, DpZero) and compute["memory_budget"] is not None:
        raise configs.ConfigError(
            f"config.compute.memory_budget={compute['memory_budget']} is for plans of "
            "gradients, and DpZero takes none: use config.compute.microbatch_size"
        )
    return resolve_engine(
        compute["engine"],
        microbatch_size=size,
        memory_budget=compute["memory_budget"],
    )


def _check_data(source: Source, held_out: Source) -> None:
    for name, data in (("data", source), ("evaluation", held_out)):
        try:
            check_records(data)
        except ValueError as error:
            raise configs.ConfigError(f"config.{name}.source: {error}") from error


def _inspected(
    config: Mapping[str, Any], part: str, data: Source, model: Model
) -> Inspection:
    try:
        return inspect(data, limits=_limits(config, data, model))
    except ValueError as error:
        raise configs.ConfigError(f"config.{part}.source: {error}") from error


def _limits(config: Mapping[str, Any], data: Source, model: Model) -> dict[str, int]:
    """Return how many values labels and tokens may have, by the model and its outputs.

    Of a model of one's own the outputs are counted if a loss or metric that ships takes
    their last axis for classes or tokens; other losses may mean something else by it.
    """
    record, found = data[[0]], {}
    used = {config["loss"]["name"], config["evaluation"]["metric"]["name"]}
    for key, keyword, readers in _INTEGERS:
        if key not in record:
            continue
        limit = configs.number_of(config["model"], keyword)
        if limit is None and used & {f"dpjax.models.losses:{name}" for name in readers}:
            limit = _last_axis(model, record)
        if limit is not None:
            found[key] = limit
    return found


_INTEGERS = (
    ("label", "num_classes", ("classification", "accuracy", "error_rate")),
    (
        "tokens",
        "vocab_size",
        ("causal_lm", "masked_lm", "token_nats", "hidden_token_nats"),
    ),
)
"""Key of a record, keyword of a model, losses and metrics for which outputs are of these."""


def _last_axis(model: Model, record: Example) -> int | None:
    blank = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), record)
    key = jax.random.key(0)
    try:
        params = jax.eval_shape(model.init, key, blank)
        outputs = jax.eval_shape(model.apply, params, blank, key)
        return outputs.shape[-1]
    except Exception:  # noqa: BLE001
        # ``startup.check_parts`` tells what is wrong with a model, and where.
        return None
