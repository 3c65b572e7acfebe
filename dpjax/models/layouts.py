"""Names and layouts of Hugging Face's tensors and settings, beside ours, by family.

A rule says which tensor holds which of our parameters. ``{}`` stands for the number of a
layer. PyTorch's linear maps are stored transposed; GPT-2's are not, and hold query, key
and value in one. Settings are what ``config.json`` says and no shape shows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Setting(NamedTuple):
    """An argument of ours, and what ``config.json`` says of it.

    Attributes:
        ours: Its name in the ``settings`` of a model.
        keys: Theirs, "a.b" for b of the object a: the first that is not null counts.
        default: What transformers takes if there is none.
        translate: From their value to ours.
    """

    ours: str
    keys: tuple[str, ...]
    default: Any
    translate: Callable[[Any], Any] = lambda value: value


class Config(NamedTuple):
    """What the ``config.json`` of one family must say.

    Attributes:
        types: One of these as its ``model_type``.
        settings: The same as the model.
        only: Of these keys this value, the one that is computed here; or nothing.
        limits: Of these keys at least this argument of ours; or nothing.
    """

    types: tuple[str, ...]
    settings: tuple[Setting, ...]
    only: dict[str, Any]
    limits: dict[str, str]


class Layout(NamedTuple):
    """The tensors and the settings of one family.

    Attributes:
        rules: For every head; those whose parameters a model lacks do not apply.
        prefix: Of the names of all tensors but the head's; files of a model saved without
            a head leave it out.
        copies: Tensors that may be there too, and the one that they must equal: tied
            weights that were saved twice.
        config: What is read of ``config.json``.
    """

    rules: tuple[Rule, ...]
    prefix: str
    copies: dict[str, str]
    config: Config


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

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}


def _activation(key: str, default: str) -> Setting:
    # What is not in the table has the same name here, or is not computed here.
    return Setting("activation", (key,), default, lambda n: _ACTIVATIONS.get(n, n))


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
    Config(
        types=("gpt2",),
        settings=(
            Setting("heads", ("n_head", "num_attention_heads"), 12),
            Setting("epsilon", ("layer_norm_epsilon",), 1e-5),
            _activation("activation_function", "gelu_new"),
        ),
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        limits={},
    ),
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
    Config(
        types=("llama", "mistral"),
        settings=(
            Setting("heads", ("num_attention_heads",), 32),
            Setting("kv_heads", ("num_key_value_heads", "num_attention_heads"), 32),
            Setting("epsilon", ("rms_norm_eps",), 1e-6),
            Setting(
                "rotary_base",
                # The second since transformers 5, the last before.
                ("rope_scaling.rope_theta", "rope_parameters.rope_theta", "rope_theta"),
                1e4,
            ),
            _activation("hidden_act", "silu"),
        ),
        only={
            "rope_scaling.rope_type": "default",
            "rope_scaling.type": "default",
            "rope_parameters.rope_type": "default",
            "attention_bias": False,
            "mlp_bias": False,
        },
        limits={"sliding_window": "length"},
    ),
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
    Config(
        types=("vit",),
        settings=(
            Setting("heads", ("num_attention_heads",), 12),
            Setting("epsilon", ("layer_norm_eps",), 1e-12),
            _activation("hidden_act", "gelu"),
        ),
        only={},
        limits={},
    ),
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


def _encoder_config(types: tuple[str, ...], first_position: Setting) -> Config:
    return Config(
        types=types,
        settings=(
            Setting("heads", ("num_attention_heads",), 12),
            Setting("epsilon", ("layer_norm_eps",), 1e-12),
            _activation("hidden_act", "gelu"),
            first_position,
        ),
        only={"position_embedding_type": "absolute", "is_decoder": False},
        limits={},
    )


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
    _encoder_config(("bert",), Setting("first_position", (), 0)),
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
    _encoder_config(
        ("roberta", "xlm-roberta", "camembert"),
        # Positions are counted from the token of padding on.
        Setting("first_position", ("pad_token_id",), 1, lambda token: token + 1),
    ),
)

LAYOUTS = {
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "vit": _VIT,
    "llama": _LLAMA,
}


def differences(
    config: Mapping[str, Any], settings: Mapping[str, Any], *, family: str
) -> list[str]:
    """Say where a model is not that of a ``config.json``, in what no shape shows.

    Args:
        config: The contents of the file.
        settings: Of the model; what they do not hold is not compared.
        family: One of ``LAYOUTS``.

    Returns:
        A clause for each difference, with the value of each side and the one that is
        needed; none if the model computes what transformers would.
    """
    ours, kind = LAYOUTS[family].config, config["model_type"]
    if kind not in ours.types:
        homes = [name for name, other in LAYOUTS.items() if kind in other.config.types]
        fix = f"family={homes[0]!r} is needed" if homes else "no family here is"
        # Keys of another family may mean something else.
        return [f"{family=} is not for model_type={kind!r} ({fix})"]
    clauses = []
    for name, keys, default, translate in ours.settings:
        key, value = _first(config, keys)
        needed = translate(default if key is None else value)
        if name in settings and settings[name] != needed:
            said = f"{key}={value!r}" if key else f"no {keys[-1]}" if keys else kind
            clauses.append(
                f"{name}={settings[name]!r} here, {said} there ({name}={needed!r} is needed)"
            )
    for key, value in ours.only.items():
        _, theirs = _first(config, (key,))
        if theirs not in (None, value):
            clauses.append(f"{key}={theirs!r} is not computed here, only {value!r}")
    for key, name in ours.limits.items():
        _, most = _first(config, (key,))
        if most is not None and settings.get(name, 0) > most:
            clauses.append(
                f"{name}={settings[name]!r} is above {key}={most!r}, and such a limit is "
                f"not computed here ({name}={most!r} or less is needed)"
            )
    return clauses


def _first(config: Mapping[str, Any], keys: Sequence[str]) -> tuple[str | None, Any]:
    """Return the first key that is there and not null, and its value; None and None."""
    for key in keys:
        group, _, last = key.rpartition(".")
        holder = (config.get(group) or {}) if group else config
        if holder.get(last) is not None:
            return key, holder[last]
    return None, None
