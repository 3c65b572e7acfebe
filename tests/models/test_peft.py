"""LoRA, prompts and prefixes: what they compute. Engines: ``contracts/test_models``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpjax.models import bert, peft
from dpjax.models.gpt2 import gpt2
from dpjax.models.llama import llama
from dpjax.models.mlp import mlp
from dpjax.models.partition import flatten, partition
from dpjax.models.transformer import Attention
from dpjax.models.vit import vit

KEY = jax.random.key(0)
TOKENS = {"tokens": np.array([3, 1, 4, 1, 5, 9], np.int32)}
QUERY_AND_UP = (".*attention/query", ".*mlp/up")


def small_gpt2(*, length=6, **run):
    run = {"dtype": "float32", "scan": False, "remat": False} | run
    return gpt2(vocab_size=11, length=length, layers=2, width=8, heads=2, **run)


def small_llama():
    return llama(
        vocab_size=11, length=6, layers=1, width=8, heads=4, kv_heads=2, hidden=12,
        rotary_base=1e4, epsilon=1e-6, tied=True, dtype="float32", scan=False,
        remat=False,
    )  # fmt: skip


def small_bert():
    encoder = bert.Encoder(
        vocab_size=11, length=9, first_position=2, segments=2, layers=1, width=8,
        heads=2, hidden=12, epsilon=1e-5, dtype="float32", scan=False, remat=False,
    )  # fmt: skip
    return bert.classifier(encoder=encoder, num_classes=3)


def small_vit():
    return vit(
        num_classes=3, image_size=4, patch=2, layers=1, width=8, heads=2, hidden=12,
        epsilon=1e-6, dtype="float32", scan=False, remat=False,
    )  # fmt: skip


def drawn(model, example):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, example)
    return jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes
    )


# --- What they compute --------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_fresh_adapters_change_nothing_and_merged_ones_compute_the_same(scan):
    base = small_gpt2(scan=scan, remat=scan)
    model = peft.lora(base, rank=2, scale=3.0, targets=QUERY_AND_UP)
    start = jax.jit(model.init)(KEY, TOKENS)
    names = {name for name in flatten(start) if "lora" in name}
    layers = ["layers"] if scan else ["layers_0", "layers_1"]
    adapted = [f"{x}/{y}" for x in layers for y in ("attention/query", "mlp/up")]
    assert names == {f"{x}/lora_{ab}" for x in adapted for ab in "ab"}
    a = flatten(start)[f"{layers[0]}/mlp/up/lora_a"]
    assert a.shape == ((2, 8, 2) if scan else (8, 2))
    # Five standard errors of the variance of so many normals.
    assert abs(np.mean(np.square(a)) * 8 - 1) < 5 * np.sqrt(2 / a.size)
    apply, plain = jax.jit(model.apply), jax.jit(base.apply)
    frozen = partition(start, [".*lora_."])[1]
    np.testing.assert_array_equal(apply(start, TOKENS, KEY), plain(frozen, TOKENS, KEY))
    params = drawn(model, TOKENS)
    merged = peft.merge_lora(params, scale=3.0)
    assert flatten(merged).keys() == flatten(frozen).keys()
    expected = plain(merged, TOKENS, KEY)
    np.testing.assert_allclose(apply(params, TOKENS, KEY), expected, 1e-4, 1e-4)
    unadapted = plain(partition(params, [".*lora_."])[1], TOKENS, KEY)
    assert np.abs(expected - unadapted).max() > 0.1


def test_adapters_are_added_to_a_model_that_jax_has_traced_before():
    model = peft.lora(small_gpt2(), rank=1, scale=1.0, targets=QUERY_AND_UP)
    first, again = (jax.eval_shape(lambda: model.init(KEY, TOKENS)) for _ in range(2))
    assert again == first


def test_the_adapters_of_a_bfloat16_model_compute_in_bfloat16():
    model = peft.lora(
        small_gpt2(dtype="bfloat16"), rank=2, scale=1.0, targets=QUERY_AND_UP
    )
    out = jax.eval_shape(model.apply, drawn(model, TOKENS), TOKENS, KEY)
    assert out.dtype == jnp.bfloat16


def test_a_prompt_of_known_tokens_is_those_tokens():
    base = small_gpt2(length=9)
    model = peft.prompt(base, length=3, position=0)
    params = drawn(model, TOKENS)
    table = flatten(params)["token/embedding"]
    words = np.array([7, 2, 2], np.int32)
    params["token"]["prompt"] = table[words]
    whole = {"tokens": np.concatenate([words, TOKENS["tokens"]])}
    plain = partition(params, ["token/prompt"])[1]
    np.testing.assert_allclose(
        model.apply(params, TOKENS, KEY), base.apply(plain, whole, KEY)[3:], 1e-4, 1e-5
    )


def test_a_prompt_of_an_encoder_stands_after_its_first_token_and_is_seen():
    base = small_bert()
    model = peft.prompt(base, length=2, position=1)
    example = TOKENS | {
        "mask": np.array([1, 1, 1, 1, 0, 0], bool),
        "segments": np.array([0, 0, 1, 1, 1, 1], np.int32),
    }
    params = drawn(model, example)
    table = flatten(params)["token/embedding"]
    params["token"]["prompt"] = table[[7, 2]]
    whole = {
        "tokens": np.array([3, 7, 2, 1, 4, 1, 5, 9], np.int32),
        "mask": np.array([1, 1, 1, 1, 1, 1, 0, 0], bool),
        "segments": np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32),
    }
    plain = partition(params, ["token/prompt"])[1]
    np.testing.assert_allclose(
        model.apply(params, example, KEY), base.apply(plain, whole, KEY), 1e-4, 1e-5
    )


def attention_with_prefix(params, x, *, heads, causal):
    """In float64 numpy, head by head and token by token."""
    f = {name: np.asarray(leaf, np.float64) for name, leaf in flatten(params).items()}

    def linear(name):
        return x @ f[f"{name}/kernel"] + f[f"{name}/bias"]

    q = linear("query")
    k = np.concatenate([f["prefix_key"], linear("key")])
    v = np.concatenate([f["prefix_value"], linear("value")])
    first, width = len(f["prefix_key"]), q.shape[1] // heads
    mixed = np.zeros_like(q)
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            seen = first + t + 1 if causal else len(k)
            scores = k[:seen, columns] @ q[t, columns] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            mixed[t, columns] = weights @ v[:seen, columns] / weights.sum()
    return mixed @ f["out/kernel"] + f["out/bias"]


def test_a_prefix_is_seen_by_every_token_and_the_rest_in_order():
    model = peft.prefix(small_gpt2(), length=3)
    params = drawn(model, TOKENS)["layers_0"]["attention"]
    seen = {}

    def catch(function, args, kwargs, context):
        if isinstance(context.module, Attention):
            seen.setdefault("spec", context.module.spec)
        return function(*args, **kwargs)

    with nn.intercept_methods(catch):
        jax.eval_shape(model.apply, drawn(model, TOKENS), TOKENS, KEY)
    x = np.random.default_rng(3).normal(size=(6, 8)).astype(np.float32)
    found = Attention(seen["spec"]).apply({"params": params}, x, jnp.arange(6), None)
    expected = attention_with_prefix(params, x, heads=2, causal=True)
    np.testing.assert_allclose(found, expected, 1e-4, 1e-5)


# --- Errors -------------------------------------------------------------------------------


def adapted(*targets, model=small_gpt2):
    return peft.lora(model(), rank=2, scale=1.0, targets=targets)


WRONG = {
    "rank": (
        lambda: peft.lora(small_gpt2(), rank=0, scale=1.0, targets=(".*",)),
        "rank=0 must be an integer of at least 1",
    ),
    "no such layer": (
        lambda: adapted(".*attn/query").init(KEY, TOKENS),
        r"'\.\*attn/query' matches none of .*layers_0/attention/key, ",
    ),
    "an embedding": (
        lambda: adapted("token", ".*up").init(KEY, TOKENS),
        "adapts linear layers .nn.Dense., and token is none; there are layers_0/att",
    ),
    "a norm": (lambda: adapted(".*norm_0").init(KEY, TOKENS), "layers_0/norm_0, "),
    "prompt": (
        lambda: peft.prompt(small_gpt2(), length=0, position=0),
        "length=0 must be an integer of at least 1",
    ),
    "a prompt without room": (
        lambda: peft.prompt(small_gpt2(), length=1, position=0).init(KEY, TOKENS),
        "an example has 7 tokens",
    ),
    "no tokens": (
        lambda: peft.prompt(small_vit(), length=1, position=0).init(
            KEY, {"image": np.zeros((4, 4, 3), np.float32)}
        ),
        "needs examples with 'tokens', not ",
    ),
    "prefix": (
        lambda: peft.prefix(small_gpt2(), length=0),
        "length=0 must be an integer of at least 1",
    ),
    "no attention": (
        lambda: peft.prefix(
            mlp(features=(), num_classes=2, activation="relu"), length=1
        ).init(KEY, {"image": np.zeros((2, 2, 1), np.float32)}),
        r"needs layers named attention, not \['head/bias', 'head/kernel'\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_adapted_raises(case):
    build, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build)
