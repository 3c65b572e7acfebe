"""From an ml_collections config to the objects it names. Strict; no hidden defaults.

A config has the groups of ``GROUPS``. A *spec* inside it is a dict with a ``name``,
"module:attribute"; its other keys are that callable's keyword arguments, and may be specs
themselves. Everything is checked against the source code of what is named, before
anything heavy is imported: a typo is answered at once.

This module may not import jax.
"""

import contextlib
import difflib
import hashlib
import importlib
import json
import math
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpjax import checks
from dpjax.training import signatures

PROVENANCES = ("private", "public")
STARTS = ("fresh", "public", "private")
"""What the starting parameters may come from: chance alone, or public or private data."""

GROUPS: dict[str, tuple[str, ...] | None] = {
    "data": ("source", "provenance"),
    "evaluation": ("source", "provenance", "metric", "batch_size", "ema_decay"),
    "model": None,
    "parameters": ("train", "provenance"),
    "loss": None,
    "augment": ("transform", "views"),
    "mechanism": None,
    "optimizer": None,
    "compute": (
        "engine",
        "microbatch_size",
        "memory_budget",
        "physical_batch_size",
    ),
    "mesh": ("data", "fsdp", "model", "rules"),
    "run": (
        "seed",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "writers",
        "log_sensitive",
        "verify",
        "self_check",
        "dry_run",
    ),
}
"""Keys of each group; None marks a group that is itself a spec."""

WEIGHTS = "dpjax.models.weights:"
"""Specs of this module start a model from weights that were trained before."""

PRIVATE_START = "starts from parameters that were trained on private data"
"""How the flag on a card begins that says so."""

FREE_ON_RESUME = (
    *(
        f"run.{key}"
        for key in GROUPS["run"] or ()
        if key
        not in ("seed", "log_sensitive")  # what was logged once stays on the card
    ),
    # They round sums otherwise: see dpjax.training.ledger for when that is refused.
    "mesh.data",
    "mesh.fsdp",
    "mesh.model",
)
"""Keys that may differ when a run is resumed: they change no release."""


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line with the key and the fix."""


def check(config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless ``config`` (plain dicts) is complete and sensible."""
    _check_keys("config", config, GROUPS)
    for group, keys in GROUPS.items():
        if keys is not None:
            _check_keys(f"config.{group}", config[group], keys)
    _check_spec("config.data.source", config["data"]["source"])
    _check_spec("config.evaluation.source", config["evaluation"]["source"])
    _check_spec("config.evaluation.metric", config["evaluation"]["metric"], given=1)
    _check_spec("config.model", config["model"])
    _check_spec("config.loss", config["loss"], given=1)
    _check_spec("config.augment.transform", config["augment"]["transform"])
    _check_spec("config.optimizer", config["optimizer"])
    _check_mechanism(config["mechanism"], config["data"]["provenance"])
    _check_values(config)
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{key}={value} must be finite")


def build(spec: Mapping[str, Any], *args: Any, **extra: Any) -> Any:
    """Call what ``spec`` names with its keys (nested specs built first) as keywords.

    Raises:
        ConfigError: The callable refused its arguments.
    """
    kwargs = {
        key: build(value) if _is_spec(value) else value
        for key, value in spec.items()
        if key != "name"
    }
    target = _import(spec["name"])
    try:
        return target(*args, **kwargs, **extra)
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{spec['name']}: {error}{place_of(error)}") from error
    except Exception as error:  # what is named may be the user's own code
        raise ConfigError(f"{spec['name']}: {told(error)}") from error


@contextlib.contextmanager
def of_the_user(
    part: str, example: Mapping[str, Any], *, data: str = "the data"
) -> Iterator[None]:
    """Tell of which part an error is: models, losses and metrics are the user's code."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        fields = (
            f"; an example has {sorted(example)}" if type(error) is KeyError else ""
        )
        raise ConfigError(
            f"config.{part} does not fit {data} or the model: {told(error)}{fields}"
        ) from error


def told(error: Exception) -> str:
    """Return type, first line and place of an error of the user's code, in one line."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """Return `` (FILE, line N)``, the innermost one that is the user's; "" if none is."""
    paths = sysconfig.get_paths()
    ours = (
        str(Path(__file__).parents[1]),
        *(paths[k] for k in ("stdlib", "purelib")),
        "<",
    )
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(ours):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def build_mechanism(spec: Mapping[str, Any], *, num_examples: int) -> Any:
    """Return the mechanism, with its noise calibrated if ``epsilon`` is given."""
    facts = {key: value for key, value in spec.items() if key != "epsilon"}
    if spec.get("epsilon") is None:
        return build(facts, num_examples=num_examples)
    from dpjax.privacy.accounting import calibrate

    def make(noise_multiplier: float) -> Any:
        chosen = {**facts, "noise_multiplier": noise_multiplier}
        return build(chosen, num_examples=num_examples)

    return calibrate(make, epsilon=spec["epsilon"])


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"group.key": value}`` for every leaf of a config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def number_of(model: Mapping[str, Any], key: str) -> int | None:
    """Return the "num_classes" or "vocab_size" that a model spec, or one in it, was given."""
    return next((v for k, v in flatten(model).items() if k.endswith(key)), None)


def differing_keys(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    free: Iterable[str] = FREE_ON_RESUME,
) -> list[str]:
    """Name the keys, but for ``free`` ones, in which two configs differ."""
    before, after = (flatten(json.loads(json.dumps(c))) for c in (old, new))
    return sorted(
        key
        for key in before.keys() | after.keys()
        if key not in free and before.get(key) != after.get(key)
    )


def digest(value: Any) -> str:
    """Return a short stable hash of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def nearest(key: str, choices: Iterable[str]) -> str:
    """Return a hint at what ``key`` was meant to be."""
    choices = list(choices)
    near = difflib.get_close_matches(key, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(choices) if 0 < len(choices) <= 20 else f"{len(choices)} names"
    return f"{hint}Choices: {listed}"


def _check_keys(path: str, given: Any, wanted: Iterable[str]) -> None:
    wanted = list(wanted)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{path}={given!r} must be a group of keys: {', '.join(wanted)}"
        )
    for key in given:
        if key not in wanted:
            raise ConfigError(f"{path}.{key} is unknown; {nearest(key, wanted)}")
    missing = [key for key in wanted if key not in given]
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing; set it in the config file")


def _check_spec(
    path: str, spec: Any, *, given: int = 0, extra: tuple[str, ...] = ()
) -> None:
    # The first `given` arguments and the `extra` keywords come from elsewhere.
    if not _is_spec(spec):
        raise ConfigError(
            f'{path}={spec!r} must be a group with a name, as in name="module:attribute"'
        )
    signature = _signature(path, spec["name"])
    wanted = [n for n in list(signature.required)[given:] if n not in extra]
    known = [*list(signature.required)[given:], *signature.optional]
    for key, value in spec.items():
        if key == "name":
            continue
        if key not in known and not signature.open:
            raise ConfigError(f"{path}.{key} is unknown; {nearest(key, known)}")
        if _is_spec(value):
            _check_spec(f"{path}.{key}", value)
    missing = [key for key in wanted if key not in spec]
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing; {spec['name']} needs it")


def _check_mechanism(spec: Any, provenance: str) -> None:
    path = "config.mechanism"
    if not _is_spec(spec):
        raise ConfigError(f"{path}={spec!r} must be a group with a name")
    facts = {k: v for k, v in spec.items() if k != "epsilon"}
    _check_spec(path, facts, extra=("num_examples", "noise_multiplier"))
    signature = _signature(path, spec["name"])
    noisy = "noise_multiplier" in (*signature.required, *signature.optional)
    # What a class inherits from afar is not read, and left to the call.
    told = signature.open and spec.keys() & {"epsilon", "noise_multiplier"}
    if noisy or told:
        chosen = [k for k in ("epsilon", "noise_multiplier") if spec.get(k) is not None]
        if len(chosen) != 1:
            raise ConfigError(
                f"{path}.epsilon={spec.get('epsilon')} and {path}.noise_multiplier="
                f"{spec.get('noise_multiplier')}: set exactly one of them"
            )
        if chosen == ["epsilon"]:
            _located(path, checks.check_epsilon, spec["epsilon"])
            facts["noise_multiplier"] = 1.0
    elif "epsilon" in spec:
        raise ConfigError(f"{path}.epsilon is unknown; {spec['name']} adds no noise")
    _check_spec(f"{path}.sampling", facts["sampling"])
    sampling = _located(f"{path}.sampling", build, facts["sampling"])
    _located(path, checks.check_sampling, sampling)
    size = _some_size(sampling)
    mechanism = _located(path, build, facts, num_examples=size)
    private = mechanism.private and spec.get("noise_multiplier") != 0
    _check_choice("config.data.provenance", provenance, PROVENANCES)
    if private and provenance == "public":
        raise ConfigError(
            "config.data.provenance='public' with a private mechanism: noise on public "
            "data protects nobody; use NonPrivate, or declare the data private"
        )
    if not private and provenance == "private":
        raise ConfigError(
            "config.data.provenance='private' with a mechanism that adds no noise: nothing "
            "would protect the data; use a private one, or declare the data public"
        )


def _some_size(sampling: Any) -> int:
    """Return a size of data that ``sampling`` fits: the real one is not known yet."""
    try:
        sampling.expected_batch_size(2**31)
    except ValueError:
        return 1
    return 2**31


def _check_parameters(parameters: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    train, provenance = parameters["train"], parameters["provenance"]
    if not (isinstance(train, list | tuple) and all(isinstance(p, str) for p in train)):
        raise ConfigError(
            f"config.parameters.train={train!r} must be a tuple of regular expressions; "
            "('.*',) trains all"
        )
    _check_choice("config.parameters.provenance", provenance, STARTS)
    loaders = [
        value
        for key, value in flatten({"model": model}).items()
        if key.endswith(".name") and str(value).startswith(WEIGHTS)
    ]
    if loaders and provenance == "fresh":
        raise ConfigError(
            f"config.parameters.provenance='fresh' with weights from {loaders[0]}: say "
            "'public' or 'private', whatever data they were trained on"
        )


def _check_values(config: Mapping[str, Any]) -> None:
    evaluation, run, compute = config["evaluation"], config["run"], config["compute"]
    _check_parameters(config["parameters"], config["model"])
    _check_choice("config.evaluation.provenance", evaluation["provenance"], PROVENANCES)
    positive = {
        "evaluation.batch_size": evaluation["batch_size"],
        "augment.views": config["augment"]["views"],
        "compute.physical_batch_size": compute["physical_batch_size"],
        "run.log_every": run["log_every"],
        "run.eval_every": run["eval_every"],
        "run.checkpoint_every": run["checkpoint_every"],
        "run.keep_checkpoints": run["keep_checkpoints"],
    }
    for key, value in positive.items():
        _located("config", checks.check_positive_int, key, value, join=".")
    decay = evaluation["ema_decay"]
    if not (isinstance(decay, int | float) and 0 <= decay < 1):
        raise ConfigError(
            f"config.evaluation.ema_decay={decay!r} must be in [0, 1); "
            "0 evaluates the last parameters"
        )
    size, mesh = compute["microbatch_size"], config["mesh"]
    _located("config.mesh", checks.check_mesh, **mesh, join=".")
    if size is not None:
        _located(
            "config.compute",
            checks.check_positive_int,
            "microbatch_size",
            size,
            join=".",
        )
    _located(
        "config.compute",
        checks.check_rows,
        compute["physical_batch_size"],
        devices=(mesh["data"] or 1) * mesh["fsdp"],
        microbatch_size=size,
        join=".",
    )
    _check_choice("config.compute.engine", compute["engine"], checks.ENGINE_NAMES)
    budget = compute["memory_budget"]
    if budget is not None:
        _located(
            "config.compute", checks.check_number, "memory_budget", budget, join="."
        )
    if budget is not None and not (compute["engine"] == "auto" and budget > 0):
        raise ConfigError(
            f"config.compute.memory_budget={budget!r} must be a positive number of bytes "
            "for the engine 'auto', or None"
        )
    for key in ("log_sensitive", "verify", "self_check", "dry_run"):
        if not isinstance(run[key], bool):
            raise ConfigError(f"config.run.{key}={run[key]!r} must be True or False")
    seed = run["seed"]
    if not (seed is None or (isinstance(seed, int) and not isinstance(seed, bool))):
        raise ConfigError(f"config.run.seed={run['seed']!r} must be an integer or None")
    if not isinstance(run["writers"], list | tuple):
        raise ConfigError(
            f"config.run.writers={run['writers']!r} must be a tuple of names"
        )
    for writer in run["writers"]:
        _check_choice("config.run.writers", writer, checks.WRITER_NAMES)
    _located("config.run", checks.check_names, "writers", run["writers"], join=".")
    for keyword in ("num_classes", "vocab_size"):
        if (number := number_of(config["model"], keyword)) is not None:
            _located(
                "config.model", checks.check_positive_int, keyword, number, join="."
            )
    # optax takes None for no scaling at all, and would go up the gradient.
    rate = config["optimizer"].get("learning_rate", 0.0)
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not isinstance(rate, Mapping) and not (number and not rate < 0):
        raise ConfigError(
            f"config.optimizer.learning_rate={rate!r} must be a number of at least 0, or "
            "the spec of a schedule"
        )


def _check_choice(path: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{path}={value!r} is unknown; {nearest(str(value), choices)}"
        )


def _located(
    path: str, function: Any, *args: Any, join: str = ": ", **kwargs: Any
) -> Any:
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}{join}{error}") from error


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)


def _import(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _signature(path: str, name: str) -> signatures.Signature:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{path}.name={name!r} must be 'module:attribute'")
    file = signatures.module_file(module)
    if file is None:
        raise ConfigError(f"{path}.name={name!r}: there is no module {module!r}")
    found = signatures.find(file, attribute)
    if found is None:
        near = nearest(attribute, signatures.public_names(file))
        raise ConfigError(
            f"{path}.name={name!r}: {module} has no {attribute!r}; {near}"
        )
    return found
