"""Small GPTs in plain JAX, on ONE example, tied or not, for the benchmark on CPUs.

Pre-LN blocks, GELU, learned positions, biases everywhere. Parameters are float32 dicts;
the dtype of the activations, which every layer casts its parameters to, is the dtype of
the computation. Letters: T tokens, D width, N heads, H width of a head, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dpjax.typing import Key, Params, Scalar

LORA_RANK = 8
_EPSILON = 1e-5  # of LayerNorm, as in GPT-2
_normal = jax.nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a transformer; ``outputs`` is its vocabulary."""

    layers: int
    width: int
    heads: int
    hidden: int
    length: int
    outputs: int


def init_gpt(key: Key, shape: Shape, *, tied: bool, stacked: bool = False) -> Params:
    """Return parameters of a GPT.

    Args:
        key: Randomness of the parameters.
        shape: Sizes.
        tied: Leave out the head: logits are products with the token embedding.
        stacked: One block whose leaves have a leading axis of layers, for ``lax.scan``.
    """
    keys = jax.random.split(key, shape.layers + 3)
    blocks = [_init_block(k, shape) for k in keys[3:]]
    params = {
        "token": _normal(keys[0], (shape.outputs, shape.width)),
        "position": _normal(keys[1], (shape.length, shape.width)),
        "blocks": jax.tree.map(lambda *b: jnp.stack(b), *blocks) if stacked else blocks,
        "norm": _init_norm(shape.width),
    }
    if not tied:
        params["head"] = _init_dense(keys[2], shape.width, shape.outputs)
    return params


def init_lora(key: Key, shape: Shape) -> Params:
    """Return adapters of the six matrices of each block, for ``with_lora``.

    Both factors start random: with the usual zero half of the gradient would vanish.
    """
    sizes = _matrix_sizes(shape)
    lora = []
    for layer_key in jax.random.split(key, shape.layers):
        keys = jax.random.split(layer_key, (len(sizes), 2))
        lora.append(
            {
                name: {
                    "down": _normal(pair[0], (inputs, LORA_RANK)),
                    "up": _normal(pair[1], (LORA_RANK, outputs)),
                }
                for (name, (inputs, outputs)), pair in zip(
                    sizes.items(), keys, strict=True
                )
            }
        )
    return lora


def with_lora(params: Params, lora: Params) -> Params:
    """Return GPT parameters whose dense layers carry unmerged adapters."""
    blocks = [
        block | {name: {**block[name], "adapter": a} for name, a in adapters.items()}
        for block, adapters in zip(params["blocks"], lora, strict=True)
    ]
    return {**params, "blocks": blocks}


def gpt_loss(params: Params, tokens: Int[Array, "T+1"], *, heads: int) -> Scalar:
    """Return the mean cross-entropy of the next tokens, computed in float32."""
    x = params["token"][tokens[:-1]] + params["position"]
    x = _layer_norm(params["norm"], _blocks(params["blocks"], x, heads=heads))
    logits = _dense(params["head"], x) if "head" in params else x @ params["token"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()


def _blocks(
    blocks: Params, x: Float[Array, "T D"], *, heads: int
) -> Float[Array, "T D"]:
    if isinstance(blocks, list):
        for block in blocks:
            x = _block(block, x, heads=heads)
        return x

    @jax.checkpoint
    def body(x: Array, block: Params) -> tuple[Array, None]:
        return _block(block, x, heads=heads), None

    return jax.lax.scan(body, x, blocks)[0]


def _block(p: Params, x: Float[Array, "T D"], *, heads: int) -> Array:
    y = _layer_norm(p["norm_0"], x)
    q, k, v = (
        _dense(p[name], y).reshape(len(x), heads, -1)
        for name in ("query", "key", "value")
    )
    x = x + _dense(p["out"], _attention(q, k, v))
    y = jax.nn.gelu(_dense(p["up"], _layer_norm(p["norm_1"], x)))
    return x + _dense(p["down"], y)


def _attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T N H"],
    v: Float[Array, "T N H"],
) -> Float[Array, "T D"]:
    scores = jnp.einsum("qnh,knh->nqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones(scores.shape[1:], bool))[None]
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("nqk,knh->qnh", weights, v).reshape(len(q), -1)


def _dense(p: Params, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
    p = jax.tree.map(lambda leaf: leaf.astype(x.dtype), p)
    y = x @ p["kernel"] + p["bias"][None]
    if "adapter" in p:
        y = y + (x @ p["adapter"]["down"]) @ p["adapter"]["up"]
    return y


def _layer_norm(p: Params, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + _EPSILON)
    return (y * p["scale"][None] + p["bias"][None]).astype(x.dtype)


def _matrix_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    square = (shape.width, shape.width)
    return {
        "query": square,
        "key": square,
        "value": square,
        "out": square,
        "up": (shape.width, shape.hidden),
        "down": (shape.hidden, shape.width),
    }


def _init_block(key: Key, shape: Shape) -> Params:
    sizes = _matrix_sizes(shape)
    keys = jax.random.split(key, len(sizes))
    norms = {name: _init_norm(shape.width) for name in ("norm_0", "norm_1")}
    dense = {
        name: _init_dense(k, *size)
        for (name, size), k in zip(sizes.items(), keys, strict=True)
    }
    return norms | dense


def _init_dense(key: Key, inputs: int, outputs: int) -> Params:
    return {"kernel": _normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def _init_norm(width: int) -> Params:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
