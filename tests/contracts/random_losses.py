"""Random small losses over the primitives that the fast engines have rules for.

A loss is a list of steps on activations ``[T, D]``. Weights are views (reshapes, transposes,
slices) of parameters, new ones or, often, ones that earlier steps use already. Drawn data
determines the whole case; its ``repr`` lists the steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts.zoo.cases import B, Case, score

LENGTH = 6  # at most as many tokens, and as many ids in an example
WIDTH = 8  # at most as many features
VOCABULARY = 5


@dataclasses.dataclass(frozen=True)
class RandomLoss:
    """``loss(params, example, key)``; hashed by identity, as jit wants."""

    steps: list[tuple[str, Callable[[Any, Any, Any], Any]]]

    def __call__(self, params, example, key):
        del key
        hidden = example["x"]
        for _, step in self.steps:
            hidden = step(params, example, hidden)
        return score(hidden)

    def __repr__(self):
        return "RandomLoss(" + "; ".join(name for name, _ in self.steps) + ")"

    __hash__ = object.__hash__


class Weights:
    """The parameters so far, and views of them."""

    def __init__(self, draw):
        self.draw = draw
        self.shapes = {}

    def new(self, shape):
        name = f"p{len(self.shapes)}"
        self.shapes[name] = tuple(shape)
        return name

    def view(self, shape):
        """Draw how to get an array of ``shape``: (description, params -> array)."""
        shape, size = tuple(shape), int(np.prod(shape))
        old = [n for n, s in self.shapes.items() if np.prod(s) >= size]
        if not old or self.draw(st.integers(0, 2)) < 2:
            return self._of_a_new_one(shape)
        name = self.draw(st.sampled_from(old))
        stored = self.shapes[name]
        if stored == shape:
            return name, lambda p: p[name]
        if sorted(stored) == sorted(shape):
            order = _order(stored, shape)
            return f"{name}.T{order}", lambda p: jnp.transpose(p[name], order)
        extra = int(np.prod(stored)) - size
        start = self.draw(st.integers(0, extra))
        return (
            f"{name}.ravel()[{start}:][:{size}].reshape{shape}",
            lambda p: p[name].ravel()[start : start + size].reshape(shape),
        )

    def _of_a_new_one(self, shape):
        size = int(np.prod(shape))
        kind = self.draw(
            st.sampled_from(["plain", "plain", "T", "flat", "wide", "stack"])
        )
        if kind == "T":
            order = self.draw(st.permutations(range(len(shape))))
            stored = [0] * len(shape)
            for axis, where in enumerate(order):
                stored[where] = shape[axis]
            name = self.new(stored)
            return f"{name}.T{order}", lambda p: jnp.transpose(p[name], order)
        if kind == "flat":
            name = self.new((size,))
            return f"{name}.reshape{shape}", lambda p: p[name].reshape(shape)
        if kind == "wide":
            name = self.new((*shape[:-1], shape[-1] + 2))
            end = 1 + shape[-1]
            return f"{name}[..., 1:-1]", lambda p: p[name][..., 1:end]
        if kind == "stack":
            name = self.new((2, *shape))
            return f"{name}[1]", lambda p: p[name][1]
        name = self.new(shape)
        return f"{name}{shape}", lambda p: p[name]


def _order(stored, shape):
    """Return a permutation that takes ``stored`` to ``shape``."""
    left, order = list(range(len(stored))), []
    for size in shape:
        axis = next(a for a in left if stored[a] == size)
        left.remove(axis)
        order.append(axis)
    return tuple(order)


def dense(draw, weights, tokens, width):
    out = draw(st.integers(1, 5))
    left = draw(st.booleans())
    text, w = weights.view((out, width) if left else (width, out))
    if left:
        return f"({text} @ h.T).T", lambda p, e, h: (w(p) @ h.T).T
    return f"h @ {text}", lambda p, e, h: h @ w(p)


def einsum(draw, weights, tokens, width):
    """Some of the data's axes are contracted, some are batch axes, all in any order."""
    heads = draw(st.sampled_from([n for n in range(1, width + 1) if width % n == 0]))
    sizes = {"t": tokens, "h": heads, "k": width // heads, "n": draw(st.integers(1, 3))}
    shared = draw(st.sampled_from(["h", "k", "hk", "th", "tk", "thk"]))
    contracted = draw(st.sets(st.sampled_from(sorted(set(shared) - {"t"})), min_size=1))
    right = "".join(draw(st.permutations(shared + "n")))
    left = "".join(draw(st.permutations("thk")))
    kept = [a for a in "thkn" if a not in contracted]
    out = "".join(draw(st.permutations(kept)))
    terms = [left, right]
    swap = draw(st.booleans())
    equation = ",".join(reversed(terms) if swap else terms) + "->" + out
    text, w = weights.view([sizes[a] for a in right])

    def step(p, e, h):
        data = jnp.einsum(f"thk->{left}", h.reshape(tokens, heads, width // heads))
        pair = (w(p), data) if swap else (data, w(p))
        result = jnp.moveaxis(jnp.einsum(equation, *pair), out.index("t"), 0)
        return result.reshape(tokens, -1)

    return f"einsum({equation}, {text})", step


def convolution(draw, weights, tokens, width):
    """Over the tokens or, with the features split, over tokens and half the features."""
    rank = draw(st.integers(1, 2))
    halves = [n for n in range(1, width + 1) if width % n == 0]
    second = draw(st.sampled_from(halves)) if rank == 2 else 1
    spatial = (tokens, second)[:rank]
    channels = width // second
    kernel, strides, padding, lhs, rhs = [], [], [], [], []
    for size in spatial:
        kernel.append(draw(st.integers(1, 3)))
        strides.append(draw(st.integers(1, 2)))
        lhs.append(draw(st.integers(1, 2)))
        rhs.append(draw(st.integers(1, 2)))
        low, high = draw(st.integers(-1, 2)), draw(st.integers(-1, 2))
        room = (size - 1) * lhs[-1] + 1 + low + high
        reach = (kernel[-1] - 1) * rhs[-1] + 1
        padding.append((low, high + max(0, reach - room)))
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4) if channels % n == 0]))
    out = groups * draw(st.integers(1, 2))
    letters = "HW"[:rank]
    data_spec = "".join(draw(st.permutations("N" + letters + "C")))
    kernel_spec = "".join(draw(st.permutations(letters + "IO")))
    out_spec = "".join(draw(st.permutations("N" + letters + "C")))
    numbers = (data_spec, kernel_spec, out_spec)
    of_kernel = dict(
        zip(letters + "IO", [*kernel, channels // groups, out], strict=True)
    )
    text, w = weights.view([of_kernel[a] for a in kernel_spec])
    plain = "N" + letters + "C"
    # The options are in the order of the kernel's axes.
    order = [letters.index(a) for a in kernel_spec if a in letters]
    strides, padding = [strides[i] for i in order], [padding[i] for i in order]
    lhs, rhs = [lhs[i] for i in order], [rhs[i] for i in order]

    def step(p, e, h):
        image = h.reshape(1, *spatial, channels)
        result = jax.lax.conv_general_dilated(
            jnp.einsum(f"{plain}->{data_spec}", image), w(p), strides, padding,
            lhs_dilation=lhs, rhs_dilation=rhs, dimension_numbers=numbers,
            feature_group_count=groups,
        )  # fmt: skip
        result = jnp.einsum(f"{out_spec}->{plain}", result)[0]
        return result.reshape(result.shape[0], -1)

    options = f"{text}, {strides}, {padding}, {lhs}, {rhs}, {numbers}, groups={groups}"
    return f"conv({options})", step


def lookup(draw, weights, tokens, width):
    text, w = weights.view((VOCABULARY, width))
    mode = draw(st.sampled_from(["clip", "fill", "index", "one_hot"]))
    shift = draw(st.integers(0, 2))

    def step(p, e, h):
        ids = e["ids"][:tokens]
        if mode == "index":
            rows = w(p)[ids % VOCABULARY]
        elif mode == "one_hot":
            rows = jax.nn.one_hot(ids, VOCABULARY) @ w(p)
        else:
            rows = jnp.take(w(p), ids + shift, axis=0, mode=mode, fill_value=0.25)
        return h + rows

    return f"h + lookup({text}, {mode}, {shift})", step


def logits(draw, weights, tokens, width):
    text, w = weights.view((VOCABULARY, width))
    return f"h @ {text}.T", lambda p, e, h: h @ w(p).T


def scale(draw, weights, tokens, width):
    text, w = weights.view((width,))
    return f"h * {text}", lambda p, e, h: h * w(p)[None]


def bias(draw, weights, tokens, width):
    text, w = weights.view((width,))
    return f"h + {text}", lambda p, e, h: h + w(p)[None]


def layers(draw, weights, tokens, width):
    """A scan over a stack, perhaps with a weight that all layers share."""
    length = draw(st.integers(1, 3))
    text, w = weights.view((length, width, width))
    shared = weights.view((width, width)) if draw(st.booleans()) else None
    options = {"reverse": draw(st.booleans()), "unroll": draw(st.integers(1, 2))}
    remat = draw(st.booleans())

    def step(p, e, h):
        def body(hidden, layer):
            out = jnp.tanh(hidden @ layer)
            return (out + hidden @ shared[1](p) if shared else out), None

        body = jax.checkpoint(body) if remat else body
        return jax.lax.scan(body, h, w(p), **options)[0]

    also = f" and {shared[0]}" if shared else ""
    return f"layers({text}{also}, remat={remat}, {options})", step


def recurrence(draw, weights, tokens, width):
    """A scan over tokens, its weight shared by them."""
    text, w = weights.view((width, width))
    reverse = draw(st.booleans())

    def step(p, e, h):
        def body(state, token):
            state = jnp.tanh(token + state @ w(p))
            return state, state

        return jax.lax.scan(body, jnp.zeros(width), h, reverse=reverse)[1]

    return f"recurrence({text}, reverse={reverse})", step


def attention(draw, weights, tokens, width):
    text, w = weights.view((width, width))

    def step(p, e, h):
        return h + jax.nn.softmax((h @ w(p)) @ h.T) @ h

    return f"attention({text})", step


STEPS = [
    dense,
    dense,
    einsum,
    einsum,
    convolution,
    convolution,
    lookup,
    logits,
    scale,
    bias,
    layers,
    recurrence,
    attention,
]


def _tame(step, activation, *, remat):
    """Apply the step, an activation, and cut what grew beyond the limits."""

    def tamed(p, e, h):
        out = activation(step(p, e, h)[:LENGTH, :WIDTH])
        # Sums over many features would leave the range in which float32 agrees to 1e-5.
        return 2 * jnp.sin(out / 2)

    return jax.checkpoint(tamed) if remat else tamed


@st.composite
def random_loss(draw, max_steps=5):
    """Draw a ``Case``; its rules are unknown, and left empty."""
    tokens, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    weights = Weights(draw)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    examples = {
        "x": jnp.asarray(rng.normal(size=(B, tokens, width)), jnp.float32),
        "ids": jnp.asarray(rng.integers(0, VOCABULARY, (B, LENGTH)), jnp.int32),
    }
    steps = []
    for _ in range(draw(st.integers(2, max_steps))):
        name, step = draw(st.sampled_from(STEPS))(draw, weights, tokens, width)
        activation = draw(st.sampled_from([jnp.tanh, jnp.tanh, jax.nn.relu, jnp.copy]))
        remat = draw(st.integers(0, 3)) == 3
        step = _tame(step, activation, remat=remat)
        shapes = {
            n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in weights.shapes.items()
        }
        one = jax.tree.map(lambda a: a[0], examples)
        hidden = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
        tokens, width = jax.eval_shape(step, shapes, one, hidden).shape
        steps.append((f"{activation.__name__}({name})" + " remat" * remat, step))
    params = {
        n: jnp.asarray(0.5 * rng.normal(size=s), jnp.float32)
        for n, s in weights.shapes.items()
    }
    return Case(RandomLoss(steps), params, examples, {}, tolerance=5e-5)
