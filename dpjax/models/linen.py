"""The bridge from Flax linen to ``dpjax.typing.Model``.

Flax is imported only in ``dpjax.models``; the rest of dpjax sees pure functions.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import errors
from flax import linen as nn
from jaxtyping import Array

from dpjax.typing import Example, Key, Model, Params


def image_model(
    module: nn.Module,
    *,
    evaluation: nn.Module | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Model:
    """Turn a linen module of image batches into a model of one example.

    As ``array_model``; it reads ``example["image"]``, ``float32[H, W, C]``.
    """
    return array_model(
        module, field="image", evaluation=evaluation, constants=constants
    )


def array_model(
    module: nn.Module,
    *,
    field: str,
    evaluation: nn.Module | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Model:
    """Turn a linen module of batches into a model of one example.

    The module sees a leading axis of 1: linen's GroupNorm takes the first axis for the
    batch, so an unbatched ``[H, W, C]`` image would be normalised along H alone.

    Args:
        module: Maps inputs ``float32[1, ...]`` to outputs ``[1, ...]``. Its variables are
            parameters and ``constants``.
        field: Key of the example under which the inputs ``float32[...]`` are.
        evaluation: Of a module that draws randomness (dropout), the same one that draws
            none (``deterministic=True``): what is evaluated.
        constants: Collections of variables that are no parameters and never change, such
            as the ``batch_stats`` of a pretrained BatchNorm with
            ``use_running_average=True``. They must be public.

    Returns:
        The model.

    Raises:
        ValueError: From ``init``, if the module has other variables; from ``apply``, if it
            changes its constants, or draws randomness with no ``evaluation`` given.
    """
    return _model(
        module,
        lambda example: [example[field][None]],
        evaluation=evaluation,
        constants=constants or {},
    ).around(lambda apply: lambda *args: apply(*args)[0])


def decoder_model(module: nn.Module) -> Model:
    """Turn a linen module that predicts next tokens into a model that also decodes.

    Args:
        module: As for ``token_model`` that reads tokens alone; called with the keyword
            ``start`` and a mutable collection "cache", it keeps keys and values there.
    """

    def decode(
        params: Params, tokens: Array, cache: Any, start: Array
    ) -> tuple[Array, Any]:
        variables = {"params": params}
        if cache is not None:
            variables["cache"] = cache
        logits, changed = module.apply(
            variables, tokens, start=start, mutable=["cache"]
        )
        return logits, changed["cache"]

    return token_model(module, reads=("tokens",))._replace(decode=decode)


def token_model(module: nn.Module, *, reads: Sequence[str]) -> Model:
    """Turn a linen module of the tokens of one example into a model.

    Args:
        module: Called with what the example has under the keys ``reads``, None where it
            has nothing. Its only variables are parameters, and it draws no randomness.
        reads: "tokens", which every example has, and what else the module reads.

    Returns:
        The model.
    """
    return _model(
        module,
        lambda example: _inputs(example, reads),
        evaluation=None,
        constants={},
    )


def _model(
    module: nn.Module,
    inputs: Callable[[Example], list[Any]],
    *,
    evaluation: nn.Module | None,
    constants: Mapping[str, Any],
) -> Model:
    """Return the model that calls ``module`` with ``inputs`` of an example."""

    def init(key: Key, example: Example) -> Params:
        return _parameters(module.init(key, *inputs(example)), constants)

    def applied(
        module: nn.Module, *, draws: bool
    ) -> Callable[[Params, Example, Key], Any]:
        def apply(params: Params, example: Example, key: Key) -> Any:
            # Every stream of randomness that has no key of its own takes this one.
            streams = {"params": key} if draws else None
            variables = {"params": params, **constants}
            with _in_our_words():
                return module.apply(variables, *inputs(example), rngs=streams)

        return apply

    if evaluation is None:
        return Model(init, applied(module, draws=False))
    evaluate = applied(evaluation, draws=False)
    return Model(init, applied(module, draws=True), evaluate=evaluate)


def _parameters(variables: Mapping[str, Any], constants: Mapping[str, Any]) -> Params:
    others = sorted(set(variables) - {"params"} - set(constants))
    if others:
        raise ValueError(
            f"the module keeps {', '.join(others)} beside its parameters, and a model of "
            "one example keeps nothing: for BatchNorm, which mixes examples, use GroupNorm "
            "or LayerNorm, or give public statistics as constants="
        )
    return variables["params"]


@contextlib.contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except errors.InvalidRngError as error:
        raise ValueError(
            "the module draws randomness (dropout?), which metrics must not: give as "
            "evaluation= the same module with deterministic=True"
        ) from error
    except errors.ModifyScopeVariableError as error:
        raise ValueError(
            "the module changes variables that are no parameters, and a model of one "
            "example keeps nothing: use_running_average=True leaves BatchNorm as it is"
        ) from error


def _inputs(example: Example, reads: Sequence[str]) -> list[Array | None]:
    first, *rest = reads
    return [example[first], *(example.get(key) for key in rest)]
