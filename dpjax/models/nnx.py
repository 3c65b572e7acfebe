"""The bridge from Flax nnx to ``dpjax.typing.Model``."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array

from dpjax.partition import flatten, unflatten
from dpjax.typing import Example, Key, Model, Params


def array_model(make: Callable[[nnx.Rngs], nnx.Module], *, field: str) -> Model:
    """Turn an nnx module of batches into a model of one example.

    The module sees a leading axis of 1, which its GroupNorm takes for the batch.

    Args:
        make: A class or function from ``rngs`` to a module that maps inputs
            ``float32[1, ...]`` to outputs ``[1, ...]``. Its only variables are
            ``nnx.Param``: no BatchNorm, no Dropout.
        field: Key of the example under which the inputs ``float32[...]`` are.

    Returns:
        The model; its parameters are named by their paths in the module, with numbers for
        the items of an ``nnx.List``.

    Raises:
        ValueError: The module has other variables than parameters.
    """
    graph, state, rest = nnx.split(
        nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...
    )
    others = [_name(path) for path, _ in nnx.to_flat_state(rest)]
    if others:
        raise ValueError(
            f"the module keeps {', '.join(others)} beside its parameters: one example's "
            "gradient would not be a function of that example and the parameters alone; "
            "use GroupNorm or LayerNorm for BatchNorm, and no Dropout"
        )
    variables = nnx.to_flat_state(state)

    def init(key: Key, example: Example) -> Params:
        del example
        drawn = nnx.to_flat_state(nnx.state(make(nnx.Rngs(key)), nnx.Param))
        return unflatten({_name(path): variable[...] for path, variable in drawn})

    def apply(params: Params, example: Example, key: Key) -> Array:
        del key
        named = flatten(params)
        filled = [(path, v.replace(named[_name(path)])) for path, v in variables]
        module = nnx.merge(graph, nnx.from_flat_state(filled))
        return module(example[field][None])[0]

    return Model(init, apply)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
