"""Data that are whole numbers, or nothing at all, in every engine and query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.clipping import Query, auto, bookkeeping, ghost, microbatched, vmap
from tests.checks import batch_of, check_engine_contract
from tests.contracts.zoo.cases import convolve, score

KEY = jax.random.key(0)
all_engines = pytest.mark.parametrize(
    "engine",
    [vmap, bookkeeping, ghost, auto, microbatched(auto, size=2)],
    ids=["vmap", "bookkeeping", "ghost", "auto", "microbatched"],
)


def bits_and_bytes(p, e, key):
    """A weight meets bits from the one side and bytes from the other."""
    del key
    return score(e["bits"] @ p["w"]) + score(e["bytes"] @ p["w"].T / 50)


def nothing(p, e, key):
    """Tokens, rows of a table and channels without any width, and an empty image."""
    del key
    out = score(e["x"] @ p["w"]) + score(p["table"][e["ids"]]) + score(p["s"] * e["y"])
    out += score(convolve(e["x"][None], p["k"][..., 0]))
    scaled = p["depthwise"] * (1 + jnp.sum(e["y"]))  # An own kernel for each example.
    padding = [(1, 2), (0, 0)]
    image = convolve(e["image"], scaled, padding=padding, feature_group_count=2)
    return out + score(image)


def drawn():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    whole = {
        "bits": jnp.asarray(rng.integers(0, 2, (4, 5, 3)), bool),
        "bytes": jnp.asarray(rng.integers(-100, 100, (4, 5, 3)), jnp.int8),
    }
    empty = {
        "x": normal(4, 5, 0),
        "y": normal(4, 3),
        "ids": jnp.asarray(rng.integers(0, 7, (4, 6))),
        "image": normal(4, 0, 5, 2),
    }
    params = {
        "w": normal(0, 3),
        "table": normal(7, 0),
        "s": normal(3),
        "k": normal(1, 1, 0, 2, 1),
        "depthwise": normal(2, 2, 1, 2),
    }
    return {
        "whole": (bits_and_bytes, {"w": normal(3, 3)}, whole),
        "nothing": (nothing, params, empty),
    }


@all_engines
@pytest.mark.parametrize("name", ["whole", "nothing"])
@pytest.mark.parametrize("points", [1, 2])
def test_engine_equals_the_reference(engine, name, points):
    loss, params, examples = drawn()[name]
    other = jax.tree.map(lambda p: p + 0.1 * jnp.cos(p), params)
    query = Query((params, other)[:points], clip_norm=0.3, signs=(1.0, -1.0)[:points])
    batch = batch_of(examples, mask=[True, True, False, True])
    check_engine_contract(engine, loss, query, batch, KEY)
