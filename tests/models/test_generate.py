"""Sampling with a cache: what it samples is what the whole forward pass says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.models import peft
from dpjax.models.generate import generator, keep_likely
from dpjax.models.gpt2 import gpt2
from dpjax.models.llama import llama
from dpjax.models.mlp import mlp
from tests.checks import thinned

KEY = jax.random.key(0)
RUN = {"dtype": "float32", "remat": False}


def small_gpt2():
    return gpt2(vocab_size=11, length=9, layers=2, width=8, heads=2, scan=True, **RUN)


def small_llama():
    return llama(
        vocab_size=11, length=9, layers=2, width=8, heads=4, kv_heads=2, hidden=12,
        rotary_base=1e4, epsilon=1e-6, tied=False, scan=False, **RUN,
    )  # fmt: skip


MODELS = {
    "gpt2": small_gpt2,
    "llama": small_llama,
    "lora": lambda: peft.lora(small_gpt2(), rank=2, scale=2.0, targets=(".*value",)),
    "prefix": lambda: peft.prefix(small_llama(), length=2),
    "prompt": lambda: peft.prompt(
        gpt2(vocab_size=11, length=12, layers=1, width=8, heads=2, scan=False, **RUN),
        length=3,
        position=0,
    ),
}


def drawn(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, {"tokens": jnp.zeros(9, jnp.int32)})
    return jax.tree.map(
        lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes
    )


@pytest.mark.parametrize("name", thinned([(name,) for name in MODELS], 3))
def test_tokens_one_by_one_with_the_cache_give_the_logits_of_the_whole(name):
    model = MODELS[name]()
    params = drawn(model)
    tokens = np.random.default_rng(1).integers(0, 11, 9).astype(np.int32)
    whole = jax.jit(model.apply)(params, {"tokens": tokens}, KEY)
    room = np.where(np.arange(9) < 4, tokens, 0)
    first, cache = jax.jit(lambda p, t: model.decode(p, t, None, 0))(params, room)
    np.testing.assert_allclose(first[:4], whole[:4], rtol=1e-4, atol=1e-5)
    step = jax.jit(model.decode)
    for start, stop in ((4, 5), (5, 6), (6, 9)):
        rows, cache = step(params, tokens[start:stop], cache, start)
        np.testing.assert_allclose(rows, whole[start:stop], rtol=1e-4, atol=1e-5)


def test_greedy_samples_are_the_argmax_of_the_uncached_forward():
    model = small_gpt2()
    params = drawn(model)
    prompts = np.array([[3, 1, 4], [5, 9, 0]], np.int32)
    lengths = np.array([3, 2], np.int32)
    sample = generator(
        model, max_new_tokens=6, stop_token=99, temperature=0.0, top_k=None, top_p=1.0
    )
    found = sample(params, prompts, lengths, KEY)
    apply = jax.jit(model.apply)
    for row in range(2):
        tokens = np.zeros(9, np.int32)
        tokens[: lengths[row]] = prompts[row, : lengths[row]]
        for i in range(6):
            place = lengths[row] + i
            logits = apply(params, {"tokens": tokens}, KEY)
            tokens[place] = np.argmax(logits[place - 1])
            assert tokens[place] == found[row, i]


def test_after_the_stop_token_there_is_nothing_else():
    model = small_gpt2()
    params = drawn(model)
    sample = generator(
        model, max_new_tokens=6, stop_token=7, temperature=3.0, top_k=None, top_p=1.0
    )
    prompts = np.ones((64, 3), np.int32)
    rows = np.asarray(sample(params, prompts, np.full(64, 3), KEY))
    stopped = np.cumsum(rows == 7, axis=1) > 0
    assert stopped.any(axis=1).sum() > 5
    assert not stopped.all()
    np.testing.assert_array_equal(rows[stopped], 7)
    again = sample(params, prompts, np.full(64, 3), KEY)
    np.testing.assert_array_equal(again, rows)


LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((1.0, None, 1.0), [0, 1, 2, 3]),
        ((1.0, 2, 1.0), [1, 3]),
        ((1.0, None, 0.39), [1]),
        ((1.0, None, 0.41), [1, 3]),
        ((1.0, None, 0.75), [1, 2, 3]),
        ((1.0, 2, 0.5), [1]),  # of what top k leaves, 4/7 is the first
        ((0.5, None, 0.5), [1]),  # squares: 16/30 is the first
        ((0.0, None, 1.0), [1]),
    ],
)
def test_which_tokens_are_sampled(options, kept):
    found = np.asarray(keep_likely(LOGITS, *options))
    assert np.flatnonzero(np.isfinite(found)).tolist() == kept
    if options[0]:
        np.testing.assert_allclose(found[kept], LOGITS[kept] / options[0], rtol=1e-6)


WRONG = {
    "no tokens": (
        {"max_new_tokens": 0},
        "max_new_tokens=0 must be an integer of at least 1",
    ),
    "temperature": ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
    "top k": ({"top_k": 0}, "top_k=0 must be at least 1 or None"),
    "top p": ({"top_p": 0.0}, r"top_p=0.0 in \(0, 1\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_raise(case):
    options = {
        "max_new_tokens": 2,
        "stop_token": 0,
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
    }
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        generator(small_gpt2(), **options | changes)
    with pytest.raises(ValueError, match="the model does not decode"):
        generator(mlp(features=(), num_classes=2, activation="relu"), **options)
