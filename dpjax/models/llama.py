"""Llama: a causal decoder with RMSNorm, rotary positions and SwiGLU."""

import dataclasses

from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpjax.checks import check_positive_int
from dpjax.models.linen import decoder_model
from dpjax.models.transformer import Spec, check_length, dense, embed, norm, run_blocks
from dpjax.typing import Model


class _Llama(nn.Module):
    vocab_size: int
    length: int
    tied: bool
    spec: Spec

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "T"], *, start: Int[Array, ""] | None = None
    ) -> Float[Array, "T V"]:
        check_length(len(tokens), positions=self.length)
        token = embed(self.spec, self.vocab_size, name="token")
        x = run_blocks(self.spec, token(tokens), start=start)
        x = norm(self.spec, name="norm")(x)
        if self.tied:
            return token.attend(x)
        return dense(self.spec, self.vocab_size, name="head", bias=False)(x)


def llama(
    *,
    vocab_size: int,
    length: int,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    rotary_base: float,
    epsilon: float,
    tied: bool,
    dtype: str,
    scan: bool,
    remat: bool,
) -> Model:
    """Build a decoder of the Llama family (also TinyLlama, SmolLM, Mistral 7B v0.2).

    Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention and SwiGLU, no
    biases. No rescaled rotary positions (Llama 3.1), no sliding window, no dropout.

    Args:
        vocab_size: V. A token of V or more gives NaN.
        length: Most tokens an example may have.
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Of the queries; divides ``width``.
        kv_heads: Of keys and values; divides ``heads``.
        hidden: Width of the MLP.
        rotary_base: 1e4 for Llama 1 and 2, 5e5 for Llama 3.
        epsilon: Of RMSNorm; 1e-5 or 1e-6.
        tied: Take the logits from the token table instead of a head.
        dtype: Of activations and logits, "float32" or "bfloat16"; parameters are float32.
        scan: Stack the parameters of all blocks and scan over them.
        remat: Recompute the inside of blocks in the backward pass.

    Returns:
        A model from ``example["tokens"]``, ``int32[T]``, to logits ``[T, V]``: row t is
        about token t + 1.

    Raises:
        ValueError: If the sizes do not fit, here; or, when it is traced, if an example has
            more than ``length`` tokens.

    References:
        Touvron et al., Llama 2, https://arxiv.org/abs/2307.09288
    """
    check_positive_int("vocab_size", vocab_size)
    check_positive_int("length", length)
    spec = Spec(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        activation="silu",
        gated=True,
        bias=False,
        norm="rms",
        epsilon=epsilon,
        post_norm=False,
        causal=True,
        rotary_base=rotary_base,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
    model = decoder_model(_Llama(vocab_size, length, tied, spec))
    settings = dataclasses.asdict(spec) | {"length": length}
    return model._replace(settings=tuple(settings.items()))
