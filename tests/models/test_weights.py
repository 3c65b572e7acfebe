"""Weights in the Hugging Face format: what transformers computes, we compute."""

import functools
import json
import pathlib
import re
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpjax.models import bert, inputs, peft, weights
from dpjax.models.gpt2 import gpt2, gpt2_small
from dpjax.models.llama import llama
from dpjax.models.vit import vit, vit_b16
from dpjax.parallel.rules import TRANSFORMER
from dpjax.parallel.sharding import make_layout
from tests.checks import thinned

HF = pathlib.Path(__file__).parents[1] / "golden" / "hf"
PLAIN = {"dtype": "float32", "scan": False, "remat": False}
SCANNED = {"dtype": "float32", "scan": True, "remat": False}


def encoder(vocab_size, length, layers, width, heads, hidden, *, roberta, **run):
    return bert.Encoder(
        vocab_size=vocab_size, length=length, layers=layers, width=width, heads=heads,
        hidden=hidden, first_position=2 if roberta else 0,
        segments=1 if roberta else 2, epsilon=1e-5 if roberta else 1e-12, **run,
    )  # fmt: skip


MODELS = {
    "gpt2_a": lambda **run: gpt2(
        vocab_size=17, length=12, layers=2, width=16, heads=2, **run
    ),
    "gpt2_b": lambda **run: gpt2(
        vocab_size=29, length=7, layers=3, width=18, heads=3, **run
    ),
    "llama_a": lambda **run: llama(
        vocab_size=17, length=16, layers=2, width=16, heads=4, kv_heads=2, hidden=20,
        rotary_base=1e4, epsilon=1e-6, tied=False, **run,
    ),
    "llama_b": lambda **run: llama(
        vocab_size=23, length=16, layers=3, width=24, heads=4, kv_heads=1, hidden=16,
        rotary_base=5e5, epsilon=1e-5, tied=True, **run,
    ),
    "vit_a": lambda **run: vit(
        num_classes=3, image_size=8, patch=4, layers=2, width=16, heads=2, hidden=24,
        epsilon=1e-12, **run,
    ),
    "vit_b": lambda **run: vit(
        num_classes=5, image_size=6, patch=2, layers=3, width=24, heads=3, hidden=20,
        epsilon=1e-12, **run,
    ),
    "bert_class": lambda **run: bert.classifier(
        encoder=encoder(17, 12, 2, 16, 2, 24, roberta=False, **run), num_classes=3
    ),
    "bert_token": lambda **run: bert.masked_lm(
        encoder=encoder(29, 9, 3, 24, 4, 20, roberta=False, **run)
    ),
    "roberta_class": lambda **run: bert.classifier(
        encoder=encoder(17, 12, 2, 16, 4, 24, roberta=True, **run), num_classes=2
    ),
    "roberta_token": lambda **run: bert.masked_lm(
        encoder=encoder(29, 9, 3, 24, 2, 20, roberta=True, **run)
    ),
}  # fmt: skip


@functools.cache
def expected():
    return load_file(HF / "expected.safetensors")


def examples_of(name):
    given = {k.split("/")[1]: v for k, v in expected().items() if k.startswith(name)}
    if "pixel_values" in given:
        return {"image": given["pixel_values"].transpose(0, 2, 3, 1)}
    examples = {"tokens": given["input_ids"]}
    if "attention_mask" in given:
        examples["mask"] = given["attention_mask"].astype(bool)
    if "token_type_ids" in given:
        examples["segments"] = given["token_type_ids"]
    return examples


def shapes_of(model, name):
    one = jax.tree.map(lambda x: x[0], examples_of(name))
    return jax.eval_shape(model.init, jax.random.key(0), one)


def params_of(model, name):
    family = name.split("_")[0]
    tensors = load_file(HF / f"{name}.safetensors")
    return weights.from_hf(tensors, shapes_of(model, name), family=family)


@pytest.mark.parametrize("name", thinned([(name,) for name in MODELS], 3))
def test_logits_are_those_of_transformers(name):
    # Two models of each family, one of them scanned.
    run = SCANNED if name.endswith(("_b", "_token")) else PLAIN
    model, examples = MODELS[name](**run), examples_of(name)
    params = params_of(model, name)
    apply = jax.jit(jax.vmap(model.apply, in_axes=(None, 0, None)))
    logits = apply(params, examples, jax.random.key(0))
    right = expected()[f"{name}/logits"]
    if "mask" in examples and logits.ndim == 3:
        # What is said about padding is read by nobody.
        logits, right = logits[examples["mask"]], right[examples["mask"]]
    # Tight enough to tell the exact GELU from its tanh form.
    np.testing.assert_allclose(logits, right, rtol=0, atol=5e-6)
    # The test can tell: the logits are no constants.
    assert np.std(right) > 0.1


@pytest.mark.parametrize(
    ("run", "name"),
    thinned([(run, name) for run in (PLAIN, SCANNED) for name in MODELS], 3),
)
def test_there_and_back_gives_the_same_tensors(run, name, tmp_path):
    family = name.split("_")[0]
    # As JAX arrays they lie in memory row by row, which their transposes do not.
    params = jax.tree.map(jnp.asarray, params_of(MODELS[name](**run), name))
    file = str(tmp_path / "model.safetensors")
    weights.write(file, params, family=family)
    before, after = load_file(HF / f"{name}.safetensors"), weights.read(file)
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor, err_msg=key)


def small(vocab_size=17, **changes):
    sizes = {
        "vocab_size": vocab_size,
        "length": 12,
        "layers": 2,
        "width": 16,
        "heads": 2,
    }
    return gpt2(**sizes | PLAIN | changes)


def load_into(tensors, model=None, *, family="gpt2", name="gpt2_a", **options):
    model = model or small()
    return weights.from_hf(tensors, shapes_of(model, name), family=family, **options)


@pytest.fixture(scope="module")
def tensors():
    return load_file(HF / "gpt2_a.safetensors")


def test_missing_and_surplus_tensors_are_listed(tensors):
    wrong = dict(tensors)
    for name in ("transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.weight"):
        del wrong[name]
    wrong["transformer.h.2.ln_1.bias"] = np.zeros(16, np.float32)
    with pytest.raises(
        ValueError,
        match=r"2 tensors missing: transformer.h.1.mlp.c_fc.bias, transformer.ln_f.weight; "
        r"1 tensors left over: transformer.h.2.ln_1.bias\. .*fresh=.*skip=",
    ):
        load_into(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 18},
            r"transformer.wte.weight is \[17, 16\].*not \[18, 16\] \(see vocab_size=\)",
        ),
        (
            {"length": 13},
            r"transformer.wpe.weight is \[12, 16\].*not \[13, 16\] \(see length=\)",
        ),
        ({"layers": 1}, r"12 tensors left over: transformer.h.1"),
        ({"layers": 3}, r"12 tensors missing: transformer.h.2"),
        (
            {"width": 8},
            r"transformer.h.0.attn.c_attn.weight is \[16, 48\], which makes "
            r"layers_0/attention/key/kernel \[16, 16\], not \[8, 8\]",
        ),
    ],
)
def test_a_model_of_other_sizes_is_refused(tensors, changes, message):
    with pytest.raises(ValueError, match=message):
        load_into(tensors, small(**changes))


def test_old_and_partial_files_are_understood(tensors):
    """As on the hub: no prefix, masks among the tensors, the tied head stored twice."""
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    for i in range(2):
        bare[f"h.{i}.attn.bias"] = np.ones((1, 1, 12, 12), np.float32)
        bare[f"h.{i}.attn.masked_bias"] = np.float32(-1e4)
    bare["lm_head.weight"] = tensors["transformer.wte.weight"]
    jax.tree.map(np.testing.assert_array_equal, load_into(bare), load_into(tensors))
    bert_tensors = load_file(HF / "bert_token.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in bert_tensors.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(9)[None]
    model = MODELS["bert_token"](**PLAIN)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_into(old, model, family="bert", name="bert_token"),
        params_of(model, "bert_token"),
    )


def test_an_untied_head_is_refused_where_the_model_ties_it(tensors):
    untied = tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}
    with pytest.raises(ValueError, match=r"'lm_head.weight' and .* differ"):
        load_into(untied)


def test_fresh_and_skip_say_what_is_not_loaded_and_must_match_something():
    """A classifier from a masked language model: the usual start of fine-tuning."""
    source = load_file(HF / "roberta_token.safetensors")
    encoder_ = encoder(29, 9, 3, 24, 2, 20, roberta=True, **PLAIN)
    model = bert.classifier(encoder=encoder_, num_classes=2)
    like = jax.tree.map(
        lambda x: np.full(x.shape, 7, np.float32), shapes_of(model, "roberta_token")
    )
    options = {"family": "roberta", "fresh": ("head/.*",), "skip": (r"lm_head\..*",)}
    params = weights.from_hf(source, like, **options)
    assert {float(x.min()) for x in jax.tree.leaves(params["head"])} == {7.0}
    np.testing.assert_array_equal(
        params["token"]["embedding"],
        source["roberta.embeddings.word_embeddings.weight"],
    )
    for key in ("fresh", "skip"):
        with pytest.raises(ValueError, match=f"{key}='lm_haed.*' matches none of"):
            weights.from_hf(source, like, **options | {key: ("lm_haed.*",)})


def test_half_precision_files_come_out_as_float32(tensors, tmp_path):
    low = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    save_file(low, tmp_path / "model.safetensors")
    params = load_into(weights.read(str(tmp_path)))
    for leaf, exact in zip(
        jax.tree.leaves(params), jax.tree.leaves(load_into(tensors)), strict=True
    ):
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, exact, rtol=2**-8)


def test_pretrained_starts_from_the_file_and_checks_it_before_it_runs(tmp_path):
    example = jax.tree.map(lambda x: x[0], examples_of("llama_b"))
    path = str(HF / "llama_b.safetensors")
    options = {"path": path, "family": "llama", "fresh": (), "skip": ()}
    model = weights.pretrained(MODELS["llama_b"](**SCANNED), **options)
    params = jax.jit(model.init)(jax.random.key(0), example)
    jax.tree.map(
        np.testing.assert_array_equal,
        params,
        params_of(MODELS["llama_b"](**SCANNED), "llama_b"),
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    other = weights.pretrained(MODELS["llama_a"](**PLAIN), **options)
    with pytest.raises(ValueError, match=r"tensors missing: lm_head.weight"):
        jax.eval_shape(other.init, jax.random.key(0), example)


# --- What no shape shows ------------------------------------------------------------------


@functools.cache
def configs():
    return json.loads((HF / "configs.json").read_text())


def start(folder, config, model, *, family):
    """Start from a folder with the tensors of nobody: none is read before the check."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not weights")
    options = {"family": family, "fresh": (), "skip": ()}
    return weights.pretrained(model, path=str(folder), **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_transformers_agrees_with_our_model_of_it(name, tmp_path):
    model = MODELS[name](**PLAIN)
    assert start(tmp_path, configs()[name], model, family=name.split("_")[0]).settings
    hash(model)  # so that it can be a static argument of jit


def unlike(name, **changes):
    """Return the config of a golden model with changes; those that are None are dropped."""
    config = configs()[name] | changes
    return {key: value for key, value in config.items() if value is not None}


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"} | parameters}


# A model, what is changed in its config, and the clause about it.
DIFFERENT = [
    ("gpt2_a", {"n_head": 4}, "heads=2 here, n_head=4 there (heads=4 is needed)"),
    (
        "gpt2_a",
        {"n_head": None, "num_attention_heads": 4},
        "heads=2 here, num_attention_heads=4 there (heads=4 is needed)",
    ),
    (
        "gpt2_a",
        {"layer_norm_epsilon": 1e-6},
        "epsilon=1e-05 here, layer_norm_epsilon=1e-06 there (epsilon=1e-06 is needed)",
    ),
    (
        "gpt2_a",
        {"activation_function": "gelu"},
        "activation='gelu_tanh' here, activation_function='gelu' there "
        "(activation='gelu' is needed)",
    ),
    (
        "gpt2_a",
        {"scale_attn_weights": False},
        "scale_attn_weights=False is not computed here, only True",
    ),
    (
        "gpt2_a",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=True is not computed here, only False",
    ),
    (
        "gpt2_a",
        {"add_cross_attention": True},
        "add_cross_attention=True is not computed here, only False",
    ),
    (
        "llama_a",
        {"num_attention_heads": 8},
        "heads=4 here, num_attention_heads=8 there (heads=8 is needed)",
    ),
    (
        "llama_a",
        {"num_key_value_heads": 4},
        "kv_heads=2 here, num_key_value_heads=4 there (kv_heads=4 is needed)",
    ),
    (
        "llama_a",
        {"num_key_value_heads": None},
        "kv_heads=2 here, num_attention_heads=4 there (kv_heads=4 is needed)",
    ),
    (
        "llama_b",
        {"rms_norm_eps": None},
        "epsilon=1e-05 here, no rms_norm_eps there (epsilon=1e-06 is needed)",
    ),
    (
        "llama_a",
        rope(rope_theta=5e5),
        "rotary_base=10000.0 here, rope_parameters.rope_theta=500000.0 there "
        "(rotary_base=500000.0 is needed)",
    ),
    (
        "llama_a",
        {"rope_parameters": None, "rope_theta": 5e5},
        "rotary_base=10000.0 here, rope_theta=500000.0 there "
        "(rotary_base=500000.0 is needed)",
    ),
    (
        "llama_a",
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        "rotary_base=10000.0 here, rope_scaling.rope_theta=500000.0 there "
        "(rotary_base=500000.0 is needed)",
    ),
    (
        "llama_b",
        {"rope_parameters": None},
        "rotary_base=500000.0 here, no rope_theta there (rotary_base=10000.0 is needed)",
    ),
    (
        "llama_a",
        rope(rope_type="llama3", factor=8.0),
        "rope_parameters.rope_type='llama3' is not computed here, only 'default'",
    ),
    (
        "llama_a",
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling.type='linear' is not computed here, only 'default'",
    ),
    (
        "llama_a",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope_scaling.rope_type='yarn' is not computed here, only 'default'",
    ),
    (
        "llama_a",
        {"attention_bias": True},
        "attention_bias=True is not computed here, only False",
    ),
    ("llama_a", {"mlp_bias": True}, "mlp_bias=True is not computed here, only False"),
    (
        "llama_a",
        {"model_type": "mistral", "sliding_window": 8},
        "length=16 is above sliding_window=8, and such a limit is not computed here "
        "(length=8 or less is needed)",
    ),
    (
        "llama_a",
        {"hidden_act": "gelu_pytorch_tanh"},
        "activation='silu' here, hidden_act='gelu_pytorch_tanh' there "
        "(activation='gelu_tanh' is needed)",
    ),
    (
        "llama_a",
        {"model_type": "gemma"},
        "family='llama' is not for model_type='gemma' (no family here is)",
    ),
    (
        "vit_a",
        {"num_attention_heads": None},
        "heads=2 here, no num_attention_heads there (heads=12 is needed)",
    ),
    (
        "vit_a",
        {"layer_norm_eps": 1e-6},
        "epsilon=1e-12 here, layer_norm_eps=1e-06 there (epsilon=1e-06 is needed)",
    ),
    (
        "vit_a",
        {"hidden_act": "relu"},
        "activation='gelu' here, hidden_act='relu' there (activation='relu' is needed)",
    ),
    (
        "bert_class",
        {"hidden_act": "gelu_new"},
        "activation='gelu' here, hidden_act='gelu_new' there "
        "(activation='gelu_tanh' is needed)",
    ),
    (
        "bert_token",
        {"position_embedding_type": "relative_key"},
        "position_embedding_type='relative_key' is not computed here, only 'absolute'",
    ),
    ("bert_token", {"is_decoder": True}, "is_decoder=True is not computed here"),
    (
        "bert_token",
        {"num_attention_heads": 6},
        "heads=4 here, num_attention_heads=6 there (heads=6 is needed)",
    ),
    (
        "bert_token",
        {"layer_norm_eps": 1e-5},
        "epsilon=1e-12 here, layer_norm_eps=1e-05 there (epsilon=1e-05 is needed)",
    ),
    (
        "bert_class",
        {"model_type": "roberta"},
        "family='bert' is not for model_type='roberta' (family='roberta' is needed)",
    ),
    (
        "roberta_token",
        {"pad_token_id": 0},
        "first_position=2 here, pad_token_id=0 there (first_position=1 is needed)",
    ),
    (
        "roberta_class",
        {"num_attention_heads": 2},
        "heads=4 here, num_attention_heads=2 there (heads=2 is needed)",
    ),
    (
        "roberta_class",
        {"hidden_act": "gelu_new"},
        "activation='gelu' here, hidden_act='gelu_new' there "
        "(activation='gelu_tanh' is needed)",
    ),
    (
        "roberta_token",
        {"position_embedding_type": "relative_key_query"},
        "position_embedding_type='relative_key_query' is not computed here",
    ),
    ("roberta_token", {"is_decoder": True}, "is_decoder=True is not computed here"),
    (
        "roberta_token",
        {"layer_norm_eps": None},
        "epsilon=1e-05 here, no layer_norm_eps there (epsilon=1e-12 is needed)",
    ),
]


@pytest.mark.parametrize(
    ("name", "changes", "clause"),
    DIFFERENT,
    ids=[f"{name} {[*changes]}" for name, changes, _ in DIFFERENT],
)
def test_what_no_shape_shows_must_be_as_in_the_config(name, changes, clause, tmp_path):
    model, config = MODELS[name](**PLAIN), unlike(name, **changes)
    with pytest.raises(ValueError, match=re.escape(clause)) as caught:
        start(tmp_path, config, model, family=name.split("_")[0])
    # Nothing else is found.
    assert ";" not in str(caught.value)


ALIKE = [
    ("gpt2_a", {"n_head": None, "num_attention_heads": 2}),
    ("gpt2_a", {"activation_function": "gelu_pytorch_tanh"}),
    ("gpt2_a", {"activation_function": None, "layer_norm_epsilon": None}),
    ("gpt2_a", {"reorder_and_upcast_attn": True}),
    ("llama_a", {"rope_parameters": None}),
    ("llama_b", {"rope_parameters": None, "rope_theta": 500_000}),
    (
        "llama_b",
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "default"},
        },
    ),
    ("llama_a", {"model_type": "mistral", "sliding_window": 16}),
    ("bert_class", {"hidden_act": None, "layer_norm_eps": None, "pad_token_id": 3}),
    ("roberta_class", {"pad_token_id": None}),
    ("roberta_class", {"model_type": "xlm-roberta"}),
    ("roberta_class", {"model_type": "camembert"}),
]


@pytest.mark.parametrize(("name", "changes"), ALIKE)
def test_other_spellings_and_defaults_of_the_config_agree(name, changes, tmp_path):
    config = unlike(name, **changes)
    start(tmp_path, config, MODELS[name](**PLAIN), family=name.split("_")[0])


# Of GPT2Config() and the like, in transformers 5.24.0.
DEFAULTS = {
    "gpt2": "heads=12, epsilon=1e-05, activation='gelu_tanh'",
    "bert": "heads=12, epsilon=1e-12, activation='gelu', first_position=0",
    "roberta": "heads=12, epsilon=1e-12, activation='gelu', first_position=2",
    "vit": "heads=12, epsilon=1e-12, activation='gelu'",
    "llama": "heads=32, kv_heads=32, epsilon=1e-06, rotary_base=10000.0, activation='silu'",
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_config_that_says_nothing_means_the_defaults(family, tmp_path):
    model, _ = OLD[family]
    unset = model._replace(settings=tuple((name, None) for name, _ in model.settings))
    with pytest.raises(ValueError, match="is needed") as caught:
        start(tmp_path, {"model_type": family}, unset, family=family)
    needed = re.findall(r"\(([^()]*) is needed\)", str(caught.value))
    assert ", ".join(needed) == DEFAULTS[family]


# Keys that are compared, as they are on the hub: written by transformers 2 to 4.
OLD = {
    "gpt2": (
        gpt2_small(vocab_size=50257, length=1024, **PLAIN),
        {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "n_head": 12},
    ),
    "bert": (
        bert.masked_lm(encoder=bert.bert_base(vocab_size=30522, length=512, **PLAIN)),
        {
            "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12,
            "pad_token_id": 0,
        },
    ),
    "roberta": (
        bert.masked_lm(
            encoder=bert.roberta_base(vocab_size=50265, length=512, **PLAIN)
        ),
        {
            "hidden_act": "gelu", "layer_norm_eps": 1e-05, "num_attention_heads": 12,
            "pad_token_id": 1,
        },
    ),
    "vit": (
        vit_b16(num_classes=2, image_size=224, **PLAIN),
        {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12},
    ),
    "llama": (  # Llama 3
        llama(
            vocab_size=128256, length=8192, layers=32, width=4096, heads=32, kv_heads=8,
            hidden=14336, rotary_base=5e5, epsilon=1e-5, tied=False, **PLAIN,
        ),
        {
            "attention_bias": False, "hidden_act": "silu", "num_attention_heads": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 500000.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OLD)
def test_the_config_of_models_on_the_hub_agrees(family, tmp_path):
    model, config = OLD[family]
    start(tmp_path, config | {"model_type": family}, model, family=family)


def test_all_differences_are_listed_at_once(tmp_path):
    config = unlike("llama_a", num_attention_heads=8, rms_norm_eps=1e-5, mlp_bias=True)
    with pytest.raises(ValueError, match=r"config.json' is of another model") as caught:
        start(tmp_path, config, MODELS["llama_a"](**PLAIN), family="llama")
    clauses = re.findall(r"\w+=[^ ]+ (?:here|is not)", str(caught.value))
    assert clauses == ["heads=4 here", "epsilon=1e-06 here", "mlp_bias=True is not"]


def test_an_encoder_that_starts_at_another_position_is_refused(tmp_path):
    """Its table has as many rows: 9 positions from 2 on, or 11 from 0 on."""
    model = MODELS["roberta_token"](**PLAIN)
    with pytest.raises(
        ValueError, match=r"first_position=2 here, bert there \(first_po"
    ):
        start(tmp_path, configs()["bert_token"], model, family="bert")


AROUND = {
    "lora": lambda m: peft.lora(m, rank=1, scale=1.0, targets=(".*query",)),
    "prompt": lambda m: peft.prompt(m, length=1, position=0),
    "prefix": lambda m: peft.prefix(m, length=1),
    "resized": lambda m: inputs.resized(m, size=8),
    "standardized": lambda m: inputs.standardized(m, mean=(0.5,), std=(0.5,)),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_model_around_a_model_is_compared_too(name, tmp_path):
    config = unlike("gpt2_a", n_head=4)
    with pytest.raises(ValueError, match="heads=2 here, n_head=4 there"):
        start(tmp_path, config, AROUND[name](small()), family="gpt2")


def test_what_cannot_be_compared_is_loaded_as_it_is(tensors, tmp_path):
    wrong, model = unlike("gpt2_a", n_head=4), small()
    unknown = model._replace(settings=None)
    start(tmp_path, wrong, unknown, family="gpt2")
    start(tmp_path, {"n_head": 4}, model, family="gpt2")  # no model_type: not of theirs
    file = str(tmp_path / "model.safetensors")
    options = {"family": "gpt2", "fresh": (), "skip": ()}
    weights.pretrained(model, path=file, **options)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' is no JSON: "):
        weights.pretrained(model, path=str(tmp_path), **options)
    (tmp_path / "config.json").unlink()
    weights.pretrained(model, path=str(tmp_path), **options)


def test_weights_in_parts_are_read_by_their_index(tensors, tmp_path):
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    again = weights.read(str(tmp_path))
    assert sorted(again) == names
    for name in names:
        np.testing.assert_array_equal(again[name], tensors[name])


def test_paths_without_weights_are_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"family='bart' is unknown; .*'roberta'"):
        load_into({}, family="bart")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"only \['pytorch_model.bin'\]"):
        weights.read(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is no safetensors file"):
        weights.read(str(file))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        weights.read(str(tmp_path / "no" / "such" / "folder"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'dpjax\[hub\]'"):
        weights.read("openai-community/gpt2")


def test_the_hub_is_asked_for_the_revision_and_its_failure_is_explained(
    tensors, tmp_path, monkeypatch
):
    """A stand-in of huggingface_hub: tests fetch nothing."""
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        assert "config.json" in allow_patterns
        asked.append((name, revision))
        if name == "absent/model":
            raise FileNotFoundError("offline")  # what its own errors are, too
        return str(tmp_path)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    save_file(tensors, tmp_path / "model.safetensors")
    assert sorted(weights.read("someone/model@abc123")) == sorted(tensors)
    assert asked == [("someone/model", "abc123")]
    with pytest.raises(
        FileNotFoundError, match=r"hub does not give it.*Without network"
    ):
        weights.read("absent/model")


# --- In several files -----------------------------------------------------------------------


def small_llama(scan):
    return llama(
        vocab_size=32,
        layers=3,
        width=8,
        heads=2,
        kv_heads=1,
        hidden=16,
        length=8,
        rotary_base=1e4,
        epsilon=1e-5,
        tied=False,
        dtype="float32",
        scan=scan,
        remat=False,
    )


@pytest.mark.parametrize("scan", [True, False])
def test_large_weights_are_written_in_files_with_an_index(tmp_path, scan):
    model = small_llama(scan)
    example = {"tokens": np.zeros(8, np.int32)}
    params = model.init(jax.random.key(0), example)
    most = 2000
    weights.write_sharded(str(tmp_path), params, family="llama", max_shard_bytes=most)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    whole = weights.to_hf(params, family="llama")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    files = sorted({*index["weight_map"].values()})
    count = len(files)
    assert count > 2
    assert files == [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    for file in files:
        held = load_file(tmp_path / file)
        for name, array in held.items():
            assert index["weight_map"][name] == file
            np.testing.assert_array_equal(array, whole[name])
        size = sum(array.nbytes for array in held.values())
        assert size <= most or len(held) == 1
    started = weights.pretrained(
        model, path=str(tmp_path), family="llama", fresh=(), skip=()
    )
    again = started.init(jax.random.key(1), example)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_parameter_is_read_from_its_own_tensors_alone(tmp_path, monkeypatch):
    """Of a model that no device holds, one process would not hold all tensors either."""
    model, example = small_llama(True), {"tokens": np.zeros(8, np.int32)}
    params = model.init(jax.random.key(0), example)
    weights.write_sharded(str(tmp_path), params, family="llama", max_shard_bytes=1000)
    read, most = weights._read, []

    def reading(files, *, data, only=None):
        found = read(files, data=data, only=only)
        if data:
            most.append(len(found))
        return found

    monkeypatch.setattr(weights, "_read", reading)
    started = weights.pretrained(
        model, path=str(tmp_path), family="llama", fresh=(), skip=()
    )
    layout = make_layout(data=1, fsdp=4, model=1, rules=TRANSFORMER)
    start = jax.jit(
        lambda key: started.init(key, example), out_shardings=layout.of_params(params)
    )
    jax.tree.map(np.testing.assert_array_equal, start(jax.random.key(1)), params)
    assert {*most} == {1}


def test_weights_that_fit_one_file_are_one_file(tmp_path):
    params = small_llama(True).init(
        jax.random.key(0), {"tokens": np.zeros(8, np.int32)}
    )
    weights.write_sharded(str(tmp_path), params, family="llama")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(
        ValueError, match=r"holds model\.safetensors: give an empty one"
    ):
        weights.write_sharded(str(tmp_path), params, family="llama")


def test_no_more_than_one_file_of_tensors_is_read_at_once(tmp_path, monkeypatch):
    params = small_llama(True).init(
        jax.random.key(0), {"tokens": np.zeros(8, np.int32)}
    )
    held, most, save = [], [], weights.save_file

    def saving(tensors, path, **rest):
        most.append(sum(array.nbytes for array in tensors.values()))
        held.append([weakref.ref(array) for array in tensors.values()])
        save(tensors, path, **rest)
        # What earlier files held is gone.
        assert not [ref for refs in held[:-2] for ref in refs if ref() is not None]

    monkeypatch.setattr(weights, "save_file", saving)
    weights.write_sharded(str(tmp_path), params, family="llama", max_shard_bytes=1000)
    assert len(most) > 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 must be an integer of at least 1"),
        ({"folder": "no/such"}, "folder='no/such' must be a folder that is there"),
        ({"family": "gpt2"}, "family='gpt2' has no parameters"),
    ],
)
def test_wrong_files_are_refused(tmp_path, wrong, message):
    params = small_llama(True).init(
        jax.random.key(0), {"tokens": np.zeros(8, np.int32)}
    )
    given = {"folder": str(tmp_path), "family": "llama"} | wrong
    with pytest.raises(ValueError, match=message):
        weights.write_sharded(given.pop("folder"), params, **given)
    assert not [*tmp_path.iterdir()]
