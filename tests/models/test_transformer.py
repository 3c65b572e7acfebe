"""The transformer families: sizes, masks, layouts, and inputs that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.models import bert, gpt2, vit
from dpjax.models.llama import llama
from dpjax.models.transformer import rotate

RUN = {"dtype": "float32", "scan": True, "remat": False}
KEY = jax.random.key(0)


def tiny_llama(**changes):
    sizes = {
        "vocab_size": 13, "length": 8, "layers": 2, "width": 8, "heads": 4,
        "kv_heads": 2, "hidden": 12, "rotary_base": 1e4, "epsilon": 1e-6, "tied": False,
    }  # fmt: skip
    return llama(**sizes | RUN | changes)


def tiny_encoder(**changes):
    sizes = {
        "vocab_size": 13, "length": 8, "first_position": 2, "segments": 1, "layers": 2,
        "width": 8, "heads": 2, "hidden": 12, "epsilon": 1e-5,
    }  # fmt: skip
    return bert.Encoder(**sizes | RUN | changes)


def draw_params(model, example):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, KEY, example)
    return jax.tree.map(
        lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes
    )


def count(model, example):
    shapes = jax.eval_shape(model.init, KEY, example)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    return sum(x.size for x in jax.tree.leaves(shapes))


TOKENS = {"tokens": jax.ShapeDtypeStruct((16,), jnp.int32)}
IMAGE = {"image": jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)}
LOW = {"dtype": "bfloat16", "scan": True, "remat": True}


@pytest.mark.parametrize(
    ("model", "example", "expected"),
    [
        # Parameters of transformers' models of the same names, tied ones counted once.
        (gpt2.gpt2_small(vocab_size=50257, length=1024, **LOW), TOKENS, 124_439_808),
        (gpt2.gpt2_medium(vocab_size=50257, length=1024, **LOW), TOKENS, 354_823_168),
        (gpt2.gpt2_large(vocab_size=50257, length=1024, **LOW), TOKENS, 774_030_080),
        (
            bert.classifier(
                encoder=bert.bert_base(vocab_size=30522, length=512, **LOW),
                num_classes=2,
            ),
            TOKENS,
            109_483_778,
        ),
        (
            bert.classifier(
                encoder=bert.roberta_base(vocab_size=50265, length=512, **LOW),
                num_classes=2,
            ),
            TOKENS,
            124_647_170,
        ),
        (
            bert.classifier(
                encoder=bert.roberta_large(vocab_size=50265, length=512, **LOW),
                num_classes=2,
            ),
            TOKENS,
            355_361_794,
        ),
        # Of timm's models.
        (vit.vit_b16(num_classes=1000, image_size=224, **LOW), IMAGE, 86_567_656),
        (vit.vit_s16(num_classes=1000, image_size=224, **LOW), IMAGE, 22_050_664),
        (vit.vit_ti16(num_classes=1000, image_size=224, **LOW), IMAGE, 5_717_416),
    ],
)
def test_parameters_of_the_published_models(model, example, expected):
    assert count(model, example) == expected


def test_a_decoder_sees_no_later_token():
    """So padding at the end needs no mask."""
    model, tokens = tiny_llama(), np.arange(6, dtype=np.int32)
    params = draw_params(model, {"tokens": tokens})
    apply = jax.jit(model.apply)
    before = apply(params, {"tokens": tokens}, KEY)
    changed = np.where(np.arange(6) < 4, tokens, 12).astype(np.int32)
    after = apply(params, {"tokens": changed}, KEY)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.abs(before[4:] - after[4:]).min() > 0


@pytest.mark.parametrize("head", [bert.classifier, bert.mean_classifier])
def test_an_encoder_does_not_see_what_is_masked(head):
    model = head(encoder=tiny_encoder(), num_classes=3)
    tokens, mask = np.arange(6, dtype=np.int32), np.arange(6) < 4
    params = draw_params(model, {"tokens": tokens, "mask": mask})
    apply = jax.jit(model.apply)
    changed = np.where(mask, tokens, 12).astype(np.int32)
    logits = [
        apply(params, {"tokens": t, "mask": m}, KEY)
        for m in (mask, np.ones(6, bool))
        for t in (tokens, changed)
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[2] - logits[3]).min() > 1e-4
    # Padding or not, what is left is the same sentence.
    short = {"tokens": tokens[:4], "mask": mask[:4]}
    np.testing.assert_allclose(
        apply(params, short, KEY), logits[0], rtol=1e-4, atol=1e-5
    )


def test_infilling_gives_the_logits_of_the_labels_at_the_mask():
    """It is the masked language model, computed at one place."""
    encoder = tiny_encoder()
    tokens = np.array([3, 1, 12, 4, 12, 5], np.int32)
    whole = bert.masked_lm(encoder=encoder)
    params = draw_params(whole, {"tokens": tokens})
    some = bert.infilling(encoder=encoder, mask_token=12, label_tokens=(7, 2))
    logits = jax.jit(some.apply)(params, {"tokens": tokens}, KEY)
    everywhere = jax.jit(whole.apply)(params, {"tokens": tokens}, KEY)
    np.testing.assert_allclose(logits, everywhere[2, [7, 2]], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_to_float32_and_remat_changes_nothing():
    tokens = {"tokens": np.arange(6, dtype=np.int32)}
    params = draw_params(tiny_llama(), tokens)
    exact = jax.jit(tiny_llama().apply)(params, tokens, KEY)
    low = jax.jit(tiny_llama(dtype="bfloat16", remat=True).apply)(params, tokens, KEY)
    assert exact.dtype == jnp.float32
    assert low.dtype == jnp.bfloat16
    scale = np.abs(exact).max()
    difference = np.abs(low.astype(np.float32) - exact).max()
    assert 0 < difference < 2**-4 * scale


def test_rotated_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1, 1, 6)).astype(np.float32)

    def product(i, j):
        turned = [rotate(v, jnp.array([p]), base=100.0) for v, p in ((x, i), (y, j))]
        return float(jnp.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(product(7, 4), product(53, 50), rtol=1e-4)
    np.testing.assert_allclose(product(4, 4), float(np.sum(x * y)), rtol=1e-5)
    assert abs(product(7, 4) - product(7, 5)) > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3, "kv_heads": 3}, "heads=3 must divide width=8"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"heads": 8, "kv_heads": 8}, "must be even for rotary"),
        ({"layers": 0}, "layers=0 must be an integer of at least 1"),
        ({"dtype": "float8"}, "dtype='float8' is unknown; .*'bfloat16'"),
    ],
)
def test_impossible_sizes_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_llama(**changes)


def test_inputs_that_do_not_fit_raise_before_compute():
    long = {"tokens": jax.ShapeDtypeStruct((9,), jnp.int32)}
    models = (
        tiny_llama(),
        bert.masked_lm(encoder=tiny_encoder()),
        gpt2.gpt2(vocab_size=13, length=8, layers=1, width=8, heads=2, **RUN),
    )
    for model in models:
        with pytest.raises(ValueError, match="has 9 tokens, and the model length=8"):
            jax.eval_shape(model.init, KEY, long)
    model = vit.vit_ti16(num_classes=3, image_size=32, **RUN)
    with pytest.raises(ValueError, match=r"images are 224x224, .*image_size=32"):
        jax.eval_shape(model.init, KEY, IMAGE)
    with pytest.raises(ValueError, match="patch=16 must divide image_size=40"):
        vit.vit_ti16(num_classes=3, image_size=40, **RUN)
    with pytest.raises(ValueError, match=r"token 13 of .* is not below vocab_size=13"):
        bert.infilling(encoder=tiny_encoder(), mask_token=13, label_tokens=(1,))
