"""The bridge from Flax linen to ``dpjax.typing.Model``.

Flax is imported only in ``dpjax.models``; the rest of dpjax sees pure functions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
from jaxtyping import Array

from dpjax.typing import Example, Key, Model, Params


def image_model(module: nn.Module) -> Model:
    """Turn a linen module of image batches into a model of one example.

    As ``array_model``; it reads ``example["image"]``, ``float32[H, W, C]``.
    """
    return array_model(module, field="image")


def array_model(module: nn.Module, *, field: str) -> Model:
    """Turn a linen module of batches into a model of one example.

    The module sees a leading axis of 1: linen's GroupNorm takes the first axis for the
    batch, so an unbatched ``[H, W, C]`` image would be normalised along H alone.

    Args:
        module: Maps inputs ``float32[1, ...]`` to outputs ``[1, ...]``. Its only
            variables are parameters (no BatchNorm) and it draws no randomness, so the
            random key given to ``apply`` is not used.
        field: Key of the example under which the inputs ``float32[...]`` are.

    Returns:
        The model.

    Raises:
        ValueError: From ``init``, if the module has other variables than parameters.
    """

    def init(key: Key, example: Example) -> Params:
        return _parameters(module.init(key, example[field][None]))

    def apply(params: Params, example: Example, key: Key) -> Array:
        del key
        return module.apply({"params": params}, example[field][None])[0]

    return Model(init, apply)


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
            has nothing. Its only variables are parameters and it draws no randomness, so
            the key given to ``apply`` is not used.
        reads: "tokens", which every example has, and what else the module reads.

    Returns:
        The model.
    """

    def init(key: Key, example: Example) -> Params:
        return _parameters(module.init(key, *_inputs(example, reads)))

    def apply(params: Params, example: Example, key: Key) -> Any:
        del key
        return module.apply({"params": params}, *_inputs(example, reads))

    return Model(init, apply)


def _parameters(variables: Mapping[str, Any]) -> Params:
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(
            f"the module keeps {', '.join(others)} beside its parameters, and a model of "
            "one example keeps nothing: for BatchNorm, which mixes examples, use GroupNorm "
            "or LayerNorm"
        )
    return variables["params"]


def _inputs(example: Example, reads: Sequence[str]) -> list[Array | None]:
    first, *rest = reads
    return [example[first], *(example.get(key) for key in rest)]
