"""Checks of plain values, shared by configs, mechanisms and engines.

This module may not import jax: config errors are answered without it.
"""

import dataclasses
import math
import os
import re
from numbers import Real
from typing import Any, Literal, get_args

ClipStyle = Literal["flat", "automatic", "per_layer"]
ErrorScale = Literal["sum", "mean"]
MIN_CLIP_NORM, MAX_CLIP_NORM = 1e-12, 1e36
ENGINE_NAMES = ("auto", "bookkeeping", "ghost", "vmap")
WRITER_NAMES = ("tensorboard", "wandb")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a real number, and no bool."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return
    schedules = "; public schedules: ScheduledDpSgd" if callable(value) else ""
    raise ValueError(f"{name}={value!r}: a number is wanted{schedules}")


def check_sampling(sampling: Any) -> None:
    """Raise ValueError for what is no sampling, or the class of one."""
    if isinstance(sampling, type) or not hasattr(sampling, "expected_batch_size"):
        raise ValueError(
            f"sampling={sampling!r} must be a sampling, such as dpjax.Poisson(rate=0.01)"
        )


def check_model(model: Any) -> None:
    """Raise ValueError for what is no model."""
    if not (hasattr(model, "init") and hasattr(model, "apply")):
        raise ValueError(f"model={model!r} must be a dpjax.Model(init, apply)")


def check_path(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` can name a file."""
    if not (isinstance(value, str | os.PathLike) and os.fspath(value)):
        raise ValueError(f"{name}={value!r} must be the name of a file or folder")


def check_patterns(name: str, patterns: Any) -> None:
    """Raise ValueError unless these are regular expressions; one string is no tuple."""
    wrong = f"{name}={patterns!r} must be a tuple of regular expressions"
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(wrong)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{wrong}; {pattern!r} is no regular expression: {error}"
            ) from None


def check_names(name: str, names: Any) -> None:
    """Raise ValueError unless these are different strings; one string is no tuple."""
    listed = [] if isinstance(names, str) else [*names]
    strings = all(isinstance(n, str) for n in listed)
    if isinstance(names, str) or not strings or len({*listed}) < len(listed):
        raise ValueError(f"{name}={names!r} must be a tuple of different names")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_numbers(facts: Any) -> None:
    """Raise ValueError unless all fields of a dataclass that are numbers hold some."""
    for field in dataclasses.fields(facts):
        value, kinds = getattr(facts, field.name), (field.type, *get_args(field.type))
        # What is no integer is told where integers are checked, with their limits.
        wrong = float in kinds or (int in kinds and callable(value))
        if wrong and not (value is None and type(None) in kinds):
            check_number(field.name, value)


_ACCOUNTED = ("init", "query", "release", "noise_stddev", "expected_batch_size")
"""What a mechanism's ``event`` tells of."""


def check_mechanism(mechanism: Any) -> None:
    """Raise ValueError for what is no mechanism, or the class of one."""
    if isinstance(mechanism, type) or not hasattr(mechanism, "steps"):
        raise ValueError(
            f"mechanism={mechanism!r} must be a mechanism, such as dpjax.DpSgd(...)"
        )


def check_accounted(mechanism: Any) -> None:
    """Raise ValueError if a class changes what its parent releases, but not the event.

    Its epsilon would be that of its parent, which is another mechanism.
    """
    for kind in type(mechanism).__mro__:
        if "event" in vars(kind):
            return
        changed = [name for name in _ACCOUNTED if name in vars(kind)]
        if changed:
            raise ValueError(
                f"mechanism={kind.__name__} overrides {changed[0]} and inherits event: its "
                f"epsilon would be its parent's; define event in {kind.__name__}, too"
            )


def check_clip(*, clip_norm: float, style: str) -> None:
    """Raise ValueError for a clip norm or a style that bounds nothing."""
    check_number("clip_norm", clip_norm)
    if not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(
            f"clip_norm={clip_norm} must be positive and finite; "
            "it bounds the L2 norm of each example's gradient"
        )
    if clip_norm < MIN_CLIP_NORM:
        raise ValueError(
            f"clip_norm={clip_norm} is below {MIN_CLIP_NORM}, where squares underflow in "
            "float32; rescale the loss"
        )
    if clip_norm > MAX_CLIP_NORM:
        raise ValueError(
            f"clip_norm={clip_norm} is above {MAX_CLIP_NORM}, where sums overflow in "
            "float32; rescale the loss"
        )
    check_style("clip_style", style)


def check_style(name: str, style: str) -> None:
    """Raise ValueError unless ``style`` is one of clipping."""
    if style not in get_args(ClipStyle):
        raise ValueError(
            f"{name}={style!r} is unknown; use one of {', '.join(get_args(ClipStyle))}"
        )


def check_noise(noise_multiplier: float) -> None:
    """Raise ValueError unless ``noise_multiplier`` scales a noise."""
    check_number("noise_multiplier", noise_multiplier)
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(
            f"noise_multiplier={noise_multiplier} must be finite and at least 0 "
            "(0 means no privacy)"
        )


def check_outer_norm(outer_norm: float, *, clip_norm: float) -> None:
    """Raise ValueError unless ``outer_norm`` leaves room for a residual."""
    check_number("outer_norm", outer_norm)
    if not outer_norm >= clip_norm:
        raise ValueError(
            f"outer_norm={outer_norm} must be at least clip_norm={clip_norm}: it bounds the "
            "whole gradient of an example, of which clip_norm is a part"
        )


def check_error_clip(*, error_clip_norm: float | None, error_scale: str) -> None:
    """Raise ValueError unless these say how far an error memory is clipped."""
    if error_clip_norm is not None:
        check_number("error_clip_norm", error_clip_norm)
    if error_clip_norm is not None and not 0 < error_clip_norm < math.inf:
        raise ValueError(
            f"error_clip_norm={error_clip_norm} must be positive and finite; it bounds "
            "what the error memory gives back in one step"
        )
    if error_scale not in get_args(ErrorScale):
        raise ValueError(
            f"error_scale={error_scale!r} is unknown; use 'sum' or 'mean', the scale on "
            "which error_clip_norm bounds the memory"
        )


def check_positive_int(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def check_rows(
    physical_batch_size: int, *, devices: int, microbatch_size: int | None
) -> None:
    """Raise ValueError unless every device gets as many rows, in whole microbatches.

    Args:
        physical_batch_size: Rows of a chunk.
        devices: Those among which rows are divided.
        microbatch_size: Rows that a device takes at once; None for all.
    """
    rows, rest = divmod(physical_batch_size, devices)
    if rest:
        raise ValueError(
            f"physical_batch_size={physical_batch_size} must be divisible by the "
            f"{devices} devices of the mesh"
        )
    if microbatch_size is not None and rows % microbatch_size:
        each = "" if devices == 1 else f" / {devices} devices = {rows} rows of each"
        raise ValueError(
            f"microbatch_size={microbatch_size} must divide "
            f"physical_batch_size={physical_batch_size}{each}"
        )


def check_mesh(*, data: int | None, fsdp: int, model: int, rules: Any) -> None:
    """Raise ValueError unless these describe a mesh; the devices are not looked at."""
    if data is not None:
        check_positive_int("data", data)
    check_positive_int("fsdp", fsdp)
    check_positive_int("model", model)
    if not isinstance(rules, list | tuple):
        raise ValueError(
            f"rules={rules!r} must be a tuple of rules, such as (('.*', 'largest'),)"
        )
    for rule in rules:
        try:
            pattern, *dimensions = rule
            re.compile(pattern)
            if isinstance(rule, str) or len(dimensions) not in (1, 2):
                raise ValueError("it has other parts")
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(
                f"rules: {rule!r} must be (regular expression, dimension over fsdp) or "
                f"(regular expression, over fsdp, over model): {error}"
            ) from error
        for dimension, also in zip(dimensions, ("'largest' or ", ""), strict=False):
            number = isinstance(dimension, int) and not isinstance(dimension, bool)
            if not (number or dimension is None or (also and dimension == "largest")):
                raise ValueError(
                    f"rules: dimension={dimension!r} of {pattern!r} must be a whole number "
                    f"(negative from the end), {also}None"
                )


def check_epsilon(epsilon: float) -> None:
    """Raise ValueError unless ``epsilon`` is a possible target."""
    check_number("epsilon", epsilon)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(
            f"epsilon={epsilon} must be positive and finite; "
            "for training without privacy use the NonPrivate mechanism"
        )


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is strictly between 0 and 1."""
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} must be strictly between 0 and 1")
