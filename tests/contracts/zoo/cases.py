"""What the losses of the zoo are written with."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

B = 4
BF16 = 2e-2  # tolerance where arithmetic is in bfloat16


class Case(NamedTuple):
    """A loss of one example, and what to expect of it.

    Attributes:
        loss: ``(params, example, key) -> scalar``.
        params: Pytree of floating arrays.
        examples: Pytree ``[B, ...]``.
        rules: Path of each parameter (``keystr``, "/" between) to its rule.
        tolerance: Relative, of sums and norms.
        dtype: Of the arithmetic.
        nonfinite: Rows whose gradient is not finite.
    """

    loss: Callable[[Any, Any, Any], Any]
    params: Any
    examples: Any
    rules: dict[str, str]
    tolerance: float = 1e-5
    dtype: str = "float32"
    nonfinite: tuple[int, ...] = ()


ZOO: dict[str, Callable[[], Case]] = {}


class P(NamedTuple):
    """A parameter to draw: normal, of this rule, shape, scale, shift and dtype."""

    rule: str
    shape: tuple[int, ...]
    scale: float = 0.5
    shift: float = 0.0
    dtype: Any = jnp.float32


def _kind(rule):
    return lambda *shape, **options: P(rule, shape, **options)


dense, conv, embedding, tied = map(_kind, ["dense", "conv", "embedding", "tied"])


elementwise, derived, fallback = map(_kind, ["elementwise", "derived", "fallback"])


dense_and_elementwise = _kind("dense+elementwise")
dense_and_number, conv_and_number, embedding_and_number = (
    _kind(f"{rule}+number") for rule in ("dense", "conv", "embedding")
)


frozen, unused = map(_kind, ["frozen", "unused"])


class X(NamedTuple):
    """Data to draw: normal, or whole numbers from ``low`` below ``high``."""

    shape: tuple[int, ...]
    low: int | None = None
    high: int | None = None
    dtype: Any = None
    scale: float = 1.0


def x(*shape, **options):
    return X(shape, **options)


def ids(high, *shape, low=0):
    return X(shape, low, high, jnp.int32)


def bits(*shape):
    return X(shape, 0, 2, jnp.bool_)


def register(build):
    """Put ``build(rng) -> Case`` in the zoo under its name."""
    name = build.__name__
    assert name not in ZOO, name
    ZOO[name] = lambda: build(np.random.default_rng(zlib.crc32(name.encode())))
    return build


def case(params, data, **options):
    """Put the decorated loss in the zoo, with these parameters and data."""

    def decorate(loss):
        def build(rng):
            return Case(
                loss,
                draw_params(rng, params),
                draw_data(rng, data),
                {
                    jax.tree_util.keystr(path, simple=True, separator="/"): p.rule
                    for path, p in jax.tree_util.tree_leaves_with_path(
                        params, is_leaf=_is_spec
                    )
                },
                **options,
            )

        build.__name__ = loss.__name__
        register(build)
        return loss

    return decorate


def _is_spec(leaf):
    return isinstance(leaf, P | X)


def draw_params(rng, spec):
    def draw(p):
        value = p.shift + p.scale * rng.normal(size=p.shape)
        return jnp.asarray(value, p.dtype)

    return jax.tree.map(draw, spec, is_leaf=_is_spec)


def draw_data(rng, spec):
    def draw(d):
        shape = (B, *d.shape)
        if d.high is None:
            return jnp.asarray(d.scale * rng.normal(size=shape), d.dtype or jnp.float32)
        return jnp.asarray(rng.integers(d.low, d.high, shape), d.dtype)

    return jax.tree.map(draw, spec, is_leaf=_is_spec)


def score(out):
    """Some smooth function of all outputs; in at least float32 whatever their dtype."""
    out = jnp.ravel(out)
    out = out.astype(jnp.float64 if out.dtype == jnp.float64 else jnp.float32)
    return jnp.sum(jnp.sin(out + 0.3)) + 0.1 * jnp.sum(jnp.square(out))


def entropy(logits, labels):
    """Summed cross entropy of ``labels[T]`` under ``logits[T, V]``."""
    log = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.take_along_axis(log, labels[:, None], axis=-1))


def convolve(
    data,
    kernel,
    stride=1,
    padding="SAME",
    *,
    numbers=("NHWC", "HWIO", "NHWC"),
    batched=False,
    **options,
):
    """Convolve one example, or a batch of views."""
    rank = kernel.ndim - 2
    strides = (stride,) * rank if isinstance(stride, int) else stride
    if rank == 1 and len(numbers[0]) == 4:
        numbers = ("NWC", "WIO", "NWC")
    out = jax.lax.conv_general_dilated(
        data if batched else data[None], kernel, strides, padding,
        dimension_numbers=numbers, **options,
    )  # fmt: skip
    return out if batched else out[0]


def named(name, build):
    build.__name__ = name
    register(build)
