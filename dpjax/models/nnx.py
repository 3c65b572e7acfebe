"""The bridge from Flax nnx to ``dpjax.typing.Model``."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from dpjax.models.partition import flatten, unflatten
from dpjax.typing import Example, Key, Model, Params


def array_model(make: Callable[[nnx.Rngs], nnx.Module], *, field: str) -> Model:
    """Turn an nnx module of batches into a model of one example.

    The module sees a leading axis of 1, which its GroupNorm takes for the batch.

    Args:
        make: A class or function from ``rngs`` to a module that maps inputs
            ``float32[1, ...]`` to outputs ``[1, ...]``. It draws from ``rngs`` alone
            (dropout), and is evaluated after its ``eval()``. Other variables than
            ``nnx.Param`` stay as they were made: public statistics of a pretrained
            BatchNorm with ``use_running_average=True``.
        field: Key of the example under which the inputs ``float32[...]`` are.

    Returns:
        The model; its parameters are named by their paths in the module, with numbers for
        the items of an ``nnx.List``. Its ``apply`` raises ValueError if the module changes
        a variable.
    """
    shapes = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state, _ = nnx.split(shapes, nnx.Param, ...)
    variables = nnx.to_flat_state(state)
    shapes.eval()
    evaluated = nnx.graphdef(shapes)
    # In a program, which leaves out the parameters.
    others = jax.jit(lambda: nnx.state(make(nnx.Rngs(0)), nnx.Not(nnx.Param)))()
    others = nnx.to_flat_state(others)

    def init(key: Key, example: Example) -> Params:
        del example
        drawn = nnx.to_flat_state(nnx.state(make(nnx.Rngs(key)), nnx.Param))
        return unflatten({_name(path): variable[...] for path, variable in drawn})

    def applied(graph: nnx.GraphDef) -> Callable[[Params, Example, Key], Array]:
        def apply(params: Params, example: Example, key: Key) -> Array:
            named = flatten(params)
            filled = [(path, v.replace(named[_name(path)])) for path, v in variables]
            kept = [(path, v.replace(_redrawn(v, path, key))) for path, v in others]
            before = {path: variable.get_value() for path, variable in kept}
            module = nnx.merge(graph, nnx.from_flat_state([*filled, *kept]))
            outputs = module(example[field][None])[0]
            _check_unchanged(before, module)
            return outputs

        return apply

    draws = any(isinstance(variable, nnx.RngKey) for _, variable in others)
    evaluate = applied(evaluated) if draws else None
    return Model(init, applied(graph), evaluate=evaluate)


def _redrawn(variable: nnx.Variable, path: tuple[Any, ...], key: Key) -> Any:
    """Return the value of a variable, keys of random streams made anew of ``key``."""
    if not isinstance(variable, nnx.RngKey):
        return variable.get_value()
    return jax.random.fold_in(key, zlib.crc32(_name(path).encode()))


def _check_unchanged(before: dict[tuple[Any, ...], Any], module: nnx.Module) -> None:
    after = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param)))
    changed = [
        _name(path)
        for path, variable in after
        if not isinstance(variable, nnx.RngState)
        and variable.get_value() is not before[path]
    ]
    if changed:
        raise ValueError(
            f"the module changes {', '.join(changed)}: one example's gradient would not be "
            "a function of that example and the parameters alone; use GroupNorm or "
            "LayerNorm for BatchNorm, or public statistics with use_running_average=True"
        )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
