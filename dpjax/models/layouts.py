"""Names and layouts of Hugging Face's tensors, beside ours, family by family.

A rule says which tensor holds which of our parameters. ``{}`` stands for the number of a
layer. PyTorch's linear maps are stored transposed; GPT-2's are not, and hold query, key
and value in one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """A reordering of numbers and its inverse.

    Attributes:
        split: From their tensor to our parameters. Views only.
        join: Back.
    """

    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


SAME = Transform(lambda a: [a], lambda parts: parts[0])
TRANSPOSED = Transform(lambda a: [a.T], lambda parts: parts[0].T)
THIRDS = Transform(
    lambda a: np.split(a, 3, axis=-1), lambda parts: np.concatenate(parts, axis=-1)
)
LEADING = Transform(lambda a: [a[0]], lambda parts: parts[0][None])
PATCHES = Transform(  # output, channel, row, column <-> row, column, channel, output
    lambda a: [a.transpose(2, 3, 1, 0)], lambda parts: parts[0].transpose(3, 2, 0, 1)
)


class Rule(NamedTuple):
    """One tensor of theirs and the parameters of ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform


class Layout(NamedTuple):
    """The tensors of one family.

    Attributes:
        rules: For every head; those whose parameters a model lacks do not apply.
        prefix: Of the names of all tensors but the head's; files of a model saved without
            a head leave it out.
        copies: Tensors that may be there too, and the one that they must equal: tied
            weights that were saved twice.
    """

    rules: tuple[Rule, ...]
    prefix: str
    copies: dict[str, str]


NOT_PARAMETERS = (
    r".*\bposition_ids",
    r".*\.attn\.(bias|masked_bias)",
    r".*\brotary_emb\.inv_freq",
)
"""Buffers that old files hold: masks and tables that are computed here."""


def _linear(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", (f"{ours}/kernel",), TRANSPOSED),
        Rule(f"{theirs}.bias", (f"{ours}/bias",), SAME),
    ]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", (f"{ours}/scale",), SAME),
        Rule(f"{theirs}.bias", (f"{ours}/bias",), SAME),
    ]


def _conv1d(theirs: str, *ours: str) -> list[Rule]:
    transform = THIRDS if len(ours) == 3 else SAME
    return [
        Rule(f"{theirs}.weight", tuple(f"{name}/kernel" for name in ours), transform),
        Rule(f"{theirs}.bias", tuple(f"{name}/bias" for name in ours), transform),
    ]


_QKV = tuple(f"layers_{{}}/attention/{name}" for name in ("query", "key", "value"))

_GPT2 = Layout(
    (
        Rule("transformer.wte.weight", ("token/embedding",), SAME),
        Rule("transformer.wpe.weight", ("position",), SAME),
        *_norm("transformer.h.{}.ln_1", "layers_{}/norm_0"),
        *_conv1d("transformer.h.{}.attn.c_attn", *_QKV),
        *_conv1d("transformer.h.{}.attn.c_proj", "layers_{}/attention/out"),
        *_norm("transformer.h.{}.ln_2", "layers_{}/norm_1"),
        *_conv1d("transformer.h.{}.mlp.c_fc", "layers_{}/mlp/up"),
        *_conv1d("transformer.h.{}.mlp.c_proj", "layers_{}/mlp/down"),
        *_norm("transformer.ln_f", "norm"),
    ),
    "transformer.",
    {"lm_head.weight": "transformer.wte.weight"},
)

_LLAMA = Layout(
    (
        Rule("model.embed_tokens.weight", ("token/embedding",), SAME),
        *(
            Rule(
                f"model.layers.{{}}.{theirs}.weight",
                (f"layers_{{}}/{ours}/kernel",),
                TRANSPOSED,
            )
            for theirs, ours in (
                ("self_attn.q_proj", "attention/query"),
                ("self_attn.k_proj", "attention/key"),
                ("self_attn.v_proj", "attention/value"),
                ("self_attn.o_proj", "attention/out"),
                ("mlp.gate_proj", "mlp/gate"),
                ("mlp.up_proj", "mlp/up"),
                ("mlp.down_proj", "mlp/down"),
            )
        ),
        Rule(
            "model.layers.{}.input_layernorm.weight", ("layers_{}/norm_0/scale",), SAME
        ),
        Rule(
            "model.layers.{}.post_attention_layernorm.weight",
            ("layers_{}/norm_1/scale",),
            SAME,
        ),
        Rule("model.norm.weight", ("norm/scale",), SAME),
        Rule("lm_head.weight", ("head/kernel",), TRANSPOSED),
    ),
    "model.",
    {"lm_head.weight": "model.embed_tokens.weight"},
)

_VIT = Layout(
    (
        Rule("vit.embeddings.cls_token", ("class",), LEADING),
        Rule("vit.embeddings.position_embeddings", ("position",), LEADING),
        Rule(
            "vit.embeddings.patch_embeddings.projection.weight",
            ("patches/kernel",),
            PATCHES,
        ),
        Rule(
            "vit.embeddings.patch_embeddings.projection.bias", ("patches/bias",), SAME
        ),
        *_norm("vit.encoder.layer.{}.layernorm_before", "layers_{}/norm_0"),
        *(
            rule
            for ours in _QKV
            for rule in _linear(
                f"vit.encoder.layer.{{}}.attention.attention.{ours.split('/')[-1]}",
                ours,
            )
        ),
        *_linear(
            "vit.encoder.layer.{}.attention.output.dense", "layers_{}/attention/out"
        ),
        *_norm("vit.encoder.layer.{}.layernorm_after", "layers_{}/norm_1"),
        *_linear("vit.encoder.layer.{}.intermediate.dense", "layers_{}/mlp/up"),
        *_linear("vit.encoder.layer.{}.output.dense", "layers_{}/mlp/down"),
        *_norm("vit.layernorm", "norm"),
        *_linear("classifier", "head"),
    ),
    "vit.",
    {},
)


def _encoder(name: str) -> list[Rule]:
    layer = f"{name}.encoder.layer.{{}}"
    embeddings = f"{name}.embeddings"
    return [
        Rule(f"{embeddings}.word_embeddings.weight", ("token/embedding",), SAME),
        Rule(f"{embeddings}.position_embeddings.weight", ("position",), SAME),
        Rule(f"{embeddings}.token_type_embeddings.weight", ("segment",), SAME),
        *_norm(f"{embeddings}.LayerNorm", "embed_norm"),
        *(
            rule
            for ours in _QKV
            for rule in _linear(f"{layer}.attention.self.{ours.split('/')[-1]}", ours)
        ),
        *_linear(f"{layer}.attention.output.dense", "layers_{}/attention/out"),
        *_norm(f"{layer}.attention.output.LayerNorm", "layers_{}/norm_0"),
        *_linear(f"{layer}.intermediate.dense", "layers_{}/mlp/up"),
        *_linear(f"{layer}.output.dense", "layers_{}/mlp/down"),
        *_norm(f"{layer}.output.LayerNorm", "layers_{}/norm_1"),
    ]


_BERT = Layout(
    (
        *_encoder("bert"),
        *_linear("bert.pooler.dense", "head/dense"),
        *_linear("classifier", "head/out"),
        *_linear("cls.predictions.transform.dense", "head/transform"),
        *_norm("cls.predictions.transform.LayerNorm", "head/norm"),
        Rule("cls.predictions.bias", ("head/bias",), SAME),
    ),
    "bert.",
    {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)

_ROBERTA = Layout(
    (
        *_encoder("roberta"),
        *_linear("classifier.dense", "head/dense"),
        *_linear("classifier.out_proj", "head/out"),
        *_linear("lm_head.dense", "head/transform"),
        *_norm("lm_head.layer_norm", "head/norm"),
        Rule("lm_head.bias", ("head/bias",), SAME),
    ),
    "roberta.",
    {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)

LAYOUTS = {
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "vit": _VIT,
    "llama": _LLAMA,
}
