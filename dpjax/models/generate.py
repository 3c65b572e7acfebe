"""Sampling of text from a trained model. It is post-processing: it costs no privacy.

That holds for prompts that are public. A prompt that was taken from the private data, or a
choice of samples that looks at them, is not covered by the model's card.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpjax.checks import check_number, check_positive_int
from dpjax.typing import Key, Model, Params, Scalar

Sample = Callable[[Params, Int[Array, "B T"], Int[Array, "B"], Key], Int[Array, "B N"]]


def generator(
    model: Model,
    *,
    max_new_tokens: int,
    stop_token: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> Sample:
    """Build the sampler of continuations; each token costs one position, not all of them.

    Args:
        model: With ``decode``: the keys and values of earlier tokens are kept.
        max_new_tokens: Number N of tokens to sample.
        stop_token: It ends a text; whatever follows is ``stop_token`` too.
        temperature: Divides the logits; 0 takes the likeliest token always.
        top_k: Only the k likeliest tokens are sampled; None for all.
        top_p: Only the fewest likeliest tokens whose probabilities, after temperature and
            ``top_k``, sum to at least this are sampled; 1 for all.

    Returns:
        A compiled function of parameters, prompts (padded at the end with anything), the
        number of tokens of each (at least 1) and a key. The model must have T + N
        positions.

    Raises:
        ValueError: If an option is out of range, or the model does not decode.

    References:
        Fan et al. (top k), https://arxiv.org/abs/1805.04833
        Holtzman et al. (top p), https://arxiv.org/abs/1904.09751
    """
    _check_options(max_new_tokens, stop_token, temperature, top_k, top_p)
    decode = model.decode
    if decode is None:
        raise ValueError(
            "the model does not decode; use a decoder such as gpt2 or llama"
        )

    def one(params: Params, prompt: Array, length: Scalar, key: Key) -> Array:
        room = jnp.pad(prompt, (0, max_new_tokens))
        logits, cache = decode(params, room, None, 0)

        def step(carry: tuple, key: Key) -> tuple[tuple, Array]:
            logits, cache, position, stopped = carry
            kept = keep_likely(logits, temperature, top_k, top_p)
            token = jnp.where(stopped, stop_token, jax.random.categorical(key, kept))
            token = token.astype(jnp.int32)
            rows, cache = decode(params, token[None], cache, position)
            return (rows[0], cache, position + 1, token == stop_token), token

        start = (logits[length - 1], cache, length, jnp.asarray(False))
        return jax.lax.scan(step, start, jax.random.split(key, max_new_tokens))[1]

    @jax.jit
    def sample(params: Params, prompts: Array, lengths: Array, key: Key) -> Array:
        _check_prompts(prompts, lengths, key)
        keys = jax.random.split(key, len(prompts))
        return jax.vmap(one, (None, 0, 0, 0))(params, prompts, lengths, keys)

    return sample


def keep_likely(
    logits: Float[Array, "V"], temperature: float, top_k: int | None, top_p: float
) -> Float[Array, "V"]:
    """Return the logits that are sampled from, -inf where a token is left out."""
    logits = jnp.asarray(logits, jnp.float32)
    if temperature == 0:
        return jnp.where(jnp.arange(len(logits)) == jnp.argmax(logits), 0.0, -jnp.inf)
    logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        least = jax.lax.top_k(logits, top_k)[0][-1]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1:
        order = jnp.argsort(-logits)
        ranked = jax.nn.softmax(logits[order])
        # The first token always stays: before it the sum is 0.
        stays = jnp.cumsum(ranked) - ranked < top_p
        logits = logits.at[order].set(jnp.where(stays, logits[order], -jnp.inf))
    return logits


def _check_prompts(prompts: Array, lengths: Array, key: Key) -> None:
    shapes = (jnp.shape(prompts)[:1], jnp.shape(lengths))
    if jnp.ndim(prompts) != 2 or shapes[0] != shapes[1]:
        raise ValueError(
            f"prompts of shape {jnp.shape(prompts)} and lengths of shape {shapes[1]} must be "
            "[B, T] and [B]"
        )
    for name, array in (("prompts", prompts), ("lengths", lengths)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise ValueError(
                f"{name} are {jnp.result_type(array)}; they must be integers"
            )
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise ValueError(
            f"key is {jnp.result_type(key)}; make it by jax.random.key(seed)"
        )


def _check_options(
    max_new_tokens: int,
    stop_token: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    check_positive_int("max_new_tokens", max_new_tokens)
    if not isinstance(stop_token, int):
        raise ValueError(f"{stop_token=} must be the number of a token")
    check_number("temperature", temperature)
    check_number("top_p", top_p)
    if not temperature >= 0:
        raise ValueError(f"{temperature=} must be at least 0")
    if top_k is not None and not isinstance(top_k, int):
        raise ValueError(f"{top_k=} must be an integer or None")
    if not (top_k is None or top_k >= 1) or not 0 < top_p <= 1:
        raise ValueError(f"{top_k=} must be at least 1 or None, {top_p=} in (0, 1]")
