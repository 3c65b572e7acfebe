"""BERT and RoBERTa: encoders with classification and masked-infilling heads."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dpjax.checks import check_positive_int
from dpjax.models.linen import token_model
from dpjax.models.transformer import (
    STD,
    Spec,
    check_length,
    dense,
    embed,
    norm,
    run_blocks,
)
from dpjax.typing import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Sizes of an encoder: post-norm blocks, exact GELU, learnt positions, no dropout.

    Attributes:
        vocab_size: V. A token of V or more gives NaN.
        length: Most tokens an example may have.
        first_position: Row of the position table of the first token: 0 for BERT, 2 for
            RoBERTa, whose rows 0 and 1 no token uses. The table has
            ``first_position + length`` rows.
        segments: Rows of the segment table: 2 for BERT, 1 for RoBERTa.
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Of attention; divides ``width``.
        hidden: Width of the MLP.
        epsilon: Of LayerNorm: 1e-12 for BERT, 1e-5 for RoBERTa.
        dtype: Of activations and logits, "float32" or "bfloat16"; parameters are float32.
        scan: Stack the parameters of all blocks and scan over them.
        remat: Recompute the inside of blocks in the backward pass.

    Raises:
        ValueError: ``vocab_size``, ``length`` or ``segments`` is no positive integer.

    References:
        Devlin et al., BERT, https://arxiv.org/abs/1810.04805
        Liu et al., RoBERTa, https://arxiv.org/abs/1907.11692
    """

    vocab_size: int
    length: int
    first_position: int
    segments: int
    layers: int
    width: int
    heads: int
    hidden: int
    epsilon: float
    dtype: str
    scan: bool
    remat: bool

    def __post_init__(self) -> None:
        for name in ("vocab_size", "length", "segments"):
            check_positive_int(name, getattr(self, name))

    def spec(self) -> Spec:
        """Return the blocks."""
        return Spec(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            hidden=self.hidden,
            activation="gelu",
            gated=False,
            bias=True,
            norm="layer",
            epsilon=self.epsilon,
            post_norm=True,
            causal=False,
            rotary_base=None,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
        )


def bert_base(
    *, vocab_size: int, length: int, dtype: str, scan: bool, remat: bool
) -> Encoder:
    """Return BERT-base's sizes; with 30,522 tokens and 512 positions 110M parameters."""
    return Encoder(
        vocab_size=vocab_size,
        length=length,
        first_position=0,
        segments=2,
        layers=12,
        width=768,
        heads=12,
        hidden=3072,
        epsilon=1e-12,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def roberta_base(
    *, vocab_size: int, length: int, dtype: str, scan: bool, remat: bool
) -> Encoder:
    """Return RoBERTa-base's sizes; with 50,265 tokens and 512 positions 125M parameters."""
    return Encoder(
        vocab_size=vocab_size,
        length=length,
        first_position=2,
        segments=1,
        layers=12,
        width=768,
        heads=12,
        hidden=3072,
        epsilon=1e-5,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def roberta_large(
    *, vocab_size: int, length: int, dtype: str, scan: bool, remat: bool
) -> Encoder:
    """Return RoBERTa-large's sizes; with 50,265 tokens and 512 positions 355M parameters."""
    base = roberta_base(
        vocab_size=vocab_size, length=length, dtype=dtype, scan=scan, remat=remat
    )
    return dataclasses.replace(base, layers=24, width=1024, heads=16, hidden=4096)


class _Bert(nn.Module):
    """The encoder and a head, called with (hidden, tokens, attend of the table, mask)."""

    encoder: Encoder
    head: nn.Module

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "T"],
        mask: Bool[Array, "T"] | None,
        segments: Int[Array, "T"] | None,
    ) -> Array:
        encoder, spec = self.encoder, self.encoder.spec()
        check_length(len(tokens), positions=encoder.length)
        token = embed(spec, encoder.vocab_size, name="token")
        x = token(tokens)
        x = x + self._positions(len(tokens)).astype(x.dtype)
        x = x + self._segments(segments).astype(x.dtype)
        x = norm(spec, name="embed_norm")(x)
        x = run_blocks(spec, x, mask=mask)
        return self.head(x, tokens, token.attend, mask)

    def _positions(self, tokens: int) -> Float[Array, "T D"]:
        start, width = self.encoder.first_position, self.encoder.width
        shape = (start + self.encoder.length, width)
        table = self.param("position", nn.initializers.normal(STD), shape)
        return jax.lax.slice_in_dim(table, start, start + tokens)

    def _segments(self, segments: Int[Array, "T"] | None) -> Float[Array, "..."]:
        shape = (self.encoder.segments, self.encoder.width)
        table = self.param("segment", nn.initializers.normal(STD), shape)
        return table[:1] if segments is None else jnp.take(table, segments, axis=0)


class _ClassHead(nn.Module):
    """Classify by the first token: dense, tanh, dense."""

    spec: Spec
    num_classes: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "T D"],
        tokens: Int[Array, "T"],
        attend: Callable[[Array], Array],
        mask: Bool[Array, "T"] | None,
    ) -> Float[Array, "C"]:
        del tokens, attend, mask
        x = jnp.tanh(dense(self.spec, self.spec.width, name="dense", bias=True)(x[:1]))
        return dense(self.spec, self.num_classes, name="out", bias=True)(x)[0]


class _MeanHead(nn.Module):
    """Classify by the mean over visible tokens: one linear map."""

    spec: Spec
    num_classes: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "T D"],
        tokens: Int[Array, "T"],
        attend: Callable[[Array], Array],
        mask: Bool[Array, "T"] | None,
    ) -> Float[Array, "C"]:
        del tokens, attend
        seen = jnp.ones(len(x), x.dtype) if mask is None else mask.astype(x.dtype)
        x = (seen @ x / jnp.maximum(jnp.sum(seen), 1.0))[None]
        return dense(self.spec, self.num_classes, name="out", bias=True)(x)[0]


class _TokenHead(nn.Module):
    """Logits of tokens from the table: everywhere, or of labels at the mask token."""

    spec: Spec
    vocab_size: int
    mask_token: int | None = None
    label_tokens: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "T D"],
        tokens: Int[Array, "T"],
        attend: Callable[[Array], Array],
        mask: Bool[Array, "T"] | None,
    ) -> Float[Array, "..."]:
        del mask
        if self.mask_token is not None:
            # One product with the table instead of T.
            x = x[jnp.argmax(tokens == self.mask_token)][None]
        x = dense(self.spec, self.spec.width, name="transform", bias=True)(x)
        x = norm(self.spec, name="norm")(jax.nn.gelu(x, approximate=False))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        logits = attend(x) + bias.astype(x.dtype)[None]
        if self.mask_token is None:
            return logits
        return logits[0, jnp.asarray(self.label_tokens)]


def _model(encoder: Encoder, head: nn.Module) -> Model:
    model = token_model(_Bert(encoder, head), reads=("tokens", "mask", "segments"))
    settings = dataclasses.asdict(encoder.spec())
    settings["first_position"] = encoder.first_position
    return model._replace(settings=tuple(settings.items()))


def classifier(*, encoder: Encoder, num_classes: int) -> Model:
    """Build an encoder that classifies by its first token.

    The head is dense, tanh, dense: BERT's pooler and classifier, RoBERTa's classifier.

    Args:
        encoder: Its sizes.
        num_classes: Number of classes C.

    Returns:
        A model to logits ``[C]``. It reads ``tokens``, ``int32[T]``, of the example and, if
        they are there, ``mask``, ``bool[T]``, False at tokens that nobody sees (padding),
        and ``segments``, ``int32[T]`` (0 everywhere without).

    Raises:
        ValueError: If the sizes do not fit, here; or, when it is traced, if an example has
            too many tokens.
    """
    check_positive_int("num_classes", num_classes)
    head = _ClassHead(encoder.spec(), num_classes)
    return _model(encoder, head)


def mean_classifier(*, encoder: Encoder, num_classes: int) -> Model:
    """Build an encoder that classifies by the mean over its tokens, with one linear map.

    Each token then moves the logits on its own, whatever the layers have learnt: a start
    for encoders too small to gather a text at one place.

    Args:
        encoder: Its sizes.
        num_classes: Number of classes C.

    Returns:
        A model to logits ``[C]``; it reads what that of ``classifier`` reads. Tokens that
        nobody sees do not count in the mean; if there are none else, it is 0.

    Raises:
        ValueError: As ``classifier``.
    """
    check_positive_int("num_classes", num_classes)
    head = _MeanHead(encoder.spec(), num_classes)
    return _model(encoder, head)


def masked_lm(*, encoder: Encoder) -> Model:
    """Build an encoder that predicts the token at every position.

    The head is dense, GELU, LayerNorm and the transposed token table with a bias.

    Args:
        encoder: Its sizes.

    Returns:
        A model to logits ``[T, V]``; it reads what that of ``classifier`` reads.

    Raises:
        ValueError: As ``classifier``.
    """
    head = _TokenHead(encoder.spec(), encoder.vocab_size)
    return _model(encoder, head)


def infilling(
    *, encoder: Encoder, mask_token: int, label_tokens: Sequence[int]
) -> Model:
    """Build a classifier that fills in a word: text infilling with label words.

    The source puts one mask token into each text, as in "TEXT It was <mask>."; the logits
    of the classes are those of their label words there. The parameters are those of
    ``masked_lm``: no weight is fresh.

    Args:
        encoder: Its sizes.
        mask_token: The id of the mask token; its first place in an example counts. In an
            example without it, the first token's place does.
        label_tokens: The token of each class.

    Returns:
        A model to logits ``[len(label_tokens)]``; it reads what that of ``classifier`` reads.

    Raises:
        ValueError: As ``classifier``, or if a token is not in the vocabulary.

    References:
        Li et al., Large Language Models Can Be Strong Differentially Private Learners,
        https://arxiv.org/abs/2110.05679, section 3.1.1
    """
    for token in (mask_token, *label_tokens):
        if not 0 <= token < encoder.vocab_size:
            raise ValueError(
                f"token {token} of mask_token={mask_token}, label_tokens="
                f"{tuple(label_tokens)} is not below vocab_size={encoder.vocab_size}"
            )
    head = _TokenHead(
        encoder.spec(),
        encoder.vocab_size,
        mask_token,
        tuple(label_tokens),
    )
    return _model(encoder, head)
