"""GPT-2: a causal decoder with learnt positions and a tied head."""

import dataclasses

from flax import linen as nn
from jaxtyping import Array, Float, Int

from dpjax.checks import check_positive_int
from dpjax.models.linen import decoder_model
from dpjax.models.transformer import (
    STD,
    Spec,
    check_length,
    embed,
    norm,
    rows_from,
    run_blocks,
)
from dpjax.typing import Model


class _Gpt2(nn.Module):
    vocab_size: int
    length: int
    spec: Spec

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "T"], *, start: Int[Array, ""] | None = None
    ) -> Float[Array, "T V"]:
        check_length(len(tokens), positions=self.length)
        token = embed(self.spec, self.vocab_size, name="token")
        position = self.param(
            "position", nn.initializers.normal(STD), (self.length, self.spec.width)
        )
        x = token(tokens)
        x = x + rows_from(position, start, len(tokens)).astype(x.dtype)
        x = norm(self.spec, name="norm")(run_blocks(self.spec, x, start=start))
        return token.attend(x)


def gpt2(
    *,
    vocab_size: int,
    length: int,
    layers: int,
    width: int,
    heads: int,
    dtype: str,
    scan: bool,
    remat: bool,
) -> Model:
    """Build a GPT-2.

    Pre-norm blocks, LayerNorm with epsilon 1e-5, MLP of 4 times the width with tanh-GELU,
    biases everywhere, logits from the token table. No dropout. Weights start normal with
    standard deviation 0.02, those that write to the residual stream
    ``0.02 / sqrt(2 * layers)``.

    Padding at the end of an example needs no mask here: no token sees a later one.

    Args:
        vocab_size: V. A token of V or more gives NaN.
        length: Positions there are; an example may have fewer tokens.
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Of attention; divides ``width``.
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
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019
    """
    check_positive_int("vocab_size", vocab_size)
    check_positive_int("length", length)
    spec = Spec(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        hidden=4 * width,
        activation="gelu_tanh",
        gated=False,
        bias=True,
        norm="layer",
        epsilon=1e-5,
        post_norm=False,
        causal=True,
        rotary_base=None,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
    model = decoder_model(_Gpt2(vocab_size, length, spec))
    return model._replace(settings=tuple(dataclasses.asdict(spec).items()))


def gpt2_small(
    *, vocab_size: int, length: int, dtype: str, scan: bool, remat: bool
) -> Model:
    """Build GPT-2 with 12 layers of width 768; 50,257 tokens, 1024 positions: 124M."""
    return gpt2(
        vocab_size=vocab_size,
        length=length,
        layers=12,
        width=768,
        heads=12,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def gpt2_medium(
    *, vocab_size: int, length: int, dtype: str, scan: bool, remat: bool
) -> Model:
    """Build GPT-2 with 24 layers of width 1024; 50,257 tokens, 1024 positions: 355M."""
    return gpt2(
        vocab_size=vocab_size,
        length=length,
        layers=24,
        width=1024,
        heads=16,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def gpt2_large(
    *, vocab_size: int, length: int, dtype: str, scan: bool, remat: bool
) -> Model:
    """Build GPT-2 with 36 layers of width 1280; 50,257 tokens, 1024 positions: 774M."""
    return gpt2(
        vocab_size=vocab_size,
        length=length,
        layers=36,
        width=1280,
        heads=20,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
