"""Small parts that are added to a model, to be trained alone: LoRA, prompts, prefixes.

Each is a model around a model. Its parameters stand beside those of the layer that they
change (``layers_0/attention/query/lora_a`` beside ``.../kernel``), so ``parameters.train``
selects them by name, and stacked layers stack them. The model that is adapted does not
know of them: it is any model made of linen modules; prefixes need the attention of
``dpjax.models.transformer``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from dpjax.checks import check_number, check_positive_int
from dpjax.models.partition import flatten, select, unflatten
from dpjax.models.transformer import STD
from dpjax.typing import Example, Key, Model, Params


def lora(model: Model, *, rank: int, scale: float, targets: Sequence[str]) -> Model:
    """Add low-rank adapters to linear layers: ``y = x W + b + scale (x A) B``.

    The adapter is not merged into ``W`` while it is trained: so its per-example gradients
    have a fast rule, and no layer-sized gradient is formed. ``A`` starts normal with
    standard deviation ``1/sqrt(inputs)``, ``B`` at zero: at first the model is unchanged.

    Args:
        model: What is adapted; pretrained, say.
        rank: Columns of A, ``lora_a`` ``[inputs, rank]``; rows of B, ``lora_b``
            ``[rank, outputs]``.
        scale: alpha / rank of the paper.
        targets: Regular expressions; the layers whose whole names they match are adapted
            (".*attention/(query|value)").

    Returns:
        A model with the parameters of ``model`` and the adapters.

    Raises:
        ValueError: If ``rank`` is below 1, ``scale`` is no finite number, or there are no
            targets; from ``init``, if a pattern matches no layer or
            one without adapters (an embedding, a norm, a convolution).

    References:
        Hu et al., LoRA, https://arxiv.org/abs/2106.09685
    """
    check_positive_int("rank", rank)
    check_number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{scale=} must be finite")
    if not targets:
        raise ValueError(f"{targets=} adapts nothing: name layers, as in ('.*query',)")

    def adapt(module: nn.Module, x: Array, y: Array) -> Array:
        a, b = (_leaf(module, name).astype(y.dtype) for name in ("lora_a", "lora_b"))
        return y + scale * ((x.astype(y.dtype) @ a) @ b)

    adapted = _intercepted(model, nn.Dense, "lora_a", adapt)

    def init(key: Key, example: Example) -> Params:
        base_key, key = jax.random.split(key)
        params = model.init(base_key, example)
        layers = select(_layers(params), targets)
        _check_dense(model, params, example, layers)
        added, leaves = {}, flatten(params)
        for layer, layer_key in zip(
            layers, jax.random.split(key, len(layers)), strict=True
        ):
            *stack, inputs, outputs = leaves[f"{layer}/kernel"].shape
            normal = jax.nn.initializers.normal(inputs**-0.5)
            added[f"{layer}/lora_a"] = normal(layer_key, (*stack, inputs, rank))
            added[f"{layer}/lora_b"] = jnp.zeros((*stack, rank, outputs))
        return unflatten(leaves | added)

    return adapted._replace(init=init)


def merge_lora(params: Params, *, scale: float) -> Params:
    """Return the parameters of the model without adapters that computes the same.

    Args:
        params: Of a model of ``lora``, all of them.
        scale: That of the adapters.
    """
    leaves = flatten(params)
    merged = {}
    for name, leaf in leaves.items():
        layer, _, kind = name.rpartition("/")
        if kind == "kernel" and f"{layer}/lora_a" in leaves:
            update = leaves[f"{layer}/lora_a"] @ leaves[f"{layer}/lora_b"]
            leaf = leaf + scale * update
        if kind not in ("lora_a", "lora_b"):
            merged[name] = leaf
    return unflatten(merged)


def prompt(model: Model, *, length: int, position: int) -> Model:
    """Put ``length`` trained token vectors between the tokens of each example.

    They take positions as tokens do, so examples may be that much shorter; in the examples
    that the model reads, token 0 stands in their places (it may not be the mask token of
    ``bert.infilling``). They start as
    the vectors of the first ``length`` tokens of the vocabulary.

    Args:
        model: Of tokens; its table is the ``nn.Embed`` named "token".
        length: Number P of vectors, the parameter ``token/prompt``.
        position: Before which token they stand: 0 for a decoder (0 is needed to decode);
            1 for an encoder that classifies by its first token.

    Returns:
        A model that reads ``tokens`` and, if they are there, ``mask`` (the vectors are
        seen) and ``segments`` (the vectors have 0). Of outputs for each token, those of
        the vectors are left out.

    Raises:
        ValueError: If ``length`` is below 1 or ``position`` negative; from ``init``, if
            the model has no such table.

    References:
        Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning,
        https://arxiv.org/abs/2104.08691
    """
    check_positive_int("length", length)
    if not isinstance(position, int) or position < 0:
        raise ValueError(f"{position=} must be an integer of at least 0")
    end = position + length

    def replace(module: nn.Module, tokens: Array, vectors: Array) -> Array:
        del tokens
        ours = _leaf(module, "prompt").astype(vectors.dtype)
        return jnp.concatenate([vectors[:position], ours, vectors[end:]])

    adapted = _intercepted(model, nn.Embed, "prompt", replace)

    def longer(example: Example) -> Example:
        if "tokens" not in example:
            raise ValueError(
                f"prompt tuning needs examples with 'tokens', not {sorted(example)}"
            )
        if position > len(example["tokens"]):
            raise ValueError(
                f"{position=} is behind the {len(example['tokens'])} tokens of an example"
            )
        # The vector of token 0 is replaced, and never seen.
        fill = {"tokens": 0, "mask": True, "segments": 0}
        return example | {
            name: _inserted(example[name], position, length, value)
            for name, value in fill.items()
            if name in example
        }

    def init(key: Key, example: Example) -> Params:
        leaves = flatten(model.init(key, longer(example)))
        if "token/embedding" not in leaves:
            raise ValueError(
                f"prompt tuning needs a table of tokens, token/embedding, not {[*leaves]}"
            )
        return unflatten(leaves | {"token/prompt": leaves["token/embedding"][:length]})

    def prompted(apply: Callable[..., Array]) -> Callable[..., Array]:
        def run(params: Params, example: Example, key: Key) -> Array:
            out = apply(params, longer(example), key)
            if out.ndim == 1:
                return out
            return jnp.concatenate([out[:position], out[end:]])

        return run

    whole = adapted.around(prompted)._replace(init=init)
    prefill, later = adapted.decode, model.decode
    if prefill is None or later is None:
        return whole

    def decode(
        params: Params, tokens: Array, cache: Any, start: Array
    ) -> tuple[Array, Any]:
        if cache is None:
            out, cache = prefill(
                params, _inserted(tokens, position, length, 0), None, start
            )
            return jnp.concatenate([out[:position], out[end:]]), cache
        # The vectors are in the cache: these tokens stand after them.
        return later(params, tokens, cache, start + length)

    return whole._replace(decode=decode)


def prefix(model: Model, *, length: int) -> Model:
    """Let every attention also look at ``length`` trained keys and values.

    They have no position, and every token sees them. They start normal with standard
    deviation 0.02. (The paper computes them by an MLP while it trains; here they are the
    parameters themselves.)

    Args:
        model: Whose attention is that of ``dpjax.models.transformer``.
        length: Number P of keys, ``prefix_key`` ``[P, heads * width]``, and of values,
            ``prefix_value``, of each layer.

    Raises:
        ValueError: If ``length`` is below 1; from ``init``, if the model has no such
            attention.

    References:
        Li and Liang, Prefix-Tuning, https://arxiv.org/abs/2101.00190
    """
    check_positive_int("length", length)

    def init(key: Key, example: Example) -> Params:
        base_key, key = jax.random.split(key)
        leaves = flatten(model.init(base_key, example))
        attentions = [n.removesuffix("/key/kernel") for n in leaves]
        attentions = [n for n in attentions if n.endswith("attention")]
        if not attentions:
            raise ValueError(
                f"prefix tuning needs layers named attention, not {[*leaves]}"
            )
        normal = jax.nn.initializers.normal(STD)
        keys = jax.random.split(key, (len(attentions), 2))
        for name, pair in zip(attentions, keys, strict=True):
            *stack, _, width = leaves[f"{name}/key/kernel"].shape
            shape = (*stack, length, width)
            leaves[f"{name}/prefix_key"] = normal(pair[0], shape)
            leaves[f"{name}/prefix_value"] = normal(pair[1], shape)
        return unflatten(leaves)

    return model._replace(init=init)


def _intercepted(
    model: Model,
    kind: type[nn.Module],
    leaf: str,
    change: Callable[[nn.Module, Array, Array], Array],
) -> Model:
    """Let ``change(module, input, output)`` act where a module has the parameter ``leaf``."""

    def intercept(
        next_function: Any,
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        out = next_function(*args, **kwargs)
        module = context.module
        called = context.method_name == "__call__" and isinstance(module, kind)
        if not (called and module.has_variable("params", leaf)):
            return out
        return change(module, args[0], out)

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with nn.intercept_methods(intercept):
                return function(*args)

        return run

    decode = None if model.decode is None else wrapped(model.decode)
    return model.around(wrapped)._replace(decode=decode)


def _leaf(module: nn.Module, name: str) -> Array:
    return module.get_variable("params", name)


def _layers(params: Params) -> list[str]:
    """Return the names of everything that has parameters of its own."""
    return [*dict.fromkeys(name.rpartition("/")[0] for name in flatten(params))]


def _check_dense(
    model: Model, params: Params, example: Example, layers: Sequence[str]
) -> None:
    """Raise ValueError unless all these layers are linear maps of the model."""
    found = []

    def record(
        next_function: Any,
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        if isinstance(context.module, nn.Dense):
            found.append("/".join(context.module.path))
        return next_function(*args, **kwargs)

    def traced(*args: Any) -> Array:
        # A function of its own: what JAX has traced before, it does not call again.
        return model.apply(*args)

    with nn.intercept_methods(record):
        jax.eval_shape(traced, params, example, jax.random.key(0))
    wrong = [name for name in layers if name not in found]
    if wrong:
        raise ValueError(
            f"LoRA adapts linear layers (nn.Dense), and {', '.join(wrong)} is none; "
            f"there are {', '.join(dict.fromkeys(found))}"
        )


def _inserted(values: Array, position: int, length: int, fill: int) -> Array:
    values = jnp.asarray(values)
    new = jnp.full(length, fill, values.dtype)
    return jnp.concatenate([values[:position], new, values[position:]])
