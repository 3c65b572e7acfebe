"""What the benchmark clips: a loss of one example, parameters and a batch, by name."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.models.bert import classifier, roberta_large
from dpjax.models.convnet import groupnorm_cnn
from dpjax.models.gpt2 import gpt2_small
from dpjax.models.losses import causal_lm, classification
from dpjax.models.mlp import mlp
from dpjax.models.vit import vit_b16, vit_ti16
from dpjax.models.wide_resnet import wide_resnet
from dpjax.typing import Batch, Example, Key, Loss, Model, Params, Scalar
from experiments.benchmarks.transformers import (
    Shape,
    gpt_loss,
    init_gpt,
    init_lora,
    with_lora,
)

GPU_ONLY = ("vit_b16", "roberta_large", "wrn28_10")
COMPILE_ONLY = ("gpt2_small_100", "gpt2_small_1024")
"""Too slow to run on a CPU."""

_SMALL = Shape(layers=4, width=256, heads=4, hidden=1024, length=128, outputs=8192)
_LOW: Final[dict[str, Any]] = {"dtype": "bfloat16", "scan": False, "remat": False}
_GPT2_TOKENS, _ROBERTA_TOKENS = 50257, 50265


@dataclasses.dataclass(frozen=True)
class Workload:
    """One thing to measure.

    Attributes:
        name: As on the command line.
        loss: Of one example.
        params: Arrays, or their shapes (ShapeDtypeStruct) if ``compile_only``.
        batch: Likewise; every example counts.
        gpu_only: Not worth waiting for elsewhere.
        compile_only: There is nothing to run it on.
    """

    name: str
    loss: Loss
    params: Params
    batch: Batch
    gpu_only: bool
    compile_only: bool


class Recipe(NamedTuple):
    """How to make a workload; ``arrays`` allocates when it is called, not before."""

    loss: Loss
    arrays: Callable[[], tuple[Params, Batch]]


def build(name: str) -> Workload:
    """Return the workload of this name, for the default device of JAX."""
    recipe = WORKLOADS[name]()
    compile_only = name in COMPILE_ONLY and jax.default_backend() == "cpu"
    make = jax.eval_shape if compile_only else _call
    params, batch = make(recipe.arrays)
    return Workload(name, recipe.loss, params, batch, name in GPU_ONLY, compile_only)


def _call(make: Callable[[], tuple[Params, Batch]]) -> tuple[Params, Batch]:
    return make()


def _images(model: Model, *, side: int, channels: int, size: int) -> Recipe:
    """Classify random images of 10 classes."""

    def arrays() -> tuple[Params, Batch]:
        batch = _image_batch(side=side, channels=channels, classes=10, size=size)
        return model.init(_key(0), _first(batch)), batch

    return Recipe(classification(model), arrays)


def _vit(make: Callable[..., Model], *, dtype: str, size: int) -> Recipe:
    model = make(num_classes=10, image_size=224, **_LOW | {"dtype": dtype})
    return _images(model, side=224, channels=3, size=size)


def _gpt2_small(length: int, *, size: int) -> Recipe:
    model = gpt2_small(vocab_size=_GPT2_TOKENS, length=length, **_LOW)
    return _tokens(model, causal_lm(model), _GPT2_TOKENS, length=length, size=size)


def _roberta_large() -> Recipe:
    encoder = roberta_large(vocab_size=_ROBERTA_TOKENS, length=128, **_LOW)
    model = classifier(encoder=encoder, num_classes=2)
    loss = classification(model)
    return _tokens(model, loss, _ROBERTA_TOKENS, length=128, size=32)


def _tokens(
    model: Model, loss: Loss, vocabulary: int, *, length: int, size: int
) -> Recipe:
    """Random tokens, of random classes."""

    def arrays() -> tuple[Params, Batch]:
        batch = _batch(
            {
                "tokens": jax.random.randint(_key(2), (size, length), 0, vocabulary),
                "label": jax.random.randint(_key(3), (size,), 0, 2),
            }
        )
        return model.init(_key(0), _first(batch)), batch

    return Recipe(loss, arrays)


def _gpt(
    shape: Shape, *, size: int, tied: bool = False, stacked: bool = False
) -> Recipe:
    """Predict the next of random tokens."""

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        del key
        return gpt_loss(params, example["tokens"], heads=shape.heads)

    def arrays() -> tuple[Params, Batch]:
        params = init_gpt(_key(0), shape, tied=tied, stacked=stacked)
        return params, _token_batch(shape, size=size)

    return Recipe(loss, arrays)


def _lora_gpt() -> Recipe:
    """Train adapters only; the loss closes over the frozen parameters."""
    base = init_gpt(_key(0), _SMALL, tied=False)

    def loss(params: Params, example: Example, key: Key) -> Scalar:
        del key
        adapted = with_lora(base, params)
        return gpt_loss(adapted, example["tokens"], heads=_SMALL.heads)

    def arrays() -> tuple[Params, Batch]:
        return init_lora(_key(1), _SMALL), _token_batch(_SMALL, size=16)

    return Recipe(loss, arrays)


def _wrn(depth: int, width: int, *, dtype: str, size: int) -> Recipe:
    model = wide_resnet(
        depth=depth,
        width=width,
        num_classes=10,
        groups=16,
        weight_standardization=True,
        dtype=dtype,
    )
    return _images(model, side=32, channels=3, size=size)


def _mlp() -> Recipe:
    model = mlp(features=(512, 512), num_classes=10, activation="relu")
    return _images(model, side=28, channels=1, size=512)


def _convnet() -> Recipe:
    return _images(groupnorm_cnn(num_classes=10), side=32, channels=3, size=64)


def _image_batch(*, side: int, channels: int, classes: int, size: int) -> Batch:
    return _batch(
        {
            "image": jax.random.uniform(_key(2), (size, side, side, channels)) - 0.5,
            "label": jax.random.randint(_key(3), (size,), 0, classes),
        }
    )


def _token_batch(shape: Shape, *, size: int) -> Batch:
    # One more token than positions: the last one is only predicted.
    sizes = (size, shape.length + 1)
    return _batch({"tokens": jax.random.randint(_key(2), sizes, 0, shape.outputs)})


def _batch(examples: Example) -> Batch:
    size = len(jax.tree.leaves(examples)[0])
    return Batch(examples, jnp.ones(size, bool), jnp.arange(size))


def _first(batch: Batch) -> Example:
    return jax.tree.map(lambda x: x[0], batch.examples)


def _key(number: int) -> Key:
    return jax.random.key(number)


WORKLOADS: dict[str, Callable[[], Recipe]] = {
    "mlp": _mlp,
    "convnet": _convnet,
    "wrn16_1": functools.partial(_wrn, 16, 1, dtype="float32", size=16),
    "wrn16_4": functools.partial(_wrn, 16, 4, dtype="float32", size=16),
    "gpt": functools.partial(_gpt, _SMALL, size=16),
    "gpt_tied": functools.partial(_gpt, _SMALL, size=16, tied=True),
    "gpt_short": functools.partial(
        _gpt, dataclasses.replace(_SMALL, length=32), size=64
    ),
    "gpt_scan": functools.partial(_gpt, _SMALL, size=16, stacked=True),
    "lora_gpt": _lora_gpt,
    "vit_ti16": functools.partial(_vit, vit_ti16, dtype="float32", size=16),
    "gpt2_small_100": functools.partial(_gpt2_small, 100, size=64),
    "gpt2_small_1024": functools.partial(_gpt2_small, 1024, size=8),
    "vit_b16": functools.partial(_vit, vit_b16, dtype="bfloat16", size=64),
    "roberta_large": _roberta_large,
    "wrn28_10": functools.partial(_wrn, 28, 10, dtype="bfloat16", size=64),
}
