"""Weights in the Hugging Face format: what transformers computes, we compute."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpjax.models import bert, weights
from dpjax.models.gpt2 import gpt2
from dpjax.models.llama import llama
from dpjax.models.vit import vit
from tests.checks import compiled

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


@pytest.mark.parametrize("run", [PLAIN, SCANNED], ids=["plain", "scan"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, run):
    model, examples = MODELS[name](**run), examples_of(name)
    params = params_of(model, name)
    apply = compiled(jax.vmap(model.apply, in_axes=(None, 0, None)))
    logits = apply(params, examples, jax.random.key(0))
    right = expected()[f"{name}/logits"]
    if "mask" in examples and logits.ndim == 3:
        # What is said about padding is read by nobody.
        logits, right = logits[examples["mask"]], right[examples["mask"]]
    np.testing.assert_allclose(logits, right, rtol=1e-4, atol=1e-4)
    # The test can tell: the logits are no constants.
    assert np.std(right) > 0.1


@pytest.mark.parametrize("run", [PLAIN, SCANNED], ids=["plain", "scan"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_gives_the_same_tensors(name, run, tmp_path):
    family = name.split("_")[0]
    params = params_of(MODELS[name](**run), name)
    file = str(tmp_path / "model.safetensors")
    weights.write(file, params, family=family)
    before, after = load_file(HF / f"{name}.safetensors"), weights.read(file)
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor, err_msg=key)
