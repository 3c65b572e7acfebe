"""Every family of transformers under every engine, and what the analysis makes of them.

What a model is asked for (scan, remat, bfloat16; tied or not; which head) and what the
engine is asked for go round over families and engines: few compilations meet them all.
Where a part alone is trained, engines meet families and kinds of part by turns (all meet all
among the long tests), and are asked for residuals, every other time for that of a difference.
"""

import functools
import re

import jax
import numpy as np
import pytest

import dpjax
from configs.common import ADAPTERS, BIASES, NORMS, PREFIXES
from dpjax.clipping import Query, auto, bookkeeping, ghost
from dpjax.clipping.execution.keys import example_keys
from dpjax.models import bert, peft
from dpjax.models.gpt2 import gpt2
from dpjax.models.llama import llama
from dpjax.models.losses import causal_lm, classification, masked_lm
from dpjax.models.moe import balanced_lm, moe
from dpjax.models.partition import partition, with_frozen
from dpjax.models.vit import vit
from dpjax.privacy.sensitive import reveal
from dpjax.typing import Batch
from tests.checks import batch_of, clip, norm, thinned
from tests.contracts.test_zoo import INDEX, KEY, MASK, check_sum
from tests.contracts.zoo.cases import BF16, B

ENGINES = {"bookkeeping": bookkeeping, "ghost": ghost, "auto": auto}
PLAIN = {"dtype": "float32", "scan": False, "remat": False, "layers": 1}
REMAT = {"dtype": "float32", "scan": False, "remat": True, "layers": 1}
SCAN = {"dtype": "float32", "scan": True, "remat": False, "layers": 2}
SCAN_REMAT = {"dtype": "float32", "scan": True, "remat": True, "layers": 2}
LOW = {"dtype": "bfloat16", "scan": False, "remat": False, "layers": 1}
LOW_SCAN = {"dtype": "bfloat16", "scan": True, "remat": False, "layers": 2}
LOW_REMAT = {"dtype": "bfloat16", "scan": True, "remat": True, "layers": 2}
DIFFERENCE = {"signs": (1.0, -1.0), "style": "flat", "residual": False}
FLAT = {"signs": (1.0,), "style": "flat", "residual": True}
LAYERS = {"signs": (1.0,), "style": "per_layer", "residual": True}


def make_gpt2(**run):
    model = gpt2(vocab_size=11, length=8, width=8, heads=2, **run)
    return model, causal_lm


def make_llama(*, tied, **run):
    model = llama(
        vocab_size=11, length=8, width=8, heads=4, kv_heads=2, hidden=12,
        rotary_base=1e4, epsilon=1e-6, tied=tied, **run,
    )  # fmt: skip
    return model, causal_lm


def make_moe(**run):
    model = moe(
        vocab_size=11, length=8, width=8, heads=4, kv_heads=2, hidden=6, experts=3,
        capacity_factor=0.8, rotary_base=1e4, epsilon=1e-6, **run,
    )  # fmt: skip
    return model, functools.partial(balanced_lm, coefficient=0.1)


def make_vit(**run):
    model = vit(
        num_classes=3, image_size=4, patch=2, width=8, heads=2, hidden=12,
        epsilon=1e-6, **run,
    )  # fmt: skip
    return model, classification


def make_bert(*, head, **run):
    encoder = bert.Encoder(
        vocab_size=11, length=8, first_position=2, segments=2, width=8, heads=2,
        hidden=12, epsilon=1e-5, **run,
    )  # fmt: skip
    if head == "token":
        model = bert.masked_lm(encoder=encoder)
        return model, functools.partial(masked_lm, mask_token=10, rate=0.5)
    if head == "infill":
        model = bert.infilling(encoder=encoder, mask_token=10, label_tokens=(4, 7, 2))
    elif head == "mean":
        model = bert.mean_classifier(encoder=encoder, num_classes=3)
    else:
        model = bert.classifier(encoder=encoder, num_classes=3)
    return model, classification


CASES = {
    "gpt2-bookkeeping": (make_gpt2, PLAIN, LAYERS),
    "gpt2-ghost": (make_gpt2, SCAN_REMAT, DIFFERENCE),
    "gpt2-auto": (make_gpt2, LOW_SCAN, FLAT),
    "llama-bookkeeping": (make_llama, {"tied": False, **SCAN_REMAT}, FLAT),
    "llama-ghost": (make_llama, {"tied": True, **REMAT}, LAYERS),
    "llama-auto": (make_llama, {"tied": False, **SCAN}, DIFFERENCE),
    "moe-bookkeeping": (make_moe, SCAN_REMAT, FLAT),
    "moe-ghost": (make_moe, SCAN, LAYERS),
    "moe-auto": (make_moe, REMAT, DIFFERENCE),
    "vit-bookkeeping": (make_vit, LOW_SCAN, FLAT),
    "vit-ghost": (make_vit, LOW_REMAT, FLAT),
    "vit-auto": (make_vit, REMAT, LAYERS),
    "bert-bookkeeping": (make_bert, {"head": "class", **SCAN}, DIFFERENCE),
    "bert-ghost": (make_bert, {"head": "token", **PLAIN}, FLAT),
    "bert-auto": (make_bert, {"head": "infill", **SCAN_REMAT}, FLAT),
    "bert_mean-auto": (make_bert, {"head": "mean", **PLAIN}, FLAT),
}


FAMILIES = {
    "gpt2": make_gpt2,
    "llama": functools.partial(make_llama, tied=False),
    "bert": functools.partial(make_bert, head="class"),
    "vit": make_vit,
}
PATTERNS = {
    "bitfit": BIASES,
    "film": NORMS,
    "head": "head/.*",
    "lora": ADAPTERS,
    "prompt": "token/prompt",
    "prefix": PREFIXES,
}
AROUND = {
    "lora": functools.partial(
        peft.lora, rank=2, scale=2.0, targets=(".*attention/(query|value)", ".*mlp/up")
    ),
    "prompt": functools.partial(peft.prompt, length=2, position=1),
    "prefix": functools.partial(peft.prefix, length=2),
}
TIED = ("gpt2", "head")
ABSENT = [("llama", "bitfit"), ("vit", "prompt")]  # no biases, no tokens
PAIRS = [(f, p) for f in FAMILIES for p in PATTERNS if (f, p) not in ABSENT]
# Another engine comes first for the next pair.
CELLS = [
    (*pair, engine)
    for i, pair in enumerate(PAIRS)
    for engine in [*ENGINES][i % 3 :] + [*ENGINES][: i % 3]
]
TOLERANCES = {"float32": 5e-5, "bfloat16": BF16}
RUNS = {
    ("gpt2", "lora"): SCAN_REMAT,
    ("gpt2", "head"): SCAN,
    ("llama", "lora"): LOW,
    ("vit", "film"): LOW,
}


def draw_examples():
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 10, (B, 6)).astype(np.int32)
    tokens[np.arange(B), [1, 0, 3, 2]] = 10  # one mask token each
    return {
        "tokens": tokens,
        "mask": np.arange(6)[None] < np.array([6, 3, 5, 4])[:, None],
        "segments": rng.integers(0, 2, (B, 6)).astype(np.int32),
        "image": rng.normal(size=(B, 4, 4, 3)).astype(np.float32),
        "label": np.array([0, 2, 1, 2], np.int32),
    }


def draw_params(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), shapes
    )


def shapes_of(model):
    one = jax.tree.map(lambda x: x[0], draw_examples())
    return jax.eval_shape(model.init, jax.random.key(0), one), one


@pytest.mark.parametrize("name", thinned([(name,) for name in CASES], 4))
def test_engine_equals_per_example_gradients(name):
    build, run, asked = CASES[name]
    model, make_loss = build(**run)
    shapes, _ = shapes_of(model)
    points = tuple(draw_params(shapes, seed) for seed in range(len(asked["signs"])))
    asked = {name.split("-")[1]: asked}
    tolerance = TOLERANCES[run["dtype"]]
    check_engines(asked, make_loss(model), points, {}, tolerance=tolerance)


@pytest.mark.parametrize(("family", "part", "engine"), thinned(CELLS, 11))
def test_engine_clips_a_part_as_per_example_gradients_do(family, part, engine):
    run = RUNS.get((family, part), PLAIN)
    model, make_loss = FAMILIES[family](**run)
    if part in AROUND:
        model = AROUND[part](model)
    pattern = PATTERNS[part] if (family, part) != TIED else "token/embedding"
    shapes, _ = shapes_of(model)
    parts = [partition(draw_params(shapes, seed), [pattern]) for seed in (0, 1)]
    points, (frozen, _) = zip(*parts, strict=True)
    cell = CELLS.index((family, part, engine))
    asked = {engine: FLAT if cell % 2 else DIFFERENCE | {"residual": True}}
    tolerance = TOLERANCES[run["dtype"]]
    check_engines(asked, make_loss(model), points, frozen, tolerance=tolerance)


def check_engines(asked, loss, points, frozen, *, tolerance):
    """Compare what engines say with per-example gradients, clipped in float64.

    Args:
        asked: By the name of the engine, what its query asks for.
        loss: Of all parameters.
        points: Two points of those that are trained.
        frozen: The others.
        tolerance: Relative.
    """
    examples = draw_examples()
    gradients = per_example_gradients(loss, points, frozen, examples)
    wanted = {name: signed(gradients, query["signs"]) for name, query in asked.items()}
    # Some rows are clipped, some are not.
    clip_norms = {
        name: float(np.mean([norm(row) for row in rows]))
        for name, rows in wanted.items()
    }

    @jax.jit
    def ask(points, frozen, batch, key):
        of_trained = with_frozen(loss, frozen)
        queries = {
            name: Query(
                points[: len(query["signs"])], clip_norm=clip_norms[name], **query
            )
            for name, query in asked.items()
        }
        return {
            name: ENGINES[name](of_trained, query, batch, key)
            for name, query in queries.items()
        }

    answers = ask(points, frozen, batch_of(examples, mask=MASK, index=INDEX), KEY)
    for name, answer in answers.items():
        try:
            check_answer(
                answer, asked[name], wanted[name], clip_norms[name], tolerance=tolerance
            )
        except AssertionError as error:
            error.add_note(f"{name}: {asked[name]}")
            raise


def check_answer(answer, asked, rows, clip_norm, *, tolerance):
    clipped, statistics = answer
    norms = np.array([norm(row) for row in rows])
    kept = [rows[i] for i in np.flatnonzero(MASK)]
    parts = [clip(row, clip_norm, asked["style"]) for row in kept]
    check_sum(clipped.total, parts, like=kept, tolerance=tolerance)
    if asked["residual"]:
        rest = [
            jax.tree.map(np.subtract, row, part)
            for row, part in zip(kept, parts, strict=True)
        ]
        check_sum(clipped.residual, rest, like=kept, tolerance=tolerance)
    np.testing.assert_allclose(reveal(statistics)["norms"], norms * MASK, tolerance)


def per_example_gradients(loss, points, frozen, examples):
    """Return the gradients ``[B, ...]`` at each point, as float64."""

    @jax.jit
    def run(point, frozen, examples, key):
        keys = example_keys(key, Batch(examples, MASK, INDEX))
        gradient = jax.grad(with_frozen(loss, frozen))
        return jax.vmap(gradient, (None, 0, 0))(point, examples, keys)

    found = [run(point, frozen, examples, KEY) for point in points]
    return jax.tree.map(lambda g: np.asarray(g, np.float64), found)


def signed(gradients, signs):
    """Return for each example ``sum_k signs[k] gradients[k]``."""
    chosen = gradients[: len(signs)]
    whole = jax.tree.map(
        lambda *parts: sum(s * g for s, g in zip(signs, parts, strict=True)), *chosen
    )
    return [jax.tree.map(lambda g, i=i: g[i], whole) for i in range(B)]


@pytest.mark.parametrize(
    "run", [PLAIN, LOW_REMAT], ids=["plain", "bfloat16 scan remat"]
)
@pytest.mark.parametrize(
    "build",
    [
        make_gpt2,
        functools.partial(make_llama, tied=False),
        functools.partial(make_llama, tied=True),
        make_vit,
        functools.partial(make_bert, head="class"),
        functools.partial(make_bert, head="token"),
        functools.partial(make_bert, head="infill"),
    ],
)
def test_every_layer_has_a_fast_rule(build, run):
    model, make_loss = build(**run)
    explained = dpjax.explain(make_loss(model), *shapes_of(model))
    rows = {row.path: row for row in explained}
    for path, row in rows.items():
        if path.endswith(("kernel", "embedding", "segment")):
            assert row.rule in ("dense", "embedding", "tied"), row
        else:
            assert row.rule == "elementwise", row
    tied = [path for path, row in rows.items() if row.rule == "tied"]
    has_head = any(re.fullmatch(r"head/(out/)?kernel", path) for path in rows)
    assert tied == ([] if has_head else ["token/embedding"])
